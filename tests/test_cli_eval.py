"""The eval command on tiny models: tables, JSON, picture, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import models
import predictor_files
import pytest
from commands import bad, good, report

from mlx_fastforward import load, load_predictor, tuned
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import verify
from mlx_fastforward.bench.eval.summaries import Summary
from mlx_fastforward.bench.eval.tasks import BUILT
from mlx_fastforward.cli import eval_save, first_use
from mlx_fastforward.cli.eval import _tasks as asked_tasks
from mlx_fastforward.cli.eval_tables import verdict
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import JSON_NAME
from mlx_fastforward.predictors.verified import chosen
from mlx_fastforward.train import curves

SHORT = ["--lengths", "256", "--prompts", "1", "-m", "4"]
SMALL = [*SHORT, "--block-sizes", "8"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    model = models.tiny("llama", vocab=4096)
    return models.save_folder(model, folder, max_position_embeddings=512)


def test_everything_in_one_run(tmp_path: Path, tiny: Path) -> None:
    args = [*SMALL, "--sparsities", "0.5,0", "--png", tmp_path / "eval.png"]
    done, found = report(tmp_path, "eval", "--model", tiny, *args)
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.png", "report.json"]
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
    questions = f"5 documents (5 of 256 tokens) with {len(zero)} questions"
    assert questions in done.stderr
    assert f"{2 * len(zero)} answers compared in " in done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("device ") and max(map(len, rest)) <= 120
    assert not any("…" in line for line in rest if "interval" in line)
    told = " ".join(done.stdout.split())
    for title in ("Scores: ", "KL(dense || sparse)", "Perplexity of ", "Largest KL "):
        assert title in told
    assert "probe 0%: score " in rest[-1]


@pytest.mark.parametrize(
    "device, args, block",
    [
        (DeviceSettings(32, "columns"), [], 32),
        (DeviceSettings(32, "columns"), ["--no-tune"], 128),
        (DeviceSettings(dense=True), [], 128),  # the default is measured all the same
    ],
)
def test_blocks_are_as_tuned(
    device: DeviceSettings,
    args: list[str],
    block: int,
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_use, "SMALLEST", 0)
    monkeypatch.setattr(tuned, "remembered", lambda key: device)
    args = ["--model", str(tiny), *SHORT, "--tasks", "needle", *args]
    _, found = report(tmp_path, "eval", *args)
    (arm,) = found["arms"]
    assert (arm["block_size"], arm["sparsity"]) == (block, 0.5)
    assert arm["label"] == ("probe 50% block 32" if block == 32 else "probe 50%")
    assert (found["records"][0]["ffn_sparsity"] > 0) == (block == 32)


def test_only_prose_has_no_scores_and_one_document_no_interval(
    tmp_path: Path, tiny: Path
) -> None:
    args = [*SMALL, "--tasks", "continuation", "--png", tmp_path / "a.png"]
    done, found = report(tmp_path, "eval", "--model", tiny, *args)
    assert "Scores" not in done.stdout and "Perplexity" in done.stdout
    (s,) = found["summaries"]
    assert (s["n"], s["score_dense"], s["kl_bounds"]) == (1, None, None)
    assert " - " in done.stdout


def test_your_own_questions(tmp_path: Path, tiny: Path) -> None:
    data, text = tmp_path / "mine.jsonl", "The fox is red. " * 50
    asked = [(text, "How?"), (text, "Why?"), ("Short.", "What?")]
    lines = [{"context": c, "input": q, "answers": ["red"]} for c, q in asked]
    data.write_text("\n".join(map(json.dumps, lines)))
    args = [*SMALL, "--prompts", 9, "--tasks", "qa", "--data", data]
    done, found = report(tmp_path, "eval", "--model", tiny, *args)
    assert "2 documents (2 of yours of " in done.stderr
    assert "1 of them have fewer than 24 tokens" in done.stderr
    assert [r["name"] for r in found["records"]] == ["How?", "Why?", "What?"]
    assert found["settings"]["data"] == "mine.jsonl"
    assert asked_tasks(None, data) == [*BUILT, "qa"]


def test_what_arms_run_with_and_are_called(tmp_path: Path) -> None:
    model, found = models.tiny("llama", vocab=4096), {}
    folder = models.save_folder(model, tmp_path / "with", chat_template=False)
    models.save_random_predictor(model, folder, compensator="mlp")

    def labels(*more: str) -> list[str]:
        args = ["--model", folder, *SMALL, "--tasks", "needle", *more]
        found.update(report(tmp_path, "eval", *args)[1])
        return [a["label"] for a in found["arms"]]

    both = labels("--compensators", "auto,none")
    assert both == ["trained + mlp 50%", "trained 50%"]
    assert found["settings"]["predictor"] == "with"
    alone = labels("--predictor", "none", "--dtype", "float16")
    assert alone == ["probe 50%"] and found["settings"]["predictor"] == "none"
    assert found["environment"]["dtype"] == "float16"
    more = ["--selectors", "oracle", "--compensators", "none", "--sparse-decode"]
    shares = ["--predictor", "none", "--sparsities", "0,0.5", "--prune-tokens", "0,0.4"]
    wanted = ["probe 0%", "tokens 40%", "probe 50%", "probe 50% tokens 40%"]
    assert labels(*shares) == wanted
    skipped = [r["ffn_sparsity"] for r in found["records"]]
    assert 0 == skipped[0] < skipped[1] < skipped[3] and skipped[2] < skipped[3]
    wanted = ["oracle 50% block 8", "oracle 50% block 16"]
    assert labels("--block-sizes", "8,16", *more) == wanted
    assert all(a["sparse_decode"] for a in found["arms"])


def test_the_demo_model_keeps_its_answer(tmp_path: Path) -> None:
    args = ["--tasks", "needle", "--lengths", 300, "--block-sizes", 32, "--prompts", 1]
    (r,) = report(tmp_path, "eval", *args)[1]["records"]
    assert r["dense"] == r["sparse"] == r["expected"]
    assert r["arm"] == "trained + low-rank 50%" and 0 < r["kl"] < 0.5
    assert 0.05 < r["ffn_sparsity"] < 0.5 and r["tokens"] == 300


def test_longbench_and_mmlu_from_a_folder(tmp_path: Path) -> None:
    net = models.tiny("llama", vocab=4096)
    folder = models.save_folder(net, tmp_path / "m", max_position_embeddings=2048)
    record = {"input": "Who?", "context": "Anna sang. " * 40, "answers": ["Anna"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record))
    args = ["eval", "--model", folder, "--data", tmp_path, "--tasks"]
    more = ["--longbench", "--sparsities", "0.5,0.4"]
    done, found = report(tmp_path, *args, "hotpotqa", *more)
    assert "multi-document QA" in done.stdout and "probe 40%" in done.stdout
    assert [a["label"] for a in found["arms"]] == ["dense", "probe 50%", "probe 40%"]
    assert found["environment"]["model"] == "m, 4 layers"
    choices: dict[str, Any] = {"choices": ["1", "2", "3", "4"], "answer": 1}
    record = {"question": "1 + 1?", "subject": "anatomy", **choices}
    for split in ("dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(5 * (json.dumps(record) + "\n"))
    done, found = report(tmp_path, *args, "anatomy", "--mmlu", "--limit", 2)
    assert "MMLU" in done.stdout and "prompts read sparsely" in done.stdout
    assert len(found["records"]) == 2


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--lengths", "256,400"], 2, "--lengths 400 is too long: the model's context "
         "has 512 tokens, 148 of them for questions and answers; use at most 364."),
        (["--lengths", "100"], 2, "--lengths must be at least 256 tokens, got 100."),
        (["--tasks", "poems"], 2, "--tasks must be among continuation, needle, "),
        (["--tasks", "qa"], 2, "--data and the task qa need each other."),
        (["--tasks", "chat", "--data", "x"], 2, "--data and the task qa need each"),
        (["--data", "none.jsonl"], 1, "none.jsonl cannot be read: No such file"),
        (["--json", "."], 1, ". cannot be written: it is a folder."),
        (["--sparsities", "1.5"], 2, "sparsity must be at least 0 and below 1"),
        (["--selectors", "auto,probe"], 2, "two arms are the same: probe 50%, "),
        (["--compensators", "mlp"], 2, "compensator mlp needs a predictor file that"),
        (["--schedule", "layerwise"], 2, "schedule layerwise needs importances"),
        (["--sparse-decode"], 2, "sparse_decode needs the selector trained"),
        (["--longbench", "--mmlu"], 2, "give --longbench or --mmlu, not both."),
        (["--limit", 3], 2, "--limit goes with --longbench or --mmlu; use --prompts."),
        (["--mmlu", "--png", "x.png"], 2, "--png does not go with --mmlu."),
        (["--mmlu", "--prefill-draft", "self"], 2, "--prefill-draft does not go with"),
        (["--keep", "0.5"], 2, "--keep needs --prefill-draft: who says what is read?"),
        (["--longbench", "--lengths", 9], 2, "--lengths does not go with --longben"),
    ],
)  # fmt: skip
def test_refusals(args: list[str], code: int, said: str, tiny: Path) -> None:
    assert bad(code, "eval", "--model", tiny, *args).startswith(said)


def test_verdicts() -> None:
    for bounds, said in {
        (-0.2, -0.1): "score 0.500, dense 0.650: worse by more than chance (-0.150, ",
        (0.1, 0.2): "better by more than chance",
        (-0.2, 0.1): "no difference beyond chance (-0.050, 95 % interval -0.200 to ",
        (0.0, 0.0): "every question as before",
        None: "One document says nothing about others",
    }.items():
        values: dict[str, Any] = dict.fromkeys(Summary.__dataclass_fields__)
        difference = sum(bounds or (0, 0)) / 2
        values |= {"arm": "x", "score_sparse": 0.5, "score_dense": 0.5 - difference}
        values |= {"score_difference": difference, "score_difference_bounds": bounds}
        assert said in verdict(Summary(**values))


def test_save_keeps_what_auto_goes_by(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a predictor file gets one that holds the table alone; chat takes its word."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    line = bad(1, "eval", "--save", "--model", tiny, "--prompts", 1)
    assert line.startswith("nothing to verify: prompts of fewer than 512 tokens")
    net = predictor_files.tiny_model(vocab=4096)
    tiny = models.save_folder(net, tmp_path / "m", max_position_embeddings=700)
    dense = DeviceSettings(
        dense=True
    )  # what tuning finds here, it need not find elsewhere
    monkeypatch.setattr(eval_save, "tuned", lambda *args: dense)
    monkeypatch.setattr(curves, "SEQUENCES", 1)
    monkeypatch.setattr(verify, "SPARSITIES", (0.5, 0.7))
    said = good("eval", "--save", "--model", tiny, "--prompts", 1)
    (folder,) = (tmp_path / "home" / "predictors").iterdir()
    assert said.rstrip().endswith(f"kept in {folder}") and "planted facts" in said
    file = load_predictor(folder)
    rows = file.details["verified"]["rows"]
    assert [r["sparsity"] for r in rows] == [0.5, 0.7]
    assert file.layers is None and {r["facts_dense"] for r in rows} == {0.0}
    assert all(r["kl"] > 0 for r in rows)
    model, _ = load(str(tiny), sparsity="auto")
    engine = engine_of(model)
    assert engine is not None and (engine.config.sparsity, engine.chosen) == chosen(
        file.details
    )
    predictor_files.save(folder)
    mark = BaseModel.of(net).fingerprint
    trained = predictor_files.edit(folder, "base_model", fingerprint=mark) / JSON_NAME
    before = trained.read_text()
    flags = ("--model", tiny, "--prompts", 1, "--predictor", "none")
    assert "holds trained weights" in bad(1, "eval", "--save", *flags)
    assert trained.read_text() == before
