"""A conversation that was read in part becomes whole while nobody waits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import models
import numpy as np
import pytest
from commands import bad, one_line, run
from mlx_lm.models.cache import make_prompt_cache
from models import tiny, token_ids
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_fastforward import heal as healing
from mlx_fastforward import saved
from mlx_fastforward.cachefile import write_cache
from mlx_fastforward.cli.idle import while_waiting
from mlx_fastforward.cli.terminal import Lines
from mlx_fastforward.errors import FileProblem
from mlx_fastforward.heal import Heal
from mlx_fastforward.model.positions import is_whole
from mlx_fastforward.scorers import DraftScorer, LayersScorer
from mlx_fastforward.session import Session, system_tokens
from mlx_fastforward.speculative import Speculative, read_places
from mlx_fastforward.tokens.speculative import KeepConfig

LONG = "Keawe was poor, brave, and active; he could read and write. " * 4
OTHER = "He sailed for some time in the island steamers, and steered a boat. " * 4


def session_of(
    name: str = "llama", keep: Optional[float] = 0.4, **more: Any
) -> Session:
    """A tiny model's; ``keep`` None reads all."""
    model = tiny(name, vocab=4096)
    session = Session(model, models.demo_tokenizer(), **more)
    if keep is not None:
        draft = DraftScorer(tiny("llama", 1, vocab=4096), "tiny")
        config = KeepConfig(keep=keep, threshold=64, chunk=4)
        session.speculative = Speculative(model, draft, config)
    return session


def ask(session: Session, text: str, n: int = 6) -> list[Any]:
    return list(session.answer(text, max_tokens=n))


def arrays(session: Session) -> list[np.ndarray]:
    return models.cached_arrays(session.cache)


def as_if_dense(session: Session) -> Session:
    """A session of the same messages in which everything was read from the start."""
    other = session_of(keep=None)
    other.model, other.messages = session.model, list(session.messages)
    other.cache, other.cached = make_prompt_cache(other.model), list(session.cached)
    for i in range(0, len(other.cached), 16):
        models.prefill(other.model, other.cached[i : i + 16], other.cache)
    return other


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_healed_conversation_is_the_dense_one(name: str) -> None:
    """To the last bit where it is read in the same chunks; its next answer, too."""
    session = session_of(name)
    first = ask(session, LONG)[0]
    assert first.read_tokens and first.read_tokens < 0.5 * first.prompt_tokens
    assert not is_whole(session.cache)
    session.speculative.exact = 0  # else the first tokens are taken over
    heal = Heal(session, tokens=16)
    assert heal.status.startswith("approximate: reading the rest, 0%")
    while heal.step():
        pass
    assert heal.status == "exact again" and is_whole(session.cache) and not heal.cache
    dense = as_if_dense(session)
    assert all(map(np.array_equal, arrays(session), arrays(dense)))
    config = session.speculative.config
    session.speculative.config = replace(config, threshold=1000)  # some read all again
    got, wanted = ask(session, "Who?"), ask(dense, "Who?")
    assert np.array_equal(models.logprobs(got), models.logprobs(wanted))
    session.speculative.config = config
    again = ask(session, OTHER)[0]  # part of a later message, after what is exact
    assert again.read_tokens and not is_whole(session.cache)
    assert session.speculative.exact >= again.cached_tokens


def test_it_begins_after_what_is_exact_and_goes_on_after_a_message() -> None:
    """Two long turns and a step in between; what was read is kept."""
    session = session_of(system_prompt="Be brief.")
    ask(session, LONG)
    exact = session.speculative.exact
    ids, messages = session.render(), session.messages
    assert exact >= system_tokens(session.tokenizer, messages, {}, ids) > 4
    heal = Heal(session, tokens=16)
    assert heal.step() and len(heal.read) == exact + 16
    ask(session, "Who?")
    assert session.speculative.exact == exact
    ask(session, OTHER)
    assert heal.step() and len(heal.read) == exact + 32
    while heal.step():
        pass
    pairs = zip(arrays(session), arrays(as_if_dense(session)), strict=True)
    assert all(models.distance(a, b) < 1e-4 for a, b in pairs)
    session.reset()
    assert not heal.step() and heal.status == ""


def test_another_conversation_and_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = session_of()
    ask(session, LONG)
    heal = Heal(session, tokens=16)
    heal.step()
    read = len(heal.read)
    session.reset()
    ask(session, OTHER)
    heal.step()
    assert len(heal.read) <= read and heal.read == session.cached[: len(heal.read)]
    monkeypatch.setattr(Heal, "_memory_short", lambda self: True)
    assert not heal.step() and not heal.cache and "not enough memory" in heal.status


def test_a_step_is_as_long_as_nobody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    heal = Heal(session_of())
    for seconds, tokens in ((0.01, 64), (0.1, 128), (0.8, 32), (9.0, 8)):
        heal._pace(heal.tokens, seconds)
        assert heal.tokens == tokens
    assert healing.SECONDS <= 0.25


def test_a_prompt_that_was_read_in_part_is_never_saved(tmp_path: Path) -> None:
    session = session_of()
    ask(session, LONG)
    with pytest.raises(FileProblem, match="read in part cannot be saved"):
        write_cache(tmp_path / "cache.safetensors", session.cache, {})
    assert not list(tmp_path.iterdir())
    path = saved.save(session, "part", "tiny")
    (path.parent / ".writing-x.safetensors").touch()  # what a killed one leaves
    assert saved.names() == ["part"]
    other = session_of()
    other.speculative.exact, other.speculative.healed = 9, True
    saved.load(other, "part")
    assert other.messages == session.messages and other.cached == []
    # of the cache that went
    assert (other.speculative.exact, other.speculative.healed) == (0, False)


def test_first_layers_serve_a_conversation() -> None:
    """Kept tokens of both turns are where they were; healing makes it the dense one."""
    session = session_of(keep=None)
    config = KeepConfig(keep=0.5, threshold=64, chunk=4)
    scorer = LayersScorer(session.model, 2)
    session.speculative = Speculative(session.model, scorer, config)
    for text in (LONG, OTHER):
        assert ask(session, text)[0].read_tokens
    assert not session.speculative.notes
    heal = Heal(session, tokens=16)
    while heal.step():
        pass
    pairs = zip(arrays(session), arrays(as_if_dense(session)), strict=True)
    assert all(models.distance(a, b) < 1e-4 for a, b in pairs)


def test_a_line_is_typed_while_steps_run() -> None:
    with (
        create_pipe_input() as keys,
        create_app_session(input=keys, output=DummyOutput()),
    ):

        class Steps:
            taken, status = 0, "approximate"

            def step(self) -> bool:
                self.taken += 1
                if self.taken == 3:
                    keys.send_text("hi\r")
                return self.taken < 1000

        steps = Steps()
        assert Lines(True, while_waiting(steps)).read() == "hi"
        assert 3 <= steps.taken

        class Broken(Steps):
            forgotten = False

            def step(self) -> bool:
                keys.send_text("yes\r")
                raise RuntimeError("out of memory")

            def forget(self) -> None:
                self.forgotten = True

        broken = Broken()
        waiting = while_waiting(broken)
        assert Lines(True, waiting).read() == "yes" and broken.forgotten
        assert waiting["bottom_toolbar"]() == " approximate: out of memory"
    assert while_waiting(None) == {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a draft of the same vocabulary, and one of another."""
    base, made = tmp_path_factory.mktemp("models"), []
    for i, name in enumerate(("model", "draft", "other")):
        model = tiny("llama", i, vocab=4096)
        made.append(models.save_folder(model, base / name))
    file = made[2] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    del tokenizer["added_tokens"][-1]
    file.write_text(json.dumps(tokenizer))
    return made[0], made[1], made[2]


def test_generate_and_chat_read_in_part_where_asked(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, draft, other = folders
    document = tmp_path / "long.txt"
    document.write_text(LONG * 3)
    base = ["--model", model, "--sparsity", "0", "--max-tokens", "5"]
    flags = [*base, "--file", document, "--prefill-threshold", "64"]
    # another vocabulary, the model's own layers, the question's words
    for name in (draft, other, "self", "words"):
        done = run("generate", "Who?", *flags, "--prefill-draft", name, "--json")
        assert (done.exit_code, done.stderr) == (0, ""), done.output
        out = json.loads(done.stdout)
        assert 0.3 < out["read_tokens"] / out["prompt_tokens"] <= 0.5
        assert out["settings"]["prefill_draft"] == str(name)
        assert out["settings"]["keep"] == 0.5
        done = run("chat", *flags, "--prefill-draft", name, stdin="Who?\nAnd?\n")
        assert (done.exit_code, done.stderr) == (0, ""), done.output
    whole = run("generate", "Who?", *flags, "--json")
    same = run("generate", "Who?", *flags[:-2], "--prefill-draft", draft, "--json")
    assert json.loads(whole.stdout)["text"] == json.loads(same.stdout)["text"]
    low = run("generate", "Who?", *flags, "--prefill-draft", draft, "--keep", "0.2")
    assert low.exit_code == 0 and "--keep 0.2 drops much" in one_line(low.stderr)


def test_what_does_not_go_is_said(folders: tuple[Path, Path, Path]) -> None:
    model, draft, other = folders
    base = ["generate", "Who?", "--model", model, "--prefill-draft"]
    assert "does not go with" in bad(2, *base, draft, "--max-kv-size", "64")
    assert "does not go with" in bad(2, *base, draft, "--draft-model", draft)
    assert "keep must be above 0" in bad(2, *base, draft, "--keep", "0")
    assert "got nothing" in bad(2, *base, "")
    assert "config.json" in bad(1, *base, draft.parent)


def test_approximate_is_for_the_question_that_was_asked() -> None:
    """What was dropped is missing from the next answer until it is read."""
    model, ids = tiny("llama"), token_ids(80)
    cache, whole = make_prompt_cache(model), make_prompt_cache(model)
    read_places(model, ids, np.array([*range(10), *range(60, 79)]), cache)
    models.prefill(model, ids[:79], whole)
    got, wanted = (
        models.continue_from(model, ids[79], 1, c)[1] for c in (cache, whole)
    )
    assert models.distance(got, wanted) > 1e-2
