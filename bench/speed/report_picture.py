"""The report's pictures: speed-up by context and chip, share of the ideal, and quality beside it."""

import io
from collections import Counter
from typing import Any, Sequence

from .result import Result, of_the_ideal
from .ttft import Row, by_arm

Line = tuple[Result, str, list[Row]]  # one arm of one result, by context
STYLES = ("-", "--", ":", "-.")
MARKS = "osD^vP"


def svg(results: Sequence[Result]) -> str:
    """An <svg> element; text stays text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastforward"}):
        draw(results).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw(results: Sequence[Result]) -> Any:
    """The figure: one colour per chip, one mark per model, one dash per arm."""
    from matplotlib.figure import Figure

    lines: list[Line]
    lines = [(r, *arm) for r in results for arm in by_arm(r.rows).items()]
    verified = any(r.quality_of(row) for r, _, rows in lines for row in rows)
    size = (14 if verified else 11, 4 + 0.17 * len(lines))  # the legend lies below
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 3 if verified else 2)
    styles = _styles(lines)
    for (result, _, rows), style in zip(lines, styles):
        contexts = [r.context for r in rows]
        axes[0].plot(contexts, [r.speedup for r in rows], **style)
        ideal = [(r.context, s) for r in rows if (s := of_the_ideal(r)) is not None]
        axes[1].plot([c for c, _ in ideal], [100 * s for _, s in ideal], **style)
        found = [(r.speedup, q["kl"]) for r in rows if (q := result.quality_of(r))]
        if found:
            axes[2].plot(*zip(*found[-1:]), **(style | {"linestyle": ""}))
    axes[0].axhline(1, color="k", linewidth=0.8)
    axes[0].set(title="speed-up over stock mlx-lm", xlabel="prompt tokens")
    axes[1].axhline(100, color="k", linewidth=0.8)
    axes[1].set(title="share of the ideal saving, %", xlabel="prompt tokens")
    if verified:
        axes[2].set(
            title="what it costs, at the longest prompt",
            xlabel="speed-up",
            ylabel="KL, nats",
            ylim=(0, None),
        )
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(alpha=0.3)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower left", fontsize=8, handlelength=4)
    return figure


def _styles(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Colour by chip, mark by model and weights, dash by arm within a result; all in the label."""
    chips = list(dict.fromkeys(r.chip for r, _, _ in lines))
    models = list(dict.fromkeys(r.weights for r, _, _ in lines))
    styles, arms = [], Counter[int]()
    for result, name, _ in lines:
        nth, arms[id(result)] = arms[id(result)], arms[id(result)] + 1
        # matplotlib would read $ as the beginning of a formula
        label = f"{result.chip}: {result.weights}; {name}".replace("$", "\\$")
        styles.append(
            {
                "color": f"C{chips.index(result.chip) % 10}",
                "marker": MARKS[models.index(result.weights) % len(MARKS)],
                "linestyle": STYLES[nth % len(STYLES)],
                "label": label,
            }
        )
    return styles
