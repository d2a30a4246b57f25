"""Attached models in unmodified mlx-lm: generation, caches, batches, drafts, chunks."""

import copy
from pathlib import Path
from typing import Any, Iterable, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.generate import batch_generate
from mlx_lm.models import cache as kv
from models import BLOCK, FFN, LAYERS, prefill, settings, tiny, token_ids

import mlx_fastforward as ff
from mlx_fastforward import attach, detach
from mlx_fastforward.attachment import reading
from mlx_fastforward.engine import Call, Engine
from mlx_fastforward.tokens.plan import Plan

TOKENS = 9 * BLOCK + 1  # the last one goes alone, after eight blocks and a tail
PROMPT, OTHER = token_ids(TOKENS), token_ids(TOKENS, seed=1)
WHOLE = (TOKENS - 1, Plan(BLOCK, 7, BLOCK, BLOCK))
SELECTORS = ["probe", "oracle", "first-block"]
Said = tuple[list[int], np.ndarray]
Seen = list[tuple[int, Optional[Call]]]
Row = tuple[list[int], list[float]]


def watch(engine: Engine) -> Seen:
    """A list that grows by (new tokens, call) with every call of the model."""
    seen, begin = [], engine.begin

    def spy(prompt: Any, batch: int, new: int, cache: Any) -> Optional[Call]:
        seen.append((new, begin(prompt, batch, new, cache)))
        return seen[-1][1]

    engine.begin = spy  # type: ignore[method-assign]
    return seen


def plans(seen: Seen) -> list[tuple[int, Optional[Plan]]]:
    """What was planned for the calls of more than one token."""
    return [(new, call.split.plan if call else None) for new, call in seen if new > 1]


def stream(model: Any, prompt: Any, n: int, by: Any = mlx_lm, **more: Any) -> Any:
    return by.stream_generate(model, models.demo_tokenizer(), prompt, n, **more)


def said(responses: Iterable[Any]) -> Said:
    """Tokens and log-probabilities of a stream."""
    listed = list(responses)
    return [r.token for r in listed], models.logprobs(listed)


def assert_same(got: Said, wanted: Said) -> None:
    assert got[0] == wanted[0]
    assert models.distance(got[1], wanted[1]) < 1e-4


def assert_other(got: Said, wanted: Said) -> None:
    """The first token's probabilities differ; a random model's tokens may not."""
    assert models.distance(got[1][0], wanted[1][0]) > 3e-3


def by_hand(model: nn.Module, name: str, prompt: list[int], n: int) -> Said:
    """What a plain model says after a prompt that it read sparsely by itself."""
    hand = models.by_hand(model, name, BLOCK, 8 * BLOCK, FFN // 2)
    _, cache = prefill(hand, prompt[:-1])
    return models.continue_from(model, prompt[-1], n, cache)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stream_generate(name: str) -> None:
    """The output is that of a hand-written sparse prefill and a dense continuation."""
    model = tiny(name)
    dense, wanted = models.decode(model, PROMPT, 8), by_hand(model, name, PROMPT, 8)
    seen = watch(attach(model, settings(selector="oracle")))
    got = said(stream(model, PROMPT, 8))
    assert plans(seen) == [WHOLE]
    assert_same(got, wanted)
    assert_other(got, dense)


@pytest.mark.parametrize("selector", SELECTORS)
def test_saved_and_loaded_prompt_cache(selector: str, tmp_path: Path) -> None:
    """It can be extended sparsely, too: without what the selector remembered."""
    model = tiny("llama")
    attach(model, settings(selector=selector))
    _, cache = prefill(model, PROMPT[:-1])
    path = str(tmp_path / "c.safetensors")
    kv.save_prompt_cache(path, cache, {"model": "tiny"})
    loaded, again = kv.load_prompt_cache(path), kv.load_prompt_cache(path)
    got = said(stream(model, PROMPT[-1:], 8, prompt_cache=loaded))
    assert_same(got, models.decode(model, PROMPT, 8))
    logits, _ = prefill(model, OTHER, again)
    detach(model)
    dense, _ = prefill(model, OTHER, copy.deepcopy(cache))
    assert np.isfinite(logits).all() and models.distance(logits, dense) > 0.02


def test_trimmed_prompt_cache() -> None:
    """A second call has no dense head, and trimmed off it can be read again."""
    model, plain, first = tiny("llama"), tiny("llama"), token_ids(2 * BLOCK)
    attach(model, settings(selector="oracle"))
    fresh, cache = prefill(model, first)
    wanted, _ = prefill(model, OTHER, cache)
    hand = models.by_hand(plain, "llama", 0, 8 * BLOCK, FFN // 2)
    by_itself, _ = prefill(hand, OTHER, prefill(plain, first)[1])
    assert models.distance(wanted, by_itself) < 1e-4
    for size, ids, logits in ((0, OTHER, wanted), (2 * BLOCK, first, fresh)):
        assert kv.trim_prompt_cache(cache, TOKENS + size) == TOKENS + size
        np.testing.assert_array_equal(prefill(model, ids, cache)[0], logits)


@pytest.mark.parametrize("selector", SELECTORS)
def test_quantised_kv_cache(selector: str) -> None:
    """At 8 bits the first token's logits stay close to those over a float cache.

    mlx-lm replaces the cache objects between two chunks: the memory goes along.
    """
    model = tiny("llama", hidden_size=128)  # groups of 32 need heads of 32
    seen = watch(attach(model, settings(selector=selector)))
    bits: dict[str, Any] = dict(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    logprobs = []
    for more in ({}, bits):
        seen.clear()
        cache = kv.make_prompt_cache(model)
        more = {"prompt_cache": cache, "prefill_step_size": 4 * BLOCK, **more}
        logprobs.append(said(stream(model, PROMPT, 1, **more))[1])
        assert isinstance(cache[0], kv.QuantizedKVCache) == ("kv_bits" in more)
        first, second = [call.memory for _, call in seen if call]
        for a, b in zip(first[:-1], second[:-1]):
            assert list(a) == list(b) == ["scores"] * (selector == "first-block")
            assert all(a[k] is b[k] for k in a)
    assert 0 < models.distance(logprobs[1], logprobs[0]) < 0.05


# Batches


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_each_row_of_a_batch_equals_its_own_run(name: str, selector: str) -> None:
    """Two calls over plain caches, the second without a dense head."""
    model, plain = tiny(name), tiny(name)
    attach(model, settings(selector=selector))
    cache, own = kv.make_prompt_cache(model), [
        kv.make_prompt_cache(model) for _ in range(3)
    ]
    for call in range(2):
        rows = [token_ids(TOKENS, seed=3 * call + i) for i in range(3)]
        got = np.array(model(mx.array(rows), cache=cache))
        for row, logits, mine in zip(rows, got, own):
            assert models.distance(logits, prefill(model, row, mine)[0]) < 1e-4
            assert call or models.distance(logits, prefill(plain, row)[0]) > 0.02


def batched(model: nn.Module, prompts: Any, n: Any, **more: Any) -> list[Row]:
    """Tokens of each row of mlx-lm's batch_generate and their log-probabilities."""
    more |= {"max_tokens": n, "return_token_ids": True, "return_logprobs": True}
    response: Any = batch_generate(model, models.demo_tokenizer(), prompts, **more)
    return list(zip(response.token_ids, response.logprobs))


def assert_row(got: Row, wanted: Said) -> None:
    tokens, logprobs = wanted
    assert got[0] == tokens
    best = logprobs[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(got[1], best, rtol=1e-3, atol=1e-4)


LENGTHS = [TOKENS, TOKENS - 13, 4 * BLOCK + 1]
RAGGED = [token_ids(n, seed=n) for n in LENGTHS]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_batch_generate_with_ragged_lengths(name: str) -> None:
    """Real tokens alone choose a padded row's neurons, as in the oracle by hand.

    All rows share one plan: shorter rows' ends are not dense as in runs of their own.
    """
    model = tiny(name)
    wanted = [by_hand(model, name, prompt, 5) for prompt in RAGGED]
    seen = watch(attach(model, settings(selector="oracle")))
    for row, hand in zip(batched(model, RAGGED, 5), wanted):
        assert_row(row, hand)
    (call,) = [call for new, call in seen if new > 1]
    assert call is not None and call.valid is not None
    real = [[1.0] * (n - 1) + [0.0] * (TOKENS - n) for n in LENGTHS]
    assert np.array(call.valid).tolist() == real


@pytest.mark.parametrize(
    "name, selector",
    [*(("llama", s) for s in SELECTORS), ("gemma3_text", "probe")]
    + [("llama", "pooled"), ("llama", "token-wise")],
)
def test_what_the_padding_holds_changes_nothing(
    name: str, selector: str, tmp_path: Path
) -> None:
    """Over empty batch caches, as mlx-lm's server makes them."""
    model = tiny(name)
    if selector in SELECTORS:
        attach(model, settings(selector=selector))
    else:
        kinds = {"predictor": selector, "compensator": "low-rank"}
        side = models.save_random_predictor(model, tmp_path, **kinds)
        attach(model, settings(), predictor=ff.load_predictor(side))
    rows = [prompt[:-1] for prompt in RAGGED]
    padding = [len(rows[0]) - len(row) for row in rows]
    outs = []
    for fill in (0, 50):
        one = kv.make_prompt_cache(model)
        cache = [c.merge([c] * len(rows)) for c in one]
        for c in cache:
            c.prepare(lengths=[len(r) for r in rows], right_padding=padding)
        ids = mx.array([row + [fill] * n for row, n in zip(rows, padding)])
        outs.append(np.array(model(ids, cache=cache)))
    for a, b, row in zip(*outs, rows):
        assert models.distance(a[: len(row)], b[: len(row)]) < 1e-5
    assert np.isfinite(outs).all()
    assert models.distance(outs[0][2], outs[1][2]) > 0.02  # the padding itself differs
    assert models.distance(outs[0][0], prefill(model, rows[0])[0]) < 1e-4


@pytest.mark.parametrize("selector", ["probe", "oracle"])
def test_batch_generate_over_histories_of_different_lengths(selector: str) -> None:
    """As in the server with prompt caches: shorter histories are padded on the left."""
    model = tiny("llama")
    engine = attach(model, settings(selector=selector))
    caches = [prefill(model, token_ids(n, seed=n))[1] for n in (21, 4 * BLOCK)]
    seen = watch(engine)
    got = batched(model, [PROMPT, OTHER], 5, prompt_caches=copy.deepcopy(caches))
    assert plans(seen) == [(TOKENS - 1, Plan(0, 8, BLOCK, BLOCK))]
    for row, prompt, cache in zip(got, (PROMPT, OTHER), caches):
        assert_row(row, models.decode(model, prompt, 5, cache))


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding", "gemma3"])
@pytest.mark.parametrize("selector", ["probe", "first-block", "oracle"])
def test_batches_that_grow_and_shrink(selector: str, name: str) -> None:
    """A slot that another prompt left is empty again, and its next prompt gets a dense head.

    In sparse decoding each row keeps its own neurons. What first-block remembers of a prompt
    cannot follow the rows: there decoding stays dense.
    """
    model, alone = tiny(name), tiny(name)
    sparse = {"sparse_decode": selector != "probe"}
    seen = watch(attach(model, settings(selector=selector, **sparse)))
    sparse = {"sparse_decode": selector == "oracle"}
    attach(alone, settings(selector=selector, **sparse))
    prompts, lengths = [token_ids(TOKENS, seed=s) for s in range(4)], [2, 9, 6, 8]
    slots = {"prefill_batch_size": 2, "completion_batch_size": 2}
    got = batched(model, prompts, lengths, **slots)
    assert plans(seen) == [WHOLE] * len(plans(seen)) and len(plans(seen)) > 1
    for row, prompt, n in zip(got, prompts, lengths):
        assert_row(row, models.decode(alone, prompt, n))


# Drafts, chunks, turns, and requests in turns


@pytest.mark.parametrize("by", [mlx_lm, ff])
@pytest.mark.parametrize("drafts, same", [(1, True), (4, True), (4, False)])
def test_speculative_decoding(drafts: int, same: bool, by: Any) -> None:
    """Greedy output is the target's own, whatever the draft proposes.

    The last prompt token and the first drafts are more than the prompt has left.
    """
    model, draft = tiny("llama"), tiny("llama", seed=0 if same else 7)
    engine = attach(model, settings())
    wanted = list(stream(model, PROMPT, 12, by))
    seen = watch(engine)
    more = {"draft_model": draft, "num_draft_tokens": drafts}
    got = list(stream(model, PROMPT, 12, by, **more))
    assert_same(said(got), said(wanted))
    assert any(r.from_draft for r in got) or not same
    assert plans(seen)[0] == WHOLE and seen[1] == (drafts + 1, None)
    assert all(call is None for _, call in seen[1:])
    assert models.idle(model)
    if by is ff:
        share = got[0].ffn_sparsity
        assert share == pytest.approx(wanted[0].ffn_sparsity, abs=0.02) and share > 0.2


@pytest.mark.parametrize(
    "by, wanted",
    [  # nobody tells the model that more follows: each chunk has its own tail
        (mlx_lm, [Plan(8, 3, 8, 8), Plan(0, 4, 8, 8), None]),
        # only the true end is dense: eight tokens, of which the last goes alone
        (ff, [Plan(8, 4, 8, 0), Plan(0, 5, 8, 0), Plan(0, 2, 8, 7)]),
    ],
)
def test_chunked_prefill(by: Any, wanted: list[Optional[Plan]]) -> None:
    model = tiny("llama")
    seen = watch(attach(model, settings()))
    list(stream(model, token_ids(104), 1, by, prefill_step_size=40))
    assert plans(seen) == list(zip((40, 40, 23), wanted))


def test_requests_in_turns() -> None:
    """One prompt is read in chunks while another request decodes, and a third is read."""
    model, long = tiny("llama"), token_ids(2 * TOKENS, seed=3)
    attach(model, settings(selector="first-block"))
    alone = said(stream(model, PROMPT, 6, ff))
    other = iter(stream(model, PROMPT, 6, ff))
    got, found = [next(other)], []
    for interrupted in (False, True):
        with reading(model, len(long)) as prompt:
            _, cache = prefill(model, long[:TOKENS])
            if interrupted:
                with reading(model, 0):  # what is no part of the prompt
                    got += [next(other), next(other)]
                with reading(model, TOKENS) as third:
                    prefill(model, OTHER)
            found.append((prefill(model, long[TOKENS:], cache), prompt))
    models.assert_close(found[1][0], found[0][0], 0)
    assert found[1][1] == found[0][1] and prompt.left == third.left == 0
    assert 0 < third.flops.sparsity < prompt.flops.sparsity
    assert_same(said([*got, *other]), alone)
    assert models.idle(model)


# What first-block remembers


def test_first_block_serves_later_calls_of_the_same_cache() -> None:
    """GRIFFIN's neurons are those of the prompt's first block, in every later chunk.

    The memory lives on the cache, and goes with a copy of it, and that into mlx-lm's
    quantised cache.
    """
    model = tiny("llama", hidden_size=128)  # groups of 32 need heads of 32
    seen = watch(attach(model, settings(selector="first-block")))
    _, cache = prefill(model, PROMPT)
    twin = copy.deepcopy(cache)
    packed = [c.to_quantized(group_size=32, bits=8) for c in twin]
    logits = [prefill(model, OTHER, c)[0] for c in (cache, twin, packed)]
    prefill(model, token_ids(TOKENS, seed=2))
    first, second, copied, quantised, other = [c.memory for _, c in seen if c]
    assert second is first is cache[0]._fastforward[1]
    assert quantised is copied is twin[0]._fastforward[1] is not first is not other
    for layer in range(LAYERS - 1):
        a, b, c = (np.array(m[layer]["scores"]) for m in (first, copied, other))
        np.testing.assert_array_equal(a, b)
        assert models.distance(a, c) > 0.02
    np.testing.assert_array_equal(logits[0], logits[1])
    assert 0 < models.distance(logits[2], logits[0]) < 0.05


def test_a_cache_trimmed_to_nothing_remembers_nothing() -> None:
    """Another prompt in the same cache objects gets its own first block's neurons."""
    model = tiny("llama")
    attach(model, settings(selector="first-block", dense_head=False))
    _, cache = prefill(model, PROMPT)
    kv.trim_prompt_cache(cache, TOKENS)
    again, _ = prefill(model, OTHER, cache)
    np.testing.assert_array_equal(again, prefill(model, OTHER)[0])
