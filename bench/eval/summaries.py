"""What the records of an evaluation say: means, and how far to trust them."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import numpy as np

from .evaluation import Record
from .intervals import Bounds, interval

ALL = "all"


@dataclass(frozen=True)
class Summary:
    """One arm on one task, or on all. Means over questions; bounds are 95 % intervals.

    None where a task has no such figure, or where one document says nothing about others.

    Args:
        n: Questions; ``scored`` of them have an answer to be right about.
        score_difference: Sparse - dense, of the same questions.
        perplexity_difference: Sparse - dense, of the same true tokens.
        ffn_sparsity: Share of the prompts' FFN FLOPs that was skipped, mean over documents.
        speedup: What the FLOPs of the prompts allow, those of a draft counted.
    """

    arm: str
    task: str
    documents: int
    n: int
    scored: int
    score_dense: Optional[float]
    score_sparse: Optional[float]
    score_dense_bounds: Bounds
    score_sparse_bounds: Bounds
    score_difference: Optional[float]
    score_difference_bounds: Bounds
    exact_dense: Optional[float]
    exact_sparse: Optional[float]
    exact_difference_bounds: Bounds
    kl: float
    kl_bounds: Bounds
    top1: float
    top1_bounds: Bounds
    nll_difference: Optional[float]
    nll_difference_bounds: Bounds
    perplexity_dense: Optional[float]
    perplexity_sparse: Optional[float]
    perplexity_difference: Optional[float]
    perplexity_difference_bounds: Bounds
    ffn_sparsity: float
    speedup: float


def summaries(records: Sequence[Record]) -> list[Summary]:
    """Per arm: every task, and all of them together if there are several."""
    found = []
    for arm in dict.fromkeys(r.arm for r in records):
        own = [r for r in records if r.arm == arm]
        tasks = list(dict.fromkeys(r.task for r in own))
        found += [summary([r for r in own if r.task == t], t) for t in tasks]
        if len(tasks) > 1:
            found.append(summary(own, ALL))
    return found


def summary(records: Sequence[Record], task: str) -> Summary:
    """Records of one arm under one name."""
    scores, exacts, nlls = (_Pairs(records, name) for name in ("score", "exact", "nll"))
    documents = {r.document: r for r in records}
    keys = [r.document for r in records]
    kl, top1 = [r.kl for r in records], [r.top1 for r in records]
    return Summary(
        arm=records[0].arm,
        task=task,
        documents=len(documents),
        n=len(records),
        scored=len(scores.keys),
        score_dense=scores.dense,
        score_sparse=scores.sparse,
        score_dense_bounds=scores.bounds(lambda m: m[:, 0]),
        score_sparse_bounds=scores.bounds(lambda m: m[:, 1]),
        score_difference=scores.difference,
        score_difference_bounds=scores.bounds(),
        exact_dense=exacts.dense,
        exact_sparse=exacts.sparse,
        exact_difference_bounds=exacts.bounds(),
        kl=_mean(kl),
        kl_bounds=interval(kl, keys),
        top1=_mean(top1),
        top1_bounds=interval(top1, keys),
        nll_difference=nlls.difference,
        nll_difference_bounds=nlls.bounds(),
        perplexity_dense=_exp(nlls.dense),
        perplexity_sparse=_exp(nlls.sparse),
        perplexity_difference=_minus(_exp(nlls.sparse), _exp(nlls.dense)),
        perplexity_difference_bounds=nlls.bounds(
            lambda m: np.exp(m[:, 1]) - np.exp(m[:, 0])
        ),
        ffn_sparsity=_mean([r.ffn_sparsity for r in documents.values()]),
        speedup=1 / _mean([r.flops for r in documents.values()]),
    )


def worst(records: Sequence[Record], count: int = 10) -> list[Record]:
    """The questions with the largest KL under the first arm."""
    main = [r for r in records if r.arm == records[0].arm]
    return sorted(main, key=lambda r: -r.kl)[:count]


class _Pairs:
    """Dense and sparse values of the records that have them."""

    def __init__(self, records: Sequence[Record], name: str):
        having = [r for r in records if getattr(r, f"{name}_dense") is not None]
        self.keys = [r.document for r in having]
        pairs = [
            (getattr(r, f"{name}_dense"), getattr(r, f"{name}_sparse")) for r in having
        ]
        self.pairs = np.array(pairs, dtype=np.float64).reshape(-1, 2)

    @property
    def dense(self) -> Optional[float]:
        return float(self.pairs[:, 0].mean()) if self.keys else None

    @property
    def sparse(self) -> Optional[float]:
        return float(self.pairs[:, 1].mean()) if self.keys else None

    @property
    def difference(self) -> Optional[float]:
        return _minus(self.sparse, self.dense)

    def bounds(
        self, of: Callable[[np.ndarray], np.ndarray] = lambda m: m[:, 1] - m[:, 0]
    ) -> Bounds:
        return interval(self.pairs, self.keys, of) if self.keys else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _exp(value: Optional[float]) -> Optional[float]:
    return None if value is None else math.exp(value)


def _minus(a: Optional[float], b: Optional[float]) -> Any:
    return None if a is None or b is None else a - b
