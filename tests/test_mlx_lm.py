"""Attached models in unmodified mlx-lm: generation, caches, batches, drafts, chunks."""

import copy
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

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
from models import BLOCK, FFN, LAYERS, NAMES

import mlx_fastforward as ff
from mlx_fastforward import attach, detach
from mlx_fastforward.engine import Call, Engine
from mlx_fastforward.neurons.selectors import Trained
from mlx_fastforward.tokens.plan import Plan

TOKENS = 9 * BLOCK + 1  # the last one goes alone, after eight blocks and a tail
SELECTORS = ["probe", "oracle", "first-block"]
Said = tuple[list[int], np.ndarray]
SelectorInputs = list[tuple[int, Optional[Call]]]
Planned = list[tuple[int, Optional[Plan]]]


@pytest.fixture
def tokenizer() -> Any:
    return models.demo_tokenizer()


def watch(engine: Engine) -> SelectorInputs:
    """A list that grows by (new tokens, call) with every call of the model."""
    seen: SelectorInputs = []
    begin = engine.begin

    def spy(batch: int, new: int, cache: Any, training: bool) -> Optional[Call]:
        call = begin(batch, new, cache, training)
        seen.append((new, call))
        return call

    engine.begin = spy  # type: ignore[method-assign]
    return seen


def plans(seen: SelectorInputs) -> Planned:
    """What was planned for the calls of more than one token."""
    return [(new, call.plan if call else None) for new, call in seen if new > 1]


def said(responses: Iterable[Any]) -> Said:
    """Tokens and log-probabilities of a stream."""
    listed = list(responses)
    return [r.token for r in listed], np.stack([np.array(r.logprobs) for r in listed])


def assert_same(got: Said, wanted: Said) -> None:
    assert got[0] == wanted[0]
    assert models.distance(got[1], wanted[1]) < 1e-4


def assert_other(got: Said, wanted: Said) -> None:
    """The first token's probabilities differ; a random model's tokens may not."""
    assert models.distance(got[1][0], wanted[1][0]) > 3e-3


@pytest.mark.parametrize("name", NAMES)
def test_stream_generate(name: str, tokenizer: Any) -> None:
    """The output is that of a hand-written sparse prefill and a dense continuation."""
    model, prompt = models.tiny(name), models.token_ids(TOKENS)
    dense = models.decode(model, prompt, 8)
    hand = models.by_hand(model, name, BLOCK, 8 * BLOCK, FFN // 2)
    _, cache = models.prefill(hand, prompt[:-1])
    wanted = models.continue_from(model, prompt[-1], 8, cache)
    seen = watch(attach(model, models.settings(selector="oracle")))
    got = said(mlx_lm.stream_generate(model, tokenizer, prompt, 8))
    assert plans(seen) == [(TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))]
    assert_same(got, wanted)
    assert_other(got, dense)


def test_generate_returns_the_text_of_the_same_tokens(tokenizer: Any) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    attach(model, models.settings())
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert text == tokenizer.decode(models.decode(model, prompt, 12)[0])
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
    got = said(
        mlx_lm.stream_generate(model, tokenizer, prompt[-1:], 8, prompt_cache=loaded)
    )
    assert_same(got, models.decode(model, prompt, 8))


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
    """At 8 bits the first token's logits stay close to those over a float cache."""
    model = models.tiny("llama", hidden_size=128)  # groups of 32 need heads of 32
    attach(model, models.settings(selector=selector))
    prompt = models.token_ids(TOKENS)
    logprobs = []
    bits: dict[str, Any] = dict(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    for more in ({}, bits):
        cache = make_prompt_cache(model)
        responses = mlx_lm.stream_generate(
            model,
            tokenizer,
            prompt,
            prompt_cache=cache,
            prefill_step_size=step,
            **more,
        )
        logprobs.append(np.array(next(responses).logprobs))
        assert isinstance(cache[0], QuantizedKVCache) == bool(more)
    assert 0 < models.distance(logprobs[1], logprobs[0]) < 0.05


def test_first_block_is_remembered_when_the_kv_cache_is_quantised(
    tokenizer: Any,
) -> None:
    """mlx-lm replaces the cache objects between two chunks of the same prompt."""
    model = models.tiny("llama", hidden_size=128)
    seen = watch(attach(model, models.settings(selector="first-block")))
    responses = mlx_lm.stream_generate(
        model,
        tokenizer,
        models.token_ids(2 * TOKENS),
        max_tokens=1,
        prefill_step_size=TOKENS,
        kv_bits=8,
        kv_group_size=32,
        quantized_kv_start=0,
    )
    list(responses)
    first, second = [call for new, call in seen if new > 1]
    assert first is not None and second is not None
    for a, b in zip(first.memory[:-1], second.memory[:-1]):
        np.testing.assert_array_equal(np.array(b["scores"]), np.array(a["scores"]))


def test_max_kv_size(tokenizer: Any) -> None:
    """A rotating cache smaller than the prompt; the FFN blocks do not care."""
    model, prompt = models.tiny("qwen2"), models.token_ids(TOKENS)
    seen = watch(attach(model, models.settings()))
    cache = make_prompt_cache(model, 32)
    assert isinstance(cache[0], RotatingKVCache)
    got = said(mlx_lm.stream_generate(model, tokenizer, prompt, 8, max_kv_size=32))
    assert plans(seen)[0] == (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert_same(got, models.decode(model, prompt, 8, cache))
    assert_other(got, models.decode(model, prompt, 8))  # the window is felt
    detach(model)
    assert_other(got, models.decode(model, prompt, 8, make_prompt_cache(model, 32)))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_batch_equals_its_own_run(name: str, selector: str) -> None:
    """Two calls over plain caches, the second without a dense head."""
    model = models.tiny(name)
    attach(model, models.settings(selector=selector))
    rows = [models.token_ids(TOKENS, seed=s) for s in range(3)]
    more = [models.token_ids(TOKENS, seed=s) for s in range(5, 8)]
    cache = make_prompt_cache(model)
    first = np.array(model(mx.array(rows), cache=cache))
    second = np.array(model(mx.array(more), cache=cache))
    for i in range(3):
        wanted, own = models.prefill(model, rows[i])
        assert models.distance(first[i], wanted) < 1e-4
        wanted, _ = models.prefill(model, more[i], own)
        assert models.distance(second[i], wanted) < 1e-4
    detach(model)
    dense, _ = models.prefill(model, rows[1])
    assert models.distance(first[1], dense) > 0.02


def batched(
    model: nn.Module, prompts: list[list[int]], n: int | list[int], **more: Any
) -> list[tuple[list[int], list[float]]]:
    """Tokens of each row of mlx-lm's batch_generate and their log-probabilities."""
    response = batch_generate(
        model,
        models.demo_tokenizer(),
        prompts,
        max_tokens=n,
        return_token_ids=True,
        return_logprobs=True,
        **more,
    )
    assert response.token_ids is not None and response.logprobs is not None
    return list(zip(response.token_ids, response.logprobs))


def assert_row(got: tuple[list[int], list[float]], wanted: Said) -> None:
    tokens, logprobs = wanted
    assert got[0] == tokens
    best = logprobs[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(got[1], best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-bias-sliding", "phi3"])
def test_batch_generate_with_equal_lengths(name: str, selector: str) -> None:
    model = models.tiny(name)
    seen = watch(attach(model, models.settings(selector=selector)))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(3)]
    got = batched(model, prompts, 5)
    assert plans(seen) == [(TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))]
    for row, prompt in zip(got, prompts):
        assert_row(row, models.decode(model, prompt, 5))


RAGGED = [TOKENS, TOKENS - 13, 4 * BLOCK + 1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_batch_generate_hides_right_padding(name: str) -> None:
    """mlx-lm pads the shorter prompts of a batch; the selectors are told where."""
    model = models.tiny(name)
    seen = watch(attach(model, models.settings()))
    batched(model, [models.token_ids(n, seed=n) for n in RAGGED], 1)
    (call,) = [call for new, call in seen if new > 1]
    assert call is not None and call.valid is not None
    wanted = [[1.0] * (n - 1) + [0.0] * (TOKENS - n) for n in RAGGED]
    assert np.array(call.valid).tolist() == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_batch_generate_with_ragged_lengths(name: str) -> None:
    """Real tokens alone choose a padded row's neurons, as in the oracle by hand.

    All rows share one plan: shorter rows' ends are not dense as in runs of their own.
    """
    model = models.tiny(name)
    hand = models.by_hand(model, name, BLOCK, 8 * BLOCK, FFN // 2)
    prompts = [models.token_ids(n, seed=n) for n in RAGGED]
    wanted = []
    for prompt in prompts:
        _, cache = models.prefill(hand, prompt[:-1])
        wanted.append(models.continue_from(model, prompt[-1], 5, cache))
    attach(model, models.settings(selector="oracle"))
    for row, by_hand in zip(batched(model, prompts, 5), wanted):
        assert_row(row, by_hand)


def batch_caches(model: nn.Module, rows: int) -> list[Any]:
    """Empty caches for a batch, as mlx-lm's server makes them."""
    return [
        (
            BatchRotatingKVCache(c.max_size, [0] * rows)
            if isinstance(c, RotatingKVCache)
            else BatchKVCache([0] * rows)
        )
        for c in make_prompt_cache(model)
    ]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_what_the_padding_holds_changes_nothing(name: str, selector: str) -> None:
    model = models.tiny(name)
    attach(model, models.settings(selector=selector))
    assert_padding_hidden(model)


@pytest.mark.parametrize("kind", ["pooled", "token-wise"])
def test_predictors_do_not_see_what_the_padding_holds(
    kind: str, tmp_path: Path
) -> None:
    model = models.tiny("llama")
    side = models.save_random_predictor(
        model, tmp_path, predictor=kind, compensator="low-rank"
    )
    attach(model, models.settings(), predictor=ff.load_predictor(side))
    assert_padding_hidden(model)


class Watched(Trained):
    """Notes which blocks have no real token, by the engine's masks, and the scores."""

    def __init__(self, other: Any):
        super().__init__(other.layers)
        self.real: list[mx.array] = []
        self.scores: list[mx.array] = []

    def __call__(self, layer: int, ffn: Any, seen: Any) -> mx.array:
        scores = super().__call__(layer, ffn, seen)
        if seen.valid is not None:
            self.real.append(mx.max(seen.valid[0], axis=-1))
            self.scores.append(scores)
        return scores


@pytest.mark.parametrize("kind", ["pooled", "token-wise"])
def test_scores_of_padded_blocks_are_numbers(kind: str, tmp_path: Path) -> None:
    """RAGGED leaves the last row blocks of nothing but padding: they count as real."""
    model = models.tiny("llama")
    side = models.save_random_predictor(model, tmp_path, predictor=kind)
    engine = attach(model, models.settings(), predictor=ff.load_predictor(side))
    engine.selector = watched = Watched(engine.selector)
    batched(model, [models.token_ids(n, seed=n) for n in RAGGED], 1)
    assert len(watched.scores) == LAYERS - 1
    assert all(mx.all(mx.isfinite(scores)).item() for scores in watched.scores)
    assert all(mx.all(real == 1).item() for real in watched.real)


def assert_padding_hidden(model: nn.Module) -> None:
    """Rows of a batch give the same, whatever fills the shorter ones."""
    lengths = [n - 1 for n in RAGGED]
    padding = [lengths[0] - n for n in lengths]
    rows = [models.token_ids(n, seed=n) for n in lengths]
    outs = []
    for fill in (0, 50):
        cache = batch_caches(model, len(rows))
        for c in cache:
            c.prepare(lengths=lengths, right_padding=padding)
        ids = [row + [fill] * n for row, n in zip(rows, padding)]
        outs.append(np.array(model(mx.array(ids), cache=cache)))
    for i, n in enumerate(lengths):
        assert models.distance(outs[0][i, :n], outs[1][i, :n]) < 1e-5
    assert models.distance(outs[0][2], outs[1][2]) > 0.02  # the padding itself differs
    single, _ = models.prefill(model, rows[0])
    assert models.distance(outs[0][0], single) < 1e-4


def test_batch_generate_with_short_prompts_is_dense() -> None:
    model, plain = models.tiny("llama"), models.tiny("llama")
    seen = watch(attach(model, models.settings()))
    prompts = [models.token_ids(n, seed=n) for n in (5, 20, 24)]
    assert batched(model, prompts, 6) == batched(plain, prompts, 6)
    assert plans(seen) == [(23, None)]


def test_prompts_that_join_a_running_batch_get_a_dense_head() -> None:
    """Over mlx-lm's batch caches: a slot that another prompt left is empty again."""
    model = models.tiny("llama")
    seen = watch(attach(model, models.settings()))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(4)]
    lengths = [2, 7, 5, 3]
    got = batched(
        model, prompts, lengths, prefill_batch_size=2, completion_batch_size=2
    )
    whole = (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert plans(seen) == [whole] * len(plans(seen)) and len(plans(seen)) > 1
    for row, prompt, n in zip(got, prompts, lengths):
        assert_row(row, models.decode(model, prompt, n))


@pytest.mark.parametrize("selector", ["probe", "oracle"])
def test_batch_generate_over_histories_of_different_lengths(selector: str) -> None:
    """As in the server with prompt caches: shorter histories are padded on the left."""
    model = models.tiny("llama")
    engine = attach(model, models.settings(selector=selector))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(2)]
    caches = [
        models.prefill(model, models.token_ids(n, seed=n))[1] for n in (21, 4 * BLOCK)
    ]
    seen = watch(engine)
    got = batched(model, prompts, 5, prompt_caches=copy.deepcopy(caches))
    assert plans(seen) == [(TOKENS - 1, Plan(0, 8, BLOCK, BLOCK))]
    for row, prompt, cache in zip(got, prompts, caches):
        assert_row(row, models.decode(model, prompt, 5, cache))


@pytest.mark.parametrize("selector", ["first-block", "oracle"])
def test_sparse_decode_in_batches_that_grow_and_shrink(selector: str) -> None:
    """Rows come and go while others decode: each must keep its own neurons.

    What first-block remembers of a prompt cannot follow the rows: there decoding stays dense.
    """
    model, reference = models.tiny("llama"), models.tiny("llama")
    kind: dict[str, Any] = dict(selector=selector, dense_head=False)
    attach(model, models.settings(sparse_decode=True, **kind))
    sparse = selector == "oracle"
    attach(reference, models.settings(sparse_decode=sparse, **kind))
    prompts = [models.token_ids(TOKENS, seed=s) for s in range(4)]
    lengths = [2, 9, 6, 8]
    got = batched(
        model, prompts, lengths, prefill_batch_size=2, completion_batch_size=2
    )
    for row, prompt, n in zip(got, prompts, lengths):
        assert_row(row, models.decode(reference, prompt, n))


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("same", [True, False])
def test_speculative_decoding(tokenizer: Any, drafts: int, same: bool) -> None:
    """Greedy output is the target's own, whatever the draft proposes."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    draft = models.tiny("llama", seed=0 if same else 7)
    engine = attach(model, models.settings())
    wanted = models.decode(model, prompt, 12)
    seen = watch(engine)
    responses = list(
        mlx_lm.stream_generate(
            model, tokenizer, prompt, 12, draft_model=draft, num_draft_tokens=drafts
        )
    )
    assert_same(said(responses), wanted)
    assert any(r.from_draft for r in responses) or not same
    assert plans(seen)[0] == (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert max(new for new, _ in seen[1:]) == drafts + 1
    assert all(call is None for _, call in seen[1:])


def test_speculative_decoding_through_our_stream_generate(tokenizer: Any) -> None:
    """The last prompt token and the first drafts are more than the prompt has left."""
    model, prompt = models.tiny("llama"), models.token_ids(TOKENS)
    engine = attach(model, models.settings())
    alone = list(ff.stream_generate(model, tokenizer, prompt, 12))
    seen = watch(engine)
    responses = list(
        ff.stream_generate(
            model,
            tokenizer,
            prompt,
            12,
            draft_model=models.tiny("llama", seed=7),
            num_draft_tokens=4,
        )
    )
    assert engine.remaining is None
    assert plans(seen)[0] == (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
    assert seen[1] == (5, None) and all(call is None for _, call in seen[1:])
    assert_same(said(responses), said(alone))
    assert responses[0].ffn_sparsity == pytest.approx(alone[0].ffn_sparsity, abs=0.02)
    assert responses[0].ffn_sparsity > 0.2


CHUNKS: list[tuple[Callable[..., Any], Planned]] = [
    (  # nobody tells the model that more follows: each chunk has its own tail
        mlx_lm.stream_generate,
        [
            (40, Plan(8, 3, 8, 8)),
            (40, Plan(0, 4, 8, 8)),
            (24, Plan(0, 2, 8, 8)),
        ],
    ),
    (  # only the true end is dense: eight tokens, of which the last goes alone
        ff.stream_generate,
        [
            (40, Plan(8, 4, 8, 0)),
            (40, Plan(0, 5, 8, 0)),
            (24, Plan(0, 2, 8, 8)),
        ],
    ),
]


@pytest.mark.parametrize("generate, wanted", CHUNKS, ids=["mlx_lm", "ours"])
def test_chunked_prefill(tokenizer: Any, generate: Any, wanted: Planned) -> None:
    model, prompt = models.tiny("llama"), models.token_ids(40 + 40 + 24 + 1)
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
    prompt = models.token_ids(total)
    next(ff.stream_generate(model, tokenizer, prompt, prefill_step_size=40))
    sparse: list[int] = []
    start = 0
    for new, call in seen:
        if call is not None:
            sparse += range(start + call.plan.start, start + call.plan.stop)
        start += new
    assert start == total + 1  # and one step of decoding
    assert sparse[0] == BLOCK
    assert total - 3 * BLOCK <= sparse[-1] < total - BLOCK
    assert len(sparse) >= total - 4 * BLOCK


def test_two_turns_over_one_cache(tokenizer: Any) -> None:
    """The second prompt is read over the first and its answer, without a head."""
    model = models.tiny("llama")
    seen = watch(attach(model, models.settings(selector="oracle")))
    first, second = models.token_ids(TOKENS), models.token_ids(TOKENS, seed=1)
    cache = make_prompt_cache(model)
    answer, _ = said(
        mlx_lm.stream_generate(model, tokenizer, first, 5, prompt_cache=cache)
    )
    assert cache[0].offset == TOKENS + 5
    got = said(mlx_lm.stream_generate(model, tokenizer, second, 6, prompt_cache=cache))
    assert plans(seen) == [
        (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK)),
        (TOKENS - 1, Plan(0, 8, BLOCK, BLOCK)),
    ]
    detach(model)
    hand = models.by_hand(model, "llama", BLOCK, 8 * BLOCK, FFN // 2)
    _, cache = models.prefill(hand, first[:-1])
    for token in [first[-1], *answer]:
        models.prefill(model, [token], cache)
    hand = models.by_hand(model, "llama", 0, 8 * BLOCK, FFN // 2)
    models.prefill(hand, second[:-1], cache)
    assert_same(got, models.continue_from(model, second[-1], 6, cache))


def test_first_block_serves_later_calls_of_the_same_cache() -> None:
    """GRIFFIN's neurons are those of the prompt's first block, in every later chunk."""
    model = models.tiny("llama")
    seen = watch(attach(model, models.settings(selector="first-block")))
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


def test_a_cache_trimmed_to_nothing_remembers_nothing() -> None:
    """Another prompt in the same cache objects gets its own first block's neurons."""
    model = models.tiny("llama")
    attach(model, models.settings(selector="first-block", dense_head=False))
    first, second = models.token_ids(TOKENS), models.token_ids(TOKENS, seed=1)
    _, cache = models.prefill(model, first)
    trim_prompt_cache(cache, TOKENS)
    again, _ = models.prefill(model, second, cache)
    fresh, _ = models.prefill(model, second)
    np.testing.assert_array_equal(again, fresh)


def test_memory_is_kept_on_its_cache_and_copied_with_it() -> None:
    """Nothing else may hold it but the engine, for the cache that quantisation puts in place."""
    model = models.tiny("llama")
    engine = attach(model, models.settings(selector="first-block"))
    _, one = models.prefill(model, models.token_ids(TOKENS))
    _, two = models.prefill(model, models.token_ids(TOKENS, seed=1))
    memory = two[0]._fastforward
    assert memory is engine.memory.last is not one[0]._fastforward
    twin = copy.deepcopy(two)[0]._fastforward
    assert twin is not memory
    np.testing.assert_array_equal(
        np.array(twin[0]["scores"]), np.array(memory[0]["scores"])
    )
