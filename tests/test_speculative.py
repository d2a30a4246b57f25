"""Speculative prefill: which tokens stay, where they stand, and what decoding makes of them."""

import copy
from typing import Any, Optional, Sequence

import mlx.core as mx
import models
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from models import tiny, token_ids

from mlx_fastforward import attach, speculative
from mlx_fastforward.checkpoints import can_trim
from mlx_fastforward.errors import ConfigError, UnsupportedModel
from mlx_fastforward.model import positions
from mlx_fastforward.model.positions import (
    CompactKVCache,
    is_whole,
    make_compact,
    places_of,
    ropes_of,
    runs_of,
)
from mlx_fastforward.scorers import Attention, DraftScorer, LayersScorer
from mlx_fastforward.speculative import Speculative, read_places
from mlx_fastforward.tokens.mapping import Translation, carried
from mlx_fastforward.tokens.speculative import (
    KeepConfig,
    importance,
    kept_places,
    pooled,
    weights,
)

SMALL = dict(threshold=1, chunk=4, pool=5, look_ahead=3)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3 scaling": dict(
        rope_scaling=dict(
            rope_type="llama3", factor=4.0, original_max_position_embeddings=32
        )
    ),
    "llama yarn": dict(
        rope_scaling=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32
        )
    ),
    "llama traditional": dict(rope_traditional=True),
    "llama-bias-sliding": {},
    "qwen3": {},
    "gemma3_text": {},
    "gemma3": {},
    "phi3": dict(partial_rotary_factor=0.5),
    "phi3 su": dict(
        original_max_position_embeddings=32,
        max_position_embeddings=128,
        rope_scaling=dict(
            type="longrope", short_factor=[1.0] * 4, long_factor=[1.5, 2.0, 3.0, 4.0]
        ),
    ),
}


def model_of(kind: str) -> Any:
    return tiny(kind.split()[0], **KINDS[kind])


class Hiding(KVCache):
    """A cache of all tokens in which nobody sees some of them."""

    def __init__(self, hidden: Sequence[int], window: Optional[int]):
        super().__init__()
        self.hidden, self.window = list(hidden), window

    def make_mask(self, N: int, **more: Any) -> mx.array:
        keys = np.arange(self.offset + N)[None]
        rows = np.arange(self.offset, self.offset + N)[:, None]
        seen = (keys <= rows) & (~np.isin(keys, self.hidden) | (keys == rows))
        return mx.array(seen & (rows - keys < (self.window or 1 << 30)))


def hiding(model: Any, hidden: Sequence[int]) -> list[Any]:
    """A reference cache: all tokens at their places, some of them unseen."""
    caches = make_prompt_cache(model)
    windows = [c.max_size if isinstance(c, RotatingKVCache) else None for c in caches]
    return [Hiding(hidden, w) for w in windows]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_stand_where_they_stand_in_the_text(kind: str) -> None:
    """As if the model read everything, and never saw the dropped tokens; twice, then decoding."""
    model, ids = model_of(kind), token_ids(96)
    kept = np.array([*range(8), *range(20, 29), *range(40, 46), *range(52, 60)])
    later = np.array([*range(60, 66), *range(80, 95)])
    cache = make_prompt_cache(model)
    for places in (kept, later):
        read_places(model, ids, places, cache, chunk=16)
    assert ropes_of(model)
    hidden = sorted(set(range(95)) - {*kept, *later})
    reference = hiding(model, hidden)
    models.prefill(model, ids[:95], reference)
    tokens, got = models.continue_from(model, ids[95], 6, cache)
    wanted_tokens, wanted = models.continue_from(model, ids[95], 6, reference)
    assert tokens == wanted_tokens and models.distance(got, wanted) < 1e-4
    assert all(c.offset == 101 and c.size() == 101 - len(hidden) for c in cache)
    assert not is_whole(cache) and is_whole(reference)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_nothing_dropped_is_the_dense_model_to_the_last_bit(kind: str) -> None:
    model, ids = model_of(kind), token_ids(80)
    cache, stock = make_prompt_cache(model), make_prompt_cache(model)
    read_places(model, ids, np.arange(79), cache, chunk=32)
    for i in (0, 32, 64):
        models.prefill(model, ids[i : min(i + 32, 79)], stock)
    got, wanted = (models.continue_from(model, ids[79], 5, c) for c in (cache, stock))
    assert got[0] == wanted[0] and np.array_equal(got[1], wanted[1])


def test_run_by_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models that use a token's place for more than RoPE."""
    model, ids = tiny("llama"), token_ids(60)
    kept = np.array([*range(16), *range(20, 29), *range(40, 59)])
    got = []
    for by_runs in ((), ("llama",)):
        monkeypatch.setattr(positions, "BY_RUNS", by_runs)
        cache = make_prompt_cache(model)
        read_places(model, ids, kept, cache, chunk=16)
        got.append(models.continue_from(model, ids[59], 4, cache)[1])
    assert models.distance(got[0], got[1]) < 1e-4


def test_a_quantised_cache_and_one_that_rotated_can_go_on() -> None:
    model, ids = tiny("llama", head_dim=64), token_ids(64)
    kept = np.array([*range(4), *range(30, 63)])
    cache = make_prompt_cache(model)
    read_places(model, ids, kept, cache)
    reference = hiding(model, range(4, 30))
    models.prefill(model, ids[:63], reference)
    packed = [c.to_quantized(64, 8) for c in cache]
    assert packed[0].to_quantized(64, 8) is packed[0] and not is_whole(packed)
    got = models.continue_from(model, ids[63], 4, packed)[1]
    wanted = models.continue_from(
        model, ids[63], 4, [c.to_quantized(64, 8) for c in reference]
    )[1]
    dense = models.continue_from(model, ids[63], 4, reference)[1]
    assert models.distance(got, dense) < 0.1 and got.shape == wanted.shape

    model, ids = tiny("gemma3_text"), token_ids(120)
    cache = make_prompt_cache(model)
    models.prefill(model, ids[:60], cache)
    for i in range(60, 70):  # decoding: its ring begins to turn
        models.prefill(model, ids[i : i + 1], cache)
    read_places(model, ids, np.array([*range(70, 80), *range(100, 119)]), cache)
    reference = hiding(model, range(80, 100))
    models.prefill(model, ids[:119], reference)
    got, wanted = (
        models.continue_from(model, ids[119], 4, c) for c in (cache, reference)
    )
    assert got[0] == wanted[0] and models.distance(got[1], wanted[1]) < 1e-4


def test_a_compact_cache_is_cut_by_places() -> None:
    """To the middle of a run, and into a gap."""
    model, ids = tiny("llama"), token_ids(64)
    kept = np.array([*range(4), *range(10, 20), *range(40, 63)])
    cache = make_prompt_cache(model)
    read_places(model, ids, kept, cache)
    for place, held in ((50, 24), (30, 14), (15, 9), (4, 4), (0, 0)):
        for c in cache:
            c.trim(c.offset - place)
            assert (c.offset, c.size()) == (place, held)
    models.prefill(model, ids, cache)
    assert cache[0].runs == [(0, 64)]
    assert runs_of(np.array([3, 4, 7])) == [(3, 5), (7, 8)] and runs_of([]) == []
    assert places_of([(3, 5), (7, 8)]).tolist() == [3, 4, 7]


def test_what_cannot_leave_tokens_out_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="RotatingKVCache"):
        make_compact([KVCache(), RotatingKVCache(16, keep=4)])
    with pytest.raises(UnsupportedModel, match="list"):
        make_compact([[]])
    scaling = dict(rope_type="dynamic", factor=2.0)
    with pytest.raises(UnsupportedModel, match="dynamic RoPE"):
        ropes_of(tiny("llama", rope_scaling=scaling, max_position_embeddings=32))
    with pytest.raises(ConfigError, match="keep must be above 0"):
        KeepConfig(keep=0)
    with pytest.raises(ConfigError, match="chunk must be at least 1"):
        KeepConfig(chunk=0)
    with pytest.raises(ConfigError, match="attention of gemma2 cannot be watched"):
        DraftScorer(tiny("gemma2"), "a draft")
    with pytest.raises(ConfigError, match="between 1 and 3"):
        LayersScorer(tiny("llama"), 4)


def test_importance_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    layers = []
    wanted = np.full(
        (3, 20), -np.inf
    )  # (queries, keys), the maximum over layers and heads
    for _ in range(2):
        q, k = rng.normal(size=(4, 3, 8)), rng.normal(size=(2, 20, 8))
        places = [17, 18, 25]
        layers.append(weights(mx.array(q), mx.array(k), 0.3, places))
        for head in range(4):
            for row, place in enumerate(places):
                score = [0.3 * q[head, row] @ key for key in k[head // 2]]
                e = np.exp(score) * (np.arange(20) <= place)
                e = np.concatenate([[0, 0], e / e.sum(), [0, 0]])
                mean = [e[i : i + 5].mean() for i in range(20)]
                wanted[row] = np.maximum(wanted[row], mean)
    assert np.allclose(importance(layers, 5), wanted.mean(axis=0), atol=1e-6)
    assert pooled(mx.ones((1, 6)), 3).tolist()[0][1:-1] == [1.0] * 4


def test_the_best_chunks_stay_with_head_tail_and_what_is_protected() -> None:
    scores = np.zeros(6400)
    for best in (3000, 5007):
        scores[best : best + 32] = 1
    config = KeepConfig(keep=0.2)
    kept = kept_places(scores, 0, config)
    assert kept.size == 1280 and (np.diff(kept) > 0).all()
    assert set(range(256)) | set(range(5888, 6400)) <= set(kept)
    assert set(range(3000, 3032)) | set(range(5007, 5039)) <= set(kept)
    # a later turn: no sinks, its own tail; a system prompt stays; short ones are not all edges
    later = kept_places(scores[:4096], 10000, config)
    assert later.min() >= 10000 and later.size <= 0.2 * 4096
    assert set(range(14096 - 512, 14096)) <= set(later)
    assert set(range(400)) <= set(kept_places(scores, 0, config, protect=400))
    # a sixteenth, and the tail; whole chunks do not fit in what is left
    few = kept_places(np.arange(320.0), 0, KeepConfig(keep=0.25)).tolist()
    assert few == [*range(20), *range(280, 320)]
    assert kept_places(scores, 0, KeepConfig(keep=1.0)).size == 6400


def test_a_draft_keeps_its_cache_and_scores_the_same_again() -> None:
    """Reading a conversation turn by turn, and anew; its look-ahead leaves nothing behind."""
    model, ids = tiny("llama"), token_ids(90)
    config = KeepConfig(keep=0.5, **SMALL)
    draft = DraftScorer(model, "tiny")
    first = draft.score(ids[:50], 0, config)
    assert first.shape == (50,) and draft.cache[0].offset == 50
    second = draft.score(ids, 50, config)
    anew = DraftScorer(model, "tiny").score(ids, 50, config)
    assert second.shape == (40,) and np.allclose(second, anew, atol=1e-5)
    assert np.allclose(draft.score(ids[:50], 0, config), first, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_first_layers_hand_their_work_on(kind: str) -> None:
    """Where nothing is dropped the answer is the dense one; a conversation goes on."""
    model, ids = model_of(kind), token_ids(120)
    scorer, cache = LayersScorer(model, 2), make_prompt_cache(model)
    config = KeepConfig(keep=0.5, **SMALL)
    for start, stop in ((0, 60), (60, 119)):
        assert scorer.score(ids[:stop], start, config).shape == (stop - start,)
        places = np.arange(start, stop)
        read_places(model, ids, places, cache, chunk=32, scorer=scorer)
    got = models.continue_from(model, ids[119], 5, cache)
    wanted = models.decode(model, ids, 5)
    assert got[0] == wanted[0] and models.distance(got[1], wanted[1]) < 1e-4


class Tokens:
    """A tokenizer that cuts a text into pieces of so many letters."""

    is_fast = True

    def __init__(self, size: int):
        self.size = size

    def decode(self, ids: list[int], **more: Any) -> str:
        return "".join(chr(i) * self.size for i in ids)

    def __call__(self, text: str, **more: Any) -> dict[str, Any]:
        cuts = range(0, len(text), self.size)
        spans = [(i, min(i + self.size, len(text))) for i in cuts]
        return {"input_ids": [ord(text[i]) for i in cuts], "offset_mapping": spans}


def test_a_draft_of_another_vocabulary_scores_through_characters() -> None:
    """One of 4 letters per token serves one of 2, and the other way round."""
    spans, wanted = [(0, 4), (4, 8), (8, 9)], [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert carried(np.array([3.0, 1, 2]), spans, wanted).tolist() == [3, 3, 1, 1, 2]
    back = carried(np.array([1.0, 5, 2, 1, 4]), wanted, [*spans, (9, 9)])
    assert back.tolist() == [5, 2, 4, 0]
    ids = [97 + i % 20 for i in range(60)]
    draft, config = tiny("llama", vocab=128), KeepConfig(keep=0.5, **SMALL)
    scorer = DraftScorer(draft, "other", Translation(Tokens(2), Tokens(4)))
    scores = scorer.score(ids, 20, config)
    assert scores.shape == (40,) and len(scorer.cached) == 30
    assert (scores.reshape(-1, 2)[:, 0] == scores.reshape(-1, 2)[:, 1]).all()
    slow = Tokens(2)
    slow.is_fast = False
    with pytest.raises(ConfigError, match="needs fast tokenizers"):
        Translation(slow, Tokens(4))
    with pytest.raises(UnsupportedModel, match="not those of its text"):
        other = Tokens(2)
        other.decode = lambda *a, **k: "xx"  # type: ignore[method-assign]
        Translation(other, Tokens(4)).to_draft(ids)


def stream(spec: Speculative, ids: list[int], cache: list, cached: int = 0) -> list:
    tokenizer = models.demo_tokenizer()
    return list(spec.stream_generate(tokenizer, ids, cached, cache, 5))


@pytest.mark.parametrize("own", [False, True])
def test_an_answer_and_its_figures(own: bool) -> None:
    model, ids = tiny("llama"), token_ids(200)
    scorer = LayersScorer(model) if own else DraftScorer(tiny("llama", 1), "tiny")
    spec = Speculative(model, scorer, KeepConfig(keep=0.5, **SMALL))
    cache = make_prompt_cache(model)
    got = stream(spec, ids, cache)
    assert got[0].prompt_tokens == 200 and got[0].cached_tokens == 0
    assert 80 <= got[0].read_tokens <= 100 and got[0].ttft > 0
    assert not spec.notes and spec.exact >= 12 and not is_whole(cache)
    assert cache[0].offset == 205 - (cache[0].offset == 204)
    assert spec.warning is None
    assert "found one planted fact" in str(
        Speculative(model, scorer, KeepConfig(keep=0.2)).warning
    )


def test_a_draft_that_fails_a_short_prompt_and_all_kept_are_read_whole() -> None:
    model, ids = tiny("llama"), token_ids(100)
    wanted = models.decode(model, ids, 5)[1]

    class Broken(DraftScorer):
        def score(self, *args: Any) -> Any:
            raise RuntimeError("out of memory")

    draft = tiny("llama", 1)
    for scorer, more in (
        (Broken(draft, "tiny"), {}),
        (DraftScorer(draft, "tiny"), dict(threshold=101)),
        (DraftScorer(draft, "tiny"), dict(keep=1.0)),
    ):
        config = KeepConfig(**{"keep": 0.3, **SMALL, **more})
        spec, cache = Speculative(model, scorer, config), make_prompt_cache(model)
        got = stream(spec, ids, cache)
        assert models.distance(models.logprobs(got), wanted) < 1e-4
        assert got[0].read_tokens is None and is_whole(cache)
        said = ["the draft tiny failed (out of memory); the whole prompt is read."]
        assert spec.notes == (said if isinstance(scorer, Broken) else [])


def test_windows_do_not_score_what_they_cannot_see() -> None:
    """Their caches hold all keys until it is known which of them count."""
    attention, x = Attention(10), mx.zeros((1, 2, 10, 4))
    cut, whole = CompactKVCache(window=4), CompactKVCache(window=12)
    for layer, cache in enumerate((cut, whole, None)):
        attention(layer, lambda q, *a, **kw: q, x, x, x, cache=cache, scale=1.0)
    assert set(attention.queries) == {1, 2}


def test_a_window_that_moved_on_before_is_not_cut_below_its_beginning() -> None:
    cache = RotatingKVCache(max_size=8)
    for new in (20, 9):
        cache.update_and_fetch(*[mx.zeros((1, 1, new, 4))] * 2)
    make_compact(caches := [cache])
    first = caches[0].runs[0][0]
    assert first > 0 and [can_trim(caches, n) for n in (first + 8, first + 7)] == [
        True,
        False,
    ]


def test_a_model_that_cannot_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle of the reading leaves nothing behind."""
    model, ids = tiny("llama"), token_ids(100)
    wanted = models.decode(model, ids, 5)[1]
    config = KeepConfig(keep=0.3, **SMALL)
    spec = Speculative(model, DraftScorer(tiny("llama", 1), "tiny"), config)

    def broken(self: Any, x: mx.array, **more: Any) -> mx.array:
        raise TypeError("another RoPE")

    rotated = speculative.rotated_at
    monkeypatch.setattr(
        speculative, "rotated_at", lambda places: lambda i, own, x, **more: broken(i, x)
    )
    got = stream(spec, ids, cache := make_prompt_cache(model))
    assert models.distance(models.logprobs(got), wanted) < 1e-4
    assert "another RoPE" in spec.notes[0] and got[0].read_tokens is None
    assert is_whole(cache)  # as if nothing had been tried
    monkeypatch.setattr(speculative, "rotated_at", rotated)
    assert stream(spec, ids, make_prompt_cache(model))[0].read_tokens


def test_kept_tokens_are_read_sparsely() -> None:
    """The FFN's plan is made on the survivors."""
    model, ids = tiny("llama"), token_ids(200)
    attach(model, models.settings(selector="first-block"))
    spec = Speculative(
        model, DraftScorer(tiny("llama", 1), "tiny"), KeepConfig(keep=0.5, **SMALL)
    )
    cache = make_prompt_cache(model)
    got = stream(spec, ids, cache)
    assert got[0].ffn_sparsity > 0.1 and spec.exact == 0 and models.idle(model)
    assert isinstance(cache[0], CompactKVCache)
    assert copy.deepcopy(cache)[0].runs == cache[0].runs
