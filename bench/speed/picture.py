"""The bench's picture: TTFT against context, and speed-up against the limit."""

from pathlib import Path

from .ttft import Row, arm_name


def picture(path: Path, rows: list[Row], title: str) -> None:
    """Write a PNG, one line per arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    contexts = sorted({r.context for r in rows})
    stock = {r.context: r.stock_ttft_s for r in rows}
    left.plot(contexts, [stock[c] for c in contexts], "k--", label="stock mlx-lm")
    for i, (name, line) in enumerate(_lines(rows).items()):
        xs, color = [r.context for r in line], f"C{i}"
        left.plot(xs, [r.ttft_s for r in line], "o-", color=color, label=name)
        right.plot(xs, [r.speedup for r in line], "o-", color=color, label=name)
        right.plot(xs, [r.ideal_speedup for r in line], ":", color=color)
    right.axhline(1, color="k", linestyle="--")
    left.set(xlabel="prompt tokens", ylabel="seconds", title="time to first token")
    right.set(
        xlabel="prompt tokens", title="speed-up over stock; dotted: the FLOPs allow"
    )
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for r in sorted(rows, key=lambda r: r.context):
        found.setdefault(arm_name(r), []).append(r)
    return found
