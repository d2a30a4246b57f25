"""Attention by blocks of queries is the whole chunk's attention, and leaves other masks alone."""

from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mlx_fastforward import attach, detach
from mlx_fastforward.attachment import attention_module, replaced
from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.errors import ConfigError
from mlx_fastforward.model.attention import NAME, by_queries


def plain(queries: Any, keys: Any, values: Any, **kwargs: Any) -> mx.array:
    kwargs.pop("cache", None)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, **kwargs)


def reference(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal attention by the definition, float64; the last query sees every key."""
    q, k, v = (np.array(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
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
    y = by_queries(plain, rows)(q, k, v, cache=None, scale=0.3, mask="causal")
    assert np.allclose(y, reference(q, k, v, 0.3), atol=1e-5)


def calls_of(rows: int, *args: Any, **kwargs: Any) -> list[tuple[int, int]]:
    """(queries, keys) of every call of the original."""
    seen: list[tuple[int, int]] = []

    def original(queries: Any, keys: Any, *args: Any, **kwargs: Any) -> mx.array:
        first = keys if isinstance(keys, mx.array) else keys[0]
        seen.append((queries.shape[2], first.shape[2]))
        return queries

    by_queries(original, rows)(*args, **kwargs)
    return seen


def test_only_keys_that_are_seen_take_part() -> None:
    q, k = mx.zeros((1, 2, 10, 4)), mx.zeros((1, 2, 13, 4))
    assert calls_of(4, q, k, k, mask="causal") == [(4, 7), (4, 11), (2, 13)]


@pytest.mark.parametrize("mask", [None, mx.ones((10, 13), dtype=mx.bool_)])
def test_other_masks_run_whole(mask: Any) -> None:
    q, k = mx.zeros((1, 2, 10, 4)), mx.zeros((1, 2, 13, 4))
    assert calls_of(4, q, k, k, mask=mask) == [(10, 13)]


def test_quantised_keys_run_whole() -> None:
    q, k = mx.zeros((1, 2, 10, 4)), mx.zeros((1, 2, 13, 4))
    assert calls_of(4, q, (k, k, k), (k, k, k), mask="causal") == [(10, 13)]


@pytest.mark.parametrize("name", models.NAMES)
def test_a_model_answers_the_same(name: str) -> None:
    model = models.tiny(name)
    ids = mx.array([models.token_ids(96)])
    logits = []
    for rows in (0, 16):
        attach(model, models.settings(selector="probe", attention_block=rows))
        cache = make_prompt_cache(model)
        first = model(ids[:, :64], cache=cache)
        logits.append(mx.concatenate([first, model(ids[:, 64:], cache=cache)], axis=1))
    assert mx.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of every attention call that the model makes from now on."""
    module, seen = attention_module(model), []
    original = getattr(module, NAME)

    def watched(queries: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.append(queries.shape[2])
        return original(queries, *args, **kwargs)

    monkeypatch.setattr(module, NAME, watched)
    return seen


def test_only_sparse_calls_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    seen = counted(model, monkeypatch)
    attach(model, models.settings(selector="probe", attention_block=32))
    cache = make_prompt_cache(model)
    model(mx.array([models.token_ids(64)]), cache=cache)
    assert set(seen) == {32} and len(seen) == 2 * len(model.layers)
    seen.clear()
    model(mx.array([[1]]), cache=cache)
    assert set(seen) == {1}
    detach(model)
    seen.clear()
    model(mx.array([models.token_ids(64)]))
    assert set(seen) == {64}


def test_the_original_comes_back_after_an_error() -> None:
    module = attention_module(models.tiny("llama"))
    before = getattr(module, NAME)
    with pytest.raises(RuntimeError, match="inside"):
        with replaced(module, lambda whole: by_queries(whole, 8)) as there:
            assert there and getattr(module, NAME) is not before
            raise RuntimeError("inside")
    assert getattr(module, NAME) is before


def test_a_module_without_it_is_left_alone() -> None:
    with replaced(mx, lambda whole: by_queries(whole, 8)) as there:
        assert not there
    assert not hasattr(mx, NAME)


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_impossible_settings(value: Any) -> None:
    with pytest.raises(ConfigError, match="attention_block must be"):
        PrefillConfig(attention_block=value)
