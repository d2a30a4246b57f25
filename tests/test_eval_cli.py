"""The eval command on tiny models: tables, JSON, picture, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner, Result

from mlx_fastforward import tune
from mlx_fastforward.bench.eval.summaries import Summary
from mlx_fastforward.bench.eval.tasks import BUILT
from mlx_fastforward.cli import app, first_use
from mlx_fastforward.cli.eval import _tasks as asked_tasks
from mlx_fastforward.cli.eval_tables import verdict
from mlx_fastforward.tune import Choice

SMALL = ["--lengths", "256", "--prompts", "1", "--block-sizes", "8", "-m", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    model = models.tiny("llama", vocab=4096)
    return models.save_folder(model, folder, max_position_embeddings=512)


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)], terminal_width=200)


def report(tmp_path: Path, *args: Any) -> tuple[Result, dict[str, Any]]:
    file = tmp_path / "eval.json"
    done = run(*args, "--json", file)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return done, found


def test_everything_in_one_run(tmp_path: Path, tiny: Path) -> None:
    png = tmp_path / "eval.png"
    done, found = report(
        tmp_path, "--model", tiny, *SMALL, "--sparsities", "0.5,0", "--png", png
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval.png"]
    assert set(found) == {
        "environment",
        "settings",
        "seconds",
        "arms",
        "summaries",
        "worst",
        "records",
    }
    assert {"device", "mlx", "model", "dtype"} <= set(found["environment"])
    labels = ["probe 50%", "probe 0%"]
    assert [a["label"] for a in found["arms"]] == labels
    assert [a["sparsity"] for a in found["arms"]] == [0.5, 0.0]
    tasks = ["continuation", "needle", "key-value", "quote", "chat", "all"]
    rows = [(s["arm"], s["task"]) for s in found["summaries"]]
    assert rows == [(arm, task) for arm in labels for task in tasks]
    assert found["settings"]["tasks"] == tasks[:-1]
    zero = [r for r in found["records"] if r["arm"] == "probe 0%"]
    assert zero and all(r["kl"] == 0 and r["dense"] == r["sparse"] for r in zero)
    kls = [r["kl"] for r in found["worst"]]
    assert len(kls) == 10 and kls == sorted(kls, reverse=True) and kls[-1] > 0
    assert str(tmp_path) not in json.dumps(found)
    assert str(tiny.parent) not in json.dumps(found)
    questions = len(zero)
    assert f"5 documents (5 of 256 tokens) with {questions} questions" in done.stderr
    assert f"{2 * questions} answers compared in " in done.stderr


def test_the_tables_fit_and_say_what_they_must(tmp_path: Path, tiny: Path) -> None:
    done = run(
        "--model", tiny, *SMALL, "--tasks", "continuation,needle", "--prompts", 2
    )
    first, *rest = done.stdout.splitlines()
    assert done.exit_code == 0 and first.startswith("device ")
    assert max(map(len, rest)) <= 120 and "…" not in "".join(
        line for line in rest if "interval" in line
    )
    told = " ".join(done.stdout.split())
    for title in ("Scores: ", "KL(dense || sparse)", "Perplexity of ", "Largest KL "):
        assert title in told
    assert "probe 50%: score " in rest[-1]


@pytest.mark.parametrize("block, args", [(32, []), (128, ["--no-tune"]), (128, None)])
def test_blocks_are_as_tuned(
    block: int,
    args: Any,
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None: tuning found dense to be the fastest, and the default is measured."""
    choice = Choice(0 if args is None else 32, "columns", 0, 1.0, [])
    monkeypatch.setattr(tuning, "SMALLEST", 0)
    monkeypatch.setattr(tune, "remembered", lambda key: choice)
    small = ["--lengths", "256", "--prompts", "1", "--tasks", "needle", "-m", "1"]
    _, found = report(tmp_path, "--model", tiny, *small, *(args or []))
    (arm,) = found["arms"]
    assert (arm["block_size"], arm["sparsity"]) == (block, 0.5)
    assert arm["label"] == ("probe 50% block 32" if block == 32 else "probe 50%")


def test_only_prose_has_no_scores(tmp_path: Path, tiny: Path) -> None:
    done, found = report(
        tmp_path, "--model", tiny, *SMALL, "--tasks", "continuation", "--png", tmp_path / "a.png"
    )  # fmt: skip
    assert "Scores" not in done.stdout and "Perplexity" in done.stdout
    (s,) = found["summaries"]
    assert (s["n"], s["score_dense"], s["kl_bounds"]) == (1, None, None)
    assert " - " in done.stdout  # one document has no interval


def test_your_own_questions(tmp_path: Path, tiny: Path) -> None:
    data, text = tmp_path / "mine.jsonl", "The fox is red. " * 50
    lines = [
        {"context": text, "input": q, "answers": ["red"]} for q in ("How?", "Why?")
    ]
    lines.append({"context": "Short.", "question": "What?", "answers": ["short"]})  # type: ignore[dict-item]
    data.write_text("\n".join(map(json.dumps, lines)))
    args = ["--model", tiny, *SMALL, "--prompts", 9, "--tasks", "qa", "--data", data]
    done, found = report(tmp_path, *args)
    assert "2 documents (2 of yours of " in done.stderr
    assert "1 of them have fewer than 24 tokens" in done.stderr
    assert [r["name"] for r in found["records"]] == ["How?", "Why?", "What?"]
    assert found["settings"]["data"] == "mine.jsonl"
    assert asked_tasks(None, data) == [*BUILT, "qa"] and asked_tasks(None, None) == [
        *BUILT
    ]


def test_the_adapter_beside_the_model(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "with")
    models.save_random_predictor(model, folder, compensator="mlp")
    args = ["--model", folder, *SMALL, "--tasks", "needle"]
    _, found = report(tmp_path, *args, "--compensators", "auto,none")
    assert [a["label"] for a in found["arms"]] == ["trained + mlp 50%", "trained 50%"]
    assert found["settings"]["predictor"] == "with"
    _, found = report(tmp_path, *args, "--predictor", "none", "--dtype", "float16")
    assert [a["label"] for a in found["arms"]] == ["probe 50%"]
    assert found["settings"]["predictor"] == "none"
    assert found["environment"]["dtype"] == "float16"


def test_block_sizes_are_named_where_they_differ(tmp_path: Path, tiny: Path) -> None:
    args = ["--model", tiny, *SMALL, "--tasks", "needle", "--block-sizes", "8,16"]
    _, found = report(tmp_path, *args, "--selectors", "oracle", "--sparse-decode")
    labels = [a["label"] for a in found["arms"]]
    assert labels == ["oracle 50% block 8", "oracle 50% block 16"]
    assert all(a["sparse_decode"] for a in found["arms"])


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "plain", chat_template=False)
    _, found = report(tmp_path, "--model", folder, *SMALL, "--tasks", "needle,chat")
    assert [r["task"] for r in found["records"]] == ["needle"] + ["chat"] * 3


def test_the_demo_model_keeps_its_answer(tmp_path: Path) -> None:
    args = ["--tasks", "needle", "--lengths", "530", "--prompts", 1]
    _, found = report(tmp_path, *args)
    (r,) = found["records"]
    assert r["dense"] == r["sparse"] == r["expected"]
    assert r["arm"] == "trained + low-rank 50%" and 0 < r["kl"] < 0.5
    assert 0.05 < r["ffn_sparsity"] < 0.5 and r["tokens"] == 530


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--lengths", "256,400"], 2, "--lengths 400 is too long: the model's context "
         "has 512 tokens, 148 of them for questions and answers; use at most 364."),
        (["--lengths", "100"], 2, "--lengths must be at least 256 tokens, got 100."),
        (["--lengths", "long"], 2, "--lengths must be numbers with commas"),
        (["--tasks", "poems"], 2, "--tasks must be among continuation, needle, "),
        (["--tasks", ""], 2, "--tasks must be among continuation, needle, "),
        (["--tasks", "qa"], 2, "--data and the task qa need each other."),
        (["--tasks", "chat", "--data", "x"], 2, "--data and the task qa need each"),
        (["--data", "none.jsonl"], 1, "none.jsonl cannot be read: No such file"),
        (["--png", "a.jpg"], 2, "--png must be a file ending in .png"),
        (["--json", "no/such/a.json"], 1, "cannot be written: no such folder."),
        (["--json", "."], 1, "cannot be written: it is a folder."),
        (["--dtype", "int8"], 2, "--dtype must be float32, float16 or bfloat16"),
        (["--sparsities", "1.5"], 2, "sparsity must be at least 0 and below 1"),
        (["--selectors", "magic"], 2, "selector must be one of "),
        (["--selectors", "trained"], 2, "selector trained needs a predictor"),
        (["--selectors", "auto,probe"], 2, "two arms are the same: probe 50%, "),
        (["--schedule", "layerwise"], 2, "schedule layerwise needs importances"),
        (["--sparse-decode"], 2, "sparse_decode needs the selector trained"),
        (["--model", "/no/such/model"], 1, "/no/such/model"),
    ],
)  # fmt: skip
def test_refusals(args: list[str], code: int, said: str, tiny: Path) -> None:
    done = run("--model", tiny, *args)
    assert (done.exit_code, done.stdout) == (code, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mlx_fastforward: ") and said in last
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def summary(bounds: Any) -> Summary:
    values: dict[str, Any] = dict.fromkeys(Summary.__dataclass_fields__)
    difference = 0.0 if bounds is None else sum(bounds) / 2
    values |= {
        "arm": "x",
        "score_sparse": 0.5,
        "score_dense": 0.5 - difference,
        "score_difference": difference,
        "score_difference_bounds": bounds,
    }
    return Summary(**values)


@pytest.mark.parametrize(
    "bounds, said",
    [
        ((-0.2, -0.1), "score 0.500, dense 0.650: worse by more than chance (-0.150, "),
        ((0.1, 0.2), "better by more than chance"),
        ((-0.2, 0.1), "no difference beyond chance (-0.050, 95 % interval -0.200 to "),
        ((0.0, 0.0), "every question as before"),
        (None, "One document says nothing about others"),
    ],
)
def test_verdicts(bounds: Any, said: str) -> None:
    assert said in verdict(summary(bounds))
