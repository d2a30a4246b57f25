"""A conversation over one KV cache: what is reused, and that it is the right thing."""

import copy
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load
from models import BLOCK

from mlx_fastforward import attach, detach, stream_generate
from mlx_fastforward.attachment import engine_of, switched
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.session import Session, TemplateError, common_prefix

VOCAB = 4096
LONG = "Keawe was poor, brave, and active; he could read and write. " * 3
OTHER = "He sailed for some time in the island steamers, and steered a boat. " * 3


def session_of(name: str = "llama", sparsity: float = 0.0, **more: Any) -> Session:
    """A session with a tiny attached model; its answers are gibberish."""
    model = models.tiny(name, vocab=VOCAB)
    attach(model, models.settings(sparsity=sparsity, selector="oracle"))
    return Session(model, models.demo_tokenizer(), **more)


def ask(session: Session, text: str, n: int = 6, **more: Any) -> list[Any]:
    return list(session.answer(text, max_tokens=n, **more))


def logprobs(responses: list[Any]) -> np.ndarray:
    return np.stack([np.array(r.logprobs.astype(mx.float32)) for r in responses])


def text_of(responses: list[Any]) -> str:
    return "".join(r.text for r in responses)


def read_anew(session: Session, text: str, n: int = 6) -> np.ndarray:
    """Log-probabilities of a plain model that reads the whole conversation."""
    plain = copy.deepcopy(session.model)
    detach(plain)
    return models.decode(plain, session.render(text), n)[1]


def assert_right(session: Session, text: str) -> list[Any]:
    """The answer is that of a model that reads everything; returns it."""
    wanted, size = read_anew(session, text), len(session.render(text))
    got = ask(session, text)
    assert models.distance(logprobs(got), wanted) < 1e-3
    assert got[0].cached_tokens + got[0].prompt_tokens == size
    return got


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding", "gemma3_text"])
def test_turns_equal_reading_the_whole_conversation(name: str) -> None:
    session = session_of(name)
    for text in (LONG, "Who?", OTHER, "What?"):
        assert_right(session, text)
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 4
    assert session.messages[4]["content"] == OTHER


def test_the_messages_hold_what_was_said() -> None:
    session = session_of(system_prompt="Be brief.")
    got = ask(session, LONG)
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": text_of(got)},
    ]
    assert len(text_of(got)) > 0


@pytest.fixture(scope="module")
def demo() -> Any:
    """The bundled model: its answers tokenise back to the same tokens."""
    return load(str(DEMO))


FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306.\n\n"


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_second_turn_reads_only_what_is_new(demo: Any, sparsity: float) -> None:
    """As mlx-lm does over the same cache: at sparsity 0 to the last bit."""
    model, tokenizer = demo
    attach(model, models.settings(sparsity=sparsity, block_size=16))
    session = Session(model, tokenizer)
    question = FACTS + LONG + "What is the secret code of Mabel?"
    prompts = [session.render(question)]
    first = ask(session, question, 8)
    assert text_of(first).strip() == "7306" or sparsity
    assert first[-1].finish_reason == "stop"
    assert (first[0].cached_tokens, first[0].prompt_tokens) == (0, len(prompts[0]))
    read = prompts[0] + [r.token for r in first]
    assert session.cached == read
    again = LONG + "What is the secret code of Felix?"
    prompts.append(session.render(again))
    assert prompts[1][: len(read)] == read  # the template repeats the turn as it was
    second = ask(session, again, 8)
    assert second[0].cached_tokens == len(read)
    assert second[0].prompt_tokens == len(prompts[1]) - len(read)
    assert (second[0].ffn_sparsity > 0.1) == bool(sparsity)
    if sparsity == 0:
        detach(model)
    cache = make_prompt_cache(model)
    for prompt, got in ((prompts[0], first), (prompts[1][len(read) :], second)):
        same = list(stream_generate(model, tokenizer, prompt, 8, prompt_cache=cache))
        np.testing.assert_array_equal(logprobs(got), logprobs(same))
    detach(model)


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding"])
def test_an_exact_continuation_is_reused_whole(name: str) -> None:
    """Rotating caches too: nothing has to be trimmed off them."""
    session = session_of(name)
    ask(session, LONG)
    read = len(session.cached)
    assert read > models.WINDOW
    longer = [*session.cached, *models.token_ids(30, seed=3)]
    session.render = lambda text=None: longer  # type: ignore[method-assign]
    got = assert_right(session, "")
    assert got[0].cached_tokens == read


def test_a_rewritten_turn_is_cut_off_the_cache() -> None:
    session = session_of("llama")
    ask(session, LONG)
    assert len(session.cached) > 30
    session.messages[-1]["content"] = "something else"
    shared = common_prefix(session.cached, session.render(OTHER))
    got = assert_right(session, OTHER)
    assert got[0].cached_tokens == shared > 20


@pytest.mark.parametrize("name", ["llama-bias-sliding", "gemma3_text"])
def test_a_rewritten_turn_voids_a_cache_that_cannot_be_trimmed(name: str) -> None:
    session = session_of(name)
    ask(session, LONG)
    assert isinstance(session.cache[0], RotatingKVCache)
    session.messages[-1]["content"] = "something else"
    got = assert_right(session, OTHER)
    assert got[0].cached_tokens == 0


def test_max_kv_size_holds_for_every_turn() -> None:
    session = session_of("qwen2", max_kv_size=32)
    for text in (LONG, OTHER):
        ask(session, text)
        assert isinstance(session.cache[0], RotatingKVCache)
        assert session.cache[0].max_size == 32
    session.reset()
    assert session.cache[0].max_size == 32


def test_the_same_question_again_reads_at_least_one_token() -> None:
    """A fully cached prompt still needs its last token to start from."""
    session = session_of()
    ask(session, LONG, 1)
    session.messages.clear()
    got = assert_right(session, LONG)
    assert got[0].prompt_tokens == 1


def test_reset() -> None:
    session = session_of(system_prompt="Be brief.")
    first = ask(session, LONG)
    ask(session, OTHER)
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.cached == [] and session.cache[0].offset == 0
    again = ask(session, LONG)
    np.testing.assert_array_equal(logprobs(again), logprobs(first))
    assert again[0].cached_tokens == 0


def test_forgetting_the_cache_keeps_the_conversation() -> None:
    session = session_of()
    ask(session, LONG)
    session.forget_cache()
    assert len(session.messages) == 2
    assert assert_right(session, OTHER)[0].cached_tokens == 0


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_answer_stays_in_the_conversation(name: str, after: int) -> None:
    session = session_of(name)
    size = len(session.render(LONG))
    stream = session.answer(LONG, max_tokens=20)
    said = [next(stream) for _ in range(after)]
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": text_of(said)}
    assert session.cached[size:] == [r.token for r in said]
    assert session.cache[0].offset == len(session.cached)
    assert_right(session, OTHER)


def test_an_answer_never_started_is_not_in_the_conversation() -> None:
    session = session_of()
    session.answer(LONG).close()
    assert session.messages == [] and session.cached == []


def interrupted_at(limit: int) -> Any:
    def callback(done: int, total: int) -> None:
        if done >= limit:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_an_interrupt_while_reading(name: str, sparsity: float) -> None:
    """As if never asked; but what was read by then is not read again."""
    session = session_of(name, sparsity)
    with pytest.raises(KeyboardInterrupt):
        ask(
            session,
            LONG,
            prefill_step_size=16,
            prompt_progress_callback=interrupted_at(32),
        )
    assert session.messages == []
    assert session.cached == session.render(LONG)[:32]
    engine = engine_of(session.model)
    assert engine is not None and engine.remaining is None and engine.call is None
    if sparsity == 0:
        assert assert_right(session, LONG)[0].cached_tokens == 32
    else:
        assert ask(session, LONG)[0].cached_tokens == 32


def test_an_interrupt_in_a_later_turn_keeps_the_earlier_ones() -> None:
    session = session_of()
    ask(session, LONG)
    before = copy.deepcopy(session.messages)
    with pytest.raises(KeyboardInterrupt):
        ask(session, OTHER, prompt_progress_callback=interrupted_at(1))
    assert session.messages == before
    assert_right(session, "And then?")


@pytest.mark.parametrize("layer", [1, 2])
def test_an_interrupt_inside_a_forward_pass_voids_the_cache(layer: int) -> None:
    """Some layers have read the chunk, others have not."""
    session = session_of(sparsity=0.5)
    engine = engine_of(session.model)
    assert engine is not None
    selector = engine.selector

    class Interrupting:
        probe_every = 0

        def __call__(self, at: int, *args: Any) -> Any:
            if at == layer:
                raise KeyboardInterrupt
            return selector(at, *args)

        def flops(self, *_: Any) -> float:
            return 0.0

        def unit(self, block: int) -> int:
            return 1

    engine.selector = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        ask(session, LONG)
    assert session.messages == [] and session.cached == []
    assert session.cache[0].offset == 0
    engine.selector, engine.enabled = selector, False
    assert_right(session, OTHER)


@pytest.mark.parametrize("layer", [0, 2, None])
def test_an_interrupt_while_answering_keeps_what_was_said(layer: Any) -> None:
    """Before a layer of the fourth decode step, or before that step as a whole."""
    session = session_of()
    model = session.model
    steps = 0

    def interrupting(call: Any) -> Any:
        def wrapped(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += x.shape[1] == 1
            if steps == 4:
                raise KeyboardInterrupt
            return call(self, x, *args, **kwargs)

        return wrapped

    target = model if layer is None else model.layers[layer]
    kind = type(target)
    target.__class__ = type("K", (kind,), {"__call__": interrupting(kind.__call__)})
    said = []
    with pytest.raises(KeyboardInterrupt):
        for r in session.answer(LONG, max_tokens=20):
            said.append(r)
    target.__class__ = kind
    assert len(said) == 2  # mlx-lm computes one token ahead
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert session.messages[-1]["content"] == text_of(said)
    assert_right(session, OTHER)


def test_answering_again_sparse_and_dense() -> None:
    """Each from an empty cache, and neither touches the conversation."""
    session = session_of(sparsity=0.5)
    first = ask(session, LONG)
    ids = session.render()[: first[0].prompt_tokens]
    before, cached = copy.deepcopy(session.messages), list(session.cached)
    cache, offset = session.cache, session.cache[0].offset
    engine = engine_of(session.model)
    assert engine is not None
    for enabled in (True, False):
        engine.enabled = enabled
        sparse = list(session.answer_again(True, max_tokens=6))
        dense = list(session.answer_again(False, max_tokens=6))
        assert engine.enabled is enabled
        np.testing.assert_array_equal(logprobs(sparse), logprobs(first))
        _, wanted = models.decode(models.tiny("llama", vocab=VOCAB), ids, 6)
        assert models.distance(logprobs(dense), wanted) < 1e-4
        assert models.distance(logprobs(sparse)[0], wanted[0]) > 3e-3
        assert sparse[0].prompt_tokens == dense[0].prompt_tokens == len(ids)
        assert sparse[0].cached_tokens == dense[0].cached_tokens == 0
        assert sparse[0].ffn_sparsity != 0.0 and dense[0].ffn_sparsity == 0.0
    assert session.messages == before and session.cached == cached
    assert session.cache is cache and cache[0].offset == offset


def test_answering_again_means_the_last_question() -> None:
    session = session_of()
    ask(session, LONG)
    second = assert_right(session, OTHER)
    again = list(session.answer_again(True, max_tokens=6))
    assert models.distance(logprobs(again), logprobs(second)) < 1e-3
    assert again[0].prompt_tokens == second[0].prompt_tokens + second[0].cached_tokens


def test_stopping_while_answering_again_restores_the_switch() -> None:
    session = session_of(sparsity=0.5)
    ask(session, LONG)
    engine = engine_of(session.model)
    assert engine is not None
    stream = session.answer_again(False, max_tokens=6)
    next(stream)
    assert engine.enabled is False
    stream.close()
    assert engine.enabled is True and engine.remaining is None


def test_switching() -> None:
    session = session_of(sparsity=0.5)
    engine = engine_of(session.model)
    assert engine is not None
    with pytest.raises(RuntimeError), switched(session.model, False):
        assert engine.enabled is False
        with switched(session.model, True):
            assert engine.enabled is True
        assert engine.enabled is False
        raise RuntimeError
    assert engine.enabled is True
    with switched(models.tiny("llama"), False):
        pass  # a plain model has no switch


def test_dense_after_sparse_reads_everything_anew() -> None:
    """What /dense does: keys that were computed sparsely must not answer for dense."""
    session = session_of(sparsity=0.5)
    ask(session, LONG)
    engine = engine_of(session.model)
    assert engine is not None
    engine.enabled = False
    session.forget_cache()
    got = assert_right(session, OTHER)
    assert (got[0].cached_tokens, got[0].ffn_sparsity) == (0, 0.0)


def test_warming_up_leaves_no_trace() -> None:
    session = session_of(sparsity=0.5)
    engine = engine_of(session.model)
    assert engine is not None
    lengths: list[tuple[int, bool]] = []
    begin = engine.begin

    def spy(batch: int, new: int, cache: Any, training: bool) -> Any:
        lengths.append((new, engine.enabled))
        return begin(batch, new, cache, training)

    engine.begin = spy  # type: ignore[method-assign]
    session.warm_up()
    assert {enabled for n, enabled in lengths if n >= 3 * BLOCK} == {True, False}
    assert session.messages == [] and session.cached == []
    assert session.cache[0].offset == 0 and engine.enabled is True


def test_a_tokenizer_without_a_template_is_refused() -> None:
    session = session_of()

    class Bare:
        has_chat_template = False

    session.tokenizer = Bare()
    with pytest.raises(TemplateError, match="has no chat template") as e:
        ask(session, LONG)
    assert "\n" not in str(e.value)
    assert session.messages == []


def test_a_template_that_refuses_says_so_in_one_line() -> None:
    session = session_of()

    class Refusing:
        has_chat_template = True

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise ValueError("roles must alternate\nsecond line")

    session.tokenizer = Refusing()
    with pytest.raises(TemplateError) as e:
        ask(session, LONG)
    assert str(e.value) == "the model's chat template refused: roles must alternate"
    assert session.messages == []


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert common_prefix([1, 2], [1, 2]) == 2


def test_an_answer_stopped_inside_a_step_keeps_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mlx-lm is a token ahead of what it yields: Ctrl-C must not cost a second reading."""
    from mlx_fastforward import session as module

    def stopped(*args: Any, **kwargs: Any) -> Any:
        responses = stream_generate(*args, **kwargs)
        yield next(responses)
        yield next(responses)
        next(responses)  # dispatched, never seen
        raise KeyboardInterrupt

    session = session_of()
    monkeypatch.setattr(module, "stream_generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(session, LONG)
    monkeypatch.undo()
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert {c.offset for c in session.cache} == {len(session.cached)}
    kept = len(session.cached)
    assert kept > len(models.demo_tokenizer().encode(LONG))
    responses = assert_right(session, OTHER)
    assert responses[0].cached_tokens > len(models.demo_tokenizer().encode(LONG))
