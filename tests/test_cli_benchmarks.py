"""eval --longbench and --mmlu: the way from the flags to lm-eval, and what is refused."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward.cli import app


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    net = models.tiny("llama", vocab=4096, max_position_embeddings=2048)
    return models.save_folder(net, tmp_path / "tiny")


def evaluate(*args: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)], terminal_width=200)


def test_longbench_from_a_folder(tmp_path: Path, tiny: Path) -> None:
    record = {"input": "Who?", "context": "Anna sang. " * 40, "answers": ["Anna"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record) + "\n")
    args = ["--tasks", "hotpotqa", "--data", tmp_path, "--json", tmp_path / "x.json"]
    done = evaluate("--model", tiny, "--longbench", *args, "--sparsities", "0.5,0.4")
    assert done.exit_code == 0, done.output
    assert "multi-document QA" in done.stdout and "probe 40%" in done.stdout
    found = json.loads((tmp_path / "x.json").read_text())
    assert [a["label"] for a in found["arms"]] == ["dense", "probe 50%", "probe 40%"]
    assert found["environment"]["model"] == "tiny, 4 layers"
    assert len(found["records"]) == 1


def test_mmlu_from_a_folder(tmp_path: Path, tiny: Path) -> None:
    for split in ("dev", "test"):
        record = {"question": "1 + 1?", "subject": "anatomy", "answer": 1}
        record["choices"] = ["1", "2", "3", "4"]
        lines = [json.dumps(record)] * 5
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    args = ["--tasks", "anatomy", "--data", tmp_path, "--limit", 2]
    done = evaluate("--model", tiny, "--mmlu", *args)
    assert done.exit_code == 0, done.output
    assert "MMLU" in done.stdout and "prompts read sparsely" in done.stdout


@pytest.mark.parametrize(
    "args, said",
    [
        (["--longbench", "--mmlu"], "give --longbench or --mmlu, not both."),
        (["--limit", 3], "--limit goes with --longbench or --mmlu; use --prompts."),
        (["--mmlu", "--png", "x.png"], "--png does not go with --mmlu."),
        (["--longbench", "--lengths", 9], "--lengths does not go with --longbench."),
        (["--longbench", "--tasks", "x"], "unknown LongBench task 'x'; known ones: "),
    ],
)
def test_refusals(args: list[Any], said: str, tiny: Path) -> None:
    done = evaluate("--model", tiny, *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mlx_fastforward: {said}")
