"""LongBench through lm-eval's own tasks, on records made up here; and what MMLU shares."""

import functools
import importlib
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, Iterator

import huggingface_hub
import mlx.nn as nn
import models
import pytest
from mlx_lm.utils import load_tokenizer
from rich.console import Console

from mlx_fastforward.attachment import engine_of
from mlx_fastforward.bench.eval import harness
from mlx_fastforward.bench.eval import lm as lm_module
from mlx_fastforward.bench.eval import longbench, mmlu
from mlx_fastforward.bench.eval.arms import DENSE, Arm
from mlx_fastforward.errors import ConfigError, FastForwardError

# From LongBench's paper and code: the longest answer in tokens, and how a prompt ends.
SUMMARY = "{c}\n\nNow, write a one-page summary of %s.\n\nSummary:"
SHOTS = "The following are some examples.\n\n{c}\n\n{q}"
TASKS = {
    "narrativeqa": (128, "\n\nQuestion: {q}\n\nAnswer:"),
    "qasper": (128, "\n\nQuestion: {q}\n\nAnswer:"),
    "multifieldqa_en": (64, "\n\nQuestion: {q}\nAnswer:"),
    "hotpotqa": (32, "\n\nQuestion: {q}\nAnswer:"),
    "2wikimqa": (32, "\n\nQuestion: {q}\nAnswer:"),
    "musique": (32, "\n\nQuestion: {q}\nAnswer:"),
    "gov_report": (512, SUMMARY % "the report"),
    "qmsum": (512, "\n\nQuery: {q}\nAnswer:"),
    "multi_news": (512, SUMMARY % "all the news"),
    "trec": (64, "Here are some examples of questions.\n\n{c}\n{q}"),
    "triviaqa": (32, SHOTS),
    "samsum": (128, SHOTS),
    "passage_count": (32, "such as 1, 2, 3, and so on.\n\nThe final answer is: "),
    "passage_retrieval_en": (32, '"Paragraph 2", etc.\n\nThe answer is: '),
    "lcc": (64, "Please complete the code given below. \n{c}Next line of code:\n"),
    "repobench-p": (64, "code given below. \n{c}{q}Next line of code:\n"),
}
UNASKED = ["gov_report", "multi_news", "vcsum", "passage_count", "lcc"]  # no question
PLAIN = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]  # no template
USER, ASSISTANT = "<|begin|><|user|>", "<|end|><|assistant|>"
ANSWERS = {
    "trec": ["Number"],
    "lsht": ["Number"],
    "passage_count": ["7"],
    "passage_retrieval_en": ["Paragraph 7"],
    "passage_retrieval_zh": ["段落7"],
    "lcc": ["    return secret + 1"],
    "repobench-p": ["self.x = 7"],
}
ARMS = [DENSE, Arm("half", models.settings())]


def record(name: str, number: int = 0) -> dict[str, Any]:
    classes = ["Location", "Number of something", "Number"]
    context = "The king had three sons, and the youngest was kind. " * 4
    return {
        "input": f"Who of the {number} was kind to {name}?",
        "context": f"Text {number} of {name}. {context}",
        "answers": ANSWERS.get(name, ["the youngest of the three sons", "a son"]),
        "all_classes": classes if name in ("trec", "lsht") else None,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of every task, four of trec."""
    folder = tmp_path_factory.mktemp("longbench")
    for name in longbench.ALL:
        count = 4 if name == "trec" else 2
        rows = [json.dumps(record(name, n), ensure_ascii=False) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@functools.cache
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


def evaluate(data: Any, *tasks: str, tokenizer: Any = None, **more: Any) -> Any:
    more = {"arms": [DENSE], "tasks": list(tasks) or None, "data": data, **more}
    tokenizer = tokenizer or models.demo_tokenizer(ends=True)
    return longbench.longbench(model(), tokenizer, **more)


Patch = pytest.MonkeyPatch


def stubbed(patch: Patch, answer: Any) -> list[tuple[str, list[int], dict[str, Any]]]:
    """Answer in the model's place; returns the list that the requests will be in."""
    asked: Any = []

    def generate(self: Any, requests: list, disable_tqdm: bool = False) -> Any:
        asked.extend((r.task_name.partition("_")[2], *r.args) for r in requests)
        sparse = engine_of(self.model) is not None
        self.ffn_sparsity = 0.25 * sparse * (requests[0].doc_id == 0)
        return [answer(r) for r in requests]

    patch.setattr(lm_module.SparseLM, "generate_until", generate)
    return asked


def right(request: Any) -> str:
    return request.doc["answers"][0]


def bare(text: str) -> str:
    """A prompt without the chat template."""
    return text.removeprefix(USER).removesuffix(ASSISTANT)


def test_prompts_caps_templates_and_right_answers(
    data: Path, monkeypatch: Patch
) -> None:
    asked = stubbed(monkeypatch, right)
    found = evaluate(data, *longbench.ALL, limit=1)
    assert [name for name, _, _ in asked if name in TASKS] == list(TASKS)
    for name, ids, options in asked:
        it, (cap, end) = record(name), TASKS.get(name, (None, ""))
        assert cap in (None, options["max_gen_toks"]), name
        text = models.demo_tokenizer().decode(ids)
        plain = bare(text)
        assert text == (plain if name in PLAIN else f"{USER}{plain}{ASSISTANT}")
        assert plain.endswith(end.format(q=it["input"], c=it["context"])), name
        assert plain.count(it["context"]) == 1
        assert plain.count(it["input"]) == (name not in UNASKED), name
    assert len(found["records"]) == 21 and found["rows"][-1]["name"] == "average"
    for line in found["rows"]:
        for each in [line, *line.get("tasks", [])]:
            assert each["scores"]["dense"] == pytest.approx(100, abs=1e-4), each


def test_the_template_gets_its_settings_and_may_be_missing(
    data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    asked, seen = stubbed(monkeypatch, right), []
    models.save_folder(model(), tmp_path / "plain", chat_template=False)
    plain = load_tokenizer(tmp_path / "plain")
    evaluate(data, "hotpotqa", limit=1, tokenizer=plain)
    text = plain.decode(asked[0][1])
    assert text.startswith("Answer the question") and "<|" not in text
    monkeypatch.setattr(longbench, "render", lambda _, m, t: seen.append(t) or [1])
    evaluate(data, "hotpotqa", limit=1)
    evaluate(data, "hotpotqa", limit=1, template={"date": "today"})
    assert seen == [{"enable_thinking": False}, {"date": "today"}]


class Letters:
    """A tokenizer of letters that begins every text with a special token, 0."""

    def encode(self, text: str) -> list[int]:
        return [0, *map(ord, text)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) if i else "^" * (not skip_special_tokens) for i in ids)


def test_long_prompts_lose_their_middle(data: Path, monkeypatch: Patch) -> None:
    """Before the template; special tokens take a place, but do not come back."""
    letters, lengths = "abcdefghij", (None, 11, 10, 7, 6, 2)
    cut = [longbench.without_middle(Letters(), letters, n) for n in lengths]
    assert cut == [letters, letters, "abcdfghij", "abhij", "abhij", "j"]
    asked, tokenizer = stubbed(monkeypatch, right), models.demo_tokenizer()
    for most in (None, 41):
        evaluate(data, "hotpotqa", "trec", limit=1, max_length=most)
    texts = [tokenizer.decode(ids) for _, ids, _ in asked]
    for whole, text in zip(texts[:2], texts[2:], strict=True):
        left = longbench.without_middle(tokenizer, bare(whole), 41)
        assert text == whole.replace(bare(whole), left) != whole


def test_only_the_first_line_of_a_few_shot_answer_counts(
    data: Path, monkeypatch: Patch
) -> None:
    text, heard = "\n\nNumber\nQuestion: Where is it?\nType: Location", []

    def letters(*args: Any) -> Iterator[Any]:
        for letter in text:
            heard.append(letter)
            yield types.SimpleNamespace(text=letter, ffn_sparsity=0.0)

    monkeypatch.setattr(lm_module, "stream_generate", letters)
    tasks = ["trec", "triviaqa", "samsum", "lsht", "hotpotqa"]
    found = {r["task"]: r for r in evaluate(data, *tasks, limit=1)["records"]}
    said = [found[name]["answers"]["dense"] for name in tasks]
    assert said == ["Number"] * 4 + [text]
    # lm-eval's classes: "Number of something" is not in the answer, "Number" is
    assert found["trec"]["scores"]["dense"] == found["lsht"]["scores"]["dense"] == 1
    # and nothing after the line is made
    assert len(heard) == 4 * len("\n\nNumber\n") + len(text)


def test_the_line_of_code_that_counts(data: Path, monkeypatch: Patch) -> None:
    for text, wanted in {
        "    return secret + 1\nx = 2": 1,
        "\n\n    return secret + 1": 1,
        "```python\n// no\n# add one\n    return secret + 1": 1,
        "# add one\n\n    return secret + 1": 0,  # the blank line counts
        "    return secret": 2 * 17 / (17 + 21),  # 2 M / T, as difflib defines it
        "# nothing else": 0,
    }.items():
        stubbed(monkeypatch, lambda request: text)
        (found,) = evaluate(data, "lcc", limit=1)["records"]
        whole_percents = pytest.approx(wanted, abs=0.006)
        assert found["scores"]["dense"] == whole_percents, text


def test_groups_averages_and_gaps_by_hand(data: Path, monkeypatch: Patch) -> None:
    """Right: dense always, sparse in the first record of each task, but none of these."""
    wrong = ["narrativeqa", "lcc", "passage_count", "passage_retrieval_en"]
    attached = []

    def answer(request: Any) -> str:
        attached.append(sparse := engine_of(model()) is not None)
        name = request.task_name.removeprefix("longbench_")
        miss = sparse and (request.doc_id > 0 or name in wrong)
        return "#" if miss else right(request)

    asked, ticks = stubbed(monkeypatch, answer), []
    found = evaluate(data, arms=ARMS, tick=lambda *args: ticks.append(args))
    assert [t[1:] for t in ticks] == [(n + 1, 68) for n in range(68)]
    assert ticks[0][0] == "dense: narrativeqa" and ticks[-1][0] == "half: repobench-p"
    assert asked[:34] == asked[34:] and attached == [False] * 34 + [True] * 34
    assert [r["tokens"] for r in found["records"]] == [len(a[1]) for a in asked[:34]]
    tasks = {t["name"]: t["scores"] for r in found["rows"][:-1] for t in r["tasks"]}
    for name in TASKS:
        half = 0 if name in wrong else 25 if name == "trec" else 50
        assert tasks[name] == pytest.approx({"dense": 100, "half": half}, abs=1e-4)
    wanted = {
        "single-document QA": 100 / 3,
        "multi-document QA": 50,
        "summarisation": 50,
        "few-shot": 125 / 3,  # of tasks, not of prompts
        "synthetic": 0,
        "code": 25,
    }
    wanted["average"] = sum(wanted.values()) / 6
    halves = {r["name"]: r["scores"]["half"] for r in found["rows"]}
    assert halves == pytest.approx(wanted, abs=1e-4) and list(halves) == list(wanted)
    assert [r["prompts"] for r in found["rows"]] == [6, 6, 6, 8, 4, 4, 34]
    json.dumps(found)
    lines = shown(found)
    assert ["few-shot", "8", "100.00", "41.67", "-58.33", "%"] in lines
    assert ["synthetic", "4", "100.00", "0.00", "-100.00", "%"] in lines
    assert ["FFN", "FLOPs", "skipped", "0.0%", "11.8%"] in lines
    assert ["prompts", "read", "sparsely", "0", "16"] in lines
    assert harness._gap({"dense": 40.0, "half": 30.0}, "dense", "half") == -25
    assert harness._gap({"dense": 0.0, "half": 30.0}, "dense", "half") is None
    assert harness._gap({"half": 30.0}, None, "half") is None


def shown(found: dict[str, Any]) -> list[list[str]]:
    """The words of every line of the table."""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(harness.table(found))
    return [line.replace("│", " ").split() for line in capture.get().splitlines()]


def test_the_archive_is_the_folder_and_comes_from_the_hub(
    data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    archive, wanted = tmp_path / "data.zip", []
    with zipfile.ZipFile(archive, "w") as opened:
        for file in data.iterdir():
            opened.write(file, f"data/{file.name}")

    def download(repo: str, **more: Any) -> str:
        wanted.append((repo, more["repo_type"], more["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    asked = stubbed(monkeypatch, right)
    for place in (data, archive, None):
        evaluate(place, "trec", "dureader", limit=1)
    assert asked[:2] == asked[2:4] == asked[4:]
    assert wanted == [("THUDM/LongBench", "dataset", ["data.zip"])]


def test_what_is_refused_before_anything_is_read() -> None:
    trained = Arm("t", models.settings(selector="trained"))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tasks": ["x"]}, "unknown LongBench task 'x'; known ones: narrativeqa, "),
        ({"tasks": []}, "unknown LongBench task ''; known ones: narrativeqa, "),
        ({"limit": 0}, "the number of prompts per task must be above 0, got 0."),
        ({"max_length": 1}, "the prompt's length must be at least 2, got 1."),
        ({"arms": [DENSE, DENSE]}, "two arms are the same: dense, dense"),
        ({"arms": [DENSE, trained]}, "selector trained needs a predictor"),
    ]
    for more, said in refused:
        with pytest.raises(ConfigError, match=f"^{said}"):
            evaluate(Path("nowhere"), **more)


def test_the_greatest_length() -> None:
    def room(context: Any, asked: Any = None) -> Any:
        net = models.tiny("llama", max_position_embeddings=context)
        return longbench._room(net, asked)

    assert [room(4096), room(4096, 100), room(1192)] == [3500, 100, 596]
    assert [room(None), room(None, 50)] == [None, 50]
    with pytest.raises(ConfigError, match="1,192 tokens at least, the model's is 1,19"):
        room(1191)
    with pytest.raises(ConfigError, match="of 1,453 tokens .* of 2,048 leaves 1,452"):
        room(2048, 1453)


def test_bad_data(tmp_path: Path) -> None:
    file, archive = tmp_path / "trec.jsonl", tmp_path / "data.zip"
    zipfile.ZipFile(archive, "w").close()
    texts = "trec.jsonl, record 1: expected answers as a list of texts."
    problems: list[tuple[Any, str]] = [
        (None, f"{file} cannot be read: No such file or directory."),
        ("", f"{file} holds no records."),
        ("{}", f"{file}, line 1: expected a JSON object with input, context, answers."),
        ("\n[1]", f"{file}, line 2: expected a JSON object with"),
        ("{oops", f"{file}, line 1: expected a JSON object with"),
        ("\udce9", f"{file} is not UTF-8 text."),
        ({"answers": "one"}, texts),
        ({"answers": []}, texts),
        ({"answers": [7]}, texts),
        ({"all_classes": None}, "trec.jsonl, record 1: answers or all_classes are not"),
        (archive, f"{archive} holds no trec.jsonl."),
        (tmp_path / "no", "neither a folder .* nor its data.zip: No such file"),
        (file, "neither a folder .* nor its data.zip: File is not a zip file."),
    ]
    for content, said in problems:
        if isinstance(content, dict):
            content = json.dumps(record("trec") | content)
        if isinstance(content, str):
            file.write_text(content, encoding="utf-8", errors="surrogateescape")
        place = content if isinstance(content, Path) else tmp_path
        with pytest.raises(FastForwardError, match=said):
            evaluate(place, "trec")


@pytest.mark.parametrize("run", [longbench.longbench, mmlu.mmlu])
def test_without_lm_eval(run: Any, monkeypatch: Patch) -> None:
    for name in ("lm_eval", "rouge"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (harness, sys.modules[run.__module__]):
        importlib.reload(module)  # eval imports them whether lm-eval is there or not
    how = r"\(lm_eval, rouge not found\): pip install 'mlx-fastforward\[eval\]'$"
    with pytest.raises(FastForwardError, match=how):
        run(None, None, ARMS)
