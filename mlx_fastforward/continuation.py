"""What a model says after a prompt that was read sparsely, next to the dense model."""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .attachment import seated, switched
from .engine import Engine
from .prefill import read


def follow(
    model: nn.Module, rest: mx.array, tokens: mx.array, cache: Any, step: bool = False
) -> mx.array:
    """Log-probabilities (tokens.size, vocabulary) of ``tokens`` after a prompt.

    Args:
        rest: What the cache does not hold of the prompt, one token at least; it runs dense.
        step: Feed ``tokens`` one by one with the engine on, for PrefillConfig.sparse_decode;
            else they run dense, in one call.
    """
    with switched(model, sparse=False):
        if not step:
            ids = mx.concatenate([rest, tokens[:-1]])
            logits = model(ids[None], cache=cache)[0, rest.size - 1 :]
        else:
            found = [model(rest[None], cache=cache)[0, -1:]]
    if step:
        for i in range(tokens.size - 1):
            found.append(model(tokens[None, i : i + 1], cache=cache)[0])
            mx.eval(found[-1])
        logits = mx.concatenate(found)
    return log_softmax(logits)


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return logprobs


def continuation(
    model: nn.Module, tokens: mx.array, prompt: int, engine: Optional[Engine]
) -> mx.array:
    """Log-probabilities (tokens.size - prompt, vocabulary) of what follows the prompt.

    The prompt is read sparsely if there is an engine, all that follows runs dense. The model is
    detached, before and after.
    """
    cache = make_prompt_cache(model)
    with seated(model, engine):
        read(model, tokens[: prompt - 1], cache, prompt)
    return follow(model, tokens[prompt - 1 : prompt], tokens[prompt:], cache)


def divergence(dense: mx.array, sparse: mx.array) -> tuple[float, float]:
    """KL(dense || sparse) in nats per token, and share of equal top-1. (tokens, vocabulary) each."""
    kl = mx.mean(mx.sum(mx.exp(dense) * (dense - sparse), axis=-1))
    same = mx.mean(mx.argmax(dense, -1) == mx.argmax(sparse, -1))
    return float(kl), float(same)
