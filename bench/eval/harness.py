"""lm-eval's tasks, dense and sparse in one run: their prompts and metrics, our arms and tables."""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

import mlx.nn as nn
from rich.table import Table

from ...attachment import seated
from ...errors import ConfigError, FastForwardError
from ...files import read_text
from ...predictors.file import PredictorFile
from .arms import Arm, labels_of

Tick = Callable[[str, int, int], None]  # what is running, prompts done, prompts in all
# of a data set, of a table, or one question with its answers by arm
Row = dict[str, Any]

PACKAGES = ("lm_eval", "datasets", "jieba", "fuzzywuzzy", "rouge")


def no_tick(what: str, done: int, total: int) -> None:
    """Show nothing."""


def need_lm_eval() -> None:
    """Raise FastForwardError unless lm-eval and what its tasks import is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FastForwardError(
            f"this needs lm-eval ({', '.join(missing)} not found): "
            "pip install 'mlx-fastforward[eval]'"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's log lines and progress bars, which would break ours."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def task_manager(folder: str) -> Any:
    """lm-eval's index of one folder of its tasks; all of them would take seconds to read."""
    import lm_eval.tasks as tasks

    with quiet():
        place = Path(tasks.__file__).parent / folder
        return tasks.TaskManager(include_path=str(place), include_defaults=False)


def load_tasks(
    manager: Any, splits: dict[str, dict[str, list[Row]]], **config: Any
) -> dict[str, Any]:
    """lm-eval's tasks over our records. splits: {task: {split: records}}; config overrides theirs."""
    from datasets import Dataset

    def dataset(name: str) -> Callable[..., Any]:
        found = {k: Dataset.from_list(rows) for k, rows in splits[name].items()}
        return lambda **_: found

    specs = [
        {"task": name, "custom_dataset": dataset(name), **config} for name in splits
    ]
    with quiet():
        loaded = manager.load({"group": "mlx_fastforward", "task": specs})["tasks"]
    return {name: loaded[name] for name in splits}


def build(tasks: dict[str, Any], limit: Optional[int]) -> None:
    """Make the requests of every task, of its first ``limit`` records at most."""
    with quiet():
        for task in tasks.values():
            task.set_fewshot_seed(seed=1234)
            task.build_all_requests(limit=limit)


def run(
    model: nn.Module,
    tokenizer: Any,
    tasks: dict[str, Any],
    arms: list[Arm],
    predictor: Optional[PredictorFile],
    metric: str,
    tick: Tick,
) -> list[Row]:
    """Ask every arm the same requests; the model is left detached.

    Returns one record per question: task, number, prompt tokens, and by arm the score (0 to 1),
    the answer and the share of the prompt's FFN FLOPs that was skipped.
    """
    from .lm import SparseLM

    lm = SparseLM(model, tokenizer)
    asked = [(name, task, q) for name, task in tasks.items() for q in questions(task)]
    records = [_record(lm, name, q) for name, _, q in asked]
    done = itertools.count(1)
    for arm in arms:
        label = arm.label
        with seated(model, arm.engine(model, predictor)):
            for (name, task, question), record in zip(asked, records):
                answer, score = _ask(lm, task, question, metric)
                record["scores"][label] = score
                record["answers"][label] = answer
                record["ffn_sparsity"][label] = lm.ffn_sparsity
                tick(f"{label}: {name}", next(done), len(arms) * len(asked))
    return records


def check(
    model: nn.Module,
    arms: list[Arm],
    predictor: Optional[PredictorFile],
    limit: Optional[int],
) -> None:
    """Raise now what an arm would be refused for after an hour of the arms before it."""
    labels_of(arms)
    if limit is not None and limit < 1:
        raise ConfigError(
            f"the number of prompts per task must be above 0, got {limit}."
        )
    for arm in arms:
        arm.engine(model, predictor)


def questions(task: Any) -> list[list[Any]]:
    """A task's requests by record: one for an answer, one per choice."""
    return [list(q) for _, q in itertools.groupby(task.instances, lambda i: i.doc_id)]


def _record(lm: Any, name: str, question: list[Any]) -> Row:
    context = question[0].args[0]
    ids = lm.tok_encode(context) if isinstance(context, str) else context
    record: Row = {"task": name, "number": question[0].doc_id, "tokens": len(ids)}
    return record | {"scores": {}, "answers": {}, "ffn_sparsity": {}}


def _ask(lm: Any, task: Any, question: list[Any], metric: str) -> tuple[str, float]:
    """The answer to one question, and lm-eval's score for it."""
    doc = question[0].doc
    responses = getattr(lm, question[0].request_type)(question, disable_tqdm=True)
    score = float(task.process_results(doc, responses)[metric])
    if isinstance(responses[0], str):
        return responses[0], score
    best = max(range(len(responses)), key=lambda i: responses[i][0])
    return task.doc_to_choice(doc)[best], score


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def percent(records: list[Row], label: str) -> float:
    """Mean score of an arm over some records, of 100."""
    return 100 * mean(r["scores"][label] for r in records)


def row(name: str, records: list[Row], arms: list[Arm]) -> Row:
    """A line of the table: mean scores of some questions by arm."""
    scores = {arm.label: percent(records, arm.label) for arm in arms} if records else {}
    return {"name": name, "prompts": len(records), "scores": scores}


def report(
    name: str,
    arms: list[Arm],
    rows: list[Row],
    records: list[Row],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What the JSON file holds; rows have name, prompts and scores by arm, and get the gaps.

    ``gap_percent`` is relative: 100 (sparse - dense) / dense, None where dense is 0 or no arm.
    """
    dense = next((arm.label for arm in arms if arm.config is None), None)
    for row in rows:
        row["gap_percent"] = {
            arm.label: _gap(row["scores"], dense, arm.label) for arm in arms
        }
    return {
        "benchmark": name,
        "settings": settings,
        "dense": dense,
        "arms": [
            {
                "label": arm.label,
                "config": None if arm.config is None else asdict(arm.config),
                "ffn_sparsity": mean(r["ffn_sparsity"][arm.label] for r in records),
                "sparse_prompts": sum(
                    r["ffn_sparsity"][arm.label] != 0 for r in records
                ),
            }
            for arm in arms
        ],
        "rows": rows,
        "records": records,
    }


def _gap(scores: dict[str, float], dense: Optional[str], label: str) -> Optional[float]:
    base = scores[dense] if dense is not None else 0
    return 100 * (scores[label] - base) / base if base else None


def table(found: dict[str, Any]) -> Table:
    """A report as a rich table: a line per group, a column per arm, relative gaps to dense."""
    result = Table(found["benchmark"], "prompts")
    dense, arms = found["dense"], found["arms"]
    for arm in arms:
        result.add_column(arm["label"], justify="right")
        if arm["label"] != dense:
            result.add_column("gap", justify="right")

    def add(name: str, prompts: str, cells: list[tuple[str, str]]) -> None:
        """cells: one per arm, and its gap."""
        pairs = zip(arms, cells)
        texts = [c if arm["label"] != dense else c[:1] for arm, c in pairs]
        result.add_row(name, prompts, *itertools.chain(*texts))

    for row in found["rows"]:
        shown = [_cells(row, arm["label"]) for arm in arms]
        add(row["name"], f"{row['prompts']:,}", shown)
    # Short prompts stay dense: then there is nothing to compare.
    result.add_section()
    add("FFN FLOPs skipped", "", [(f"{a['ffn_sparsity']:.1%}", "") for a in arms])
    add("prompts read sparsely", "", [(f"{a['sparse_prompts']:,}", "") for a in arms])
    return result


def _cells(row: Row, label: str) -> tuple[str, str]:
    gap = row["gap_percent"][label]
    return f"{row['scores'][label]:.2f}", "-" if gap is None else f"{gap:+.2f} %"


def parse_lines(lines: Iterable[str], name: str, fields: tuple[str, ...]) -> list[Row]:
    """Records of a JSONL file, each with these fields; raises FastForwardError."""
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not set(fields) <= set(record):
            raise FastForwardError(
                f"{name}, line {number}: expected a JSON object with {', '.join(fields)}."
            )
        records.append(record)
    if not records:
        raise FastForwardError(f"{name} holds no records.")
    return records


def read_lines(path: Path, fields: tuple[str, ...]) -> list[Row]:
    """parse_lines() of a file."""
    # splitlines() would also split at letters that JSON leaves as they are
    return parse_lines(read_text(path).split("\n"), str(path), fields)
