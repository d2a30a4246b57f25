"""Layer importances (eq. 23): attention mass on keys outside the first block."""

from typing import Any, Iterable

import mlx.core as mx
import mlx.nn as nn

from ..attachment import watched_attention
from ..model.attention import Attention
from ..model.proof import reach

ROWS = 256  # queries at a time: all of them against all keys would not fit


def importances(
    model: nn.Module, sequences: Iterable[mx.array], block: int
) -> list[float]:
    """s_l of every FFN's layer, mean over heads, queries outside the first block, and sequences."""
    layers = len(model.layers)
    total, count = mx.zeros((layers,)), 0
    for ids in sequences:
        if len(ids) > block:
            total, count = total + masses(model, ids, block), count + 1
            mx.eval(total)
    ffns = reach(model).ffns
    if not count:
        return [1.0] * len(ffns)
    values: Any = (total / count).tolist()
    return [values[ffn.layer] for ffn in ffns]


def masses(model: nn.Module, ids: mx.array, block: int) -> mx.array:
    """s_l of one sequence, (layers,)."""
    found: list[mx.array] = []

    def watching(
        layer: int,
        original: Attention,
        queries: mx.array,
        keys: mx.array,
        *args: Any,
        **kwargs: Any,
    ) -> mx.array:
        mass = outside(queries, keys, kwargs["scale"], kwargs.get("mask"), block)
        mx.eval(mass)
        found.append(mass)
        return original(queries, keys, *args, **kwargs)

    with watched_attention(model, watching) as all_layers:
        if not all_layers:
            return mx.ones((len(model.layers),))  # layers without plain attention
        model(ids[None])  # lazily: only the masses are computed
    return mx.stack(found)


def outside(
    queries: mx.array, keys: mx.array, scale: float, mask: Any, block: int
) -> mx.array:
    """Mean attention mass on keys from ``block`` on. queries (1, H, L, e), keys (1, G, L, e)."""
    _, heads, length, e = queries.shape
    groups = keys.shape[1]
    q = queries[0].reshape(groups, heads // groups, length, e).astype(mx.float32)
    k = keys[0].astype(mx.float32)[:, None]
    place, total = mx.arange(length), mx.array(0.0)
    for start in range(block, length, ROWS):
        rows = place[start : start + ROWS]
        scores = (q[:, :, start : start + ROWS] @ k.swapaxes(-1, -2)) * scale
        visible = rows[:, None] >= place[None]
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
            visible = visible & mask[..., start : start + ROWS, :].reshape(
                len(rows), length
            )
        scores = mx.where(visible, scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1)
        total = total + mx.sum(weights[..., block:])
    return total / (heads * max(1, length - block))
