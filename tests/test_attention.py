"""Attention by blocks of queries, and attention that is watched: in one model, in no other."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from reference import float64

from mlx_fastforward import DeviceSettings, attach
from mlx_fastforward.attachment import switched, watched, watched_attention
from mlx_fastforward.model.attention import NAME, by_queries


def reference(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal attention by the definition; the last query sees every key."""
    q, k, v = map(float64, (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    new, seen = q.shape[2], k.shape[2]
    scores = np.einsum("bhqe,bhke->bhqk", q, k) * scale
    hidden = np.arange(seen)[None] > np.arange(new)[:, None] + seen - new
    weights = np.exp(np.where(hidden, -np.inf, scores))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bhke->bhqe", weights, v)


@given(
    new=st.integers(1, 40),
    cached=st.integers(0, 20),
    rows=st.integers(1, 45),
    batch=st.integers(1, 2),
)
def test_equals_the_definition(new: int, cached: int, rows: int, batch: int) -> None:
    q = mx.random.normal((batch, 4, new, 8))
    k, v = (mx.random.normal((batch, 2, cached + new, 8)) for _ in range(2))
    whole = mx.fast.scaled_dot_product_attention
    y = by_queries(whole, rows)(q, k, v, scale=0.3, mask="causal")
    assert np.allclose(y, reference(q, k, v, 0.3), atol=1e-5)


def test_only_plain_causal_calls_are_cut() -> None:
    """Not those of quantised keys, or of a mask that hides what it likes."""
    q, k = mx.zeros((1, 2, 10, 4)), mx.zeros((1, 2, 13, 4))
    hidden, seen = mx.ones((10, 13), dtype=mx.bool_), []

    def original(queries: Any, keys: Any, *args: Any, **kwargs: Any) -> mx.array:
        seen.append((queries.shape[2], len(keys) if keys is packed else keys.shape[2]))
        return queries

    packed = (k, k, k)
    for keys, mask in ((k, "causal"), (k, None), (k, hidden), (packed, "causal")):
        by_queries(original, 4)(q, keys, keys, mask=mask)
    assert seen == [(4, 7), (4, 11), (2, 13), (10, 13), (10, 13), (10, 3)]


def in_blocks(model: nn.Module, rows: int) -> None:
    device = DeviceSettings(attention_block=rows)
    attach(model, models.settings(), device=device)


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every attention kernel that runs from now on."""
    seen, kernel = [], mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.append(q.shape[2])
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_a_model_answers_the_same(name: str, queries: list[int]) -> None:
    """Gemma 2 spells its attention out: it runs as it is."""
    model, ids = models.tiny(name), mx.array([models.token_ids(96)])
    logits = []
    for rows in (0, 16):
        in_blocks(model, rows)
        cache = make_prompt_cache(model)
        first = model(ids[:, :64], cache=cache)
        logits.append(mx.concatenate([first, model(ids[:, 64:], cache=cache)], axis=1))
    assert (16 in queries) == (name != "gemma2")
    assert mx.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_two_models_of_one_architecture_do_not_see_each_other(
    queries: list[int],
) -> None:
    """One attends in blocks, the other is watched; a third one is stock."""
    cut, other, stock = (models.tiny("llama") for _ in range(3))
    in_blocks(cut, 16)
    ids, seen = models.token_ids(64), []
    alone, wanted = models.prefill(cut, ids), models.prefill(stock, ids)
    before, kinds = getattr(llama, NAME), [type(m.self_attn) for m in other.layers]

    def around(layer: int, own: Any, q: mx.array, *args: Any, **kw: Any) -> mx.array:
        seen.append((layer, q.shape[2]))
        return own(q, *args, **kw)

    with watched_attention(other, around) as there:
        assert there and getattr(llama, NAME) is before
        queries.clear()
        for model, found in ((cut, alone), (stock, wanted), (other, wanted)):
            assert not seen
            models.assert_close(models.prefill(model, ids), found, 0)
        assert queries == [16] * 16 + [64] * 8
    assert seen == [(layer, 64) for layer in range(4)]
    assert [type(m.self_attn) for m in other.layers] == kinds
    queries.clear()
    models.prefill(cut, [1], alone[1])  # only sparse calls are cut
    with switched(cut, False):
        models.prefill(cut, ids)
    models.prefill(other, ids)
    assert queries == [1] * 4 + [64] * 8 and len(seen) == 4
    with watched_attention(models.tiny("gemma2"), around) as there:
        assert not there  # its attention is spelled out


def test_watching_an_attached_model_changes_nothing_and_ends_with_an_error() -> None:
    model, ids = models.tiny("llama"), models.token_ids(64)
    attach(model, models.settings())
    wanted = models.prefill(model, ids)
    mlps = [layer.mlp for layer in model.layers]
    kinds, seen = [type(m) for m in mlps], []

    def around(i: int, own: Any, x: mx.array) -> mx.array:
        seen.append(i)
        return own(x)

    with pytest.raises(RuntimeError, match="inside"), watched(mlps, around):
        models.assert_close(models.prefill(model, ids), wanted, 0)
        raise RuntimeError("inside")
    assert seen == [0, 1, 2, 3] and [type(m) for m in mlps] == kinds
