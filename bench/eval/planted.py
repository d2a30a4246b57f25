"""What is planted into prose, and what is asked about it; wording is that of the demo model's training.

The tasks of ``HARD`` are where methods that read less are known to break: what must be counted, found
in several places at once or in a result of a tool, copied letter by letter, or put into JSON.
"""

import json
import random
from dataclasses import dataclass
from typing import Callable, Optional

from ...train.facts import CODE, NAMES, WORD, WORDS, asked, planted

DEPTHS = (0.5, 0.25, 0.75, 0.0, 1.0)  # the end and the beginning are read densely
COUNTS = "two three four five six seven".split()
ROWS = 6  # of a table or a program
RESULTS = 4  # of a tool


@dataclass(frozen=True)
class Question:
    """What is asked, and the answers that are right.

    Args:
        answers: Any will do; of ``several`` all are wanted.
        kind: secret code, favourite word, prose, quote, qa, or one of HARD.
        depth: Where in the document the answer stands, 0 to 1; None if unknown, or in many places.
    """

    text: str
    answers: list[str]
    kind: str
    depth: Optional[float] = None


Facts = list[tuple[float, str]]  # depth, text
Made = tuple[Facts, list[Question]]


def single(task: str, i: int, rng: random.Random) -> Made:
    """needle: one fact at a given depth; key-value: three to six anywhere; chat: three."""
    if task == "needle":
        depths = [DEPTHS[i % len(DEPTHS)]]
    else:
        count = 3 if task == "chat" else rng.randint(3, 6)
        depths = [round(rng.random(), 3) for _ in range(count)]
    kind = rng.choice((CODE, WORD))
    if kind == CODE:
        values = _codes(rng, len(depths))
    else:
        values = rng.sample(WORDS, len(depths))
    facts, questions = [], []
    for name, value, depth in zip(rng.sample(NAMES, len(depths)), values, depths):
        facts.append((depth, planted(kind, name, value)))
        questions.append(Question(asked(kind, name), [value], kind, depth))
    return facts, questions


def _counting(rng: random.Random) -> Made:
    """Someone buys several things all over the text, and somebody else does too."""
    (who, other), count = rng.sample(NAMES, 2), rng.randint(2, 7)
    things = rng.sample(WORDS, count + 3)
    buyers = [who] * count + [other] * 3
    facts = [
        (round(rng.random(), 3), f"{name} bought a {thing}.")
        for name, thing in zip(buyers, things)
    ]
    question = f"How many things did {who} buy? Answer with a number."
    return facts, [Question(question, [str(count), COUNTS[count - 2]], "counting")]


def _several(rng: random.Random) -> Made:
    """Three codes at once, among those of others."""
    names, codes = rng.sample(NAMES, 5), _codes(rng, 5)
    facts = [
        (round(rng.random(), 3), planted(CODE, name, code))
        for name, code in zip(names, codes)
    ]
    question = f"What are the secret codes of {names[0]}, {names[1]} and {names[2]}?"
    return facts, [Question(question, codes[:3], "several")]


def _table(rng: random.Random) -> Made:
    """A row of a table, to be copied."""
    cells = zip(rng.sample(NAMES, ROWS), rng.sample(WORDS, ROWS), _codes(rng, ROWS))
    rows = [f"| {' | '.join(row)} |" for row in cells]
    row = rng.choice(rows)
    question = f"Copy the row of {row.split()[1]} from the table, exactly as it stands."
    return _block(
        ["| name | word | code |", "|---|---|---|", *rows], question, row, rng
    )


def _code(rng: random.Random) -> Made:
    """A line of a program, to be copied."""
    names = [name.lower() for name in rng.sample(NAMES, ROWS)]
    lines = [
        f'    {name}_limit = scale("{word}", {code}) + {rng.randint(2, 9)}'
        for name, word, code in zip(
            names, rng.sample(WORDS, ROWS), rng.sample(range(1000, 10_000), ROWS)
        )
    ]
    line = rng.choice(lines).strip()
    said = f"Copy the line of the program that sets {line.split()[0]}, exactly as it stands."
    return _block(
        ["```python", "def limits():", *lines, "```"], said, line, rng, "code"
    )


def _block(
    lines: list[str],
    question: str,
    answer: str,
    rng: random.Random,
    kind: str = "table",
) -> Made:
    depth = round(rng.random(), 3)
    return [(depth, "\n".join(lines))], [Question(question, [answer], kind, depth)]


def _tool(rng: random.Random) -> Made:
    """A fact in one of several results of a tool, as an agent's conversation has them."""
    names, codes = rng.sample(NAMES, RESULTS), _codes(rng, RESULTS)
    results = [
        json.dumps({"tool": "read_note", "content": planted(CODE, name, code)})
        for name, code in zip(names, codes)
    ]
    lines = [f"<tool_response>\n{result}\n</tool_response>" for result in results]
    i = rng.randrange(RESULTS)
    return _block(lines, asked(CODE, names[i]), codes[i], rng, "tool")


def _json(rng: random.Random) -> Made:
    """Two facts about one person, as an object."""
    (who, other), values = rng.sample(NAMES, 2), rng.sample(WORDS, 2)
    codes = _codes(rng, 2)
    facts = [
        (round(rng.random(), 3), planted(kind, name, value))
        for name, code, word in zip((who, other), codes, values)
        for kind, value in ((CODE, code), (WORD, word))
    ]
    question = (
        f"What are the {CODE} and the {WORD} of {who}? "
        'Answer with a JSON object with the keys "code" and "word".'
    )
    answer = json.dumps({"code": codes[0], "word": values[0]})
    return facts, [Question(question, [answer], "json")]


def _codes(rng: random.Random, count: int) -> list[str]:
    return [f"{code:04}" for code in rng.sample(range(10_000), count)]


HARD: dict[str, Callable[[random.Random], Made]] = {
    "counting": _counting,
    "several": _several,
    "table": _table,
    "code": _code,
    "tool": _tool,
    "json": _json,
}
