"""Scores and intervals against the definitions, written down a second time."""

import math
import random
import re
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fastforward.bench.eval import scores
from mlx_fastforward.bench.eval.intervals import interval

WORDS = st.sampled_from("a The an cat cat. dog DOG! 4821 it's — né\n the-cat".split())
TEXTS = st.lists(WORDS, max_size=8).map(" ".join) | st.text("aethn .,'’\n", max_size=20)


def squad_normal(s: str) -> str:
    """As in the official script of SQuAD 1.1."""
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def squad_f1(answer: str, reference: str) -> float:
    got, wanted = squad_normal(answer).split(), squad_normal(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    left, same = list(wanted), 0
    for word in got:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(got), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_token_f1_and_exact_match_are_squads(answer: str, references: list) -> None:
    wanted = max(squad_f1(answer, r) for r in references)
    assert scores.f1(answer, references) == pytest.approx(wanted)
    same = any(squad_normal(answer) == squad_normal(r) for r in references)
    assert scores.exact(answer, references) == float(same)


def test_some_scores_by_hand() -> None:
    assert scores.f1("The cat sat.", ["a cat", "dog"]) == pytest.approx(2 / 3)
    assert scores.f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert scores.exact("The Lantern.", ["lantern"]) == 1
    assert scores.exact("a lantern it is", ["lantern"]) == 0


@pytest.mark.parametrize(
    "answer, right",
    [
        ("4821", 1),
        ("The secret code of Felix is 4821.", 1),
        ("It is 14821.", 0),
        ("4822", 0),
        ("", 0),
    ],
)
def test_a_value_is_found_as_a_whole_word(answer: str, right: int) -> None:
    assert scores.found(answer, ["4821"]) == right
    assert scores.found(answer, ["no", "4821"]) == right


def test_a_value_of_several_words_is_found_in_order() -> None:
    assert scores.found("He bought a cork-screw, there.", ["the cork screw"]) == 0
    assert scores.found("Bought: the old cork screw!", ["old cork screw"]) == 1
    assert scores.found("the cork old screw", ["old cork screw"]) == 0


def test_the_first_line_of_an_answer() -> None:
    assert scores.first_line("\n 4821 \n\nWhat else?") == "4821"


def test_bounds_of_few_documents_are_those_of_the_binomial() -> None:
    """Of [0, 0, 0, 1] a resample's mean is binomial(4, 1/4) / 4: P(4) is below 2.5 %, P(>2) above."""
    assert interval([0, 0, 0, 1], ["a", "b", "c", "d"]) == (0.0, 0.75)
    assert interval([0, 1], ["a", "b"]) == (0.0, 1.0)


def test_documents_are_drawn_whole() -> None:
    """Resamples of two documents are both, or one twice; a long document weighs more."""
    seen = []

    def keep(means: np.ndarray) -> np.ndarray:
        seen.extend(means[:, 0])
        return means[:, 0]

    interval([1, 0, 0, 0], ["a", "b", "b", "b"], keep)
    shares = {m: seen.count(m) / len(seen) for m in set(seen)}
    assert shares == pytest.approx({0.0: 0.25, 0.25: 0.5, 1.0: 0.25}, abs=0.03)


def test_questions_of_the_same_document_add_no_certainty() -> None:
    rng = np.random.default_rng(1)
    values, names = rng.normal(size=40), [f"d{i}" for i in range(40)]
    once = interval(values, names)
    often = interval(np.repeat(values, 5), list(np.repeat(names, 5)))
    assert once is not None and often == pytest.approx(once)
    low, high = interval(np.repeat(values, 5), list(map(str, range(200)))) or (0, 0)
    assert high - low < 0.7 * (once[1] - once[0])


def test_many_documents_give_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3, 2, 500)
    low, high = interval(values, list(map(str, range(500)))) or (0, 0)
    half = 1.96 * values.std() / 500**0.5
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )


def test_a_naive_bootstrap_gives_the_same() -> None:
    rng, own = np.random.default_rng(3), random.Random(3)
    names = [f"d{i // 3}" for i in range(36)]
    pairs = rng.normal(2, 0.5, (36, 2))

    def of(means: np.ndarray) -> np.ndarray:
        return np.exp(means[:, 1]) - np.exp(means[:, 0])

    found: list[Any] = []
    for _ in range(4000):
        drawn = own.choices(sorted(set(names)), k=12)
        rows = [p for d in drawn for n, p in zip(names, pairs) if n == d]
        found.append(of(np.mean(rows, axis=0)[None])[0])
    wanted = np.percentile(found, [2.5, 97.5])
    spread = wanted[1] - wanted[0]
    assert interval(pairs, names, of) == pytest.approx(wanted, abs=0.06 * spread)


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=1, max_size=12
    ),
    st.floats(-3, 3),
)
def test_what_holds_of_every_interval(rows: list, shift: float) -> None:
    values, names = [v for v, _ in rows], [n for _, n in rows]
    found = interval(values, names, resamples=300)
    if len(set(names)) < 2:
        assert found is None
        return
    assert found is not None
    assert min(values) - 1e-9 <= found[0] <= found[1] <= max(values) + 1e-9
    assert found == interval(values, names, resamples=300)
    moved = interval([v + shift for v in values], names, resamples=300)
    assert moved == pytest.approx((found[0] + shift, found[1] + shift), abs=1e-6)
    assert not any(map(math.isnan, found))
