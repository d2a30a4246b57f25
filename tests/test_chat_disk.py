"""A chat's prefixes on disk: what was read on another day is not read again."""

from pathlib import Path
from typing import Any

import models
import pytest
from commands import bad, run
from models import demo_tokenizer, tiny

from mlx_fastforward import attach
from mlx_fastforward.cli.disk_cache import Shelf
from mlx_fastforward.server.disk import DiskCache
from mlx_fastforward.session import Session

STORY = "Keawe was poor, brave, and active; he could read and write. " * 30
SETTINGS = dict(sparsity=0.5, selector="oracle")


class Day:
    """A chat that begins with an empty memory."""

    def __init__(self, folder: Path, name: str = "llama", **more: Any):
        self.told: list[str] = []
        self.disk = DiskCache(folder, 10**9, self.told.append)
        model = tiny(name, vocab=4096)
        attach(model, models.settings(**{**SETTINGS, **more}))
        self.session = Session(model, demo_tokenizer())
        self.session.shelf = Shelf(self.disk)

    def ask(self, text: str) -> tuple[list[int], int]:
        """The answer, and how many tokens were not read for it."""
        got = list(self.session.answer(text, max_tokens=4))
        self.disk.jobs.join()
        return [r.token for r in got], got[0].cached_tokens


def test_a_document_that_was_read_once(tmp_path: Path) -> None:
    first, cached = Day(tmp_path).ask(STORY + "Who?")
    assert cached == 0 and len([*tmp_path.glob("*.json")]) == 1
    same, most = Day(tmp_path).ask(STORY + "Who?")
    other = Day(tmp_path)
    assert same == first and other.ask(STORY + "Where?")[1] > 400 < most
    assert other.ask("And why?")[1] > 400  # in memory by now
    assert Day(tmp_path, sparsity=0.3).ask(STORY)[1] == 0  # was read otherwise
    assert Day(tmp_path, "qwen2").ask(STORY)[1] == 0


def test_a_dense_document_serves_everybody(tmp_path: Path) -> None:
    assert Day(tmp_path, sparsity=0.0).ask(STORY)[1] == 0
    assert Day(tmp_path).ask(STORY + "Who?")[1] > 400


def test_damage_is_told(tmp_path: Path) -> None:
    first, _ = Day(tmp_path).ask(STORY)
    (file,) = tmp_path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    day = Day(tmp_path)
    assert day.ask(STORY) == (first, 0)
    assert len(day.told) == 1 and "damaged: the checksum is wrong" in day.told[0]


@pytest.mark.parametrize("name", ["llama", "llama-bias-sliding"])
def test_a_conversation_goes_on_from_disk(tmp_path: Path, name: str) -> None:
    """Where a cache cannot be cut back, only if the answer's text has the answer's tokens."""
    day = Day(tmp_path, name, sparsity=0.0)
    day.ask(STORY)
    messages = list(day.session.messages)
    wanted, _ = day.ask("And then?")
    later = Day(tmp_path, name, sparsity=0.0)
    later.session.messages = messages
    got, cached = later.ask("And then?")
    assert got == wanted and (cached > 400) == (name == "llama")


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    (document := tmp_path / "d.txt").write_text(STORY)
    folder = tmp_path / "prompts"
    flags = ("--model", tiny_folder, "-m", "6", "--file", document)
    command = ("chat", *flags, "--cache-dir", folder)
    plain = run("chat", *flags, stdin="Who?\n")
    first, second = run(*command, stdin="Who?\n"), run(*command, stdin="Who?\n")
    assert first.stdout == second.stdout == plain.stdout and not second.stderr
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    told = run(*command, stdin="Who?\n").stderr
    assert told.startswith("mlx_fastforward: ") and "damaged" in told
    assert "--cache-gb must be above 0" in bad(2, *command, "--cache-gb", "0")
    beside = bad(2, *command, "--prefill-draft", "self")
    assert "--cache-dir does not go with --prefill-draft" in beside
    assert "--cache-dir" in bad(1, "chat", "--cache-dir", document, *flags)
