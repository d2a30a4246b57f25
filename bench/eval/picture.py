"""The evaluation's picture: scores and KL per task, and scores by the depth of the fact."""

from pathlib import Path
from typing import Any, Sequence

from . import frontier_picture
from .evaluation import Record
from .frontier import PLANTED, Point
from .intervals import LEAST_KL, errors, interval
from .summaries import ALL, Summary

DENSE = "0.6"
DEPTHS = (0, 25, 50, 75, 100)
MOST = 4  # arms that bars beside each other can show


def picture(
    path: Path,
    records: Sequence[Record],
    found: Sequence[Summary],
    points: Sequence[Point],
    title: str,
) -> None:
    """Write a PNG; bars and points with their 95 % intervals."""
    draw(records, found, points, title).savefig(path, dpi=120, format="png")


def draw(
    records: Sequence[Record],
    found: Sequence[Summary],
    points: Sequence[Point],
    title: str,
) -> Any:
    """The arms by task, where they are few; below, the frontier of several."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(s.arm for s in found))
    rows = [
        r
        for r, shown in (("tasks", len(arms) <= MOST), ("all", len(arms) > 1))
        if shown
    ]
    whole = Figure(figsize=(14.1, 4.9 * len(rows)), layout="constrained")
    parts = dict(zip(rows, whole.subfigures(len(rows), 1, squeeze=False)[:, 0]))
    for row, figure in parts.items():
        axes = figure.subplots(1, 3)
        if row == "tasks":
            _scores(axes[0], [s for s in found if s.score_dense is not None], arms)
            _kl(axes[1], [s for s in found if s.task != ALL], arms)
            _depths(axes[2], [r for r in records if r.task in PLANTED], arms)
        else:
            frontier_picture.draw(axes, points)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*_handles(axes), loc="outside lower center", ncols=4, fontsize=9)
    whole.suptitle(f"{title}; bars: 95 % intervals", fontsize=10, parse_math=False)
    return whole


def _handles(axes: Any) -> Any:
    """Of the axis with the longest legend."""
    return max((a.get_legend_handles_labels() for a in axes), key=lambda h: len(h[0]))


def _scores(axis: Any, found: list[Summary], arms: list[str]) -> None:
    axis.set(title="answers (more is better)", xlabel="task", ylim=(0, 1.05))
    axis.set_ylabel("share right; quote and qa: token F1")
    if not found:
        return _nothing(axis, "no task with answers")
    width = 0.8 / (len(arms) + 1)
    for i, arm in enumerate([None, *arms]):  # None: dense, the same in every arm
        own = [s for s in found if s.arm == (arm or arms[0])]
        name = "sparse" if arm else "dense"
        values = [getattr(s, f"score_{name}") for s in own]
        bounds = [getattr(s, f"score_{name}_bounds") for s in own]
        axis.bar(
            [at + (i + 0.5) * width - 0.4 for at in range(len(own))],
            values,
            0.94 * width,
            yerr=errors(values, bounds),
            color=f"C{i - 1}" if arm else DENSE,
            label=arm or "dense",
        )
    axis.set_xticks(range(len(own)), [s.task for s in own], fontsize=9)


def _kl(axis: Any, found: list[Summary], arms: list[str]) -> None:
    axis.set(title="distance from dense (less is better)", yscale="log")
    axis.set(xlabel="task", ylabel="KL(dense || sparse), nats per token")
    for i, arm in enumerate(arms):
        own = [s for s in found if s.arm == arm]
        values = [max(LEAST_KL, s.kl) for s in own]
        bars = errors(values, [s.kl_bounds for s in own])
        xs = [at + (i + 0.5) * 0.6 / len(arms) - 0.3 for at in range(len(own))]
        axis.errorbar(xs, values, bars, fmt="o", color=f"C{i}", label=arm)
    axis.set_xticks(range(len(own)), [s.task for s in own], fontsize=9)
    axis.set_xlim(-0.5, len(own) - 0.5)
    ends = [max(LEAST_KL, v) for s in found for v in (s.kl, *(s.kl_bounds or ()))]
    axis.set_ylim(min(ends) / 2, max(ends) * 2)  # matplotlib finds none for one point


def _depths(axis: Any, records: list[Record], arms: list[str]) -> None:
    axis.set(title="planted facts by depth (more is better)", ylim=(0, 1.05))
    axis.set_ylabel("share right")
    if not records:
        return _nothing(axis, "no task with planted facts")
    for i, arm in enumerate([None, *arms]):
        own = [r for r in records if r.arm == (arm or arms[0])]
        bins = [[r for r in own if _bin(r) == depth] for depth in DEPTHS]
        xs = [depth + 1.2 * i for depth, near in zip(DEPTHS, bins) if near]
        field = "score_sparse" if arm else "score_dense"
        means, bounds = [], []
        for near in filter(None, bins):
            values = [getattr(r, field) for r in near]
            means.append(sum(values) / len(values))
            bounds.append(interval(values, [r.document for r in near]))
        axis.errorbar(
            xs,  # a little apart, to show the intervals
            means,
            errors(means, bounds),
            fmt="o-" if arm else "o--",
            markersize=4,
            color=f"C{i - 1}" if arm else DENSE,
        )
    axis.set(xlabel="depth of the fact in the document, %", xticks=DEPTHS)


def _bin(record: Record) -> int:
    """The nearest of DEPTHS."""
    assert record.depth is not None
    return 25 * round(4 * record.depth)


def _nothing(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes, color="0.4")
    axis.set(xticks=[], yticks=[])
