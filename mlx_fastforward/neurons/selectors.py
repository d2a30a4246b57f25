"""Which neurons a block keeps. Every selector scores neurons; the engine takes the top K.

Notation: M blocks (batch rows times blocks per row) of N tokens, hidden size d, f neurons.
"""

from dataclasses import dataclass, field
from typing import Optional, Sequence

import mlx.core as mx

from ..model.ffn import GatedFFN
from .predictor import PREDICTED, PredictorWeights, parts


@dataclass
class SelectorInputs:
    """What a layer knows about a call before it picks neurons.

    The dense tokens of a row are its head, its probes and its tail, T in all; they have already run.

    Args:
        blocks: FFN inputs of the sparse blocks (M, N, d); blocks of one row are neighbours.
        dense: FFN inputs of the dense tokens (batch, T, d); None where nobody asks for them.
        z: Their activations (batch, T, f); likewise.
        head: How many of the dense tokens are the head.
        valid: 1 for real tokens and 0 for padding, (M, N) for blocks and (batch, T) for dense
            tokens, or None where all are real.
        memory: Kept with the KV cache between the calls of one prompt; for this layer.
    """

    blocks: mx.array
    dense: Optional[mx.array] = None
    z: Optional[mx.array] = None
    head: int = 0
    valid: Optional[tuple[mx.array, mx.array]] = None
    memory: dict[str, mx.array] = field(default_factory=dict)


class Selector:
    """Scores neurons. A new selector is a name, ``score`` and ``flops``.

    name: as in --selector.
    probe_every > 0: one in so many tokens of a block runs densely beforehand.
    remembers: decode steps need what the prompt left in ``SelectorInputs.memory``.
    """

    name = ""
    probe_every = 0
    remembers = False

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        """Scores (M, f), larger is more wanted."""
        raise NotImplementedError

    def flops(self, layer: int, block: int, dense: int, d: int, f: int) -> float:
        """FLOPs to score one block in a row with ``dense`` dense tokens, FFN not counted."""
        raise NotImplementedError

    def unit(self, block: int) -> int:
        """What the lengths of blocks of about this many tokens have to be multiples of."""
        return 1


def neuron_scores(
    z: mx.array, ffn: GatedFFN, valid: Optional[mx.array] = None
) -> mx.array:
    """||z_j|| * ||w_down_j||: what neuron j alone can add to a block's output.

    Args:
        z: Activations (..., tokens, f).
        valid: (..., tokens), 0 hides a token.
    """
    z = z.astype(mx.float32)
    if valid is not None:
        z = z * valid[..., None]
    return mx.sqrt(mx.sum(mx.square(z), axis=-2)) * ffn.down_norms()


def unit_rows(x: mx.array) -> mx.array:
    """Rows scaled to norm 1; the fused norm accumulates in float32 whatever the dtype."""
    return mx.fast.rms_norm(x, None, 1e-12) * x.shape[-1] ** -0.5


def at_least_one(valid: mx.array) -> mx.array:
    """A mask (M, N) in which a block of nothing but padding counts as real."""
    return mx.maximum(valid, 1 - mx.max(valid, axis=-1, keepdims=True))


def top_neurons(scores: mx.array, keep: int) -> mx.array:
    """The ``keep`` best neurons of each block in ascending order. (M, f) -> (M, K).

    Ascending, so that the gathers walk memory forwards.
    """
    best = mx.argpartition(-scores, keep - 1, axis=-1)[..., :keep]
    return mx.sort(best, axis=-1)


class Probe(Selector):
    """Training-free: tokens that run densely anyway vote for the tokens that resemble them.

    Evenly spaced probe tokens of each block run densely, in one GEMM with head and tail, and keep
    their exact outputs. A neuron's energy z^2 at any other token t is estimated by kernel
    regression over the row's dense tokens i, with weights softmax_i(32 cos(x_t, x_i)). Its energy
    in a block is the sum over a sample of the block's tokens (every fourth, from the second on),
    so a dense token counts as often as it has look-alikes in the block.
    """

    name = "probe"
    probe_every = 8
    sharpness = 32.0
    sample = 4

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        assert inputs.dense is not None and inputs.z is not None
        m, _, d = inputs.blocks.shape
        batch = len(inputs.dense)
        x = inputs.blocks[:, 1 :: self.sample].reshape(batch, -1, d)
        likeness = unit_rows(x) @ unit_rows(inputs.dense).swapaxes(-1, -2)
        likeness = self.sharpness * likeness.astype(mx.float32)
        if inputs.valid is not None:
            likeness = mx.where(inputs.valid[1][:, None] > 0, likeness, -1e9)
        votes = mx.softmax(likeness, axis=-1)
        if inputs.valid is not None:
            real = at_least_one(inputs.valid[0][:, 1 :: self.sample])
            votes = votes * real.reshape(batch, -1, 1)
        votes = votes.reshape(batch, m // batch, -1, votes.shape[-1]).sum(axis=2)
        energy = votes @ mx.square(inputs.z.astype(mx.float32))
        return mx.sqrt(energy).reshape(m, -1) * ffn.down_norms()

    def flops(self, layer: int, block: int, dense: int, d: int, f: int) -> float:
        return 2.0 * (block / self.sample) * dense * d + 2.0 * dense * f

    def unit(self, block: int) -> int:
        return self.probe_every


class FirstBlock(Selector):
    """GRIFFIN: the neurons of the first block serve the whole prompt."""

    name = "first-block"
    remembers = True

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        assert inputs.dense is not None
        m, batch = len(inputs.blocks), len(inputs.dense)
        scores = inputs.memory.get("scores")
        if inputs.head or scores is None or len(scores) != batch:
            scores = neuron_scores(*self._first(ffn, inputs, batch))
            inputs.memory["scores"] = scores
        return mx.repeat(scores, m // batch, axis=0)

    def _first(
        self, ffn: GatedFFN, inputs: SelectorInputs, batch: int
    ) -> tuple[mx.array, GatedFFN, Optional[mx.array]]:
        """Activations of the head, or of the first sparse block, and its padding mask."""
        valid = inputs.valid
        if inputs.head:
            assert inputs.z is not None
            head = slice(inputs.head)
            return inputs.z[:, head], ffn, None if valid is None else valid[1][:, head]
        _, n, d = inputs.blocks.shape
        first = inputs.blocks.reshape(batch, -1, n, d)[:, 0]
        mask = None if valid is None else valid[0].reshape(batch, -1, n)[:, 0]
        return ffn.activations(first), ffn, mask

    def flops(self, layer: int, block: int, dense: int, d: int, f: int) -> float:
        return 0.0


class Oracle(Selector):
    """The dense FFN first, then the best neurons of the block. Saves nothing: for measuring."""

    name = "oracle"

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        valid = None if inputs.valid is None else inputs.valid[0]
        return neuron_scores(ffn.activations(inputs.blocks), ffn, valid)

    def flops(self, layer: int, block: int, dense: int, d: int, f: int) -> float:
        return 4.0 * block * d * f


class Trained(Selector):
    """The predictor file's predictors, one set of weights per layer.

    A block of more than 128 tokens is predicted in parts, and a neuron's score is its best one: what
    only one part needs, a planted fact, is not outvoted by the others.
    """

    name = "trained"

    def __init__(self, layers: Sequence[PredictorWeights]):
        self.layers = layers

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        w = self.layers[layer]
        m, n, d = inputs.blocks.shape
        cut = parts(n)
        x = inputs.blocks.astype(w.w1.dtype).reshape(m * cut, n // cut, d)
        if inputs.valid is None:
            return mx.max(w(x).reshape(m, cut, -1), axis=1)
        valid = inputs.valid[0].reshape(m * cut, n // cut)
        scores = w(x, at_least_one(valid))
        real = mx.max(valid, axis=-1, keepdims=True) > 0
        return mx.max(mx.where(real, scores, -mx.inf).reshape(m, cut, -1), axis=1)

    def flops(self, layer: int, block: int, dense: int, d: int, f: int) -> float:
        cut = parts(block)
        return cut * self.layers[layer].flops(block // cut, d, f)

    def unit(self, block: int) -> int:
        return max(1, round(block / PREDICTED))
