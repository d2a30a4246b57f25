"""A conversation over one KV cache: what is reused, and that it is the right thing."""

import copy
from types import SimpleNamespace
from typing import Any, Optional

import mlx.core as mx
import models
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load, load_tokenizer
from models import logprobs

from mlx_fastforward import attach, detach
from mlx_fastforward import session as session_module
from mlx_fastforward import stream_generate
from mlx_fastforward.attachment import is_enabled, switch, watched
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.errors import TemplateError
from mlx_fastforward.model.caches import memory_of
from mlx_fastforward.session import Session, common_prefix

LONG = "Keawe was poor, brave, and active; he could read and write. " * 3
OTHER = "He sailed for some time in the island steamers, and steered a boat. " * 3
FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306.\n\n"
SLIDING = "llama-bias-sliding"  # its caches rotate, and cannot be trimmed


def session_of(name: str = "llama", sparsity: float = 0.0, **more: Any) -> Session:
    """A session with a tiny attached model; its answers are gibberish."""
    model = models.tiny(name, vocab=4096)
    attach(model, models.settings(sparsity=sparsity, selector="oracle"))
    return Session(model, models.demo_tokenizer(), **more)


def ask(session: Session, text: str, n: int = 6, **more: Any) -> list[Any]:
    return list(session.answer(text, max_tokens=n, **more))


def text_of(responses: list[Any]) -> str:
    return "".join(r.text for r in responses)


def assert_right(session: Session, text: str, cached: Optional[int] = None) -> None:
    """The answer is that of a plain model that reads the whole conversation."""
    plain, ids = copy.deepcopy(session.model), session.render(text)
    detach(plain)
    _, wanted = models.decode(plain, ids, 6)
    got = ask(session, text)
    assert models.distance(logprobs(got), wanted) < 1e-3
    assert got[0].cached_tokens + got[0].prompt_tokens == len(ids)
    assert cached in (None, got[0].cached_tokens)
    assert got[0].ffn_sparsity == 0.0


def test_what_the_selector_remembers_goes_with_its_text() -> None:
    """Another text after the same first tokens begins anew; one step back does not."""
    cache = [KVCache()]

    def call(new: int, fresh: bool = False) -> bool:
        """Whether anything is remembered."""
        (memory,) = memory_of(cache, 1, fresh, new)
        known = bool(memory)
        memory["scores"] = mx.zeros(3)
        cache[0].offset += new
        return known

    assert not call(20, fresh=True) and call(5) and call(1)
    cache[0].trim(6)
    assert call(1)
    cache[0].trim(4)
    assert not call(30) and call(1)


def test_a_template_that_refuses_the_system_prompt_alone(monkeypatch: Any) -> None:
    session = session_of(system_prompt="Be brief.")
    session.speculative = SimpleNamespace(
        stream_generate=lambda *args, protect, **kwargs: iter([protect]),
        forget=lambda: None,
    )

    def refuses(*args: Any) -> int:
        raise TemplateError("no")

    monkeypatch.setattr(session_module, "system_tokens", refuses)
    assert [*session._stream([1, 2], 0)] == [0]


@pytest.mark.parametrize("name", ["llama", SLIDING])
def test_turns_equal_reading_the_whole_conversation(name: str) -> None:
    session = session_of(name, system_prompt="Be brief.")
    for text in (LONG, "Who?", OTHER, "What?"):
        assert_right(session, text)
    got = ask(session, "Why?")
    session.tokenizer = load_tokenizer(DEMO)
    session.tokenizer.eos_token_ids = range(4096)
    ask(session, "And?")  # to which nothing is an answer, too
    roles, said = zip(*(m.values() for m in session.messages))
    assert roles == ("system", *("user", "assistant") * 6)
    assert (said[0], said[5], said[-3]) == ("Be brief.", OTHER, text_of(got) or None)
    assert said[-1] == ""


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_second_turn_reads_only_what_is_new(sparsity: float) -> None:
    """As mlx-lm does over the same cache: at sparsity 0 to the last bit."""
    model, tokenizer = load(str(DEMO))  # its answers tokenise back to the same tokens
    attach(model, models.settings(sparsity=sparsity, block_size=16))
    session, cache = Session(model, tokenizer), make_prompt_cache(model)
    turns, read = [], []
    for name, facts in (("Mabel", FACTS), ("Felix", "")):
        question = f"{facts}{LONG}What is the secret code of {name}?"
        prompt = session.render(question)
        got, new = ask(session, question, 8), prompt[len(read) :]
        assert got[0].cached_tokens == len(read) and got[0].prompt_tokens == len(new)
        assert (got[0].ffn_sparsity > 0.1) == bool(sparsity)
        assert got[-1].finish_reason == "stop"
        read = prompt + [r.token for r in got]
        assert session.cached == read
        turns.append((new, got))
    if sparsity == 0:
        assert text_of(turns[0][1]).strip() == "7306"
        detach(model)
    for new, got in turns:
        same = list(stream_generate(model, tokenizer, new, 8, prompt_cache=cache))
        np.testing.assert_array_equal(logprobs(got), logprobs(same))


@pytest.mark.parametrize("name", ["llama", SLIDING])
@pytest.mark.parametrize("how", ["continued", "rewritten", "repeated"])
def test_what_is_reused(name: str, how: str) -> None:
    """All that agrees, but for the last token: an answer starts from it.

    A cache that cannot be trimmed goes back to the last question.
    """
    session = session_of(name)
    asked = len(session.render(LONG)) - 1
    ask(session, LONG)
    read = len(session.cached)
    assert read > models.WINDOW
    if how == "rewritten":
        session.messages[-1]["content"] = "something else"
        cached = common_prefix(session.cached, session.render(OTHER))
        assert 20 < cached < read
    else:
        new = {"continued": models.token_ids(30, seed=3), "repeated": []}[how]
        longer = [*session.cached, *new]
        session.render = lambda text=None: longer  # type: ignore[method-assign]
        cached = min(read, len(longer) - 1)
    if name == SLIDING and cached < read:
        cached = asked
    assert_right(session, OTHER, cached=cached)


def test_reset_and_forgetting_the_cache() -> None:
    session = session_of("qwen2", system_prompt="Be brief.", max_kv_size=1000)
    first = ask(session, LONG)
    for way, left in ((session.reset, 1), (session.forget_cache, 3)):
        way()
        assert session.cached == [] and len(session.messages) == left
        assert session.cache[0].offset == 0 and session.cache[0].max_size == 1000
        if left == 1:
            again = ask(session, LONG)
            np.testing.assert_array_equal(logprobs(again), logprobs(first))
    assert_right(session, OTHER, cached=0)


@pytest.mark.parametrize("name", ["llama", SLIDING])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_answer_stays_in_the_conversation(name: str, after: int) -> None:
    """But not one that was never started."""
    session = session_of(name)
    size = len(session.render(LONG))
    stream = session.answer(LONG, max_tokens=20)
    said = [next(stream) for _ in range(after)]
    stream.close()
    assert len(session.messages) == 2 * bool(after)
    if after:
        assert session.messages[-1]["content"] == text_of(said)
        assert session.cached[size:] == [r.token for r in said]
        assert session.cache[0].offset == len(session.cached)
    assert_right(session, OTHER)


def interrupt(done: int, total: int) -> None:
    if done >= 32:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name, turns", [("llama", 0), (SLIDING, 0), ("llama", 1)])
def test_an_interrupt_while_reading(name: str, turns: int) -> None:
    """As if never asked; but what was read by then is not read again."""
    session = session_of(name)
    for _ in range(turns):
        ask(session, OTHER)
    before, ids = copy.deepcopy(session.messages), session.render(LONG)
    known = common_prefix(session.cached, ids) + 32
    stopped = {"prefill_step_size": 16, "prompt_progress_callback": interrupt}
    with pytest.raises(KeyboardInterrupt):
        ask(session, LONG, **stopped)
    assert session.messages == before and session.cached == ids[:known]
    assert models.idle(session.model)
    assert_right(session, LONG, cached=known)


@pytest.mark.parametrize(
    "name, layer", [("llama", 0), ("llama", 2), ("llama", None), (SLIDING, 2)]
)
def test_an_interrupt_while_answering_keeps_what_was_said(
    name: str, layer: Any
) -> None:
    """Before a layer of the fourth decode step, or before that step as a whole.

    mlx-lm computes a token ahead of what it yields: it is cut off the cache, or that goes back to the
    question.
    """
    session, steps, said = session_of(name), [], []
    target = session.model if layer is None else session.model.layers[layer]
    kind, size = type(target), len(session.render(LONG))

    class Interrupting(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append(x.shape[1])
            if steps.count(1) == 4:
                raise KeyboardInterrupt
            return super().__call__(x, *args, **kwargs)

    target.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        for r in session.answer(LONG, max_tokens=20):
            said.append(r)
    target.__class__ = kind
    assert len(said) == 2 and session.messages[-1]["content"] == text_of(said)
    if name == "llama":
        assert session.cached[size:] == [r.token for r in said]
    else:
        assert len(session.cached) == size - 1
    assert {c.offset for c in session.cache} == {len(session.cached)}
    assert_right(session, OTHER)


@pytest.mark.parametrize("turns", [1, 2])
def test_answering_again_sparse_and_dense(turns: int) -> None:
    """The last question, from an empty cache; the conversation is not touched.

    The chat template gets the session's settings, too.
    """
    session = session_of(sparsity=0.5, template={"note": "Be brief, or do not. " * 5})
    model, plain = session.model, models.tiny("llama", vocab=4096)
    session.tokenizer = load_tokenizer(DEMO)
    session.tokenizer.eos_token_ids = []
    said = "{% for m in messages %}{{ m.content }} {% endfor %}{{ note }}"
    session.tokenizer.chat_template = said
    for text in (LONG, OTHER)[:turns]:
        ids = session.render(text)
        first = ask(session, text)
    before = copy.deepcopy((session.messages, session.cached))
    cache, offset = session.cache, session.cache[0].offset
    for enabled in (False, True):
        switch(model, enabled)
        sparse = list(session.answer_again(True, max_tokens=6))
        dense = list(session.answer_again(False, max_tokens=6))
        assert is_enabled(model) is enabled
        if turns == 1:  # later ones are read over a cache
            np.testing.assert_array_equal(logprobs(sparse), logprobs(first))
        _, wanted = models.decode(plain, ids, 6)
        assert models.distance(logprobs(dense), wanted) < 1e-4
        assert models.distance(logprobs(sparse)[0], wanted[0]) > 3e-3
        for r in (sparse[0], dense[0]):
            assert (r.prompt_tokens, r.cached_tokens) == (len(ids), 0)
        assert sparse[0].ffn_sparsity != 0.0 and dense[0].ffn_sparsity == 0.0
    assert (session.messages, session.cached) == before
    assert session.cache is cache and cache[0].offset == offset
    stream = session.answer_again(False, max_tokens=6)
    next(stream)
    assert not is_enabled(model)
    stream.close()
    assert is_enabled(model) and models.idle(model)


def test_warming_up_runs_both_paths_and_leaves_no_trace() -> None:
    session, ran = session_of(sparsity=0.5), set()

    def around(i: int, own: Any, x: mx.array) -> mx.array:
        ran.add((is_enabled(session.model), x.shape[1] >= 3 * models.BLOCK))
        return own(x)

    with watched([session.model.layers[0].mlp], around):
        session.warm_up()
    assert ran >= {(True, True), (False, True)}
    assert session.messages == [] and session.cached == []
    assert session.cache[0].offset == 0 and is_enabled(session.model)


def test_templates_that_cannot_render() -> None:
    class Refusing:
        has_chat_template = True

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise ValueError("roles must alternate\nsecond line")

    session = session_of()
    session.tokenizer = Refusing()
    with pytest.raises(TemplateError, match="refused: roles must alternate$"):
        ask(session, LONG)
    Refusing.has_chat_template = False
    with pytest.raises(TemplateError, match="has no chat template; use an instruct"):
        ask(session, LONG)
    assert session.messages == []
