"""mlx-lm's stream_generate with a prefill that knows where the prompt ends, and its statistics."""

import contextlib
import time
from dataclasses import dataclass, fields
from typing import Any, Generator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generation_stream
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import ranks
from .attachment import engine_of, is_enabled, reading
from .model.caches import cached_tokens


@dataclass
class Response(GenerationResponse):
    """What mlx-lm yields, plus the prefill's statistics.

    Args:
        ttft: Seconds from the call to the first token; tokenisation is in it where the prompt is text.
        cached_tokens: Prompt tokens found in the prompt cache; prompt_tokens counts the others.
        prefill_tps: New prompt tokens per second until the first token.
        ffn_sparsity: Share of the prompt's FFN FLOPs that was skipped: dense head and tail counted,
            selection and compensation paid.
        read_tokens: Of prompt_tokens, those that a speculative prefill read; None: all.
    """

    ttft: float = 0.0
    cached_tokens: int = 0
    prefill_tps: float = 0.0
    ffn_sparsity: float = 0.0
    read_tokens: Optional[int] = None


def encode_prompt(tokenizer: Any, prompt: str | mx.array | Sequence[int]) -> mx.array:
    """Token ids of a prompt, by mlx-lm's rule for the beginning-of-sequence token."""
    if isinstance(prompt, mx.array):
        return prompt
    if not isinstance(prompt, str):
        return mx.array(list(prompt))
    bos = tokenizer.bos_token
    special = bos is None or not prompt.startswith(bos)
    return mx.array(tokenizer.encode(prompt, add_special_tokens=special))


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    draft_model: Optional[nn.Module] = None,
    **kwargs: Any,
) -> Generator[Response, None, None]:
    """Stream text as ``mlx_lm.stream_generate`` does, with only the true end of the prompt dense.

    Called from mlx-lm itself, the end of every 2048-token chunk stays dense, since nobody
    says whether more follows; here the model knows the prompt's length. A model that is not
    attached runs as it is: the statistics then describe stock mlx-lm.

    Args:
        model: Attached or not.
        tokenizer: As returned by ``load``.
        prompt: Text or token ids; with ``prompt_cache`` only what the cache does not hold.
        max_tokens: Tokens to generate at most, -1 for no limit.
        draft_model: For speculative decoding.
        kwargs: As for ``mlx_lm.stream_generate``; ``prefill_step_size`` is by default as tuned.

    Yields:
        Response: One per generated segment.
    """
    start = time.perf_counter()
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    embeddings = kwargs.get("input_embeddings")
    total = len(ids) if embeddings is None else len(embeddings)
    cached = cached_tokens(kwargs.get("prompt_cache"))
    engine = engine_of(model)
    if engine is not None and engine.sparse and is_enabled(model):
        kwargs.setdefault("prefill_step_size", engine.device.step)
    responses = mlx_lm_stream_generate(
        model, tokenizer, ids, max_tokens, draft_model=draft_model, **kwargs
    )
    with contextlib.closing(responses):
        with reading(model, total) as state:
            first = next(responses)
        ttft = time.perf_counter() - start
        sparsity = state.flops.sparsity

        def extended(r: GenerationResponse) -> Response:
            shared = {f.name: getattr(r, f.name) for f in fields(GenerationResponse)}
            return Response(
                **shared,
                ttft=ttft,
                cached_tokens=cached,
                prefill_tps=r.prompt_tps,
                ffn_sparsity=sparsity,
            )

        yield extended(first)
        for response in responses:
            yield extended(response)
    if ranks.several():  # a step more is on its way: who ended first would be missed
        mx.synchronize(generation_stream)
