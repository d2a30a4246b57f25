"""Which tokens of a prompt are read at all: scored by attention, kept in chunks (arXiv 2502.02789)."""

from dataclasses import dataclass
from typing import Sequence

import mlx.core as mx
import numpy as np

from ..errors import ConfigError

LOW_KEEP = 0.3  # below it, ports of the method lost most planted facts


@dataclass(frozen=True)
class KeepConfig:
    """What a speculative prefill keeps; raises ConfigError on impossible values.

    Args:
        keep: Share of the new prompt tokens that is read, 0 < keep <= 1; 1 reads all.
        threshold: Shorter prompts are read whole.
        look_ahead: Tokens that the draft says, and whose attention counts.
        pool: Width of the average over neighbouring tokens, odd.
        chunk: Tokens that stay or go together.
        sinks: First tokens of a conversation that always stay, a sixteenth of it at most.
        tail: Last tokens that always stay, an eighth of the new ones at most: a short prompt is not all
            head and tail.
    """

    keep: float = 0.5
    threshold: int = 8192
    look_ahead: int = 8
    pool: int = 13
    chunk: int = 32
    sinks: int = 256
    tail: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(
                f"keep must be above 0 and at most 1, got {self.keep}; 0.5 reads half of a prompt."
            )
        for name in ("threshold", "pool", "chunk", "tail"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )


def weights(
    queries: mx.array, keys: mx.array, scale: float, places: Sequence[int]
) -> mx.array:
    """Attention (heads, queries, keys) in float32.

    queries: (heads, Q, d), at ``places``; keys: (KV heads, K, d), of the prompt from its start.
    """
    q, k = queries.astype(mx.float32), keys.astype(mx.float32)
    heads, count, d = q.shape
    q = q.reshape(k.shape[0], -1, d)
    scores = (q @ k.swapaxes(-1, -2) * scale).reshape(heads, count, -1)
    seen = mx.arange(k.shape[1])[None] <= mx.array(list(places))[:, None]
    return mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1)


def pooled(x: mx.array, width: int) -> mx.array:
    """The mean over ``width`` neighbours along the last axis; beyond the ends there is nothing."""
    left = width // 2
    padded = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, width - 1 - left)])
    n = x.shape[-1]
    return sum((padded[..., i : i + n] for i in range(width)), mx.zeros(())) / width


def importance(layers: Sequence[mx.array], width: int) -> np.ndarray:
    """A score per key: pooled, the maximum over layers and heads, the mean over queries.

    layers: (heads, queries, keys) each.
    """
    most = None
    for x in layers:
        now = mx.max(pooled(x, width), axis=0)
        most = now if most is None else mx.maximum(most, now)
        mx.eval(most)
    assert most is not None
    return np.array(mx.mean(most, axis=0))


def kept_places(
    scores: np.ndarray, start: int, config: KeepConfig, protect: int = 0
) -> np.ndarray:
    """Places of the prompt tokens that are read, increasing.

    scores: (new tokens,), of the places from ``start`` on. The first ``protect`` places stay, too.
    """
    new = scores.size
    stop = start + new
    sinks = max(protect, min(config.sinks, stop // 16))
    first = min(max(start, sinks), stop)
    last = max(first, stop - max(1, min(config.tail, new // 8)))
    stays = np.zeros(new, bool)
    stays[: first - start] = stays[last - start :] = True
    budget = round(config.keep * new) - int(stays.sum())
    edges = np.arange(first, last, config.chunk) - start
    if budget >= config.chunk and edges.size:
        sizes = np.diff(np.append(edges, last - start))
        means = np.add.reduceat(scores[: last - start], edges) / sizes
        for i in np.argsort(-means, kind="stable")[: budget // config.chunk]:
            stays[edges[i] : edges[i] + sizes[i]] = True
    return np.flatnonzero(stays) + start
