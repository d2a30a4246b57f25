"""The chat: in a pipe answers and nothing else; its commands, and what cannot be done."""

import _thread
import io
import re
import threading
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import mlx_lm
import models
import pytest
from commands import run
from mlx_lm.utils import load
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mlx_fastforward import attach, session, tuned
from mlx_fastforward.cli import (
    chat_commands,
    conversation,
    first_use,
    lengths,
    terminal,
)
from mlx_fastforward.cli.conversation import Chat
from mlx_fastforward.cli.models import load_model
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.session import render

FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306."
MABEL = "What is the secret code of Mabel?"
FELIX = "What is the secret code of Felix?"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6
HELLO = "Hello\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Flags for a model that loads in no time; its answers are gibberish."""
    model = models.tiny("llama", vocab=4096, tie_word_embeddings=False)
    folder = models.save_folder(model, tmp_path_factory.mktemp("chat") / "tiny")
    return ["--model", folder, "--block-size", "8", "--sparsity", "0.9"]


def chat(lines: str, flags: list[Any], code: int = 0) -> tuple[str, list[str]]:
    """What a chat over pipes prints, and what it says on stderr."""
    done = run("chat", "--max-tokens", "8", *flags, stdin=lines)
    assert done.exit_code == code and "›" not in done.output, done.output
    told = done.stderr.splitlines()
    assert all(line.startswith("mlx_fastforward: ") for line in told)
    return done.stdout, [line.removeprefix("mlx_fastforward: ") for line in told]


def said(lines: str, flags: list[Any] = []) -> str:
    """What a chat without any trouble prints."""
    out, told = chat(lines, flags)
    assert not told
    return out


def test_answers_and_a_document_that_stays_known_until_a_reset(tmp_path: Path) -> None:
    model, tokenizer = load(str(DEMO))
    (document := tmp_path / "d.txt").write_text(FACTS)
    lines = f"/file {document}\n\n{MABEL}\n{FELIX}\n/reset\n{FELIX}\n"
    first, second, third = said(lines).splitlines()
    assert (first.strip(), second.strip()) == ("7306", "4821")
    ids = render(tokenizer, [{"role": "user", "content": f"{FACTS}\n\n{MABEL}"}])
    assert first == mlx_lm.generate(model, tokenizer, ids, max_tokens=8)
    fresh = said(f"/file {document}\nr\n{FELIX}\n")
    assert fresh == third + "\n" != second + "\n"


def test_leaving_and_help(tiny: list[Any]) -> None:
    for leave in (f"q\n{HELLO}", f"/quit\n{HELLO}", f"/exit\n{HELLO}", " q \nq", ""):
        assert said(leave, tiny) == ""
    assert said(HELLO, tiny) == said("Hello", tiny) != "\n"
    assert said("/etc/hosts holds what?\n", tiny).strip()  # no command
    for name in ("/help\n", "h\n"):
        for command in ("/file PATH", "/compare", "/dense", "/sparse", "/reset"):
            assert command in said(name, tiny)


def test_paths_as_typed_quoted_and_pasted(tmp_path: Path, tiny: list[Any]) -> None:
    (document := tmp_path / "my story.txt").write_text(STORY)
    wanted, plain = said(HELLO, [*tiny, "--file", document]), said(HELLO, tiny)
    assert wanted != plain != said(HELLO, [*tiny, "--system-prompt", FACTS])
    escaped = str(document).replace(" ", "\\ ")
    for typed in (document, f"'{document}'", f'"{document}"', escaped):
        assert said(f"/file {typed}\n{HELLO}", tiny) == wanted


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(
    tiny: list[Any], tmp_path: Path
) -> None:
    wanted = {
        "/file": "usage: /file PATH",
        f"/file {tmp_path}": f"{tmp_path} is a folder; expected a text file.",
        "/file a\0b": "a\ufffdb cannot be read: ",
        "/frobnicate": "unknown command /frobnicate; /help lists them.",
        "/Compare": "nothing to compare yet: ask something first.",
        "/again": "nothing to answer again yet: ask something first.",
        "/continue": "nothing to continue: the last answer was not cut.",
        "/drop": "no document is waiting for your next message.",
        "/temp hot": "usage: /temp NUMBER, from 0 on; it is 0.",
        "/temp -1": "usage: /temp NUMBER, from 0 on; it is 0.",
        "/save x": "nothing to save yet: ask something first.",
        "/load ../x": "a name of letters, digits, - and _ is expected, got '../x'.",
        "/load x": "no conversation x is saved; there are: none.",
    }
    lines = "".join(f"{line}\n" for line in wanted)
    out, told = chat(lines + HELLO, tiny, code=1)
    assert out == said(HELLO, tiny)
    for line, text in zip(told, wanted.values(), strict=True):
        assert line.replace("\0", "\ufffd").startswith(text)


def test_dense_and_sparse(tiny: list[Any]) -> None:
    """/dense reads everything anew, as stock mlx-lm, and /sparse switches back."""
    story, dense = f"{STORY}\n", [*tiny, "--sparsity", "0"]
    first, stock = said(story, tiny), said(story, dense)
    assert first != stock == said(f"/dense\n{story}", tiny)
    assert said(f"/dense\n/sparse\n{story}", tiny) == first
    both = said(f"{story}/dense\n{HELLO}", tiny)
    model, tokenizer = load(str(tiny[1]))
    turns = [("user", STORY.strip()), ("assistant", first[:-1]), ("user", "Hello")]
    ids = render(tokenizer, [{"role": r, "content": c} for r, c in turns])
    wanted = mlx_lm.generate(model, tokenizer, ids, max_tokens=8)
    assert both == f"{first}{wanted}\n" != said(f"{story}{HELLO}", tiny)
    why = "this chat was started with --sparsity 0; start it with more."
    assert chat(f"/sparse\n{HELLO}/compare\n", dense, code=1)[1] == [why, why]


def test_compare(tiny: list[Any]) -> None:
    """Both answers, both TTFTs; then the conversation goes on as before."""
    sparse, dense = (said(f"/{way}\n{STORY}\n", tiny) for way in ("sparse", "dense"))
    begun = f"{sparse}sparse\n{sparse}dense\n{dense}"
    whole = said(f"{STORY}\n/compare\n{HELLO}", tiny)
    assert sparse != dense and whole.startswith(begun)
    table = whole.removeprefix(begun)
    assert re.search(r"sparse +\d+ +\d+\.\d\d s", table)
    assert re.search(r"dense \(mlx-lm\) +\d+ +\d+\.\d\d s", table)
    assert re.search(r"^Sparse (begins|and dense begin) to answer ", table, re.M)
    last = said(f"{STORY}\n{HELLO}", tiny).removeprefix(sparse)
    assert whole.endswith(last) and last.strip()


def test_a_device_on_which_dense_is_fastest(
    tiny: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    dense = DeviceSettings(dense=True)
    monkeypatch.setattr(tuned, "remembered", lambda key: dense)
    _, told = chat(f"/sparse\n{HELLO}/compare\n", tiny[:2], code=1)
    why = "dense prefill is the fastest on this device; start with --no-tune."
    assert told == [why, why]
    assert said("/sparse\n", [*tiny[:2], "--no-tune"]) == ""


def test_more_than_the_models_context_and_no_template(tmp_path: Path) -> None:
    """A message that does not fit is refused unless --force; a chat that grew goes on."""
    model = models.tiny("llama", vocab=4096, max_position_embeddings=64)
    flags = ["--model", models.save_folder(model, tmp_path / "small")]
    content = {"role": "user", "content": STORY.strip()}
    n = len(render(models.demo_tokenizer(), [content]))
    told = f"{n:,} tokens, but the model was made for 64: "
    for command in (["chat"], ["generate", STORY.strip()]):
        done = run(*command, *flags, stdin=f"{STORY}\n")
        assert done.exit_code == 1 and f"{told}use a shorter document" in done.stderr
        done = run(*command, *flags, "--force", "-m", 8, stdin=f"{STORY}\n")
        assert done.exit_code == 0 and f"{told}expect a poor answer." in done.stderr
        assert done.stdout.strip()
    *_, grown = chat(f"{STORY[:150]}\n{HELLO}{STORY[:99]}\n", flags)[1]
    assert grown.endswith("made for 64: expect a poor answer.")
    base = models.save_folder(model, tmp_path / "base", chat_template=False)
    (line,) = chat(HELLO, ["--model", base], code=1)[1]
    assert "has no chat template" in line


def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_counted(
    tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its size alone, wherever it comes from."""
    model = models.tiny("llama", vocab=4096, max_position_embeddings=64)
    flags = ["--model", models.save_folder(model, tmp_path / "small")]
    (big := tmp_path / "big.txt").write_text("a" * 1200)
    said = "1,200 characters are more than 75 tokens, but the model was made for 64: "
    monkeypatch.setattr(session, "render", None)
    for command in (["generate"], ["chat"]):
        done = run(*command, "--file", big, *flags, stdin=HELLO)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"mlx_fastforward: {said}use a shorter doc")
    out, told = chat(f"/file {big}\n", flags, code=1)
    assert out == "" and told[0].startswith(said)


def test_counting_the_tokens_of_a_long_text_can_be_stopped() -> None:
    """Though the tokenizer is one call; what it finds or raises arrives."""
    console, size = Console(file=io.StringIO(), force_terminal=True), lengths.LONG_TEXT
    assert lengths.patiently(lambda: [1, 2], size, console) == [1, 2]
    assert "counting the tokens of 300,000 characters" in console.file.getvalue()
    with pytest.raises(ZeroDivisionError):
        lengths.patiently(lambda: 1 // 0, size, console)
    gate, start = threading.Event(), time.perf_counter()
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        lengths.patiently(lambda: gate.wait(20), size, console)
    assert time.perf_counter() - start < 5
    gate.set()


def stopped(calls: list[int], how_often: int) -> Any:
    """stream_generate with Ctrl-C pressed while it reads its first prompts."""
    real = session.stream_generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= how_often:
            raise KeyboardInterrupt
        yield from real(*args, **kwargs)

    return generate


def test_ctrl_c_ends_a_script(monkeypatch: pytest.MonkeyPatch, tiny: list[Any]) -> None:
    """Nobody at the keyboard could ask again."""
    monkeypatch.setattr(session, "stream_generate", stopped([], 1))
    assert chat(f"{STORY}\n{HELLO}", tiny, code=130) == ("", [])


class Typed:
    """Somebody at a terminal: each line is typed when the one before it was dealt with."""

    def __init__(self, flags: list[Any], **more: Any):
        model, tokenizer = load(str(flags[1]))
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
def typed(tiny: list[Any]) -> Typed:
    return Typed(tiny)


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
    waiting = "with your next message: facts.txt (67 characters; /drop)"
    kept = f"(stopped while reading: your message was not sent)\n{waiting}"
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
        f"/file {a}", "/drop", "Hello", f"/file {a}", f"/FILE {b}", "Who?", "So?"
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


def test_another_model_goes_on(tiny: list[Any], tmp_path: Path) -> None:
    """It reads the conversation anew; one that cannot be loaded changes nothing."""
    other = models.tiny("qwen2", vocab=4096)
    folder = models.save_folder(other, tmp_path / "other")
    typed = Typed(tiny, loader=partial(load_model, lazy=True))
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
    tiny: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reading it again, where the same model reads in the same way; also after a cut."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path))
    first = Typed(tiny)
    first.type(STORY, "/save story")
    for change, kept in ((None, True), ("model", False), ("dense", False)):
        later = Typed(tiny)
        if change == "model":
            norm = later.chat.session.model.model.norm
            norm.weight = norm.weight + 1
        lines = ["/dense"] if change == "dense" else []
        later.type(*lines, "/load story")
        theirs, ours = later.chat.session, first.chat.session
        assert theirs.messages == ours.messages and theirs.cut == (change != "model")
        assert theirs.cached == (ours.cached if kept else [])
        wanted = [r.text for r in ours.answer("Hello", max_tokens=8)]
        ours.take_back()
        if kept:
            got = list(theirs.answer("Hello", max_tokens=8))
            assert [r.text for r in got] == wanted
            assert got[0].cached_tokens > 50
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
