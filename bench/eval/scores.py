"""Is an answer right? Normalisation and token F1 as in SQuAD's evaluation script."""

import json
import re
import string
from collections import Counter
from typing import Callable, Sequence

_DROP = str.maketrans("", "", string.punctuation)


def normal(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DROP)).split()


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references after normalisation, else 0."""
    return float(any(normal(answer) == normal(r) for r in references))


def found(answer: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the answer, as whole words, else 0.

    Chat models answer in sentences: "The secret code of Felix is 4821." is right.
    """
    said = f" {' '.join(normal(answer))} "
    return float(any(f" {' '.join(normal(r))} " in said for r in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Token F1, 0 to 1, the best over the references."""
    return max((_f1(normal(answer), normal(r)) for r in references), default=0.0)


def share(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer, as whole words."""
    return sum(found(answer, [r]) for r in references) / len(references)


def verbatim(answer: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the answer letter by letter, but for runs of spaces, else 0."""
    said = " ".join(answer.split())
    return float(any(" ".join(r.split()) in said for r in references))


def fields(answer: str, references: Sequence[str]) -> float:
    """The share of a reference's fields that the answer's JSON object has, values as text."""
    try:
        said = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except (ValueError, RecursionError):
        return 0.0
    wanted = [json.loads(r).items() for r in references]
    return max(sum(str(said.get(k)) == v for k, v in w) / len(w) for w in wanted)


def first_line(text: str) -> str:
    """What a model without a chat template answers before it goes on by itself."""
    return re.split(r"\n", text.strip(), maxsplit=1)[0].strip()


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * same / (len(answer) + len(reference))


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "quote": f1,
    "qa": f1,
    "several": share,
    "table": verbatim,
    "code": verbatim,
    "json": fields,
}  # by task; the others: found
