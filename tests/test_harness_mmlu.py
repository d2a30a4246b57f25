"""MMLU through lm-eval's own tasks, on questions made up here."""

import json
from pathlib import Path
from typing import Any, Callable

import mlx.nn as nn
import models
import numpy as np
import pytest

from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import harness
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval import mmlu
from mlx_fastforward.errors import ConfigError, FastForwardError

ARMS: list[harness.Arm] = [("dense", None), ("half", models.settings())]
COUNTS = {"astronomy": 2, "high_school_us_history": 3, "marketing": 1, "sociology": 2}
LETTERS = "ABCD"


def question(subject: str, split: str, number: int) -> dict[str, Any]:
    return {
        "question": f" {split} {number} of {subject}: which one? ",
        "subject": subject,
        "choices": [f"{word} {number}" for word in ("one", "two", "three", "four")],
        "answer": number % 4,
    }


def write(folder: Path, split: str, counts: dict[str, int]) -> None:
    rows = [question(s, split, n) for s, count in counts.items() for n in range(count)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    write(folder, "test", COUNTS)
    write(folder, "dev", {name: 5 for name in COUNTS})
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


def evaluate(model: nn.Module, arms: list[harness.Arm] = ARMS, **more: Any) -> Any:
    return mmlu.mmlu(model, models.demo_tokenizer(ends=True), arms, **more)


Choose = Callable[[nn.Module, Any], int]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Choose], list[Any]]:
    """Choose in the model's place; returns the list that the requests will be in."""

    def choosing(choose: Choose) -> list[Any]:
        asked: list[Any] = []

        def score(self: Any, requests: list, disable_tqdm: bool = False) -> Any:
            asked.append([r.args for r in requests])
            best = choose(self.model, requests[0].doc)
            return [(-1.0 - abs(i - best), False) for i in range(len(requests))]

        monkeypatch.setattr(lm_module.SparseLM, "loglikelihood", score)
        return asked

    return choosing


def prompt(subject: str, number: int, shots: int) -> str:
    """As MMLU's authors write it, five examples from dev first."""
    title = subject.replace("_", " ").replace(" us ", " us ")
    text = (
        f"The following are multiple choice questions (with answers) about {title}.\n\n"
    )
    for split, n in [("dev", n) for n in range(shots)] + [("test", number)]:
        it = question(subject, split, n)
        text += it["question"].strip() + "\n"
        for letter, choice in zip(LETTERS, it["choices"]):
            text += f"{letter}. {choice}\n"
        text += "Answer:"
        text += f" {LETTERS[it['answer']]}\n\n" if split == "dev" else ""
    return text


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_prompts(
    model: nn.Module, data: Path, stub: Callable[[Choose], list[Any]], shots: int
) -> None:
    asked = stub(lambda model, doc: 0)
    evaluate(model, data=data, num_shots=shots)
    names = sorted(COUNTS)
    wanted = [prompt(s, n, shots) for s in names for n in range(COUNTS[s])]
    assert [choices[0][0] for choices in asked] == wanted * 2
    for choices in asked:
        assert len({context for context, _ in choices}) == 1
        assert [c for _, c in choices] == [" A", " B", " C", " D"]


def test_accuracies_by_hand(
    model: nn.Module, data: Path, stub: Callable[[Choose], list[Any]]
) -> None:
    """Large subjects count more. Dense is right but for history's last, sparse only in STEM."""

    def choose(model: nn.Module, doc: dict[str, Any]) -> int:
        astronomy = doc["subject"] == "astronomy"
        if engine_of(model) is not None:
            return doc["answer"] if astronomy else 3
        last = doc["subject"] == "high_school_us_history" and doc["answer"] == 2
        return 0 if last else doc["answer"]

    stub(choose)
    found = evaluate(model, data=data)
    rows = {r["name"]: r for r in found["rows"]}
    assert list(rows) == ["STEM", "humanities", "social sciences", "other", "all"]
    assert [r["prompts"] for r in rows.values()] == [2, 3, 2, 1, 8]
    dense = [r["scores"]["dense"] for r in rows.values()]
    assert dense == pytest.approx([100, 200 / 3, 100, 100, 87.5])
    half = [r["scores"]["half"] for r in rows.values()]
    assert half == pytest.approx([100, 0, 0, 0, 25])
    gaps = [r["gap_percent"]["half"] for r in rows.values()]
    assert gaps == pytest.approx([0, -100, -100, -100, -250 / 3.5])
    first = found["records"][0]
    assert (first["task"], first["number"]) == ("astronomy", 0)
    assert first["answers"] == {"dense": "A", "half": "A"}
    assert first["scores"] == {"dense": 1.0, "half": 1.0}
    assert found["settings"] == {"num_shots": 5, "limit": None}
    json.dumps(found)


def test_a_real_run(model: nn.Module, data: Path) -> None:
    """The answer is the letter that the model finds likeliest."""
    found = evaluate(model, data=data)
    tokenizer = models.demo_tokenizer()
    for r in found["records"]:
        text = prompt(r["task"], r["number"], 5)
        ids = [tokenizer.encode(f"{text} {letter}") for letter in LETTERS]
        assert len({len(i) for i in ids}) == 1 and r["tokens"] == len(ids[0]) - 1
        logits, _ = models.prefill(model, ids[0][:-1])
        best = int(np.argmax([logits[-1][i[-1]] for i in ids]))
        assert r["answers"]["dense"] == LETTERS[best]
        assert r["scores"]["dense"] == (best == r["number"] % 4)
        assert r["ffn_sparsity"]["dense"] == 0 and r["ffn_sparsity"]["half"] > 0.2
    assert found["arms"][1]["sparse_prompts"] == 8
    assert engine_of(model) is None


def test_subjects_and_limits(
    model: nn.Module, data: Path, stub: Callable[[Choose], list[Any]]
) -> None:
    stub(lambda model, doc: 0)
    found = evaluate(model, data=data, limit=1, tasks=["sociology", "astronomy"])
    listed = [(r["task"], r["number"]) for r in found["records"]]
    assert listed == [("astronomy", 0), ("sociology", 0)]
    assert [r["name"] for r in found["rows"]] == ["STEM", "social sciences", "all"]


def test_parquet_files_as_on_the_hub(
    model: nn.Module,
    data: Path,
    stub: Callable[[Choose], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import Dataset

    for split in ("test", "dev"):
        lines = (data / f"{split}.jsonl").read_text().splitlines()
        (tmp_path / "all").mkdir(exist_ok=True)
        rows = Dataset.from_list([json.loads(line) for line in lines])
        rows.to_parquet(tmp_path / f"all/{split}-00000-of-00001.parquet")
    asked = stub(lambda model, doc: 0)
    evaluate(model, ARMS[:1], data=data)
    wanted = list(asked)
    asked.clear()
    called = []
    monkeypatch.setattr(
        harness,
        "snapshot_download",
        lambda *args, **more: called.append((args, more)) or str(tmp_path),
    )
    evaluate(model, ARMS[:1])
    assert asked == wanted
    patterns = ["all/test-*.parquet", "all/dev-*.parquet"]
    more = {"repo_type": "dataset", "allow_patterns": patterns}
    assert called == [(("cais/mmlu",), more)]
    (tmp_path / "all/dev-00000-of-00001.parquet").write_text("broken")
    assert "cannot be read: " in refused(FastForwardError, model)


def test_all_57_subjects_have_a_group() -> None:
    manager = harness.task_manager("mmlu/default")
    groups = [mmlu.subjects(manager, tag) for tag in mmlu.GROUPS.values()]
    assert [len(g) for g in groups] == [19, 13, 12, 13]
    assert len(set().union(*groups)) == 57


def refused(kind: type, model: nn.Module, **more: Any) -> str:
    with pytest.raises(kind) as e:
        evaluate(model, **more)
    text = str(e.value)
    assert "\n" not in text
    return text


def test_what_is_refused(model: nn.Module, data: Path, tmp_path: Path) -> None:
    said = refused(ConfigError, model, data=data, tasks=["astrology"])
    assert said.startswith("unknown MMLU subject 'astrology'; known ones: abstract_")
    said = refused(ConfigError, model, data=data, num_shots=-1)
    assert said == "the number of examples must be 0 or more, got -1."
    said = refused(FastForwardError, model, data=data, tasks=["virology"])
    assert said == f"{data} holds no questions about virology."
    said = refused(FastForwardError, model, data=data, num_shots=6)
    assert said.endswith("holds 5 examples (dev) about astronomy; expected 6 at least.")
    said = refused(FastForwardError, model, data=tmp_path)
    assert said.startswith(f"{tmp_path} holds no test.jsonl; expected a folder with ")
    assert said.endswith("question, subject, choices, answer.")


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"subject": "astrology"}, "test.jsonl: unknown subject 'astrology'."),
        ({"answer": 4}, "record 1: expected four choices and an answer of 0 to 3."),
        ({"answer": "A"}, "record 1: expected four choices and an answer of 0 to 3."),
        ({"choices": ["a"]}, "record 1: expected four choices and an answer of 0"),
        ({"choices": 4}, "record 1: expected four choices and an answer of 0"),
    ],
)
def test_bad_records(
    model: nn.Module, tmp_path: Path, change: dict[str, Any], wanted: str
) -> None:
    write(tmp_path, "dev", {"astronomy": 5})
    row = {**question("astronomy", "test", 0), **change}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    assert wanted in refused(FastForwardError, model, data=tmp_path)


def test_without_lm_eval(
    model: nn.Module, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    said = refused(FastForwardError, model, data=data)
    assert said.endswith("pip install 'mlx-fastforward[eval]'")
