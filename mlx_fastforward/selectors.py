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

    Args:
        blocks: FFN inputs of the sparse blocks (M, N, d).
        batch: Rows of the call; blocks of one row are neighbours in ``blocks``.
        head: Activations of the dense head (batch, N, f), where there is one.
        probes: Activations of the probe tokens (M, N / probe_every, f), where there are any.
        valid: 1 for real tokens and 0 for padding (M, N), or None where all are real.
        memory: Kept with the KV cache between the calls of one prompt; for this layer.
    """

    blocks: mx.array
    batch: int = 1
    head: Optional[mx.array] = None
    probes: Optional[mx.array] = None
    valid: Optional[mx.array] = None
    memory: dict[str, mx.array] = field(default_factory=dict)


class Selector(Protocol):
    """probe_every > 0 asks the engine to run every so-manieth token densely beforehand."""

    probe_every: int

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        """Scores (M, f), larger is more wanted."""
        ...

    def flops(self, block: int, d: int, f: int) -> float:
        """FLOPs for one block beyond those of the dense and sparse FFN themselves."""
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
        z = z * mx.rsqrt(mx.sum(mx.square(z), axis=-1, keepdims=True) + 1e-12)
    if valid is not None:
        z = z * valid[..., None]
    norms = mx.sqrt(mx.sum(mx.square(z), axis=-2))
    return norms * ffn.down_norms() if score == "weighted" else norms


def top_neurons(scores: mx.array, keep: int) -> mx.array:
    """The ``keep`` best neurons of each block in ascending order. (M, f) -> (M, K).

    Ascending, so that the gathers walk memory forwards.
    """
    best = mx.argpartition(-scores, keep - 1, axis=-1)[..., :keep]
    return mx.sort(best, axis=-1)


class Probe:
    """Training-free: evenly spaced tokens of each block run densely and vote.

    The probes of all blocks go through one GEMM together with the dense head and tail, and their
    exact outputs are kept, so a probe costs less than the sparse FFN on top would.
    """

    def __init__(self, score: str, probe_every: int):
        self.score = score
        self.probe_every = probe_every

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        assert seen.probes is not None
        valid = seen.valid
        if valid is not None:
            valid = valid[:, :: self.probe_every]
        return neuron_scores(seen.probes, ffn, self.score, valid)

    def flops(self, block: int, d: int, f: int) -> float:
        return 0.0


class FirstBlock:
    """GRIFFIN: the neurons of the first block serve the whole prompt."""

    probe_every = 0

    def __init__(self, score: str):
        self.score = score

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        if seen.head is not None:
            seen.memory["scores"] = neuron_scores(seen.head, ffn, self.score)
        elif "scores" not in seen.memory:
            m, n, d = seen.blocks.shape
            first = seen.blocks.reshape(seen.batch, m // seen.batch, n, d)[:, 0]
            z = ffn.activations(first)
            seen.memory["scores"] = neuron_scores(z, ffn, self.score)
        scores = seen.memory["scores"]
        return mx.repeat(scores, len(seen.blocks) // len(scores), axis=0)

    def flops(self, block: int, d: int, f: int) -> float:
        return 0.0


class Oracle:
    """The dense FFN first, then the best neurons of the block. Saves nothing: for measuring."""

    probe_every = 0

    def __init__(self, score: str):
        self.score = score

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        z = ffn.activations(seen.blocks)
        return neuron_scores(z, ffn, self.score, seen.valid)

    def flops(self, block: int, d: int, f: int) -> float:
        return 4.0 * block * d * f


@dataclass(frozen=True)
class PredictorWeights:
    """One layer's expert predictor: query (d,), w1 (d, r), w2 (r, f)."""

    query: mx.array
    w1: mx.array
    w2: mx.array


class Trained:
    """The paper's expert predictor (eq. 12-13), one set of weights per layer."""

    probe_every = 0

    def __init__(self, layers: Sequence[PredictorWeights]):
        self.layers = layers

    def __call__(self, layer: int, ffn: GatedFFN, seen: Seen) -> mx.array:
        w = self.layers[layer]
        x = seen.blocks.astype(w.query.dtype)
        logits = (x @ w.query) / math.sqrt(x.shape[-1])
        if seen.valid is not None:
            logits = mx.where(seen.valid > 0, logits, -mx.inf)
        attention = mx.softmax(logits, axis=-1, precise=True)
        pooled = (attention[:, None, :] @ x)[:, 0]
        return mx.maximum(pooled @ w.w1, 0) @ w.w2

    def flops(self, block: int, d: int, f: int) -> float:
        r = self.layers[0].w1.shape[1]
        return 4.0 * block * d + 2.0 * r * (d + f)
