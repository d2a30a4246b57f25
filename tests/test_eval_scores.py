"""Scores, intervals, summaries and ablations against the definitions, written down again."""

import math
import random
import re
import string
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_fastforward.bench.eval import scores
from mlx_fastforward.bench.eval.evaluation import Record
from mlx_fastforward.bench.eval.intervals import interval
from mlx_fastforward.bench.eval.summaries import summaries, worst
from mlx_fastforward.bench.studies.ablations import ARMS, TITLES, Ablation, table

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
    assert scores.share("4821, then 17", ["17", "18", "4821", "1"]) == 0.5
    assert scores.verbatim('so:\n  a =  f("b")', ['a = f("b")']) == 1
    assert scores.verbatim("a = f('b')", ['a = f("b")']) == 0
    wanted = ['{"code": "0017", "word": "lamp"}']
    assert scores.fields('It is {"code": "0017", "word": "oil"}.', wanted) == 0.5
    assert scores.fields('{"code": 17, "word": "lamp"', wanted) == 0  # not closed
    assert scores.first_line("\n 4821 \n\nWhat else?") == "4821"


def test_a_value_is_found_as_whole_words() -> None:
    for answer, reference, right in [
        ("4821", "4821", 1),
        ("The secret code of Felix is 4821.", "4821", 1),
        ("It is 14821.", "4821", 0),
        ("", "4821", 0),
        ("He bought a cork-screw, there.", "the cork screw", 0),
        ("Bought: the old cork screw!", "old cork screw", 1),
        ("the cork old screw", "old cork screw", 0),
    ]:
        assert scores.found(answer, ["no", reference]) == right


def test_bounds_of_few_documents_are_those_of_the_binomial() -> None:
    """Of [0, 0, 0, 1] a resample's mean is binomial(4, 1/4) / 4: P(4) is below 2.5 %, P(>2) above."""
    assert interval([0, 0, 0, 1], ["a", "b", "c", "d"]) == (0.0, 0.75)
    assert interval([0, 1], ["a", "b"]) == (0.0, 1.0)
    assert interval([0, 1], ["a", "a"]) is None  # one says nothing about others


def test_a_naive_bootstrap_that_draws_whole_documents_gives_the_same() -> None:
    """Documents have one to ten questions; a long one weighs more."""
    own, names = random.Random(3), [f"d{int(i ** 0.5 * 2)}" for i in range(36)]
    pairs = np.random.default_rng(3).normal(2, 0.5, (36, 2))
    documents = sorted(set(names))

    def of(means: np.ndarray) -> np.ndarray:
        return np.exp(means[:, 1]) - np.exp(means[:, 0])

    found: list[Any] = []
    for _ in range(4000):
        drawn = own.choices(documents, k=len(documents))
        rows = [p for d in drawn for n, p in zip(names, pairs) if n == d]
        found.append(of(np.mean(rows, axis=0)[None])[0])
    wanted = np.percentile(found, [2.5, 97.5])
    spread = wanted[1] - wanted[0]
    assert interval(pairs, names, of) == pytest.approx(wanted, abs=0.06 * spread)


def record(**more: Any) -> Record:
    base: dict[str, Any] = dict.fromkeys(Record.__dataclass_fields__)
    base |= {"arm": "a", "task": "t", "document": "d"}
    base |= {"kl": 0.0, "top1": 1.0, "ffn_sparsity": 0.0, "flops": 1.0}
    return Record(**{**base, **more})


def test_a_summary_by_hand() -> None:
    rows = [
        record(document="x", kl=1.0, top1=0.5, score_dense=1, score_sparse=0.5,
               exact_dense=1, exact_sparse=0, ffn_sparsity=0.2, flops=0.3),
        record(document="x", kl=2.0, top1=1.0, score_dense=1, score_sparse=1,
               exact_dense=1, exact_sparse=1, ffn_sparsity=0.2, flops=0.3),
        record(document="y", kl=6.0, top1=0.0, score_dense=0, score_sparse=0.3,
               exact_dense=0, exact_sparse=0, ffn_sparsity=0.5, flops=0.5),
        record(task="c", document="z", kl=0.5, nll_dense=1.0, nll_sparse=1.5),
        record(task="c", document="w", kl=0.7, nll_dense=2.0, nll_sparse=2.0),
    ]  # fmt: skip
    t, c, whole = summaries(rows)
    assert [s.task for s in (t, c, whole)] == ["t", "c", "all"]
    assert (t.n, t.documents, whole.n, whole.documents) == (3, 2, 5, 4)
    assert (t.scored, c.scored, whole.scored) == (3, 0, 3)
    assert (t.kl, t.top1) == (3.0, 0.5) and t.kl_bounds == (1.5, 6.0)
    assert t.score_dense == pytest.approx(2 / 3)
    assert t.score_sparse == pytest.approx(0.6)
    assert t.score_difference == pytest.approx(-0.2 / 3)
    assert t.score_difference_bounds == pytest.approx((-0.25, 0.3))
    assert (t.exact_dense, t.exact_sparse) == pytest.approx((2 / 3, 1 / 3))
    assert t.ffn_sparsity == pytest.approx(0.35)  # of documents, not of questions
    assert t.speedup == pytest.approx(2.5)  # all FLOPs over those that ran
    assert t.perplexity_dense is t.nll_difference_bounds is None
    e = math.exp
    assert c.perplexity_dense == pytest.approx(e(1.5))
    assert c.perplexity_sparse == pytest.approx(e(1.75))
    assert c.perplexity_difference == pytest.approx(e(1.75) - e(1.5))
    assert c.perplexity_difference_bounds == pytest.approx((0, e(1.5) - e(1)))
    assert (c.nll_difference, c.score_dense) == (0.25, None)
    assert c.nll_difference_bounds == (0, 0.5)
    assert whole.score_sparse == t.score_sparse and whole.kl == pytest.approx(2.04)


def test_arms_are_summed_up_one_by_one_and_the_first_shows_its_worst() -> None:
    rows = [record(arm=a, name=f"{a}{k}", kl=k) for k in (1.0, 5.0, 3.0) for a in "ba"]
    assert [(s.arm, s.kl) for s in summaries(rows)] == [("b", 3.0), ("a", 3.0)]
    assert [r.name for r in worst(rows, 2)] == ["b5.0", "b3.0"]


@pytest.mark.parametrize("which", Ablation)
def test_the_arms_of_an_ablation_differ_only_in_what_is_asked(which: Ablation) -> None:
    assert which in TITLES
    found = [asdict(a.config) for a in ARMS[which]]
    assert len({a.label for a in ARMS[which]}) == len({str(c) for c in found}) >= 2
    differing = {k for c in found for k in c if c[k] != found[0][k]}
    wanted = {
        Ablation.sparsity: {"sparsity"},
        Ablation.decode: {"sparse_decode"},
        Ablation.schedule: {"schedule", "sparsity"},
        Ablation.edges: {"dense_head", "dense_tail"},
        Ablation.compensator: {"compensator", "sparsity"},
        Ablation.predictors: {"selector", "compensator", "schedule"},
    }
    assert differing == wanted[which]


def test_rows_of_an_ablation_by_hand() -> None:
    def both(arm: str, *values: tuple[float, float]) -> list[Record]:
        more = {"arm": arm, "task": "key-value", "top1": 0.5, "ffn_sparsity": 0.25}
        return [
            record(document=d, kl=kl, score_dense=1.0, score_sparse=score, **more)
            for d, (kl, score) in zip("xy", values)
        ]

    records = both("a", (0.1, 1.0), (0.3, 1.0)) + both("b", (0.2, 0.0), (0.4, 1.0))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(Ablation.edges, records))
    rows = [line for line in shown.get().splitlines() if line.startswith("│")]
    cells = [[c.strip() for c in row.strip("│").split("│")] for row in rows]
    same, worse = "+0.000 (+0.000 to +0.000)", "-0.500 (-1.000 to +0.000)"
    more = "+0.1000 (+0.1000 to +0.1000)"
    assert cells == [
        ["dense", "", "", "", "", "1.000", ""],
        ["a", "25.0%", "0.2000", "", "0.500", "1.000", same],
        ["b", "25.0%", "0.3000", more, "0.500", "0.500", worse],
    ]
