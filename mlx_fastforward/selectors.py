"""Which neurons a block keeps. Every selector scores neurons; the engine takes the top K.

Notation: M blocks (batch rows times blocks per row) of N tokens, hidden size d, f neurons.
"""

import math
from dataclasses import dataclass, field
from typing import Optional, Protocol, Sequence

import mlx.core as mx

from .ffn import GatedFFN


@dataclass
class Seen:
    """What a layer knows about a call before it picks neurons.

    The dense tokens of a row are its head, its probes and its tail, T in all.

    Args:
        blocks: FFN inputs of the sparse blocks (M, N, d); blocks of one row are neighbours.
        x: FFN inputs of the dense tokens (batch, T, d).
        z: Their activations (batch, T, f).
        head: How many of the dense tokens are the head.
        valid: 1 for real tokens and 0 for padding, (M, N) for blocks and (batch, T) for dense
            tokens, or None where all are real.
        memory: Kept with the KV cache between the calls of one prompt; for this layer.
    """

    blocks: mx.array
    x: mx.array
    z: mx.array
    head: int = 0
    valid: Optional[tuple[mx.array, mx.array]] = None
    memory: dict[str, mx.array] = field(default_factory=dict)


class Selector(Protocol):
    """What the engine asks of a selector.

    name: as in --selector.
    probe_every > 0: run every so-manieth token of a block densely beforehand.
    remembers: decode steps need what the prompt left in ``Seen.memory``.
    """

    name: str
    probe_every: int
    remembers: bool

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        """Scores (M, f), larger is more wanted."""
        ...

    def unit(self, block: int) -> int:
        """What the lengths of blocks of about this many tokens have to be multiples of."""
        ...

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        """FLOPs to score one block in a row with ``dense`` dense tokens, FFN not counted."""
        ...


def neuron_scores(
    z: mx.array, ffn: GatedFFN, score: str, valid: Optional[mx.array] = None
) -> mx.array:
    """Score neurons by their activations over the tokens of a block.

    "weighted": ||z_j|| * ||w_down_j||, what neuron j alone can add to the output.
    "griffin": norm over tokens of z normalised per token (GRIFFIN's statistic).

    Args:
        z: Activations (..., tokens, f).
        valid: (..., tokens), 0 hides a token.
    """
    z = z.astype(mx.float32)
    if score == "griffin":
        z = unit_rows(z)
    if valid is not None:
        z = z * valid[..., None]
    norms = mx.sqrt(mx.sum(mx.square(z), axis=-2))
    return norms * ffn.down_norms() if score == "weighted" else norms


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


class Probe:
    """Training-free: tokens that run densely anyway vote for the tokens that resemble them.

    Evenly spaced probe tokens of each block run densely, in one GEMM with head and tail, and keep
    their exact outputs. A neuron's energy z^2 at any other token t is estimated by kernel
    regression over the row's dense tokens i, with weights softmax_i(32 cos(x_t, x_i)). Its energy
    in a block is the sum over a sample of the block's tokens (every fourth, from the second on),
    so a dense token counts as often as it has look-alikes in the block.
    """

    name = "probe"
    sharpness = 32.0
    sample = 4
    remembers = False

    def __init__(self, score: str, probe_every: int):
        self.score = score
        self.probe_every = probe_every

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        m, _, d = seen.blocks.shape
        batch = len(seen.x)
        x = seen.blocks[:, 1 :: self.sample].reshape(batch, -1, d)
        likeness = unit_rows(x) @ unit_rows(seen.x).swapaxes(-1, -2)
        likeness = self.sharpness * likeness.astype(mx.float32)
        if seen.valid is not None:
            likeness = mx.where(seen.valid[1][:, None] > 0, likeness, -1e9)
        votes = mx.softmax(likeness, axis=-1)
        if seen.valid is not None:
            real = at_least_one(seen.valid[0][:, 1 :: self.sample])
            votes = votes * real.reshape(batch, -1, 1)
        votes = votes.reshape(batch, m // batch, -1, votes.shape[-1]).sum(axis=2)
        z = seen.z.astype(mx.float32)
        if self.score == "griffin":
            z = unit_rows(z)
        norms = mx.sqrt(votes @ mx.square(z)).reshape(m, -1)
        return norms * ffn.down_norms() if self.score == "weighted" else norms

    def unit(self, block: int) -> int:
        return self.probe_every

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        return 2.0 * (block / self.sample) * dense * d + 2.0 * dense * f


class FirstBlock:
    """GRIFFIN: the neurons of the first block serve the whole prompt."""

    name = "first-block"
    probe_every = 0
    remembers = True

    def __init__(self, score: str):
        self.score = score

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        m, batch = len(seen.blocks), len(seen.x)
        scores = seen.memory.get("scores")
        if seen.head or scores is None or len(scores) != batch:
            z, valid = self._first(ffn, seen)
            scores = neuron_scores(z, ffn, self.score, valid)
            seen.memory["scores"] = scores
        return mx.repeat(scores, m // batch, axis=0)

    def _first(self, ffn: GatedFFN, seen: Seen) -> tuple[mx.array, Optional[mx.array]]:
        """Activations of the head, or of the first sparse block, and its padding mask."""
        if seen.head:
            valid = None if seen.valid is None else seen.valid[1][:, : seen.head]
            return seen.z[:, : seen.head], valid
        _, n, d = seen.blocks.shape
        batch = len(seen.x)
        valid = (
            None if seen.valid is None else seen.valid[0].reshape(batch, -1, n)[:, 0]
        )
        return ffn.activations(seen.blocks.reshape(batch, -1, n, d)[:, 0]), valid

    def unit(self, block: int) -> int:
        return 1

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        return 0.0


class Oracle:
    """The dense FFN first, then the best neurons of the block. Saves nothing: for measuring."""

    name = "oracle"
    probe_every = 0
    remembers = False

    def __init__(self, score: str):
        self.score = score

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        z = ffn.activations(seen.blocks)
        valid = None if seen.valid is None else seen.valid[0]
        return neuron_scores(z, ffn, self.score, valid)

    def unit(self, block: int) -> int:
        return 1

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        return 4.0 * block * d * f


QUANTIZATION_BITS = (4, 8)


def group_size(f: int) -> int:
    """Neurons that share a scale in a quantised w2; 0 where f allows none."""
    return next((g for g in (64, 32) if f % g == 0), 0)


@dataclass(frozen=True)
class PredictorWeights:
    """One layer's expert predictor.

    Pooled, the paper's (eq. 12-13): query (d,), w1 (d, r), w2 (r, f). Token-wise, without a query:
    w1 (d, r), w2 (2r, f), bias (f,). With ``bits`` w2 is packed along the neurons, and has scales
    and biases.
    """

    query: Optional[mx.array]
    w1: mx.array
    w2: mx.array
    scales: Optional[mx.array] = None
    biases: Optional[mx.array] = None
    bits: int = 0
    bias: Optional[mx.array] = None

    def __call__(self, x: mx.array, valid: Optional[mx.array] = None) -> mx.array:
        """Scores of all neurons. x: (M, N, d), valid: (M, N), 0 hides a token -> (M, f)."""
        if self.query is None:
            hidden = token_features(mx.maximum(x @ self.w1, 0), valid)
        else:
            hidden = mx.maximum(self._pooled(x, valid) @ self.w1, 0)
        scores = self._matmul(hidden)
        return scores if self.bias is None else scores + self.bias

    def _pooled(self, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        """softmax(q X^T / sqrt(d)) X (eq. 12)."""
        assert self.query is not None
        logits = (x @ self.query) / math.sqrt(x.shape[-1])
        if valid is not None:
            logits = mx.where(valid > 0, logits, -mx.inf)
        attention = mx.softmax(logits, axis=-1, precise=True)
        return (attention[:, None, :] @ x)[:, 0]

    def _matmul(self, hidden: mx.array) -> mx.array:
        hidden = hidden.astype(self.w1.dtype)
        if not self.bits:
            return hidden @ self.w2
        assert self.scales is not None
        return mx.quantized_matmul(
            hidden,
            self.w2,
            scales=self.scales,
            biases=self.biases,
            transpose=False,
            group_size=self.w2.shape[1] * 32 // self.bits // self.scales.shape[1],
            bits=self.bits,
        )

    def flops(self, block: int, d: int, f: int) -> float:
        r = self.w1.shape[1]
        if self.query is None:
            return 2.0 * block * d * r + 4.0 * r * f
        return 4.0 * block * d + 2.0 * r * (d + f)


def token_features(h: mx.array, valid: Optional[mx.array] = None) -> mx.array:
    """Mean and root mean square of hidden units over a block's tokens. (..., N, r) -> (..., 2r).

    Neurons fire on single tokens: pooling after the non-linearity keeps what an average of the
    inputs loses.
    """
    h = h.astype(mx.float32)
    if valid is None:
        mean, square = mx.mean(h, axis=-2), mx.mean(mx.square(h), axis=-2)
    else:
        share = (valid / mx.sum(valid, axis=-1, keepdims=True))[..., None]
        mean, square = mx.sum(h * share, axis=-2), mx.sum(mx.square(h) * share, axis=-2)
    return mx.concatenate([mean, mx.sqrt(square + 1e-6)], axis=-1)


PREDICTED = 128  # tokens that a predictor looks at together


def parts(block: int) -> int:
    """Into how many equal parts of about 128 tokens a block is cut for the predictor."""
    divisors = [p for p in range(1, 2 + 2 * block // PREDICTED) if block % p == 0]
    return min(divisors, key=lambda p: abs(math.log(block / p / PREDICTED)))


class Trained:
    """The adapter's predictor, one set of weights per layer.

    A block of more than 128 tokens is predicted in parts, and a neuron's score is its best one: what
    only one part needs, a planted fact, is not outvoted by the others.
    """

    name = "trained"
    probe_every = 0
    remembers = False

    def __init__(self, layers: Sequence[PredictorWeights]):
        self.layers = layers

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        w = self.layers[layer]
        m, n, d = seen.blocks.shape
        cut = parts(n)
        x = seen.blocks.astype(w.w1.dtype).reshape(m * cut, n // cut, d)
        if seen.valid is None:
            return mx.max(w(x).reshape(m, cut, -1), axis=1)
        valid = seen.valid[0].reshape(m * cut, n // cut)
        scores = w(x, at_least_one(valid))
        real = mx.max(valid, axis=-1, keepdims=True) > 0
        return mx.max(mx.where(real, scores, -mx.inf).reshape(m, cut, -1), axis=1)

    def unit(self, block: int) -> int:
        return max(1, round(block / PREDICTED))

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        cut = parts(block)
        total = sum(w.flops(block // cut, d, f) for w in self.layers)
        return cut * total / len(self.layers)
