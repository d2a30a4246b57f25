"""Causal attention of a chunk in blocks of queries: exact, and less work where no fused kernel runs.

Without a fused kernel (CPUs, and head sizes that a GPU has none for) every query of a chunk is
multiplied with every key, those that it must not see too. A block of queries needs only the keys up to
its own end: up to half of the products and of the softmax is left out, and the scores take less memory.
"""

from typing import Any, Callable

import mlx.core as mx

NAME = "scaled_dot_product_attention"  # mlx-lm's model files import it by this name
Attention = Callable[..., mx.array]


def by_queries(original: Attention, rows: int) -> Attention:
    """Attention that takes ``rows`` queries at a time where the mask is plainly causal."""

    def blocked(
        queries: mx.array, keys: Any, values: Any, *args: Any, **kwargs: Any
    ) -> mx.array:
        new = queries.shape[2]
        if new <= rows or not _causal(keys, args, kwargs):
            return original(queries, keys, values, *args, **kwargs)
        seen = keys.shape[2] - new
        out = []
        for start in range(0, new, rows):
            stop = min(start + rows, new)
            block = queries[:, :, start:stop]
            k, v = keys[:, :, : seen + stop], values[:, :, : seen + stop]
            out.append(original(block, k, v, *args, **kwargs))
        return mx.concatenate(out, axis=2)

    return blocked


def _causal(keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether keys are plain arrays and the mask is the word: arrays may hide other keys too."""
    mask = kwargs.get("mask")
    return isinstance(keys, mx.array) and not args and isinstance(mask, str)
