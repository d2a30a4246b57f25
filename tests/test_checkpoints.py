"""Chats over caches that cannot be trimmed: only what changed is read again, and answers are right."""

import copy
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from models import logprobs

from mlx_fastforward import attach, checkpoints, detach
from mlx_fastforward.attachment import reading, watched
from mlx_fastforward.bench.studies import checkpoints as study
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.checkpoints import MOST, Checkpoints
from mlx_fastforward.prefill import pausing
from mlx_fastforward.session import Session

SYSTEM = "Keawe was poor, brave, and active; he could read and write. " * 10
TURNS = [("Who was he?", "A man, I think.</think>Keawe."), ("And?", "Hm.</think>Yes.")]
THINK = len(study.tokenizer().encode("<think>", add_special_tokens=False))
# states; both in a layer; windows; chunks of attention, whose caches say that they can be trimmed
HYBRID = ["qwen3_5", "falcon_h1", "gemma3_text", "llama4"]


def session_of(name: str, **settings: Any) -> Session:
    """An attached model and a template that strips thinking."""
    model = study.tiny(name)
    if settings:
        attach(model, models.settings(**settings))
    return Session(model, study.tokenizer(), SYSTEM)


def ask(session: Session, text: str, answer: str, cached: int) -> None:
    """The first token's distribution is that of a stock model that reads everything."""
    ids, plain = session.render(text), copy.deepcopy(session.model)
    detach(plain)
    got = study.ask(session, text, answer)
    assert (got[0].cached_tokens, got[0].prompt_tokens) == (cached, len(ids) - cached)
    wanted = models.decode(plain, ids, 1)[1]
    assert models.distance(logprobs(got[:1]), wanted) < 1e-3


@pytest.mark.parametrize("name", HYBRID)
def test_only_what_follows_the_last_question_is_read_again(name: str) -> None:
    session, read = session_of(name), 0
    for text, answer in TURNS + TURNS:
        size = len(session.render(text))
        ask(session, text, answer, read)
        assert session.messages[-1]["content"] == answer
        read = size - THINK
    text = session.take_back()
    ask(session, text, "No.</think>No.", read)  # /again
    del session.messages[1:]
    ask(session, "Another one?", "</think>Yes.", min(session.checkpoints.places))
    assert (
        min(session.checkpoints.places) > 128 and len(session.checkpoints.places) == 2
    )


@pytest.mark.parametrize("name", HYBRID[:3])
def test_stopped_while_reading_and_while_answering(name: str) -> None:
    """Inside a forward pass: what lies before the last checkpoint stays."""
    session = session_of(name)
    for calls, place in ((2, 0), (6, -1)):
        asked, made = session.render("Who was he?"), []

        def stop(i: int, own: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(i)
            if len(made) == calls:
                raise KeyboardInterrupt
            return own(*args, **kwargs)

        with watched([session.model.layers[2]], stop), pytest.raises(KeyboardInterrupt):
            study.ask(session, *TURNS[0])
        place = sorted(session.checkpoints.places)[place]
        assert session.cached == asked[:place]
    assert place == len(asked) - THINK
    ask(session, *TURNS[1], cached=place)


def test_reading_with_pauses_is_one_prompt() -> None:
    """The same plan as for calls that end there, the same counts, and mlx-lm's progress."""
    session = session_of("qwen3_5", sparsity=0.5, selector="first-block")
    ids, seen = session.render("Who was he?"), []
    kwargs: dict[str, Any] = {"prefill_step_size": 100, "max_tokens": 2}
    kwargs["prompt_progress_callback"] = lambda done, total: seen.append((done, total))
    got = list(session.answer("Who was he?", **kwargs))
    system, question = session.checkpoints.places
    ends = sorted({0, *range(100, len(ids) - 1, 100), system, question, len(ids) - 1})
    cache = make_prompt_cache(session.model)
    with reading(session.model, len(ids)) as state:
        for a, b in zip(ends, ends[1:]):
            models.prefill(session.model, ids[a:b], cache)
        _, wanted = models.continue_from(session.model, ids[-1], 2, cache)
    assert models.distance(logprobs(got), wanted) < 1e-5
    assert (
        got[0].ffn_sparsity == pytest.approx(state.flops.sparsity)
        and got[0].ffn_sparsity > 0.2
    )
    n = len(ids)
    assert seen == [*((i, n) for i in range(0, n - 1, 100)), (n - 1, n), (n, n)]
    assert got[0].prompt_tokens == n and got[0].cached_tokens == 0


def test_pauses_inside_a_call_between_calls_and_none() -> None:
    model, sizes, at = models.tiny("llama"), [], []
    ids, cache = models.token_ids(20), make_prompt_cache(model)

    def around(_: int, own: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        sizes.append(x.shape[1])
        return own(x, *args, **kwargs)

    def pause(place: int) -> None:
        assert cache[0].offset == place
        at.append(place)

    with watched(model.layers[:1], around), pausing(model, [10, 3, 4], pause):
        models.prefill(model, ids[:10], cache)
        models.prefill(model, ids[10:], cache)
    assert sizes == [3, 1, 6, 10] and at == [3, 4, 10]
    session = Session(zoo.tiny("llama", vocab_size=4096), study.tokenizer(), SYSTEM)
    study.ask(session, *TURNS[0])
    assert not session.checkpoints.places  # its caches can be trimmed


def test_checkpoints_are_few(monkeypatch: Any) -> None:
    """The first and the newest stay; keys and values of caches that can be trimmed are not copied."""
    model, kept = zoo.tiny("qwen3_5"), Checkpoints()
    cache, states = make_prompt_cache(model), []
    for place in range(10, 80, 10):
        models.prefill(model, models.token_ids(10, seed=place), cache)
        kept.add(place, cache)
        states.append([np.array(a) for a in cache[0].cache])
    assert list(kept.places) == [10, 50, 60, 70] and len(kept.places) == MOST
    assert kept.nbytes == MOST * sum(c.nbytes for c in cache if hasattr(c, "cache"))
    for most, place in ((69, 60), (69, 60), (49, 10)):
        assert kept.back(cache, most) == place == cache[3].offset
        np.testing.assert_array_equal(cache[0].cache[1], states[place // 10 - 1][1])
        models.prefill(model, models.token_ids(5), cache)
    assert kept.back(cache, 9) == 0
    monkeypatch.setattr(checkpoints, "BYTES", 1)
    for place in (20, 30):
        kept.add(place, cache)
    assert list(kept.places) == [30]
