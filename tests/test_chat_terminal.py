"""The chat with somebody at a terminal: documents that wait, answers that are cut, saved, or stopped."""

import re
import types
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lm
import models
import pytest
from mlx_lm.utils import load
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_fastforward import attach, session
from mlx_fastforward.cli import chat_commands, conversation, terminal
from mlx_fastforward.cli.conversation import Chat
from mlx_fastforward.cli.models import load_model
from mlx_fastforward.session import render

FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306."
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6


def stopped(calls: list[int], how_often: int) -> Any:
    """stream_generate with Ctrl-C pressed while it reads its first prompts."""
    real = session.stream_generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= how_often:
            raise KeyboardInterrupt
        yield from real(*args, **kwargs)

    return generate


class Typed:
    """Somebody at a terminal: each line is typed when the one before it was dealt with."""

    def __init__(self, folder: Path, **more: Any):
        model, tokenizer = load(str(folder))
        attach(model)
        self.chat = Chat(
            session.Session(model, tokenizer),
            "tiny",
            tune=True,
            sampling={"temp": 0.0, "top_p": 1.0},
            **{"max_tokens": 8, **more},
        )
        self.chat.interactive = True

    def type(self, *lines: str) -> None:
        left = iter([*lines, None])
        reader = types.SimpleNamespace(read=lambda: next(left))
        chat_commands.run(self.chat, reader)

    @property
    def asked(self) -> list[str]:
        messages = self.chat.session.messages
        return [m["content"] for m in messages if m["role"] == "user"]


@pytest.fixture
def typed(tiny_folder: Path) -> Typed:
    return Typed(tiny_folder)


def test_ctrl_c_stops_the_answer_not_the_chat(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And what was not said is not part of the conversation: the document still waits."""
    calls: list[int] = []
    monkeypatch.setattr(session, "stream_generate", stopped(calls, 1))
    typed.chat.pending = [("facts.txt", FACTS)]
    conversation.banner(typed.chat)
    typed.type(STORY, "Hello", "Again")
    shown = capsys.readouterr().out
    assert "50% of FFN neurons dropped per 128 tokens, selector probe" in shown
    waiting = "with your next message: facts.txt (67 characters; /drop forgets it)"
    kept = f"was not sent; arrow up brings it back)\n{waiting}"
    assert kept in shown and shown.count(waiting) == 2
    assert "read densely: shorter than 512 tokens" in shown
    assert len(calls) == 3 and typed.asked == [f"{FACTS}\n\nHello", "Again"]


def test_documents_add_up_and_can_be_dropped(
    typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, text in (("a.txt", FACTS), ("b.txt", STORY)):
        (tmp_path / name).write_text(text)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    typed.type(
        f"/file {a}",
        "/drop",
        "Hello",
        f"/file '{a}'",
        f"/file {a}",  # is there already
        f"/FILE {b}",
        "Who?",
        "So?",
    )
    assert typed.asked == ["Hello", f"{FACTS}\n\n{STORY.strip()}\n\nWho?", "So?"]
    shown = capsys.readouterr().out
    assert f"Dropped: {a}." in shown
    assert shown.count(f"with your next message: {a}, {b} (") == 1


def test_an_answer_that_was_cut_goes_on(
    typed: Typed, capsys: pytest.CaptureFixture
) -> None:
    """As if it had never been cut; what the model ended itself does not."""
    typed.type("Hello", "/continue")
    cut = "(cut at --max-tokens 8; /continue goes on)"
    assert capsys.readouterr().out.count(cut) == 2
    in_two = typed.chat.session.messages
    assert in_two[1]["content"] == said_at_once(typed, 16) != ""
    typed.chat.session.finished = True
    typed.type("/continue")
    assert "nothing to continue" in capsys.readouterr().out


def said_at_once(typed: Typed, n: int) -> str:
    whole = session.Session(typed.chat.session.model, typed.chat.session.tokenizer)
    return "".join(r.text for r in whole.answer("Hello", max_tokens=n))


def test_another_answer_another_temperature_another_system_prompt(
    typed: Typed, capsys: pytest.CaptureFixture
) -> None:
    typed.type("Hello", "/again", "/temp 3", "/again", "/system Be brief.", "/system")
    assert typed.asked == ["Hello"] and len(typed.chat.session.messages) == 2
    shown = capsys.readouterr().out
    assert shown.count("Without chance the answer is the same") == 1
    first = said_at_once(typed, 8)
    assert shown.count(f"{first}\n") == 2
    assert typed.chat.session.messages[1]["content"] != first
    typed.type("/system Be brief.", "/system Be long.", "/reset")
    (system,) = typed.chat.session.messages
    assert system == {"role": "system", "content": "Be long."}


def test_a_stop_says_what_became_of_the_message(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing was unsent where there is an answer already."""
    typed.type("Hello")
    before, calls = list(typed.chat.session.messages), []
    monkeypatch.setattr(session, "stream_generate", stopped(calls, 2))
    monkeypatch.setattr(typed.chat.session, "warm_up", lambda: None)
    typed.type("/again", "/compare")
    shown = capsys.readouterr().out
    assert "(stopped while reading: the answer before stays)" in shown
    assert shown.endswith("(stopped while reading)\n") and "not sent" not in shown
    assert typed.chat.session.messages == before


def test_what_is_so_already_forgets_nothing(
    typed: Typed, capsys: pytest.CaptureFixture
) -> None:
    typed.type("Hello", "/sparse")
    assert typed.chat.session.cached
    typed.type("/dense", "Hello", "/dense")
    assert typed.chat.session.cached
    shown = capsys.readouterr().out
    assert "Prefill is sparse already." in shown and "is dense already." in shown


def test_another_model_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    """It reads the conversation anew; one that cannot be loaded changes nothing."""
    other = models.tiny("qwen2", vocab=4096)
    folder = models.save_folder(other, tmp_path / "other")
    typed = Typed(tiny_folder, loader=partial(load_model, lazy=True))
    typed.type("Hello", f"/model {tmp_path / 'none'}", "/model", "Who?")
    before = list(typed.chat.session.messages)
    assert len(before) == 4 and typed.chat.failed
    typed.type(f"/model {folder}")
    assert typed.chat.model == str(folder) and typed.chat.session.messages == before
    assert not typed.chat.session.cut  # its tokens were another's
    typed.type("So?")
    turns = [*before, {"role": "user", "content": "So?"}]
    ids = render(models.demo_tokenizer(ends=True), turns)
    wanted = mlx_lm.generate(other, models.demo_tokenizer(ends=True), ids, max_tokens=8)
    assert typed.chat.session.messages[-1]["content"] == wanted


def test_lines_fit_a_narrow_terminal(
    typed: Typed, capsys: pytest.CaptureFixture
) -> None:
    """Help is not wrapped, and figures break between each other only."""
    assert max(map(len, chat_commands.HELP.splitlines())) < 80
    typed.chat.console.width = 40
    typed.type("Hello", "/again")
    shown = capsys.readouterr().out
    first = r"(\d+ prompt tokens?( \(\+\d+ cached\))? · TTFT .* s)"
    last = r"(8 tokens at .* tok/s · peak .* GB)"
    figures = re.compile(
        rf"^{first}\nread densely: shorter than 512 tokens\n{last}$", re.M
    )
    assert len(figures.findall(shown)) == 2 and "\n1 prompt token (+" in shown


def test_comparing_what_is_too_short_to_gain(
    typed: Typed, capsys: pytest.CaptureFixture
) -> None:
    typed.type("Hello", "/compare")
    shown = capsys.readouterr().out
    assert shown.count("(cut at --max-tokens 8)\n") == 2  # not of the conversation
    last = shown.splitlines()[-1]
    why = "Both were read densely: shorter than 512 tokens. What differs is chance."
    assert last == why


def test_nothing_typed_ends_a_chat(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("some bug")

    monkeypatch.setitem(chat_commands.COMMANDS, "help", fails)
    typed.type("/file ~nobody/x.txt", "/help", "Hello")
    shown = capsys.readouterr().out
    assert "~nobody/x.txt" in shown and "some bug" in shown and typed.asked == ["Hello"]


def test_a_saved_conversation_is_taken_up(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Without reading it again, where the same model reads in the same way; also after a cut."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path))
    first = Typed(tiny_folder)
    first.type(STORY, "/save story")
    for change, kept in ((None, True), ("model", False), ("dense", False)):
        later = Typed(tiny_folder)
        if change == "model":
            norm = later.chat.session.model.model.norm
            norm.weight = norm.weight + 1
        lines = ["/dense"] if change == "dense" else []
        later.type(*lines, "/load story")
        told = capsys.readouterr().out.splitlines()[-1]
        assert told.startswith("Loaded story, 1 message: ")
        assert ("tokens need not be read again" in told) == kept
        theirs, ours = later.chat.session, first.chat.session
        assert theirs.messages == ours.messages and theirs.cut == (change != "model")
        assert theirs.cached == (ours.cached if kept else [])
        wanted = [r.text for r in ours.answer("Hello", max_tokens=8)]
        ours.take_back()
        if kept:
            got = list(theirs.answer("Hello", max_tokens=8))
            assert [r.text for r in got] == wanted
            assert got[0].cached_tokens > 50
    first.type("/system Be brief.", "/save other", "/load other")
    told = capsys.readouterr().out.splitlines()[-1]
    kept, whole = map(int, re.findall(r" (\d+) of its (\d+) tokens", told)[0])
    assert kept < 5 < 100 < whole
    (tmp_path / "conversations" / "story.safetensors").write_bytes(b"nonsense")
    before = later.chat.session.messages
    later.type("/load story")
    assert later.chat.session.messages == before


def test_what_was_typed_is_there_in_the_next_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    for keys in ("first\r", "\x1b[A\r"):  # the arrow up
        with create_pipe_input() as pipe, create_app_session(pipe, DummyOutput()):
            pipe.send_text(keys)
            assert terminal.Lines(True).read() == "first"
    assert (tmp_path / "home" / "history").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "sparse, dense, wanted",
    [
        (
            2.21,
            2.63,
            "0.42 s sooner than dense: after 2.21 s, not 2.63 s (1.19 times as fast).",
        ),
        (
            3.0,
            2.0,
            "1.00 s later than dense: after 3.00 s, not 2.00 s (1.50 times as slow).",
        ),
        (2.001, 2.0, "equally soon, after 2.00 s."),
    ],
)
def test_comparing_in_words(sparse: float, dense: float, wanted: str) -> None:
    assert terminal.compared(sparse, dense).endswith(wanted)
