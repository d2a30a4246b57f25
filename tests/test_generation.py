"""Our stream_generate: mlx-lm's tokens, and figures that can be checked by hand."""

import time
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from models import (
    BLOCK,
    FFN,
    cached_arrays,
    distance,
    logprobs,
    prefill,
    settings,
    tiny,
    token_ids,
)

from mlx_fastforward import DeviceSettings, Response, attach, detach, stream_generate
from mlx_fastforward.generation import encode_prompt

TOKENS = 12 * BLOCK + 5
PROMPT = token_ids(TOKENS)
MEASURED = ["ttft", "cached_tokens", "prefill_tps", "ffn_sparsity", "read_tokens"]


def responses(model: nn.Module, prompt: Any, n: int = 6, **more: Any) -> list[Response]:
    return list(stream_generate(model, models.demo_tokenizer(), prompt, n, **more))


def sparsity(model: nn.Module, prompt: Any = PROMPT, **more: Any) -> float:
    (share,) = {r.ffn_sparsity for r in responses(model, prompt, 3, **more)}
    return share  # decoding is not counted


@pytest.mark.parametrize("n", [1, 10, TOKENS])
@pytest.mark.parametrize("attached", [False, True])
def test_plain_and_sparsity_0_give_what_mlx_lm_gives(n: int, attached: bool) -> None:
    model, prompt, tokenizer = tiny("llama"), token_ids(n), models.demo_tokenizer()
    wanted = list(mlx_lm.stream_generate(model, tokenizer, prompt, 6))
    if attached:
        attach(model, settings(sparsity=0.0))
    got = responses(model, prompt)
    assert len(got) == len(wanted) == 6
    names = [f.name for f in fields(GenerationResponse)]
    assert [f.name for f in fields(Response)] == names + MEASURED
    timed = ("logprobs", "prompt_tps", "generation_tps", "peak_memory")
    for a, b in zip(got, wanted):
        for name in set(names) - set(timed):
            assert getattr(a, name) == getattr(b, name), name
        np.testing.assert_array_equal(np.array(a.logprobs), np.array(b.logprobs))
        assert (a.ffn_sparsity, a.cached_tokens) == (0.0, 0)


def test_prompts_as_text_list_and_array_are_the_same() -> None:
    """A bare tokenizer of Hugging Face's is wrapped."""
    model, tokenizer = tiny("llama", vocab=4096), models.demo_tokenizer()
    attach(model, settings())
    text = "Keawe could read and write like a schoolmaster. " * 4
    ids = tokenizer.encode(text)
    wanted = responses(model, ids)
    assert len(ids) > 4 * BLOCK and wanted[0].ffn_sparsity > 0.1
    for prompt in (text, tuple(ids), mx.array(ids)):
        got = responses(model, prompt)
        np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
        assert got[-1].prompt_tokens == len(ids)
    bare = next(stream_generate(model, tokenizer._tokenizer, ids, 1))
    assert bare.token == wanted[0].token


def test_no_text_begins_with_two_marks() -> None:
    """mlx-lm's rule: none is added where the text, or a chat template, has it."""

    class Marking:
        bos_token = "<s>"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0] * add_special_tokens + [len(text)]

    assert encode_prompt(Marking(), "Keawe").tolist() == [0, 5]
    assert encode_prompt(Marking(), "<s>Keawe").tolist() == [8]


def test_times_and_rates() -> None:
    """The clock starts with the first next() and stops at the first token."""
    model, slept = tiny("llama"), 0.2
    attach(model, settings())

    def slow(done: int, total: int) -> None:
        time.sleep(slept if done == 0 else 0)

    tokenizer, more = models.demo_tokenizer(), {"prompt_progress_callback": slow}
    start = time.perf_counter()
    stream = stream_generate(model, tokenizer, PROMPT, 4, **more)
    got = [next(stream)]
    first = time.perf_counter() - start
    got += stream
    assert {r.ttft for r in got} == {got[0].ttft} and slept < got[0].ttft <= first
    assert [r.generation_tokens for r in got] == [1, 2, 3, 4]
    assert got[0].prefill_tps == got[0].prompt_tps
    assert TOKENS / got[0].ttft <= got[0].prefill_tps < TOKENS / slept


def test_ffn_sparsity_is_that_of_the_whole_prompt_and_of_no_other() -> None:
    """However it is chunked, over a warm cache, and where layers differ."""
    model = tiny("llama", wide=192)
    first_block = settings(selector="first-block")
    attach(model, first_block)
    # 100 tokens in one call, 8 + 10 blocks of 8 + 12, and the last one alone
    assert sparsity(model) == pytest.approx(80 / 2 / 101, rel=1e-9)
    # 40 + 40 + 20; the last chunk leaves 8 - 1 to the tail
    chunked = sparsity(model, prefill_step_size=40)
    assert chunked == pytest.approx((32 + 40 + 13) / 2 / 101, rel=1e-9)
    cache = make_prompt_cache(model)
    first = responses(model, PROMPT, 3, prompt_cache=cache)
    second = responses(model, token_ids(50, seed=1), 3, prompt_cache=cache)
    assert {(r.cached_tokens, r.prompt_tokens) for r in first} == {(0, TOKENS)}
    assert {(r.cached_tokens, r.prompt_tokens) for r in second} == {(TOKENS + 3, 50)}
    # 49 tokens of 50 in one call: five blocks from the first on, then the tail
    assert second[0].ffn_sparsity == pytest.approx(5 * 8 / 2 / 50, rel=1e-9)
    assert sparsity(model, token_ids(10)) == 0.0
    given = settings(selector="first-block", schedule="auto")
    attach(model, given, importances=[8.0, 1.0, 1.0, 5.0])
    # layer 0 stays dense, the others keep a quarter
    share = 80 / 101 * 3 / 4 * (192 + 128) / (128 + 192 + 128)
    assert sparsity(model) == pytest.approx(share, rel=1e-9)
    detach(model)
    assert sparsity(model) == 0.0


@pytest.mark.parametrize("cached", [1, 3, 8, 12])
def test_the_dense_head_is_what_a_cached_prefix_leaves_of_it(cached: int) -> None:
    """The first 8 tokens of the text are dense, and what follows is cut as without a prefix."""
    model, plain = tiny("llama"), tiny("llama")
    attach(model, settings(selector="oracle"))
    whole, cache = make_prompt_cache(model), make_prompt_cache(model)
    responses(model, PROMPT, 1, prompt_cache=whole)
    prefill(model, PROMPT[:cached], cache)  # too short to be sparse
    responses(model, PROMPT[cached:], 1, prompt_cache=cache)
    pairs = [*zip(cached_arrays(cache), cached_arrays(whole), strict=True)]
    same = max(distance(a, b) for a, b in pairs) < 1e-5
    assert same == (cached <= 8)  # beyond the head, blocks begin where the prefix ends
    cache = make_prompt_cache(plain)
    prefill(plain, PROMPT[:-1], cache)
    dense = [a[:, :, :8] for a in cached_arrays(cache)]
    head = [a[:, :, :8] for a in cached_arrays(whole)]
    assert max(map(distance, head, dense)) < 1e-5


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopping_leaves_no_prompt_behind(after: int) -> None:
    """The next prompt is planned as if nothing had happened."""
    model, tokenizer = tiny("llama"), models.demo_tokenizer()
    attach(model, settings())
    wanted, cache = responses(model, PROMPT), make_prompt_cache(model)
    stream = stream_generate(model, tokenizer, PROMPT, 9, prompt_cache=cache)
    for _ in range(after):
        next(stream)
        assert models.idle(model)
    stream.close()
    assert cache[0].offset == (TOKENS + after if after else 0)

    def interrupt(done: int, total: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    stopped = {"prefill_step_size": 40, "prompt_progress_callback": interrupt}
    with pytest.raises(KeyboardInterrupt):
        responses(model, PROMPT, **stopped)
    with pytest.raises(ValueError, match="must be provided"):  # mlx-lm's own refusal
        responses(model, [])
    assert models.idle(model)
    got = responses(model, PROMPT)
    np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
    assert got[0].ffn_sparsity == wanted[0].ffn_sparsity


def test_tokens_per_call_are_as_tuned() -> None:
    """Unless the caller says, or nothing runs sparsely."""
    model, seen = tiny("llama"), []  # type: nn.Module, list[int]
    device, prompt = DeviceSettings(step=512), token_ids(1200)
    tick = lambda done, total: seen.append(done)
    for sparsity, more, wanted in (
        (0.5, {}, [0, 512, 1024, 1199, 1200]),
        (0.5, {"prefill_step_size": 1024}, [0, 1024, 1199, 1200]),
        (0.0, {}, [0, 1199, 1200]),
    ):
        attach(model, settings(sparsity=sparsity), device=device)
        responses(model, prompt, 1, prompt_progress_callback=tick, **more)
        assert seen == wanted
        seen.clear()


def test_input_embeddings() -> None:
    """Those of the prompt's own tokens generate what the tokens do."""
    model = tiny("llama")
    attach(model, settings())
    ids = mx.array(PROMPT)
    embeddings = model.model.embed_tokens(ids)
    wanted = responses(model, ids)
    for prompt in (ids, mx.array([], mx.int32)):
        got = responses(model, prompt, input_embeddings=embeddings)
        np.testing.assert_array_equal(logprobs(got), logprobs(wanted))
        assert got[0].ffn_sparsity == wanted[0].ffn_sparsity > 0.1


def test_sparse_decode_uses_the_first_blocks_neurons() -> None:
    """The prompt is read as ever; every decode step runs the neurons of its blocks."""
    model, chosen = tiny("llama"), []
    attach(model, settings(selector="first-block"))
    dense = responses(model, PROMPT, 4)
    engine = attach(model, settings(selector="first-block", sparse_decode=True))
    choose = engine.choose

    def spy(layer: int, inputs: Any) -> mx.array:
        neurons = choose(layer, inputs)
        chosen.extend(map(tuple, neurons.tolist() if layer == 1 else []))
        return neurons

    engine.choose = spy  # type: ignore[method-assign]
    sparse = responses(model, PROMPT, 4)
    np.testing.assert_array_equal(logprobs(sparse)[0], logprobs(dense)[0])
    assert models.distance(logprobs(sparse)[1], logprobs(dense)[1]) > 3e-3
    assert sparse[0].ffn_sparsity == dense[0].ffn_sparsity
    (neurons,) = set(chosen)
    assert len(chosen) == 10 + 4 and len(set(neurons)) == FFN // 2
