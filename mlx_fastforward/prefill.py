"""The one loop that feeds a prompt to a model in chunks."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attachment import reading
from .tokens.plan import CHUNK


def prefill(model: nn.Module, tokens: mx.array, cache: Any) -> None:
    """Feed all of ``tokens``, (L,) or (B, L), in chunks, as mlx-lm does."""
    rows = tokens if tokens.ndim == 2 else tokens[None]
    for start in range(0, rows.shape[1], CHUNK):
        model(rows[:, start : start + CHUNK], cache=cache)
        mx.eval([c.state for c in cache])


def read(model: nn.Module, tokens: mx.array, cache: Any, prompt: int) -> float:
    """Prefill ``tokens``, the first of a prompt's; sparsely where the model is attached.

    Args:
        prompt: Tokens of the whole prompt.

    Returns:
        float: Share of their FFN FLOPs that was skipped.
    """
    with reading(model, prompt) as state:
        prefill(model, tokens, cache)
    return state.flops.sparsity
