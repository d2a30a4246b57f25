"""The frontier's picture: what each arm costs, by how fast its FLOPs allow it to be."""

from typing import Any, Sequence

from .frontier import Point
from .intervals import LEAST_KL, errors

KINDS = {  # by what an arm leaves out: its colour and mark
    "FFN neurons left out (--sparsity)": ("C0", "o"),
    "tokens skip FFNs (--prune-tokens)": ("C2", "s"),
    "part is read, a draft chooses (--keep)": ("C1", "D"),
    "part is read, the model's first layers choose (--keep)": ("C3", "v"),
    "part is read, the question's words choose (--keep)": ("C5", "^"),
    "several of these": ("C4", "*"),
}
CHOOSERS = {"self": 3, "words": 4}  # of a part, among KINDS; a draft otherwise


def draw(axes: Sequence[Any], points: Sequence[Point]) -> None:
    """KL, facts and quotes on three axes; bars are 95 % intervals."""
    titles = ("distance from dense (less is better)", "planted facts (more is better)")
    kl, facts, quotes = axes
    kl.set(title=titles[0], ylabel="KL(dense || sparse), nats per token", yscale="log")
    facts.set(title=titles[1], ylabel="share found", ylim=(0, 1.05))
    quotes.set(title="completed quotes (more is better)", ylabel="token F1")
    _points(kl, points, "kl")
    for axis, name in ((facts, "facts"), (quotes, "quotes")):
        _points(axis, [p for p in points if getattr(p, name) is not None], name)
    quotes.set_ylim(0)
    for axis in axes:
        axis.set_xlabel("times as fast as stock mlx-lm, by FLOPs")
        axis.margins(x=0.12)


def _points(axis: Any, points: Sequence[Point], name: str) -> None:
    if not points:
        axis.text(
            0.5, 0.5, "not asked", ha="center", transform=axis.transAxes, color="0.4"
        )
        axis.set(xticks=[], yticks=[])
        return
    if name != "kl":
        dense = getattr(points[0], f"{name}_dense")
        axis.axhline(dense, color="0.6", linestyle="--", label="dense model")
    for label, (color, mark) in KINDS.items():
        own = [p for p in points if kind(p) == label]
        if not own:
            continue
        values = [getattr(p, name) for p in own]
        if name == "kl":
            values = [max(LEAST_KL, v) for v in values]
        bars = errors(values, [getattr(p, f"{name}_bounds") for p in own])
        line = "" if label == list(KINDS)[-1] else "-"
        style = dict(fmt=mark + line, color=color, capsize=2, linewidth=0.8, alpha=0.9)
        xs = [p.speedup for p in own]
        axis.errorbar(xs, values, bars, label=label, **style)
        # beside its mark; the other axes have the same x
        for p, *at in zip(own, xs, values) if name == "kl" else ():
            place = {"xytext": (4, 3), "textcoords": "offset points"}
            axis.annotate(short(p), at, **place, fontsize=8)


def kind(p: Point) -> str:
    """Which of KINDS a point is."""
    names, left = list(KINDS), (p.sparsity > 0, p.prune_tokens > 0, p.keep < 1)
    if sum(left) > 1:
        return names[-1]
    if left[2]:
        return names[CHOOSERS.get(p.prefill_draft, 2)]
    return names[1 if left[1] else 0]


def short(p: Point) -> str:
    """What a point leaves out, beside it."""
    parts = []
    if p.sparsity:
        parts.append(f"{p.sparsity:.0%}")
    if p.prune_tokens:
        parts.append(f"skip {p.prune_tokens:.0%}")
    if p.keep < 1:
        by = f" {p.prefill_draft}" if p.prefill_draft in CHOOSERS and parts else ""
        parts.append(f"keep {p.keep:.0%}{by}")
    return ", ".join(parts) or "nothing"
