"""LongBench through lm-eval's own tasks, on records made up here."""

import json
import types
import zipfile
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.nn as nn
import models
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console

from mlx_fastforward import PrefillConfig, stream_generate
from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import harness
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval import longbench
from mlx_fastforward.errors import ConfigError, FastForwardError

# From LongBench's paper and code: the longest answer in tokens, and how a prompt ends.
CAPS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
ENDS = {
    "narrativeqa": "\n\nQuestion: {q}\n\nAnswer:",
    "qasper": "\n\nQuestion: {q}\n\nAnswer:",
    "multifieldqa_en": "\n\nQuestion: {q}\nAnswer:",
    "hotpotqa": "\n\nQuestion: {q}\nAnswer:",
    "2wikimqa": "\n\nQuestion: {q}\nAnswer:",
    "musique": "\n\nQuestion: {q}\nAnswer:",
    "gov_report": "{c}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "qmsum": "\n\nQuery: {q}\nAnswer:",
    "multi_news": "{c}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "trec": "Here are some examples of questions.\n\n{c}\n{q}",
    "triviaqa": "The following are some examples.\n\n{c}\n\n{q}",
    "samsum": "The following are some examples.\n\n{c}\n\n{q}",
    "passage_count": "such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    "passage_retrieval_en": '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    "lcc": "Please complete the code given below. \n{c}Next line of code:\n",
    "repobench-p": "code given below. \n{c}{q}Next line of code:\n",
}
UNASKED = ["gov_report", "multi_news", "passage_count", "lcc"]  # no question in it
PLAIN = ["trec", "triviaqa", "samsum", "lcc", "repobench-p"]  # no chat template
GROUPS = {
    "single-document QA": ["narrativeqa", "qasper", "multifieldqa_en"],
    "multi-document QA": ["hotpotqa", "2wikimqa", "musique"],
    "summarisation": ["gov_report", "qmsum", "multi_news"],
    "few-shot": ["trec", "triviaqa", "samsum"],
    "synthetic": ["passage_count", "passage_retrieval_en"],
    "code": ["lcc", "repobench-p"],
}
CLASSES = ["Location", "Number of something", "Number"]
ANSWERS = {
    "trec": ["Number"],
    "lsht": ["Number"],
    "passage_count": ["7"],
    "passage_retrieval_en": ["Paragraph 7"],
    "passage_retrieval_zh": ["段落7"],
    "lcc": ["    return secret + 1"],
    "repobench-p": ["self.x = 7"],
}
ARMS: list[harness.Arm] = [("dense", None), ("half", models.settings())]


def record(name: str, number: int = 0) -> dict[str, Any]:
    context = "The king had three sons, and the youngest was kind. " * 4
    return {
        "input": f"Who of the {number} was kind to {name}?",
        "context": f"Text {number} of {name}. {context}",
        "answers": ANSWERS.get(name, ["the youngest of the three sons", "a son"]),
        "length": 40,
        "dataset": name,
        "language": "en",
        "all_classes": CLASSES if name in ("trec", "lsht") else None,
        "_id": f"{name}{number}",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of every task."""
    folder = tmp_path_factory.mktemp("longbench")
    for name in longbench.ALL:
        write(folder, name, [record(name, n) for n in range(2)])
    return folder


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


Answer = Callable[[nn.Module, Any], str]
Prompts = list[tuple[str, list[int], dict[str, Any]]]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], Prompts]:
    """Answer in the model's place; returns the list that the requests will be in."""

    def answering(answer: Answer) -> Prompts:
        asked: Prompts = []

        def generate(self: Any, requests: list, disable_tqdm: bool = False) -> Any:
            asked.extend((r.task_name.partition("_")[2], *r.args) for r in requests)
            return [answer(self.model, r) for r in requests]

        monkeypatch.setattr(lm_module.SparseLM, "generate_until", generate)
        return asked

    return answering


def evaluate(model: nn.Module, arms: list[harness.Arm] = ARMS, **more: Any) -> Any:
    tokenizer = models.demo_tokenizer(ends=True)
    return longbench.longbench(model, tokenizer, arms, **more)


def right(model: nn.Module, request: Any) -> str:
    return request.doc["answers"][0]


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in found["rows"] if r["name"] == name)


def test_prompts_caps_and_templates(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    tokenizer = models.demo_tokenizer(ends=True)
    asked = stub(right)
    evaluate(model, ARMS[:1], data=data, limit=1)
    assert [name for name, _, _ in asked] == [n for g in GROUPS.values() for n in g]
    for name, ids, options in asked:
        it = record(name)
        assert options["max_gen_toks"] == CAPS[name], name
        text = tokenizer.decode(ids)
        if name in PLAIN:
            assert "<|" not in text
        else:
            start, end = "<|begin|><|user|>", "<|end|><|assistant|>"
            assert text.startswith(start) and text.endswith(end)
            text = text.removeprefix(start).removesuffix(end)
        assert text.endswith(ENDS[name].format(q=it["input"], c=it["context"])), name
        assert text.count(it["context"]) == 1
        assert text.count(it["input"]) == (name not in UNASKED)


def test_both_arms_get_the_same_prompts(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    attached = []

    def answer(model: nn.Module, request: Any) -> str:
        attached.append(engine_of(model) is not None)
        return "a son"

    asked = stub(answer)
    found = evaluate(model, data=data)
    half = len(asked) // 2
    assert half == 32 and asked[:half] == asked[half:]
    assert attached == [False] * half + [True] * half
    assert engine_of(model) is None
    assert [r["tokens"] for r in found["records"]] == [len(a[1]) for a in asked[:half]]


@pytest.mark.parametrize("max_length", [40, 41, 90])
def test_long_prompts_lose_their_middle(
    model: nn.Module,
    data: Path,
    stub: Callable[[Answer], Prompts],
    max_length: int,
) -> None:
    """Before the template, by halves of the prompt's tokens, special ones left out."""
    tokenizer = models.demo_tokenizer(ends=True)
    asked = stub(right)
    names = ["hotpotqa", "trec"]
    evaluate(model, ARMS[:1], data=data, limit=1, tasks=names)
    whole = {name: tokenizer.decode(ids) for name, ids, _ in asked}
    asked.clear()
    evaluate(model, ARMS[:1], data=data, limit=1, tasks=names, max_length=max_length)
    for name, ids, _ in asked:
        start, end = "<|begin|><|user|>", "<|end|><|assistant|>"
        tokens = tokenizer.encode(whole[name].removeprefix(start).removesuffix(end))
        assert len(tokens) > max_length
        half = int(max_length / 2)
        first = tokenizer.decode(tokens[:half])
        last = tokenizer.decode(tokens[len(tokens) - half :])
        wanted = f"{start}{first}{last}{end}" if name == "hotpotqa" else first + last
        assert tokenizer.decode(ids) == wanted


class Letters:
    """A tokenizer of letters that begins every text with a special token, 0."""

    def encode(self, text: str) -> list[int]:
        return [0, *map(ord, text)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) if i else "^" * (not skip_special_tokens) for i in ids)


def test_special_tokens_count_but_do_not_come_back() -> None:
    """As in the authors' code: the beginning-of-sequence token takes a place."""
    letters = "abcdefghij"
    cut = [longbench.without_middle(Letters(), letters, n) for n in (11, 10, 7, 6, 2)]
    assert cut == [letters, "abcdfghij", "abhij", "abhij", "j"]


def test_a_prompt_of_the_greatest_length_is_whole() -> None:
    tokenizer = models.demo_tokenizer()
    text = "The king had three sons."
    length = len(tokenizer.encode(text))
    assert longbench.without_middle(tokenizer, text, length) == text
    assert longbench.without_middle(tokenizer, text, length - 1) != text
    assert longbench.without_middle(tokenizer, text, None) == text


def test_a_right_answer_scores_100_everywhere(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    stub(right)
    found = evaluate(model, data=data, tasks=longbench.ALL)
    assert len(found["records"]) == 2 * 21
    for line in found["rows"]:
        for each in [line, *line.get("tasks", [])]:
            assert each["scores"]["dense"] == pytest.approx(100, abs=1e-4), each
    assert [r["name"] for r in found["rows"]] == [*GROUPS, "average"]


def test_a_second_answer_counts_and_a_wrong_one_does_not(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    """Token F1 by hand: "kind son" shares one of two words with "a son", articles aside."""
    stub(lambda model, request: "Kind son!" if request.doc_id else "nobody")
    found = evaluate(model, ARMS[:1], data=data, tasks=["qasper"])
    scores = [r["scores"]["dense"] for r in found["records"]]
    assert scores == pytest.approx([0, 2 * 0.5 * 1 / 1.5])
    assert row(found, "average of 1 groups")["scores"]["dense"] == pytest.approx(
        100 / 3
    )


def said(monkeypatch: pytest.MonkeyPatch, text: str) -> list[str]:
    """The model says ``text``, letter by letter; returns what it came to say."""
    heard: list[str] = []

    def letters(*args: Any) -> Any:
        for letter in text:
            heard.append(letter)
            yield types.SimpleNamespace(text=letter, ffn_sparsity=0.0)

    monkeypatch.setattr(lm_module, "stream_generate", letters)
    return heard


def test_only_the_first_line_of_a_few_shot_answer_counts(
    model: nn.Module, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\nNumber\nQuestion: Where is it?\nType: Location"
    heard = said(monkeypatch, text)
    tasks = ["trec", "triviaqa", "samsum", "lsht", "hotpotqa"]
    found = evaluate(model, ARMS[:1], data=data, limit=1, tasks=tasks)
    answers = {r["task"]: r["answers"]["dense"] for r in found["records"]}
    assert answers.pop("hotpotqa") == text
    assert set(answers.values()) == {"Number"} and len(answers) == 4
    scores = {r["task"]: r["scores"]["dense"] for r in found["records"]}
    # lm-eval's classes: "Number of something" is not in the answer, "Number" is
    assert scores["trec"] == scores["lsht"] == 1
    assert len(heard) == 4 * len("\n\nNumber\n") + len(
        text
    )  # and nothing after it is made


@pytest.mark.parametrize(
    "text, line",
    [
        ("    return secret + 1\nx = 2", "    return secret + 1"),
        ("\n\n    return secret + 1", "    return secret + 1"),
        ("# add one\n    return secret + 1", "    return secret + 1"),
        ("```python\n// no\n    return secret + 1", "    return secret + 1"),
        ("# add one\n\n    return secret + 1", ""),  # the blank line counts
        ("  \n    return secret + 1", "  "),
        ("# nothing else", ""),
    ],
)
def test_the_line_of_code_that_counts(text: str, line: str) -> None:
    from difflib import SequenceMatcher

    wanted = "    return secret + 1"
    doc = {"answers": ["nothing like it at all here", wanted]}
    got = longbench.code_similarity(doc, [text])["score"]
    best = max(SequenceMatcher(None, line, a).ratio() for a in doc["answers"])
    assert got == pytest.approx(best if line else 0, abs=0.006)  # whole percents


def test_code_tasks_are_scored_by_the_line_that_counts(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    stub(lambda model, request: "# the next line\n\n" + right(model, request))
    found = evaluate(model, ARMS[:1], data=data, tasks=["lcc", "repobench-p"])
    assert [r["scores"]["dense"] for r in found["records"]] == [0.0] * 4


def test_groups_averages_and_gaps_by_hand(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts]
) -> None:
    """Right answers: dense to all, sparse to the first record of each, and to none of these."""
    wrong = ["narrativeqa", "lcc", "passage_count", "passage_retrieval_en"]

    def answer(model: nn.Module, request: Any) -> str:
        name = request.task_name.removeprefix("longbench_")
        sparse = engine_of(model) is not None
        if sparse and (request.doc_id == 1 or name in wrong):
            return "#"
        return right(model, request)

    stub(answer)
    found = evaluate(model, data=data)
    half = {r["name"]: r["scores"]["half"] for r in found["rows"]}
    tasks = {
        t["name"]: t["scores"]["half"] for r in found["rows"][:-1] for t in r["tasks"]
    }
    for name in CAPS:
        assert tasks[name] == pytest.approx(0 if name in wrong else 50, abs=1e-4), name
    wanted = {
        "single-document QA": 100 / 3,
        "multi-document QA": 50,
        "summarisation": 50,
        "few-shot": 50,
        "synthetic": 0,
        "code": 25,
    }
    wanted["average"] = sum(wanted.values()) / 6
    assert half == pytest.approx(wanted, abs=1e-4)
    for line in found["rows"]:
        assert line["scores"]["dense"] == pytest.approx(100, abs=1e-4)
        gap = line["gap_percent"]["half"]
        assert gap == pytest.approx(wanted[line["name"]] - 100, abs=1e-4)
    assert row(found, "few-shot")["prompts"] == 6
    assert row(found, "average")["prompts"] == 32
    by_record = [r["scores"] for r in found["records"] if r["task"] == "hotpotqa"]
    assert by_record == [{"dense": 1.0, "half": 1.0}, {"dense": 1.0, "half": 0.0}]
    json.dumps(found)


def test_the_gap_is_relative_to_dense() -> None:
    rows = [{"name": "x", "prompts": 2, "scores": {"a": 30.0, "dense": 40.0}}]
    rows.append({"name": "y", "prompts": 2, "scores": {"a": 30.0, "dense": 0.0}})
    records = [{"ffn_sparsity": {"a": s, "dense": 0.0}} for s in (0.0, 0.5)]
    arms: list[harness.Arm] = [("a", PrefillConfig(0.4)), ("dense", None)]
    found = harness.report("LongBench", arms, rows, records, {})
    assert rows[0]["gap_percent"] == {"a": -25.0, "dense": 0.0}
    assert rows[1]["gap_percent"] == {"a": None, "dense": None}
    assert found["dense"] == "dense"
    assert found["arms"][0]["ffn_sparsity"] == 0.25
    assert found["arms"][0]["sparse_prompts"] == 1
    assert found["arms"][0]["config"]["sparsity"] == 0.4
    assert found["arms"][1]["config"] is None
    lines = shown(found)
    assert ["x", "2", "30.00", "-25.00", "%", "40.00"] in lines
    assert ["y", "2", "30.00", "-", "0.00"] in lines
    assert ["FFN", "FLOPs", "skipped", "25.0%", "0.0%"] in lines
    assert ["prompts", "read", "sparsely", "1", "0"] in lines
    alone = harness.report("LongBench", arms[:1], rows, records, {})
    assert alone["dense"] is None and rows[0]["gap_percent"]["a"] is None
    assert ["x", "2", "30.00", "-"] in shown(alone)


def shown(found: dict[str, Any]) -> list[list[str]]:
    """The words of every line of the table."""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(harness.table(found))
    return [line.replace("│", " ").split() for line in capture.get().splitlines()]


def test_a_real_run(
    model: nn.Module, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model reads all sixteen, dense and sparse; sparsity 0 says what dense says."""
    monkeypatch.setattr(lm_module, "stream_generate", brief)
    arms: list[harness.Arm] = [*ARMS, ("zero", models.settings(sparsity=0.0))]
    ticks: list[tuple[str, int, int]] = []
    found = evaluate(
        model, arms, data=data, limit=1, tick=lambda *args: ticks.append(args)
    )
    assert len(found["records"]) == 16
    for r in found["records"]:
        assert r["answers"]["dense"] == r["answers"]["zero"]
        assert r["scores"]["dense"] == r["scores"]["zero"]
        assert r["ffn_sparsity"]["dense"] == r["ffn_sparsity"]["zero"] == 0
        assert 0.1 < r["ffn_sparsity"]["half"] < 0.5
    assert any(r["answers"]["dense"] != r["answers"]["half"] for r in found["records"])
    assert [t[1:] for t in ticks] == [(n + 1, 48) for n in range(48)]
    assert ticks[0][0] == "dense: narrativeqa" and ticks[-1][0] == "zero: repobench-p"
    assert found["arms"][1]["sparse_prompts"] == 16
    assert engine_of(model) is None


def brief(model: nn.Module, tokenizer: Any, ids: list[int], limit: int) -> Any:
    """The real one, but summaries would take seconds."""
    return stream_generate(model, tokenizer, ids, min(limit, 24))


def test_lm_evals_own_loop_gives_the_same_scores(model: nn.Module, data: Path) -> None:
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    names = ["triviaqa", "trec", "lcc"]  # no chat template: theirs comes before the cut
    found = evaluate(model, ARMS[:1], data=data, tasks=names)
    tasks = longbench.load(names, data)
    for task in tasks.values():
        task.set_fewshot_seed(1)
    lm = lm_module.SparseLM(model, models.demo_tokenizer(ends=True))
    theirs: Any = lm_eval_evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)
    for name in names:
        mine = [r for r in found["records"] if r["task"] == name]
        samples = theirs["samples"][name]
        assert [s["resps"][0][0] for s in samples] == [
            r["answers"]["dense"] for r in mine
        ]
        score = sum(r["scores"]["dense"] for r in mine) / len(mine)
        assert theirs["results"][name]["score,none"] == pytest.approx(score)


def test_a_tokenizer_without_a_chat_template(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts], tmp_path: Path
) -> None:
    from mlx_lm.utils import load_tokenizer

    folder = models.save_folder(
        models.tiny("llama", vocab=4096), tmp_path / "plain", chat_template=False
    )
    tokenizer = load_tokenizer(folder)
    asked = stub(right)
    longbench.longbench(
        model, tokenizer, ARMS[:1], data=data, limit=1, tasks=["hotpotqa"]
    )
    text = tokenizer.decode(asked[0][1])
    assert text.startswith("Answer the question") and "<|" not in text


def test_the_template_gets_its_settings(
    model: nn.Module,
    data: Path,
    stub: Callable[[Answer], Prompts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        longbench, "render", lambda tokenizer, messages, t: seen.append(t) or [1]
    )
    stub(right)
    more: dict[str, Any] = dict(data=data, limit=1, tasks=["hotpotqa"])
    evaluate(model, ARMS[:1], **more)
    evaluate(model, ARMS[:1], template={"date": "today"}, **more)
    assert seen == [{"enable_thinking": False}, {"date": "today"}]


@pytest.mark.parametrize(
    "context, asked, room",
    [(4096, None, 3500), (4096, 100, 100), (None, None, None), (None, 50, 50)],
)
def test_the_greatest_length(
    context: Optional[int], asked: Optional[int], room: Optional[int]
) -> None:
    net = models.tiny("llama", max_position_embeddings=context)
    assert longbench._room(net, asked) == room


def test_the_archive_is_the_folder(
    model: nn.Module, data: Path, stub: Callable[[Answer], Prompts], tmp_path: Path
) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in data.iterdir():
            opened.write(file, f"data/{file.name}")
    asked = stub(right)
    more: dict[str, Any] = dict(tasks=["hotpotqa", "trec", "dureader"], limit=1)
    for place in (data, archive):
        evaluate(model, ARMS[:1], data=place, **more)
    assert asked[:3] == asked[3:]


def refused(kind: type, model: nn.Module, **more: Any) -> str:
    with pytest.raises(kind) as e:
        evaluate(model, **more)
    text = str(e.value)
    assert "\n" not in text
    assert engine_of(model) is None
    return text


def test_what_is_refused(model: nn.Module, data: Path) -> None:
    said = refused(ConfigError, model, data=data, tasks=["hotpotqa", "narative"])
    assert said.startswith(
        "unknown LongBench task 'narative'; known ones: narrativeqa,"
    )
    assert "narrativeqa" in refused(ConfigError, model, data=data, tasks=[])
    said = refused(ConfigError, model, data=data, limit=0)
    assert said == "the number of prompts per task must be above 0, got 0."
    said = refused(ConfigError, model, data=data, max_length=1)
    assert said == "the prompt's length must be at least 2, got 1."
    arms = [("a", None), ("a", models.settings())]
    said = refused(ConfigError, model, data=data, arms=arms)
    assert said == "every arm needs a name of its own, got ['a', 'a']."
    trained = [("dense", None), ("half", models.settings(selector="trained"))]
    said = refused(ConfigError, model, data=Path("nowhere"), arms=trained)
    assert said.startswith("selector trained needs a predictor")


def test_a_context_too_short_for_longbench(data: Path) -> None:
    net = models.tiny("llama", vocab=4096, max_position_embeddings=1000)
    said = refused(ConfigError, net, data=data)
    assert "a context of 1,192 tokens at least, the model's is 1,000" in said
    net = models.tiny("llama", vocab=4096, max_position_embeddings=2048)
    said = refused(ConfigError, net, data=data, max_length=2000)
    assert "prompts of 2,000 tokens" in said and "leaves 1,452" in said


@pytest.mark.parametrize(
    "name, lines, wanted",
    [
        ("hotpotqa", None, "hotpotqa.jsonl cannot be read: No such file or directory."),
        ("hotpotqa", "", "hotpotqa.jsonl holds no records."),
        (
            "hotpotqa",
            "{}",
            "line 1: expected a JSON object with input, context, answers.",
        ),
        ("hotpotqa", "\n[1]", "line 2: expected a JSON object with"),
        ("hotpotqa", "{oops", "line 1: expected a JSON object with"),
        (
            "hotpotqa",
            {"answers": "one"},
            "record 1: expected answers as a list of texts.",
        ),
        ("hotpotqa", {"answers": []}, "record 1: expected answers as a list of texts."),
        (
            "hotpotqa",
            {"answers": [7]},
            "record 1: expected answers as a list of texts.",
        ),
        ("trec", {"all_classes": None}, "trec.jsonl, record 1: answers or all_classes"),
        (
            "passage_retrieval_en",
            {"answers": ["7"]},
            "record 1: answers or all_classes",
        ),
    ],
)
def test_bad_data(
    model: nn.Module, tmp_path: Path, name: str, lines: Any, wanted: str
) -> None:
    if isinstance(lines, dict):
        write(tmp_path, name, [{**record(name), **lines}])
    elif lines is not None:
        (tmp_path / f"{name}.jsonl").write_text(lines)
    assert wanted in refused(FastForwardError, model, data=tmp_path, tasks=[name])


def test_bad_archives(model: nn.Module, tmp_path: Path) -> None:
    more: dict[str, Any] = dict(tasks=["hotpotqa"])
    said = refused(FastForwardError, model, data=tmp_path / "no", **more)
    assert "neither a folder with LongBench's files nor its data.zip: No such" in said
    text = tmp_path / "data.txt"
    text.write_text("no archive")
    said = refused(FastForwardError, model, data=text, **more)
    assert said.endswith("data.zip: File is not a zip file.")
    empty = tmp_path / "data.zip"
    zipfile.ZipFile(empty, "w").close()
    said = refused(FastForwardError, model, data=empty, **more)
    assert said == f"{empty} holds no hotpotqa.jsonl."


@pytest.mark.parametrize(
    "error, wanted",
    [
        (LocalEntryNotFoundError("a long\nstory"), "the hub cannot be reached"),
        (ConnectionError("a long\nstory"), "the hub cannot be reached"),
        (RuntimeError("a long\nstory"), "cannot be downloaded (a long story)"),
        (RuntimeError(), "cannot be downloaded (RuntimeError)"),
    ],
)
def test_without_the_hub(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception, wanted: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert args == ("THUDM/LongBench",)
        assert kwargs == {"repo_type": "dataset", "allow_patterns": ["data.zip"]}
        raise error

    monkeypatch.setattr(harness, "snapshot_download", fail)
    said = refused(FastForwardError, model, tasks=["trec"])
    assert said.startswith("THUDM/LongBench ") and wanted in said
    assert said.endswith("or pass a folder that holds it.")


def test_without_lm_eval(
    model: nn.Module, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "rouge"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    said = refused(FastForwardError, model, data=data)
    assert said == (
        "this needs lm-eval (lm_eval, rouge not found): pip install 'mlx-fastforward[eval]'"
    )


def test_the_modules_import_without_lm_eval() -> None:
    """--help must work, and be fast."""
    import subprocess
    import sys

    code = (
        "import sys; from mlx_fastforward.bench import harness, longbench, mmlu; "
        "assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
