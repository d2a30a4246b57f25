"""The bench's picture: TTFT against context, and speed-up against the limit."""

from pathlib import Path
from typing import Any, Optional, Sequence

from .ttft import Row, arm_name, by_arm

Quality = Optional[dict[str, Any]]  # what eval --save measured at a row's settings


def picture(
    path: Path, rows: list[Row], title: str, measured: Sequence[Quality] = ()
) -> None:
    """Write a PNG, one line per arm."""
    draw(rows, title, measured).savefig(path, dpi=100, format="png")


def draw(rows: list[Row], title: str, measured: Sequence[Quality] = ()) -> Any:
    """Seconds on the left, how many times as fast on the right, and what that costs where it is known.

    Bars reach from the fastest to the slowest run.
    """
    from matplotlib.figure import Figure

    known = any(measured)
    figure = Figure(figsize=(14 if known else 9.6, 5), layout="constrained")
    left, right, *more = figure.subplots(1, 3 if known else 2)
    for axis in more:
        _costs(axis, rows, measured)
    contexts = sorted({r.context for r in rows})
    first = {r.context: r for r in reversed(rows)}
    stock = [first[c] for c in contexts]
    _seconds(left, stock, "stock_ttft_s", "stock_ttft_spread_s", "k", "stock mlx-lm")
    for i, (name, line) in enumerate(by_arm(rows).items()):
        xs, color = [r.context for r in line], f"C{i}"
        _seconds(left, line, "ttft_s", "ttft_spread_s", color, name)
        right.plot(xs, [r.speedup for r in line], "o-", color=color, label=name)
        ideal, limit = [r.ideal_speedup for r in line], f"{name}: as its FLOPs allow"
        right.plot(xs, ideal, ":", color=color, label=limit)
    right.axhline(1, color="k", linestyle="--", label="stock mlx-lm")
    left.set(
        title="time to first token (less is better)", ylabel="seconds", ylim=(0, None)
    )
    right.set(title="speed-up (more is better)", ylabel="times as fast as stock mlx-lm")
    for axis in (left, right):
        axis.set(xlabel="prompt length in tokens")
        axis.set_xticks(contexts, [f"{c:,}" for c in contexts], rotation=45)
        axis.spines[["top", "right"]].set_visible(False)
    names = right.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2, fontsize=9)
    said = f"{title}; bars: fastest to slowest run"
    figure.suptitle(said, fontsize=9, parse_math=False)
    return figure


def _costs(axis: Any, rows: list[Row], measured: Sequence[Quality]) -> None:
    """KL against the measured speed-up, at the longest prompt of each arm."""
    longest = max(r.context for r in rows)
    names = list(by_arm(rows))
    for r, q in zip(rows, measured):
        if q is None or r.context != longest:
            continue
        color = f"C{names.index(arm_name(r))}"
        told = f"{arm_name(r)}: facts {q['facts']:.2f} of {q['facts_dense']:.2f}"
        spread = [[r.speedup - r.stock_ttft_s / r.ttft_spread_s[1]]]
        spread += [[r.stock_ttft_s / r.ttft_spread_s[0] - r.speedup]]
        point = [r.speedup], [max(1e-6, q["kl"])]
        axis.errorbar(*point, xerr=spread, fmt="o", color=color, capsize=3, label=told)
    axis.set(
        title="what it costs (less is better)",
        xlabel=f"times as fast as stock mlx-lm, {longest:,} tokens",
        ylabel="KL of prose after the prompt, nats per token",
        yscale="log",
    )
    axis.legend(fontsize=8)


def _seconds(
    axis: Any, rows: list[Row], value: str, spread: str, color: str, name: str
) -> None:
    """Medians, with bars from the least to the most of all trials."""
    middle = [getattr(r, value) for r in rows]
    bounds = [getattr(r, spread) for r in rows]
    below = [max(0.0, m - low) for m, (low, _) in zip(middle, bounds)]
    above = [max(0.0, high - m) for m, (_, high) in zip(middle, bounds)]
    style = "o--" if color == "k" else "o-"
    xs = [r.context for r in rows]
    axis.errorbar(
        xs, middle, [below, above], fmt=style, capsize=3, color=color, label=name
    )
