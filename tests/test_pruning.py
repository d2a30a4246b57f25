"""Tokens that skip the FFN: who stays, and models under it against a forward by hand."""

import json
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
import reference
from commands import bad, good
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import cache as kv
from models import BLOCK, FFN, LAYERS, settings, token_ids

from mlx_fastforward.attachment import attach
from mlx_fastforward.tokens.plan import Plan
from mlx_fastforward.tokens.pruning import CentredNorm, keep_best, survivors

TOKENS = 7 * BLOCK + 3
HEAD, STOP, STAY = BLOCK, 6 * BLOCK, 3 * BLOCK  # of 40 in the middle, 24 stay
IDS = token_ids(TOKENS)
SHARE = 0.4


def attached(name: str, **more: Any) -> Any:
    model = models.tiny(name)
    attach(model, settings(**{"selector": "oracle", "prune_tokens": SHARE, **more}))
    return model


@given(st.data())
def test_who_stays(data: st.DataObject) -> None:
    """Head, tail and the best of the middle, in order; putting back undoes taking out."""
    count = st.integers(1, 3)
    plan = Plan(data.draw(st.integers(0, 3)), *(data.draw(count) for _ in range(3)))
    middle, batch = plan.stop - plan.start, data.draw(count)
    stay = data.draw(st.integers(1, middle))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    scores = rng.permuted(np.tile(np.arange(middle), (batch, 1)), axis=1)
    kept = keep_best(mx.array(scores), plan, plan.head + stay + plan.tail)
    for row, places in zip(scores, np.array(kept.order)):
        best = [plan.head + i for i in reference.top_k(row, stay)]
        ends = [*range(plan.head), *range(plan.stop, plan.tokens)]
        assert places[: kept.count].tolist() == sorted(ends + best)
        assert sorted(places) == list(range(plan.tokens))
    x = mx.random.normal((batch, plan.tokens, 2))
    assert mx.array_equal(kept.put(kept.take(x), kept.others(x)), x).item()
    assert kept.take(x[..., 0]).shape == (batch, kept.count)


@given(
    st.integers(1, 9),
    st.integers(2, 40),
    st.floats(0.01, 0.99),
    st.sampled_from([1, 8]),
)
def test_survivors_are_planned_like_tokens(
    blocks: int, size: int, share: float, unit: int
) -> None:
    """Between the same ends, about as many as asked for: less than a unit per block is missing."""
    plan = Plan(5, blocks, size * unit, 7)
    middle = plan.stop - plan.start
    found = survivors(plan, share, size * unit, unit)
    wanted = round((1 - share) * middle)
    if found is None:
        assert wanted < unit or wanted == middle
        return
    assert (found.head, found.tail) == (5, 7) and found.block_size % unit == 0
    stay = found.stop - found.start
    assert 0 <= wanted - stay < found.blocks * unit and stay < middle


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_importance_is_the_distance_from_the_mean(padded: bool, dtype: Any) -> None:
    """Of large inputs too, whose squares float16 does not hold; padding counts for nothing."""
    x = (300 * mx.random.normal((2, 20, 32), key=mx.random.key(0))).astype(dtype)
    real = np.random.default_rng(0).random((2, 20)) < 0.6
    found = CentredNorm().score(1, x, mx.array(real) * 1.0 if padded else None)
    for got, row, mask in zip(np.array(found), reference.float64(x), real):
        wanted = reference.far_from_mean(row, mask if padded else None)
        some = np.isfinite(wanted)
        np.testing.assert_allclose(got[some], wanted[some], rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_a_model_equals_the_forward_written_by_hand(name: str, sparsity: float) -> None:
    keep = [FFN // 2 if sparsity else None] * LAYERS
    plain = models.tiny(name)
    hand = models.by_hand(plain, name, HEAD, STOP, keep, STAY)
    got = models.prefill(attached(name, sparsity=sparsity), IDS)
    models.assert_close(got, models.prefill(hand, IDS))
    assert models.distance(got[0], models.prefill(plain, IDS)[0]) > 0.02


def test_what_no_token_skips() -> None:
    """The first layer's FFN, short calls and decode steps; every token has keys and values."""
    model, plain = attached("llama", sparsity=0.0), models.tiny("llama")
    (_, cache), (_, whole) = models.prefill(model, IDS), models.prefill(plain, IDS)
    for layer, (a, b) in enumerate(zip(cache, whole)):
        pairs = zip(a.keys_and_values(), b.keys_and_values())
        assert a.offset == TOKENS
        assert all(mx.allclose(x, y, 1e-5, 1e-5).item() for x, y in pairs) == (
            layer < 2
        )
    assert kv.trim_prompt_cache(cache, 20) == 20
    kv.trim_prompt_cache(whole, 20)
    for c, w in zip(cache, whole):
        w.state = c.state
    for ids in ([5], token_ids(3 * BLOCK - 1), [7]):
        models.assert_close(
            models.prefill(model, ids, cache), models.prefill(plain, ids, whole), 0
        )


@pytest.mark.parametrize("selector", ["probe", "first-block", "oracle"])
def test_rows_of_a_batch(selector: str) -> None:
    """Each as in its own run, over plain caches, the second call without a head."""
    model = attached("llama", selector=selector)
    cache = kv.make_prompt_cache(model)
    own = [kv.make_prompt_cache(model) for _ in range(2)]
    for call in range(2):
        rows = [token_ids(TOKENS, seed=2 * call + i) for i in range(2)]
        got = np.array(model(mx.array(rows), cache=cache))
        for row, logits, mine in zip(rows, got, own):
            assert models.distance(logits, models.prefill(model, row, mine)[0]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padding_skips_first_and_changes_nothing(name: str) -> None:
    """Right padding in batch caches, as mlx-lm's server has it."""
    model, outs = attached(name), []
    rows = [token_ids(n, seed=n) for n in (TOKENS, TOKENS - 20)]
    for fill in (0, 50):
        cache = [c.merge([c] * 2) for c in kv.make_prompt_cache(model)]
        for c in cache:
            c.prepare(lengths=[len(r) for r in rows], right_padding=[0, 20])
        ids = mx.array([rows[0], rows[1] + [fill] * 20])
        outs.append(np.array(model(ids, cache=cache)))
    for a, b, row in zip(*outs, rows):
        assert models.distance(a[: len(row)], b[: len(row)]) < 1e-5
    # 16 of the 40 tokens between head and tail skip, and 9 of those are padding
    assert models.distance(outs[0][0], models.prefill(model, rows[0])[0]) < 1e-4


def test_the_flag(tmp_path: Any) -> None:
    folder = models.save_folder(models.tiny("llama", vocab=4096), tmp_path / "tiny")
    args = ["generate", "word " * 80, "--model", folder, "-m", 1, "--json"]
    args += ["--block-size", 8, "--sparsity", 0, "--prune-tokens"]
    said = json.loads(good(*args, 0.5))
    assert said["settings"]["prune_tokens"] == 0.5 and said["settings"]["sparsity"] == 0
    assert said["ffn_sparsity"] > 0.2
    assert "prune_tokens must be" in bad(2, *args, 1.5)
