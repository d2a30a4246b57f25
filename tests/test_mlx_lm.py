"""Attached models in unmodified mlx-lm: generation, caches, batches, drafts, chunks."""

import copy
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.generate import batch_generate
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from models import BLOCK, LAYERS, NAMES

import mlx_fastforward as ff
from mlx_fastforward import attach, detach
from mlx_fastforward.engine import Call, Engine
from mlx_fastforward.plan import Plan

TOKENS = 9 * BLOCK + 1  # the last one goes alone, after eight blocks and a tail
SELECTORS = ["probe", "oracle", "first-block"]
Planned = list[tuple[int, Optional[Plan]]]


@pytest.fixture
def tokenizer() -> Any:
    return models.demo_tokenizer()


def watch(engine: Engine) -> list[tuple[int, Optional[Call]]]:
    """A list that grows by (new tokens, call) with every call of the model."""
    seen: list[tuple[int, Optional[Call]]] = []
    begin = engine.begin

    def spy(batch: int, new: int, cache: Any, training: bool) -> Optional[Call]:
        call = begin(batch, new, cache, training)
        seen.append((new, call))
        return call

    engine.begin = spy  # type: ignore[method-assign]
    return seen


def plans(seen: list[tuple[int, Optional[Call]]]) -> Planned:
    """What was planned for the calls of more than one token."""
    return [(new, call.plan if call else None) for new, call in seen if new > 1]


def tokens_of(responses: Iterator[Any]) -> list[int]:
    return [r.token for r in responses]


def by_hand(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens from mlx-lm's way of reading a prompt: all but the last token, then it."""
    _, cache = models.prefill(model, prompt[:-1])
    out = prompt[-1:]
    for _ in range(n):
        logits, _ = models.prefill(model, out[-1:], cache)
        out.append(int(logits[-1].argmax()))
    return out[1:]


@pytest.mark.parametrize("name", NAMES)
def test_stream_generate(name: str, tokenizer: Any) -> None:
    """The tokens are those of the hand-written sparse prefill and a dense continuation."""
    model, prompt = models.tiny(name), models.token_ids(TOKENS)
    hand = models.by_hand(model, name, BLOCK, 8 * BLOCK, models.FFN // 2)
    plain = by_hand(model, prompt, 12)
    _, cache = models.prefill(hand, prompt[:-1])
    wanted = prompt[-1:]
    for _ in range(12):
        logits, _ = models.prefill(model, wanted[-1:], cache)
        wanted.append(int(logits[-1].argmax()))
    seen = watch(attach(model, models.settings(selector="oracle")))
    got = tokens_of(mlx_lm.stream_generate(model, tokenizer, prompt, 12))
    assert got == wanted[1 : 1 + len(got)] and len(got) == 12
    assert plans(seen) == [(TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))]
    assert got != plain


def test_generate_returns_the_text_of_the_same_tokens(tokenizer: Any) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    attach(model, models.settings())
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert text == tokenizer.decode(by_hand(model, prompt, 12))
    detach(model)
    assert text != mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


def test_a_text_prompt(tokenizer: Any) -> None:
    model = models.tiny("llama", vocab=4096)
    seen = watch(attach(model, models.settings()))
    text = "Keawe sailed for some time in the island steamers. " * 4
    mlx_lm.generate(model, tokenizer, text, max_tokens=2)
    n = len(tokenizer.encode(text))
    assert n > 4 * BLOCK and plans(seen)[0][0] == n - 1
    assert plans(seen)[0][1] is not None


def test_saved_and_loaded_prompt_cache(tokenizer: Any, tmp_path: Path) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    attach(model, models.settings())
    _, cache = models.prefill(model, prompt[:-1])
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache, {"model": "tiny"})
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    for a, b in zip(models.cached_arrays(loaded), models.cached_arrays(cache)):
        np.testing.assert_array_equal(a, b)
    got = tokens_of(
        mlx_lm.stream_generate(model, tokenizer, prompt[-1:], 8, prompt_cache=loaded)
    )
    assert got == by_hand(model, prompt, 8)


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_loaded_cache_can_be_extended_sparsely(selector: str, tmp_path: Path) -> None:
    """The selectors' memory of a prompt is not in the file: they must do without."""
    model = models.tiny("llama")
    attach(model, models.settings(selector=selector))
    _, cache = models.prefill(model, models.token_ids(TOKENS))
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    more = models.token_ids(TOKENS, seed=1)
    logits, _ = models.prefill(model, more, loaded)
    detach(model)
    dense, _ = models.prefill(model, more, copy.deepcopy(cache))
    assert np.isfinite(logits).all()
    assert models.distance(logits, dense) > 0.02


def test_trimmed_prompt_cache() -> None:
    """Trimming and reading the same tokens again gives the same logits."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="oracle"))
    first, second = models.token_ids(4 * BLOCK), models.token_ids(TOKENS, seed=1)
    _, cache = models.prefill(model, first)
    wanted, _ = models.prefill(model, second, cache)
    assert trim_prompt_cache(cache, TOKENS) == TOKENS
    assert cache[0].offset == 4 * BLOCK
    again, _ = models.prefill(model, second, cache)
    np.testing.assert_array_equal(again, wanted)
    assert trim_prompt_cache(cache, TOKENS + 4 * BLOCK) == TOKENS + 4 * BLOCK
    logits, _ = models.prefill(model, first, cache)
    fresh, _ = models.prefill(model, first)
    np.testing.assert_array_equal(logits, fresh)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("step", [2048, 3 * BLOCK])
def test_quantised_kv_cache(tokenizer: Any, selector: str, step: int) -> None:
    """At 8 bits the logits of the first token stay close to those over a float cache."""
    model = models.tiny("llama", hidden_size=128)  # groups of 32 need heads of 32
    attach(model, models.settings(selector=selector))
    prompt = models.token_ids(TOKENS)
    logprobs = []
    for more in ({}, dict(kv_bits=8, kv_group_size=32, quantized_kv_start=0)):
        cache = make_prompt_cache(model)
        first = next(
            mlx_lm.stream_generate(
                model,
                tokenizer,
                prompt,
                prompt_cache=cache,
                prefill_step_size=step,
                **more,
            )
        )
        logprobs.append(np.array(first.logprobs))
        assert isinstance(cache[0], QuantizedKVCache) == bool(more)
    assert 0 < models.distance(logprobs[1], logprobs[0]) < 0.05


def test_first_block_is_remembered_when_the_kv_cache_is_quantised(
    tokenizer: Any,
) -> None:
    """mlx-lm replaces the cache objects between two chunks; the prompt stays the same."""
    model = models.tiny("llama", hidden_size=128)
    engine = attach(model, models.settings(selector="first-block"))
    seen = watch(engine)
    list(
        mlx_lm.stream_generate(
            model,
            tokenizer,
            models.token_ids(2 * TOKENS),
            max_tokens=1,
            prefill_step_size=TOKENS,
            kv_bits=8,
            kv_group_size=32,
            quantized_kv_start=0,
        )
    )
    first, second = [call for new, call in seen if new > 1]
    assert first is not None and second is not None
    for a, b in zip(first.memory[:-1], second.memory[:-1]):
        np.testing.assert_array_equal(np.array(a["scores"]), np.array(b["scores"]))


def test_max_kv_size(tokenizer: Any) -> None:
    """A rotating cache smaller than the prompt; the FFN blocks do not care."""
    model, prompt = models.tiny("qwen2"), models.token_ids(TOKENS)
    seen = watch(attach(model, models.settings()))
    cache = make_prompt_cache(model, 32)
    assert isinstance(cache[0], RotatingKVCache)
    got = tokens_of(mlx_lm.stream_generate(model, tokenizer, prompt, 8, max_kv_size=32))
    _, cache = models.prefill(model, prompt[:-1], cache)
    wanted = prompt[-1:]
    for _ in range(8):
        logits, _ = models.prefill(model, wanted[-1:], cache)
        wanted.append(int(logits[-1].argmax()))
    assert got == wanted[1:]
    assert plans(seen)[0] == (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert got != by_hand(model, prompt, 8)  # the window is felt


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_batch_equals_its_own_run(name: str, selector: str) -> None:
    model = models.tiny(name)
    attach(model, models.settings(selector=selector))
    rows = [models.token_ids(TOKENS, seed=s) for s in range(3)]
    more = [models.token_ids(TOKENS, seed=s) for s in range(5, 8)]
    cache = make_prompt_cache(model)
    batch = [np.array(model(mx.array(r), cache=cache)) for r in (rows, more)]
    for i in range(3):
        _, own = models.prefill(model, rows[i])
        for got, ids in zip(batch, (rows[i], more[i])):
            wanted, _ = models.prefill(model, ids, own if ids is more[i] else None)
            assert models.distance(got[i], wanted) < 1e-4
    detach(model)
    plain, _ = models.prefill(model, rows[1])
    assert models.distance(batch[0][1], plain) > 0.02


def batch_tokens(model: nn.Module, prompts: list[list[int]], n: int, **more: Any):
    response = batch_generate(
        model,
        models.demo_tokenizer(),
        prompts,
        max_tokens=n,
        return_token_ids=True,
        **more,
    )
    return response.token_ids


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-bias-sliding", "phi3"])
def test_batch_generate_with_equal_lengths(name: str, selector: str) -> None:
    model = models.tiny(name)
    seen = watch(attach(model, models.settings(selector=selector)))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(3)]
    got = batch_tokens(model, prompts, 8)
    assert plans(seen) == [(TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))]
    for ids, prompt in zip(got, prompts):
        assert ids == by_hand(model, prompt, 8)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_batch_generate_hides_right_padding(name: str) -> None:
    """mlx-lm pads the shorter prompts of a batch: those rows must not vote for neurons."""
    model = models.tiny(name)
    seen = watch(attach(model, models.settings()))
    lengths = [TOKENS, TOKENS - 13, 4 * BLOCK + 1]
    prompts = [models.token_ids(n, seed=n) for n in lengths]
    got = batch_tokens(model, prompts, 4)
    assert [len(ids) for ids in got] == [4, 4, 4]
    (call,) = [call for new, call in seen if new > 1]
    assert call is not None and call.valid is not None
    wanted = [[1.0] * (n - 1) + [0.0] * (TOKENS - n) for n in lengths]
    assert np.array(call.valid).tolist() == wanted


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padding_of_a_batch_changes_no_choice(name: str, selector: str) -> None:
    """Keys of a padded row equal those of its single run up to where both are sparse."""
    model = models.tiny(name)
    attach(model, models.settings(selector=selector))
    lengths = [TOKENS, TOKENS - 2 * BLOCK]
    prompts = [models.token_ids(n, seed=n) for n in lengths]
    cache = [
        (
            BatchRotatingKVCache(c.max_size, [0, 0])
            if isinstance(c, RotatingKVCache)
            else BatchKVCache([0, 0])
        )
        for c in make_prompt_cache(model)
    ]
    padded = [p + [0] * (TOKENS - len(p)) for p in prompts]
    for c in cache:
        c.prepare(lengths=lengths, right_padding=[0, 2 * BLOCK])
    batch = np.array(model(mx.array(padded), cache=cache))
    shared = lengths[1] - BLOCK - 1  # then comes the single run's tail
    if selector == "probe":  # its dense tokens differ: other tails vote
        shared = 2 * BLOCK
    wanted, _ = models.prefill(model, prompts[1])
    if selector != "probe":
        assert models.distance(batch[1][:shared], wanted[:shared]) < 1e-4
    whole, _ = models.prefill(model, prompts[0])
    assert models.distance(batch[0], whole) < 1e-4


@pytest.mark.parametrize("selector", SELECTORS)
def test_batch_generate_ragged_is_close_to_single_runs(selector: str) -> None:
    """The padded row keeps its first tokens of greedy text on a model that is not shaky.

    Its tail is sparse where the single run's is dense, so logits agree only roughly: far better
    than with a dense run of another prompt.
    """
    model = models.tiny("llama")
    attach(model, models.settings(selector=selector, sparsity=0.25))
    prompts = [models.token_ids(n, seed=n) for n in (TOKENS, TOKENS - 6)]
    response = batch_tokens(model, prompts, 3)
    assert response[0] == by_hand(model, prompts[0], 3)
    assert response[1][0] == by_hand(model, prompts[1], 1)[0]


def test_batch_generate_with_short_prompts_is_dense() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    seen = watch(attach(model, models.settings()))
    prompts = [models.token_ids(n, seed=n) for n in (5, 20, 24)]
    assert batch_tokens(model, prompts, 6) == batch_tokens(plain, prompts, 6)
    assert plans(seen) == [(23, None)]


def test_more_prompts_than_fit_in_one_batch() -> None:
    model = models.tiny("llama")
    attach(model, models.settings())
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(4)]
    lengths = [2, 7, 5, 3]
    got = batch_tokens(
        model, prompts, lengths, prefill_batch_size=2, completion_batch_size=2
    )
    for ids, prompt, n in zip(got, prompts, lengths):
        assert ids == by_hand(model, prompt, n)


@pytest.mark.parametrize("selector", ["first-block", "oracle"])
def test_sparse_decode_in_batches_that_grow_and_shrink(selector: str) -> None:
    """Rows come and go while others decode: each must keep its own neurons."""
    model = models.tiny("llama")
    attach(model, models.settings(selector=selector, sparse_decode=True))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(4)]
    lengths = [2, 9, 6, 8]
    got = batch_tokens(
        model, prompts, lengths, prefill_batch_size=2, completion_batch_size=2
    )
    for ids, prompt, n in zip(got, prompts, lengths):
        assert ids == by_hand(model, prompt, n)


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("same", [True, False])
def test_speculative_decoding(tokenizer: Any, drafts: int, same: bool) -> None:
    """Greedy output is the target's own, whatever the draft proposes."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    draft = models.tiny("llama", seed=0 if same else 7)
    seen = watch(attach(model, models.settings()))
    responses = list(
        mlx_lm.stream_generate(
            model, tokenizer, prompt, 12, draft_model=draft, num_draft_tokens=drafts
        )
    )
    assert [r.token for r in responses] == by_hand(model, prompt, 12)
    assert any(r.from_draft for r in responses) or not same
    prefill, *verify = plans(seen)[:-1]
    assert prefill == (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert all(p == (drafts + 1, None) for p in verify)


def test_speculative_decoding_through_our_stream_generate(tokenizer: Any) -> None:
    """The last prompt token comes with the first drafts: more tokens than the prompt has left."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    engine = attach(model, models.settings())
    seen = watch(engine)
    draft = models.tiny("llama", seed=7)
    responses = list(
        ff.stream_generate(
            model, tokenizer, prompt, 12, draft_model=draft, num_draft_tokens=4
        )
    )
    got = [r.token for r in responses]
    assert plans(seen)[:2] == [(TOKENS - 1, Plan(BLOCK, 8, BLOCK, 0)), (5, None)] or (
        plans(seen)[:2] == [(TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK)), (5, None)]
    )
    assert engine.remaining is None
    assert got == tokens_of(ff.stream_generate(model, tokenizer, prompt, 12))
    assert responses[0].ffn_sparsity > 0.2


CHUNKS: list[tuple[Callable[..., Any], list[int], Planned]] = [
    (  # nobody tells the model that more follows: each chunk has its own tail
        mlx_lm.stream_generate,
        [40, 40, 24],
        [
            (40, Plan(8, 3, 8, 8)),
            (40, Plan(0, 4, 8, 8)),
            (24, Plan(0, 2, 8, 8)),
        ],
    ),
    (  # only the true end is dense: the 8 last tokens, of which one goes alone
        ff.stream_generate,
        [40, 40, 24],
        [
            (40, Plan(8, 4, 8, 0)),
            (40, Plan(0, 5, 8, 0)),
            (24, Plan(0, 2, 8, 8)),
        ],
    ),
]


@pytest.mark.parametrize("generate, sizes, wanted", CHUNKS, ids=["mlx_lm", "ours"])
def test_chunked_prefill(
    tokenizer: Any, generate: Any, sizes: list[int], wanted: Planned
) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(sum(sizes) + 1)
    seen = watch(attach(model, models.settings()))
    next(generate(model, tokenizer, prompt, prefill_step_size=40))
    assert plans(seen) == wanted


@pytest.mark.parametrize("tail", range(1, 2 * BLOCK + 2))
def test_chunked_prefill_keeps_the_end_of_every_prompt_dense(
    tokenizer: Any, tail: int
) -> None:
    """Wherever the chunks' borders fall, sparse tokens stop a block before the end."""
    total = 80 + tail
    model = models.tiny("llama", num_hidden_layers=2)
    seen = watch(attach(model, models.settings()))
    next(
        ff.stream_generate(
            model, tokenizer, models.token_ids(total), prefill_step_size=40
        )
    )
    sparse, start = [], 0
    for new, call in seen[: -(-(total - 1) // 40) + 1]:
        if call is not None:
            sparse += range(start + call.plan.start, start + call.plan.stop)
        start += new
    assert start == total
    assert sparse[0] == BLOCK and sparse[-1] < total - BLOCK
    assert len(sparse) > total - 4 * BLOCK
    assert sparse[-1] >= total - 3 * BLOCK


def test_two_turns_over_one_cache(tokenizer: Any) -> None:
    """The second prompt is read over the first and its answer, with no head of its own."""
    model = models.tiny("llama")
    seen = watch(attach(model, models.settings(selector="oracle")))
    first, second = models.token_ids(TOKENS), models.token_ids(TOKENS, seed=1)
    cache = make_prompt_cache(model)
    said = tokens_of(
        mlx_lm.stream_generate(model, tokenizer, first, 5, prompt_cache=cache)
    )
    assert cache[0].offset == TOKENS + 5
    got = tokens_of(
        mlx_lm.stream_generate(model, tokenizer, second, 6, prompt_cache=cache)
    )
    assert plans(seen) == [
        (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK)),
        (TOKENS - 1, Plan(0, 8, BLOCK, BLOCK)),
    ]
    detach(model)
    hand = models.by_hand(model, "llama", BLOCK, 8 * BLOCK, models.FFN // 2)
    _, cache = models.prefill(hand, first[:-1])
    for token in [first[-1], *said]:
        models.prefill(model, [token], cache)
    hand = models.by_hand(model, "llama", 0, 8 * BLOCK, models.FFN // 2)
    models.prefill(hand, second[:-1], cache)
    wanted = second[-1:]
    for _ in range(6):
        logits, _ = models.prefill(model, wanted[-1:], cache)
        wanted.append(int(logits[-1].argmax()))
    assert got == wanted[1:]


def test_first_block_serves_later_calls_of_the_same_cache(tokenizer: Any) -> None:
    """GRIFFIN's neurons are those of the prompt's first block, in every later chunk."""
    model = models.tiny("llama")
    engine = attach(model, models.settings(selector="first-block"))
    seen = watch(engine)
    cache = make_prompt_cache(model)
    models.prefill(model, models.token_ids(TOKENS), cache)
    models.prefill(model, models.token_ids(TOKENS, seed=1), cache)
    models.prefill(model, models.token_ids(TOKENS, seed=2))
    first, second, other = [call for _, call in seen]
    assert first is not None and second is not None and other is not None
    assert second.memory is first.memory
    assert other.memory is not first.memory
    for layer in range(LAYERS - 1):
        a, b = (np.array(c.memory[layer]["scores"]) for c in (first, other))
        assert models.distance(a, b) > 0.02


def test_memory_dies_with_its_cache() -> None:
    model = models.tiny("llama")
    engine = attach(model, models.settings(selector="first-block"))
    for _ in range(3):
        models.prefill(model, models.token_ids(TOKENS))
    _, cache = models.prefill(model, models.token_ids(TOKENS))
    assert len(engine.memory.kept) == 1
    del cache
    assert len(engine.memory.kept) == 0
