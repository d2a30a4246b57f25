"""The chat: in a pipe answers and nothing else; its commands, and what cannot be done."""

import _thread
import io
import re
import threading
from pathlib import Path
from typing import Any

import mlx_lm
import models
import pytest
from commands import run
from mlx_lm.utils import load
from rich.console import Console

from mlx_fastforward import session, tuned
from mlx_fastforward.cli import first_use, lengths
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.session import render

FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306."
MABEL = "What is the secret code of Mabel?"
FELIX = "What is the secret code of Felix?"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6
HELLO = "Hello\n"


@pytest.fixture
def tiny(tiny_folder: Path) -> list[Any]:
    """Flags for a model that loads in no time; its answers are gibberish."""
    return ["--model", tiny_folder, "--block-size", "8", "--sparsity", "0.9"]


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
    for leave in (f"q\n{HELLO}", f"/quit\n{HELLO}", f"/Q\n{HELLO}", " q \nq", ""):
        assert said(leave, tiny) == ""
    assert said(HELLO, tiny) == said("Hello", tiny) != "\n"
    assert said("/etc/hosts holds what?\n", tiny).strip()  # no command
    for name in ("/help\n", "H\n", "/?\n"):
        for command in ("/file PATH", "/compare", "/dense", "/sparse", "/reset"):
            assert command in said(name, tiny)


def test_paths_as_typed_quoted_and_pasted(tmp_path: Path, tiny: list[Any]) -> None:
    (document := tmp_path / "my story.txt").write_text(STORY)
    (other := tmp_path / "b.txt").write_text(FACTS)
    both = [*tiny, "--file", document, "--file", other]
    assert said(HELLO, both) == said(f"/file {document}\n/file {other}\n{HELLO}", tiny)
    wanted, plain = said(HELLO, [*tiny, "--file", document]), said(HELLO, tiny)
    assert said(HELLO, both) != wanted
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
        "/save": "usage: /save NAME",
        "/save x": "nothing to save yet: ask something first.",
        "/load": "usage: /load NAME; none is saved: /save NAME keeps one.",
        "/load ../x": "a name of letters, digits, - and _ is expected, got '../x'.",
        "/load x": "there is no conversation x; none is saved: /save NAME keeps one.",
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


@pytest.mark.usefixtures("as_in_a_terminal")
def test_counting_the_tokens_of_a_long_text_can_be_stopped() -> None:
    """Though the tokenizer is one call; what it finds or raises arrives."""
    console, size = Console(file=io.StringIO(), force_terminal=True), lengths.LONG_TEXT
    assert lengths.patiently(lambda: [1, 2], size, console) == [1, 2]
    assert "counting the tokens of 300,000 characters" in console.file.getvalue()
    with pytest.raises(ZeroDivisionError):
        lengths.patiently(lambda: 1 // 0, size, console)
    gate = threading.Event()

    def stopped() -> None:
        _thread.interrupt_main()
        gate.wait(60)

    with pytest.raises(KeyboardInterrupt):  # though it is still counting
        lengths.patiently(stopped, size, console)
    gate.set()


def test_ctrl_c_ends_a_script(monkeypatch: pytest.MonkeyPatch, tiny: list[Any]) -> None:
    """Nobody at the keyboard could ask again."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(session, "stream_generate", stopped)
    assert chat(f"{STORY}\n{HELLO}", tiny, code=130) == ("", [])
