"""Every arm as one point: how fast the FLOPs allow it to be, and what it costs."""

from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Sequence

from .evaluation import Record
from .intervals import Bounds
from .summaries import ALL, summary

PROSE, QUOTES = "continuation", "quote"
PLANTED = ("needle", "key-value", "chat")


@dataclass(frozen=True)
class Point:
    """One arm: what it leaves out, and what that does. Bounds are 95 % intervals over documents.

    Args:
        sparsity: Share of FFN neurons dropped.
        prune_tokens: Share of the middle's tokens that skip FFNs.
        keep: Share of the tokens that is read, as ``prefill_draft`` says; "" where all are.
        speedup: Stock's FLOPs over all that ran, those of a draft too.
        kl: Nats per token of prose that goes on; without that task of all that was asked.
        facts: Share of planted facts found, by the dense model in ``facts_dense``; None where no
            task asked for them.
        quotes: Token F1 of sentences completed.
        best: No other arm is as fast with a lower KL and as many facts.
    """

    arm: str
    sparsity: float
    prune_tokens: float
    keep: float
    prefill_draft: str
    speedup: float
    kl: float
    kl_bounds: Bounds = None
    facts: Optional[float] = None
    facts_bounds: Bounds = None
    facts_dense: Optional[float] = None
    facts_difference_bounds: Bounds = None
    quotes: Optional[float] = None
    quotes_bounds: Bounds = None
    quotes_dense: Optional[float] = None
    quotes_difference_bounds: Bounds = None
    best: bool = False


def frontier(
    records: Sequence[Record], left_out: Mapping[str, dict[str, Any]]
) -> list[Point]:
    """A point per arm, the slowest first.

    Args:
        left_out: By arms' labels, as Arm.left_out tells.
    """
    found = [
        _point([r for r in records if r.arm == arm], settings)
        for arm, settings in left_out.items()
    ]
    found = [replace(p, best=not any(_beats(o, p) for o in found)) for p in found]
    return sorted(found, key=lambda p: p.speedup)


def _point(records: list[Record], settings: dict[str, Any]) -> Point:
    of = lambda *tasks: [r for r in records if r.task in tasks]
    kl = summary(of(PROSE) or records, ALL)
    values: dict[str, Any] = {"kl": kl.kl, "kl_bounds": kl.kl_bounds}
    for name, own in (("facts", of(*PLANTED)), ("quotes", of(QUOTES))):
        if own:
            s = summary(own, name)
            values[name], values[f"{name}_dense"] = s.score_sparse, s.score_dense
            values[f"{name}_bounds"] = s.score_sparse_bounds
            values[f"{name}_difference_bounds"] = s.score_difference_bounds
    speedup = summary(records, ALL).speedup
    return Point(records[0].arm, **settings, speedup=speedup, **values)


def _beats(a: Point, b: Point) -> bool:
    """Whether a is at least as good as b in all, and better in something."""
    pairs = [(a.speedup, b.speedup), (-a.kl, -b.kl), (a.facts or 0, b.facts or 0)]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)
