"""The user's own questions about the user's own documents: a JSONL file."""

import json
from pathlib import Path

from ...errors import FastForwardError
from ...files import read_text

Asked = tuple[str, list[tuple[str, list[str]]]]  # context, (question, answers)


def read_data(path: Path) -> list[Asked]:
    """Contexts and what is asked about them; neighbouring lines with one context are together.

    A line is {"context", "question" or LongBench's "input", "answers": [...]}.

    Raises:
        FastForwardError: the file cannot be read, or a line is something else.
    """
    lines = read_text(path).split("\n")
    made: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context, question, answers = _entry(line, f"{path}, line {number}")
        if not made or made[-1][0] != context:
            made.append((context, []))
        made[-1][1].append((question, answers))
    if not made:
        raise FastForwardError(f"{path} is empty; expected JSONL with questions.")
    return made


def _entry(line: str, where: str) -> tuple[str, str, list[str]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict):
        context, answers = entry.get("context"), entry.get("answers")
        question = entry.get("question", entry.get("input"))
        answers = [answers] if isinstance(answers, str) else answers
        good = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
        if isinstance(context, str) and isinstance(question, str) and good and answers:
            return context.strip(), question, answers
    raise FastForwardError(
        f"{where}: expected an object with context, question and answers (a list of texts)."
    )
