"""MMLU (arXiv 2009.03300) through lm-eval: accuracy, five examples before each question.

Only prompts that are long enough are read sparsely: with five examples that is a part of them,
without examples almost none.
"""

from pathlib import Path
from typing import Any, Optional

import mlx.nn as nn

from ...errors import ConfigError, FastForwardError
from ...hub import download
from ...predictors.file import PredictorFile
from .arms import Arm
from .harness import (
    Row,
    Tick,
    build,
    check,
    load_tasks,
    need_lm_eval,
    no_tick,
    read_lines,
    report,
    row,
    run,
    task_manager,
)

GROUPS = {
    "STEM": "mmlu_stem_tasks",
    "humanities": "mmlu_humanities_tasks",
    "social sciences": "mmlu_social_sciences_tasks",
    "other": "mmlu_other_tasks",
}
REPOSITORY, FOLDER = "cais/mmlu", "all"
FIELDS = ("question", "subject", "choices", "answer")


def mmlu(
    model: nn.Module,
    tokenizer: Any,
    arms: list[Arm],
    *,
    predictor: Optional[PredictorFile] = None,
    limit: Optional[int] = None,
    tasks: Optional[list[str]] = None,
    data: Optional[Path] = None,
    num_shots: int = 5,
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """Score every arm on the same MMLU questions, without a chat template; the paper's table 3.

    Args:
        model: As loaded; it is left detached.
        predictor: For the arms that are not dense.
        limit: Questions per subject, all by default.
        tasks: Subjects, e.g. high_school_us_history; all 57 by default.
        data: A folder with test.jsonl and dev.jsonl (or .parquet) as in cais/mmlu's folder
            ``all``. Default: from the hub.
        num_shots: Examples from dev before each question.

    Returns:
        dict: As ``harness.report``, rows of 100, a record per question.

    Raises:
        ConfigError, FastForwardError: before anything is read by the model.
    """
    need_lm_eval()
    check(model, arms, predictor, limit)
    manager = task_manager("mmlu/default")
    groups = {group: subjects(manager, tag) for group, tag in GROUPS.items()}
    known = sorted(set().union(*groups.values()))
    if unknown := [name for name in tasks or [] if name not in known]:
        raise ConfigError(
            f"unknown MMLU subject {', '.join(unknown)!r}; known ones: {', '.join(known)}."
        )
    if num_shots < 0:
        raise ConfigError(f"the number of examples must be 0 or more, got {num_shots}.")
    found = load(manager, known, tasks, data, num_shots)
    build(found, limit)
    records = run(model, tokenizer, found, arms, predictor, "acc", tick)
    rows = []
    for group, names in groups.items():  # large subjects count more
        if chosen := [r for r in records if r["task"] in names]:
            rows.append(row(group, chosen, arms))
    rows.append(row("all", records, arms))
    settings = {"num_shots": num_shots, "limit": limit}
    return report("MMLU", arms, rows, records, settings)


def subjects(manager: Any, tag: str) -> set[str]:
    """The subjects of one of lm-eval's four groups."""
    return {name.removeprefix("mmlu_") for name in manager.task_index[tag].tags}


def load(
    manager: Any,
    known: list[str],
    tasks: Optional[list[str]],
    data: Optional[Path],
    num_shots: int,
) -> dict[str, Any]:
    """lm-eval's MMLU tasks by subject; of a local folder those that it holds."""
    if data is None:
        patterns = [f"{FOLDER}/{split}-*.parquet" for split in ("test", "dev")]
        place = download(REPOSITORY, patterns, "data", repo_type="dataset")
    else:
        place = Path(data)
    test, dev = _by_subject(place, "test", known), _by_subject(place, "dev", known)
    names = [name for name in known if name in (tasks or test)]
    for name in names:
        if name not in test:
            raise FastForwardError(f"{place} holds no questions about {name}.")
        if len(dev.get(name, [])) < num_shots:
            raise FastForwardError(
                f"{place} holds {len(dev.get(name, []))} examples (dev) about {name}; "
                f"expected {num_shots} at least."
            )
    # lm-eval wants a split of examples even where none is shown
    splits = {
        f"mmlu_{n}": {"test": test[n], "dev": dev.get(n) or test[n]} for n in names
    }
    loaded = load_tasks(manager, splits, num_fewshot=num_shots)
    return {name: loaded[f"mmlu_{name}"] for name in names}


def _by_subject(place: Path, split: str, known: list[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for path in _files(place, split):
        for number, record in enumerate(_read(path), 1):
            subject, choices = record["subject"], record["choices"]
            answer = record["answer"]
            if subject not in known:
                raise FastForwardError(f"{path}: unknown subject {subject!r}.")
            four = isinstance(choices, list) and len(choices) == 4
            if not four or answer not in range(4):
                raise FastForwardError(
                    f"{path}, record {number}: expected four choices and an answer of 0 to 3."
                )
            kept = {k: record[k] for k in FIELDS}
            found.setdefault(subject, []).append(kept)
    return found


def _files(place: Path, split: str) -> list[Path]:
    for folder in (place, place / FOLDER):
        for suffix in (".jsonl", ".parquet"):
            if files := sorted(folder.glob(f"{split}*{suffix}")):
                return files
    raise FastForwardError(
        f"{place} holds no {split}.jsonl; expected a folder with test.jsonl and dev.jsonl in "
        f"the fields of {REPOSITORY}: {', '.join(FIELDS)}."
    )


def _read(path: Path) -> list[Row]:
    if path.suffix == ".jsonl":
        return read_lines(path, FIELDS)
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return read_table(path, columns=list(FIELDS)).to_pylist()
    except (OSError, ArrowException) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise FastForwardError(f"{path} cannot be read: {reason}") from None
