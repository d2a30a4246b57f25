"""The dense model's word on a prompt that was read sparsely: what comes after, next to dense."""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .engine import Engine
from .plan import CHUNK
from .session import switched


def prefill(model: nn.Module, tokens: mx.array, cache: Any) -> None:
    """Feed all of ``tokens`` in chunks, as mlx-lm does."""
    for start in range(0, tokens.size, CHUNK):
        model(tokens[None, start : start + CHUNK], cache=cache)
        mx.eval([c.state for c in cache])


def continuation(
    model: nn.Module, tokens: mx.array, prompt: int, engine: Optional[Engine]
) -> mx.array:
    """Log-probabilities (tokens.size - prompt, vocabulary) of what follows the prompt.

    The prompt is read sparsely if there is an engine, all that follows runs dense.
    """
    cache = make_prompt_cache(model)
    if engine is None:
        prefill(model, tokens[: prompt - 1], cache)
    else:
        with engine.prompt(prompt):
            prefill(model, tokens[: prompt - 1], cache)
    with switched(model, sparse=False):
        logits = model(tokens[None, prompt - 1 : -1], cache=cache)[0]
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return logprobs


def divergence(dense: mx.array, sparse: mx.array) -> tuple[float, float]:
    """KL(dense || sparse) in nats per token, and share of equal top-1. (tokens, vocabulary) each."""
    kl = mx.mean(mx.sum(mx.exp(dense) * (dense - sparse), axis=-1))
    same = mx.mean(mx.argmax(dense, -1) == mx.argmax(sparse, -1))
    return float(kl), float(same)
