"""The tune command, and tuning on the way into generate."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward import tune
from mlx_fastforward.cli import app, first_use


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return models.save_folder(models.tiny("llama", vocab=4096), tmp_path / "tiny")


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, args)), terminal_width=200)


def test_tune_shows_every_candidate_and_keeps_the_choice(
    home: Path, tiny: Path
) -> None:
    done = run("tune", "--model", tiny, "--largest", 256)
    assert done.exit_code == 0, done.output
    (choice,) = json.loads((home / "tuned.json").read_text()).values()
    tried = [(c["block_size"], c["strategy"]) for c in choice["candidates"]]
    assert tried[:2] == [(256, "chunk"), (256, "columns")] and tried[2][0] == 128
    for block, strategy in tried:
        assert any(
            str(block) in line and strategy in line for line in done.stdout.splitlines()
        )
    assert done.stdout.splitlines()[-1].startswith(f"Kept in {home / 'tuned.json'} for")


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


def test_generate_tunes_once_and_says_what_it_runs_with(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SMALLEST", 0)
    choice = tune.Choice(256, "columns", 700, 1.0, [_candidate()])
    monkeypatch.setattr(tune, "tune", lambda *args, **kwargs: choice)
    args = ["generate", "--model", tiny, "hello", "-m", 1, "--json"]
    first, second = run(*args), run(*args)
    assert first.exit_code == second.exit_code == 0, first.output
    assert "Tuned: blocks of 256 tokens, columns" in " ".join(first.stderr.split())
    assert "Tuned" not in second.stderr
    assert json.loads(second.stdout)["settings"]["block_size"] == 256
    own = run(*args, "--block-size", 64)
    assert json.loads(own.stdout)["settings"]["block_size"] == 64
    plain = run(*args, "--no-tune")
    assert json.loads(plain.stdout)["settings"]["block_size"] == 128


def _candidate() -> dict[str, Any]:
    return {
        "block_size": 256,
        "strategy": "columns",
        "seconds": 0.5,
        "error": 0.0,
        "correct": True,
    }
