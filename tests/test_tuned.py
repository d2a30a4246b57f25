"""What tuning found is kept, and chat and generate tune on the way, once."""

import io
import json
from pathlib import Path
from typing import Any

import models
import pytest
from rich.console import Console
from test_tune import HEADS, home, made, tiny
from typer.testing import CliRunner, Result

import mlx_fastforward as ff
from mlx_fastforward import calls, tuned, tuning
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.cli import app, first_use
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.model.families import Heads

# What is remembered


def test_memory(home: Path) -> None:
    devices = [DeviceSettings(256, "columns", 512, 64), DeviceSettings(dense=True)]
    for key, device in zip("ab", devices):
        assert tuned.remembered(key) is None
        tuned.remember(key, device)
    assert [tuned.remembered(key) for key in "ab"] == devices
    assert [p.name for p in home.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"key": 3}',
        '{"key": {"a": 1}}',
        '{"key": {"block_size": 1.5}}',
        '{"key": {"block_size": 0}}',
        '{"key": {"dense": "no"}}',
    ],
)
def test_damaged_memory_is_no_memory(text: str, home: Path) -> None:
    home.mkdir()
    (home / "tuned.json").write_text(text)
    assert tuned.remembered("key") is None
    tuned.remember("key", DeviceSettings())
    assert tuned.remembered("key") == DeviceSettings()


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    home.write_text("")
    tuned.remember("key", DeviceSettings())
    assert tuned.remembered("key") is None


def test_keys_tell_what_matters_apart() -> None:
    engines = [made(), made(4), made(8), made(4, "mxfp4")]
    engines += [made(sparsity=0.4), made(selector="first-block")]
    keys = [tuned.key(engine, HEADS) for engine in engines]
    keys.append(tuned.key(engines[0], Heads(4, 4, 8)))
    assert len(set(keys)) == len(keys)
    assert tuned.key(made(block_size=64), HEADS) == keys[0] and "probe" in keys[0]


# On the way into a chat

STORY = "Keawe was poor, brave, and active; he could read and write. " * 40


def test_what_is_not_worth_tuning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models, what runs densely anyway, and prompts that are too short to gain."""
    model, console = models.tiny("llama"), Console(file=io.StringIO())
    assert first_use.tuned(model, made(), console) == DeviceSettings()
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    assert first_use.tuned(model, made(sparsity=0.0), console) == DeviceSettings()
    ff.attach(model, ff.PrefillConfig())
    first_use.tune_first(model, engine_of(model).shortest - 1)
    assert not home.exists()


def test_a_device_that_is_too_slow_to_try_is_told_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C would have to wait for a whole chunk."""
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    monkeypatch.setattr(tuning, "chunk_seconds", lambda engine: 7.0)
    model, console = models.tiny("llama"), Console(file=io.StringIO(), width=300)
    ff.attach(model, ff.PrefillConfig())
    for _ in range(2):
        first_use.tune_first(model, 600, console)
    assert console.file.getvalue().count("takes about 7 s per 2,048 tokens") == 1
    assert engine_of(model).device == DeviceSettings()


def test_ctrl_c_skips_tuning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is remembered of it."""
    monkeypatch.setattr(first_use, "SMALLEST", 0)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_measured", interrupted)
    model, console = models.tiny("llama"), Console(file=io.StringIO(), width=300)
    ff.attach(model, ff.PrefillConfig())
    first_use.tune_first(model, 600, console)
    assert "Tuning skipped: blocks of 128 tokens. --no-tune" in console.file.getvalue()
    assert not home.exists() and engine_of(model).device == DeviceSettings()


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, args)), terminal_width=200)


def test_generate_tunes_once_and_says_what_it_runs_with(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a prompt that is long enough; users who know better are believed."""
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    candidates = [tuning.Candidate(256, "columns", 0.5, 1.0, 0.0, True)]
    choice = tuning.Choice(DeviceSettings(256, "columns", 700), candidates)
    monkeypatch.setattr(tuning, "search", lambda *_, **__: choice)
    args = ["generate", "--model", tiny, "-m", 1, "--json"]
    for more, size, strategy, told in (
        (["hello"], 128, "chunk", False),
        ([STORY], 256, "columns", True),
        ([STORY], 256, "columns", False),
        (["hello"], 256, "columns", False),
        ([STORY, "--block-size", 64], 64, "chunk", False),
        ([STORY, "--no-tune"], 128, "chunk", False),
    ):
        done = run(*args, *more)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["settings"]
        assert (found["block_size"], found["strategy"]) == (size, strategy)
        words = "Tuned: blocks of 256 tokens, columns"
        assert (words in " ".join(done.stderr.split())) == told


def test_the_command(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is shown; by the real clock."""
    for module in (calls, tuning):
        monkeypatch.setattr(module, "CHUNK", 1024)
    monkeypatch.setattr(calls, "STEPS", (2048,))
    file = tiny.parent / "found.json"
    done = run("tune", "--model", tiny, "--largest", 256, "--json", file)
    assert done.exit_code == 0, done.output
    told = json.loads(file.read_text())
    times = [f"{c['seconds'] * 1e3:.1f}" for c in told["candidates"]]
    (choice,) = json.loads((home / "tuned.json").read_text()).values()
    assert DeviceSettings(**choice).block_size in (128, 256)
    assert told["device"] == choice
    wanted = [["256", "chunk"], ["256", "columns"], ["128"]]
    for line, words, ms in zip(done.stdout.splitlines()[1:], wanted, times):
        assert line.split()[: len(words)] == words and "wrong" not in line
        assert f" {ms} " in line
        assert "as they are" in line
    assert done.stdout.splitlines()[-1].startswith(f"Kept in {home / 'tuned.json'}: ch")
    done = run("generate", "--model", tiny, "hello", "-m", 1, "--json")
    found = json.loads(done.stdout)["settings"]
    if not choice["dense"]:  # small as it is
        assert found["block_size"] == choice["block_size"]
    assert (found["sparsity"] == 0) == choice["dense"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--largest", 64], "--largest must be 128 to 2048, got 64."),
        (["--sparsity", 0], "nothing to tune: every layer stays dense."),
    ],
)
def test_refusals(args: list[Any], said: str, tiny: Path) -> None:
    done = run("tune", "--model", tiny, *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"mlx_fastforward: {said}\n"
