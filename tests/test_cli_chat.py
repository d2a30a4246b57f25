"""The chat: in a pipe answers and nothing else; its commands, and what cannot be done."""

import importlib
import re
import types
from pathlib import Path
from typing import Any

import mlx_lm
import models
import pytest
from commands import run
from mlx_lm.utils import load

from mlx_fastforward import attach, session, tune
from mlx_fastforward.cli import first_use
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
        "/Compare": "unknown command /Compare; /help lists them.",
        "/compare": "nothing to compare yet: ask something first.",
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
    assert re.search(r"sparse +│ +\d+ +│ +\d+\.\d\d s", table)
    assert re.search(r"dense \(stock mlx-lm\) +│ +\d+ +│ +\d+\.\d\d s", table)
    assert re.search(r"^TTFT \d+\.\d\dx$", table, re.MULTILINE)
    last = said(f"{STORY}\n{HELLO}", tiny).removeprefix(sparse)
    assert whole.endswith(last) and last.strip()


def test_a_device_on_which_dense_is_fastest(
    tiny: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    dense = DeviceSettings(dense=True)
    monkeypatch.setattr(tune, "remembered", lambda key: dense)
    _, told = chat(f"/sparse\n{HELLO}/compare\n", tiny[:2], code=1)
    why = "dense prefill is the fastest on this device; start with --no-tune."
    assert told == [why, why]
    assert said("/sparse\n", [*tiny[:2], "--no-tune"]) == ""


def test_more_than_the_models_context_and_no_template(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096, max_position_embeddings=64)
    folder = models.save_folder(model, tmp_path / "small")
    (line,) = chat(f"{STORY}\n", ["--model", folder])[1]
    content = {"role": "user", "content": STORY.strip()}
    n = len(render(models.demo_tokenizer(), [content]))
    assert line.startswith(f"{n:,} tokens, but the model was made for 64") and n > 64
    base = models.save_folder(model, tmp_path / "base", chat_template=False)
    (line,) = chat(HELLO, ["--model", base], code=1)[1]
    assert "has no chat template" in line


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


def test_ctrl_c_stops_the_answer_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, tiny: list[Any], capsys: pytest.CaptureFixture
) -> None:
    """And what was not said is not part of the conversation: the document still waits."""
    module = importlib.import_module("mlx_fastforward.cli.chat")
    calls: list[int] = []
    lines = iter([STORY, "Hello", "Again", None])
    reader = types.SimpleNamespace(read=lambda: next(lines))
    monkeypatch.setattr(module, "Lines", lambda interactive: reader)
    monkeypatch.setattr(session, "stream_generate", stopped(calls, 1))
    model, tokenizer = load(str(tiny[1]))
    attach(model)
    loop = module.Chat(session.Session(model, tokenizer), FACTS, max_tokens=8)
    loop.interactive = True
    loop.banner(None, None)
    loop.run()
    shown = capsys.readouterr().out
    assert "50% of FFN neurons dropped per 128 tokens, selector probe" in shown
    assert "(stopped)" in shown and "of the prompt's FFN skipped" in shown
    asked = [m["content"] for m in loop.session.messages if m["role"] == "user"]
    assert len(calls) == 3 and asked == [f"{FACTS}\n\nHello", "Again"]
