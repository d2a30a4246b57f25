"""LongBench (arXiv 2308.14508), as its authors run it, with lm-eval's prompts and metrics.

Where lm-eval 0.4.13 differs from the authors' pred.py and eval.py, this follows the authors:

- Data: lm-eval reads Xnhyacinth/LongBench, whose contexts and questions already stand in the
  prompt's sentences (lm-eval puts them there again), and whose questions lack the "Type:" and
  "Answer:" that they end with. Here the authors' own files are read.
- Prompts: passage_count and passage_retrieval_en end with a space, lcc and repobench-p with a
  newline, triviaqa and samsum have an empty line before the question.
- Length: a long prompt loses its middle, not its beginning, and before the chat template.
- Chat template: none for few-shot and code tasks, whatever the model.
- Answers to few-shot tasks: the first line counts after leading newlines are dropped; lm-eval
  stops at the first newline, and an answer that begins with one is empty.
- Code: the line that counts may be blank; lm-eval passes over blank ones.
- The average is that of the six groups, each the mean of its tasks, of one language.

One difference stays: the authors forbid samsum to begin with a newline or to end at once, here
leading newlines are dropped there too, and an answer may be empty.
"""

import zipfile
from pathlib import Path
from typing import Any, Optional

import mlx.nn as nn

from ...errors import ConfigError, FastForwardError
from ...generation import encode_prompt
from ...hub import download
from ...model.families import context_length
from ...predictors.file import PredictorFile
from ...session import render
from .arms import Arm
from .harness import (
    Row,
    Tick,
    build,
    check,
    load_tasks,
    mean,
    need_lm_eval,
    no_tick,
    parse_lines,
    read_lines,
    report,
    row,
    run,
    task_manager,
)

GROUPS = {
    "single-document QA": [
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "multifieldqa_zh",
    ],
    "multi-document QA": ["hotpotqa", "2wikimqa", "musique", "dureader"],
    "summarisation": ["gov_report", "qmsum", "multi_news", "vcsum"],
    "few-shot": ["trec", "triviaqa", "samsum", "lsht"],
    "synthetic": ["passage_count", "passage_retrieval_en", "passage_retrieval_zh"],
    "code": ["lcc", "repobench-p"],
}
ALL = [name for names in GROUPS.values() for name in names]
CHINESE = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"]
ENGLISH = [name for name in ALL if name not in CHINESE]
FEW_SHOT, CODE = GROUPS["few-shot"], GROUPS["code"]

REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
FIELDS = ("input", "context", "answers")
ROOM = 596  # the authors give a model of 4,096 tokens prompts of 3,500

# lm-eval's endings of a prompt, and the authors'.
ENDINGS = {
    "passage_count": ("The final answer is:", "The final answer is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("Next line of code:", "Next line of code:\n"),
    "repobench-p": ("Next line of code:", "Next line of code:\n"),
    "triviaqa": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
    "samsum": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
}


def longbench(
    model: nn.Module,
    tokenizer: Any,
    arms: list[Arm],
    *,
    predictor: Optional[PredictorFile] = None,
    limit: Optional[int] = None,
    tasks: Optional[list[str]] = None,
    data: Optional[Path] = None,
    max_length: Optional[int] = None,
    template: Optional[dict[str, Any]] = None,
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """Score every arm on the same LongBench prompts; the paper's table 2.

    Args:
        model: As loaded; it is left detached.
        predictor: For the arms that are not dense.
        limit: Records per task, all by default.
        tasks: LongBench's names; the 16 English and code tasks by default.
        data: A folder with LongBench's ``{task}.jsonl``, or its data.zip. Default: from the hub.
        max_length: Tokens that a prompt may have before the chat template; the middle of a longer
            one is cut out. Default: what the model's context leaves beside the answer.
        template: For the chat template. Default: no thinking, which no answer has room for.

    Returns:
        dict: As ``harness.report``, rows of 100, a record per prompt; print it with
        ``harness.table``.

    Raises:
        ConfigError, FastForwardError: before anything is read by the model.
    """
    need_lm_eval()
    names = _checked(tasks)
    length = _room(model, max_length)
    template = {"enable_thinking": False} if template is None else template
    check(model, arms, predictor, limit)
    found = load(names, data)
    build(found, limit)
    for name, task in found.items():
        for instance in task.instances:
            text, options = instance.args
            ids = prompt_ids(tokenizer, name, text, length, template)
            instance.arguments = (ids, options)
    records = run(model, tokenizer, found, arms, predictor, "score", tick)
    settings = {"max_length": length, "limit": limit, "template": template}
    return report("LongBench", arms, _rows(records, arms), records, settings)


def load(names: list[str], data: Optional[Path]) -> dict[str, Any]:
    """lm-eval's LongBench tasks over the authors' records, with the differences undone."""
    place = (
        download(REPOSITORY, [ARCHIVE], "data", repo_type="dataset") / ARCHIVE
        if data is None
        else Path(data)
    )
    splits = {f"longbench_{n}": {"test": _records(place, n)} for n in names}
    loaded = load_tasks(task_manager("longbench"), splits)
    tasks = {name: loaded[f"longbench_{name}"] for name in names}
    for name, task in tasks.items():
        text: str = task.config.doc_to_text
        theirs, ours = ENDINGS.get(name, ("", ""))
        if text.endswith(theirs):
            task.set_config("doc_to_text", text.removesuffix(theirs) + ours)
        if name in FEW_SHOT:
            stop = {"until": ["\n"], "skip": "\n"}
            task.set_config("generation_kwargs", stop, update=True)
        if name in CODE:
            task.set_config("process_results", code_similarity)
        _check_metric(name, task)
    return tasks


def _check_metric(name: str, task: Any) -> None:
    """Some metrics want more of a record, e.g. classes: raise FastForwardError where it lacks."""
    for number, doc in enumerate(task.test_docs(), 1):
        try:
            task.process_results(doc, [""])
        except Exception:
            raise FastForwardError(
                f"{name}.jsonl, record {number}: answers or all_classes are not as LongBench's "
                f"{name} has them."
            ) from None


def prompt_ids(
    tokenizer: Any,
    name: str,
    text: str,
    max_length: Optional[int],
    template: dict[str, Any],
) -> list[int]:
    """Tokens of one task's prompt: the middle cut out, then the chat template where it has one."""
    text = without_middle(tokenizer, text, max_length)
    if name in FEW_SHOT + CODE or not tokenizer.has_chat_template:
        ids: Any = encode_prompt(tokenizer, text).tolist()
        return ids
    return render(tokenizer, [{"role": "user", "content": text}], template)


def without_middle(tokenizer: Any, text: str, max_length: Optional[int]) -> str:
    """The first and the last half of ``max_length`` tokens, where the text has more."""
    ids = tokenizer.encode(text)
    if max_length is None or len(ids) <= max_length:
        return text
    half = max_length // 2
    ends = (ids[:half], ids[-half:])
    return "".join(tokenizer.decode(e, skip_special_tokens=True) for e in ends)


def code_similarity(doc: Row, results: list[str]) -> dict[str, float]:
    """The authors' code_sim_score: edit similarity of the first line without a comment or fence."""
    from fuzzywuzzy import fuzz

    lines = results[0].lstrip("\n").split("\n")
    plain = (x for x in lines if not any(mark in x for mark in ("`", "#", "//")))
    line = next(plain, "")
    return {"score": max(fuzz.ratio(line, a) / 100 for a in doc["answers"])}


def _checked(tasks: Optional[list[str]]) -> list[str]:
    names = ENGLISH if tasks is None else list(dict.fromkeys(tasks))
    unknown = [name for name in names if name not in ALL]
    if unknown or not names:
        raise ConfigError(
            f"unknown LongBench task {', '.join(unknown)!r}; known ones: {', '.join(ALL)}."
        )
    return names


def _room(model: nn.Module, max_length: Optional[int]) -> Optional[int]:
    """Tokens that a prompt may have, None for any number."""
    context = context_length(model)
    if max_length is not None and max_length < 2:
        raise ConfigError(f"the prompt's length must be at least 2, got {max_length}.")
    if context is None:
        return max_length
    if context < 2 * ROOM:
        raise ConfigError(
            f"LongBench needs a context of {2 * ROOM:,} tokens at least, the model's is "
            f"{context:,}; use another model."
        )
    room = context - ROOM
    if max_length is not None and max_length > room:
        raise ConfigError(
            f"prompts of {max_length:,} tokens were asked for; the model's context of "
            f"{context:,} leaves {room:,} beside the answer."
        )
    return max_length or room


def _records(place: Path, name: str) -> list[Row]:
    """One task's records as lm-eval's prompts name their fields."""
    file = f"{name}.jsonl"
    if place.is_dir():
        records = read_lines(place / file, FIELDS)
    else:
        records = parse_lines(_member(place, file).split("\n"), file, FIELDS)
    for number, record in enumerate(records, 1):
        answers = record["answers"]
        texts = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
        if not texts or not answers:
            raise FastForwardError(
                f"{file}, record {number}: expected answers as a list of texts."
            )
        record["question"] = record["input"]
    kept = ("question", "context", "answers", "all_classes")
    return [{k: r.get(k) for k in kept} for r in records]


def _member(archive: Path, file: str) -> str:
    """A file of data.zip, whatever folder it is in there."""
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [n for n in opened.namelist() if Path(n).name == file]
            if not names:
                raise FastForwardError(f"{archive} holds no {file}.")
            return opened.read(names[0]).decode("utf-8")
    except (OSError, zipfile.BadZipFile) as e:
        raise FastForwardError(
            f"{archive} is neither a folder with LongBench's files nor its {ARCHIVE}: "
            f"{getattr(e, 'strerror', None) or e}."
        ) from None


def _rows(records: list[Row], arms: list[Arm]) -> list[Row]:
    """A line per task and group, and the average of the groups."""
    rows = []
    for group, names in GROUPS.items():
        tasks = [row(n, [r for r in records if r["task"] == n], arms) for n in names]
        tasks = [task for task in tasks if task["prompts"]]
        if tasks:
            rows.append(_mean_row(group, tasks, arms) | {"tasks": tasks})
    name = "average" if len(rows) == len(GROUPS) else f"average of {len(rows)} groups"
    return [*rows, _mean_row(name, rows, arms)]


def _mean_row(name: str, rows: list[Row], arms: list[Arm]) -> Row:
    scores = {arm.label: mean(r["scores"][arm.label] for r in rows) for arm in arms}
    return {"name": name, "prompts": sum(r["prompts"] for r in rows), "scores": scores}
