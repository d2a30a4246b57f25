"""MMLU through lm-eval's own tasks, on questions made up here."""

import functools
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.nn as nn
import models
import numpy as np
import pytest

from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import harness
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval import mmlu
from mlx_fastforward.bench.eval.arms import DENSE, Arm
from mlx_fastforward.errors import ConfigError, FastForwardError

ARMS = [DENSE, Arm("half", models.settings())]
COUNTS = {"astronomy": 2, "high_school_us_history": 3, "marketing": 1, "sociology": 2}
LETTERS = "ABCD"


def question(subject: str, split: str, number: int) -> dict[str, Any]:
    return {
        "question": f" {split} {number} of {subject}: which one? ",
        "subject": subject,
        "choices": [f"{word} {number}" for word in ("one", "two", "three", "four")],
        "answer": number % 4,
    }


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    for split, more in (("test", COUNTS), ("dev", dict.fromkeys(COUNTS, 5))):
        write(
            folder, split, [question(s, split, n) for s in more for n in range(more[s])]
        )
    return folder


@functools.cache
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


def evaluate(data: Any, *tasks: str, arms: Any = ARMS, **more: Any) -> Any:
    more |= {"data": data, "tasks": list(tasks) or None}
    return mmlu.mmlu(model(), models.demo_tokenizer(ends=True), arms, **more)


def stubbed(patch: pytest.MonkeyPatch, choose: Any = lambda doc: 0) -> list[Any]:
    """Choose in the model's place; returns the list that the requests will be in."""
    asked: list[Any] = []

    def score(self: Any, requests: list, disable_tqdm: bool = False) -> Any:
        asked.append([r.args for r in requests])
        best = choose(requests[0].doc)
        return [(-1.0 - abs(i - best), False) for i in range(len(requests))]

    patch.setattr(lm_module.SparseLM, "loglikelihood", score)
    return asked


def prompt(subject: str, number: int, shots: int) -> str:
    """As MMLU's authors write it, examples from dev first."""
    title = subject.replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {title}."
    text += "\n\n"
    for split, n in [("dev", n) for n in range(shots)] + [("test", number)]:
        it = question(subject, split, n)
        text += it["question"].strip() + "\n"
        for letter, choice in zip(LETTERS, it["choices"]):
            text += f"{letter}. {choice}\n"
        text += "Answer:"
        text += f" {LETTERS[it['answer']]}\n\n" if split == "dev" else ""
    return text


@pytest.mark.parametrize("shots", [0, 2])
def test_prompts(data: Path, monkeypatch: pytest.MonkeyPatch, shots: int) -> None:
    asked = stubbed(monkeypatch)
    evaluate(data, num_shots=shots)
    wanted = [prompt(s, n, shots) for s in sorted(COUNTS) for n in range(COUNTS[s])]
    answers = [" A", " B", " C", " D"]
    assert asked == 2 * [[(text, answer) for answer in answers] for text in wanted]


def test_accuracies_by_hand(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large subjects count more. Dense is right but for history's last, sparse only in STEM."""

    def choose(doc: dict[str, Any]) -> int:
        astronomy = doc["subject"] == "astronomy"
        if engine_of(model()) is not None:
            return doc["answer"] if astronomy else 3
        last = doc["subject"] == "high_school_us_history" and doc["answer"] == 2
        return 0 if last else doc["answer"]

    stubbed(monkeypatch, choose)
    found = evaluate(data)
    wanted = {
        "STEM": (2, 100, 100, 0),
        "humanities": (3, 200 / 3, 0, -100),
        "social sciences": (2, 100, 0, -100),
        "other": (1, 100, 0, -100),
        "all": (8, 87.5, 25, -250 / 3.5),
    }
    assert [r["name"] for r in found["rows"]] == list(wanted)
    for r in found["rows"]:
        got = (r["prompts"], *r["scores"].values(), r["gap_percent"]["half"])
        assert got == pytest.approx(wanted[r["name"]]), r["name"]
    assert found["settings"] == {"num_shots": 5, "limit": None}
    manager = harness.task_manager("mmlu/default")
    groups = [mmlu.subjects(manager, tag) for tag in mmlu.GROUPS.values()]
    assert [len(g) for g in groups] == [19, 13, 12, 13]
    assert len(set().union(*groups)) == 57
    json.dumps(found)


def test_a_real_run(data: Path) -> None:
    """The answer is the letter that the model finds likeliest."""
    found, tokenizer = evaluate(data), models.demo_tokenizer()
    for r in found["records"]:
        text = prompt(r["task"], r["number"], 5)
        ids = [tokenizer.encode(f"{text} {letter}") for letter in LETTERS]
        assert {len(i) for i in ids} == {r["tokens"] + 1}
        logits, _ = models.prefill(model(), ids[0][:-1])
        best = int(np.argmax([logits[-1][i[-1]] for i in ids]))
        assert r["answers"]["dense"] == LETTERS[best]
        assert r["scores"]["dense"] == (best == r["number"] % 4)
        assert r["ffn_sparsity"]["dense"] == 0 and r["ffn_sparsity"]["half"] > 0.2
    assert found["arms"][1]["sparse_prompts"] == 8
    assert engine_of(model()) is None


def test_parquet_files_as_on_the_hub(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    (tmp_path / "all").mkdir()
    for split in ("test", "dev"):
        lines = (data / f"{split}.jsonl").read_text().splitlines()
        rows = Dataset.from_list([json.loads(line) for line in lines])
        rows.to_parquet(tmp_path / f"all/{split}-00000-of-00001.parquet")
    wanted = []

    def download(repo: str, **more: Any) -> str:
        wanted.append((repo, more["repo_type"], more["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    asked = stubbed(monkeypatch)
    for place in (data, None):
        evaluate(place, arms=[DENSE])
    assert asked[:8] == asked[8:] and len(asked) == 16
    patterns = ["all/test-*.parquet", "all/dev-*.parquet"]
    assert wanted == [("cais/mmlu", "dataset", patterns)]
    (tmp_path / "all/dev-00000-of-00001.parquet").write_text("broken")
    with pytest.raises(FastForwardError, match="cannot be read: "):
        evaluate(None)


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    astronomy = question("astronomy", "test", 0)
    four = "/test.jsonl, record 1: expected four choices and an answer of 0 to 3."
    problems: list[tuple[Any, dict[str, Any], str]] = [
        ("astrology", {}, "unknown MMLU subject 'astrology'; known ones: abstract_"),
        (None, {"num_shots": -1}, "the number of examples must be 0 or more, got -1."),
        (None, {"arms": [DENSE, DENSE]}, "two arms are the same: dense, dense"),
        ("virology", {}, "holds no questions about virology."),
        (None, {"num_shots": 6}, r"5 examples \(dev\) about astronomy; expected 6 at"),
        (astronomy | {"subject": "x"}, {}, "/test.jsonl: unknown subject 'x'."),
        (astronomy | {"answer": 4}, {}, four),
        (astronomy | {"answer": "A"}, {}, four),
        (astronomy | {"choices": ["a"]}, {}, four),
        (astronomy | {"choices": 4}, {}, four),
    ]
    with pytest.raises(FastForwardError, match="holds no test.jsonl; expected a fold"):
        evaluate(tmp_path)
    for number, (what, more, said) in enumerate(problems):
        place, tasks = data, [what] if isinstance(what, str) else []
        if isinstance(what, dict):
            write(place := tmp_path, "test", [what])
        kind = ConfigError if number < 3 else FastForwardError
        with pytest.raises(kind, match=said):
            evaluate(place, *tasks, **more)
