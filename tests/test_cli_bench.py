"""The bench command on a tiny model: table, JSON, picture, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward.cli import app

ARMS = ["--contexts", "64,96", "-n", "1"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return models.save_folder(models.tiny("llama", vocab=4096), tmp_path / "tiny")


def bench(*args: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, args)], terminal_width=200)


def report(tmp_path: Path, *args: Any) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    done = bench(*args, "--json", file)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_arm_has_a_row(tmp_path: Path, tiny: Path) -> None:
    arms = ["--block-sizes", "8,16", "--sparsities", "0.5,0.25"]
    arms += ["--selectors", "probe,first-block", "--strategies", "chunk,columns"]
    found = report(tmp_path, "--model", tiny, *ARMS, *arms)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    keys = ("context", "block_size", "sparsity", "selector", "strategy")
    assert len({tuple(r[k] for k in keys) for r in rows}) == len(rows)


def test_attention_arms(tmp_path: Path, tiny: Path) -> None:
    arms = ["--block-sizes", "8", "--attention-blocks", "0,16"]
    rows = report(tmp_path, "--model", tiny, *ARMS, *arms)["rows"]
    assert [r["attention_block"] for r in rows] == [0, 16, 0, 16]
    for r in rows:
        assert 0 < r["ffn_share"] and r["reachable_speedup"] == pytest.approx(
            1 / (1 - r["ffn_share"] * r["ffn_flops_skipped"])
        )


def test_what_a_row_and_the_environment_hold(tmp_path: Path, tiny: Path) -> None:
    found = report(tmp_path, "--model", tiny, *ARMS, "--block-sizes", "8")
    assert set(found["rows"][0]) >= {
        "context",
        "sparsity",
        "block_size",
        "selector",
        "strategy",
        "ttft_s",
        "stock_ttft_s",
        "speedup",
        "ideal_speedup",
        "peak_memory_gb",
        "decode_tps",
        "stock_decode_tps",
    }
    environment = found["environment"]
    assert {"device", "blas", "mlx", "mlx_lm", "dtype", "model"} <= set(environment)
    assert str(tmp_path) not in json.dumps(found)


def test_the_table_and_the_picture(tmp_path: Path, tiny: Path) -> None:
    png = tmp_path / "bench.png"
    done = bench("--model", tiny, *ARMS, "--block-sizes", 8, "--png", png)
    assert done.exit_code == 0, done.output
    assert {"probe", "50%,", "8,", "chunk"} <= set(done.stdout.split())
    assert png.read_bytes().startswith(b"\x89PNG")


def test_an_adapter_beside_the_model_is_used(tmp_path: Path, tiny: Path) -> None:
    models.save_random_predictor(models.tiny("llama", vocab=4096), tiny)
    found = report(tmp_path, "--model", tiny, *ARMS, "--block-sizes", "8")
    assert {r["selector"] for r in found["rows"]} == {"trained"}
    none = report(
        tmp_path, "--model", tiny, *ARMS, "--block-sizes", 8, "--predictor", "none"
    )
    assert {r["selector"] for r in none["rows"]} == {"probe"}


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--random", "gpt-5"], 2, "--random must be one of llama-3.2-1b, "),
        (["--random", "qwen3-4b", "--q-bits", 7], 2, "--q-bits must be 2, 3, "),
        (["--png", "a.jpg"], 2, "--png must be a file ending in .png"),
        (["--layers", 3], 2, "--layers and --q-bits go with --random."),
        (["--dtype", "int8"], 2, "--dtype must be float32, float16 or bfloat16"),
        (["--contexts", "many"], 2, "--contexts must be numbers with commas"),
        (["--contexts", "0"], 2, "--contexts must be at least 1"),
        (["--sparsities", "1.5"], 2, "sparsity must be at least 0 and below 1"),
        (["--block-sizes", "4"], 2, "block_size must be at least 8"),
        (["--strategies", "fast"], 2, "strategy must be one of chunk, columns"),
        (["--selectors", "magic"], 2, "selector must be one of "),
    ],
)
def test_refusals(args: list[Any], code: int, said: str, tiny: Path) -> None:
    model = [] if "--random" in args else ["--model", tiny]
    done = bench(*model, *args)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_report_that_cannot_be_written(tmp_path: Path, tiny: Path) -> None:
    file = tmp_path / "no" / "bench.json"
    done = bench("--model", tiny, *ARMS, "--block-sizes", 8, "--json", file)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"mlx_fastforward: {file} cannot be")
