"""What a run found, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

from ..files import replace, write_text
from ..model.families import prefilled
from ..neurons.schedule import Curves, measured


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.png beside the predictor."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace(folder / "report.png", lambda half: picture(half, report))


def picture(path: Path, report: dict[str, Any]) -> None:
    """Recall and loss over the steps; by layer recall, error removed, importance and cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = report["calibration"]
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _descent(axes[0, 0], report["descent"])
    bars = (
        (axes[0, 1], "recall of the best half of the neurons", found["recall"]),
        (axes[1, 0], "error removed by the compensator", found["error_removed"]),
        (axes[1, 1], "importance (eq. 23)", report["importance"]),
    )
    for axis, title, values in bars:
        axis.bar(range(len(values)), values, color="tab:blue")
        axis.set(title=title, xlabel="layer", ylabel="share")
    axes[0, 1].set_ylim(0.5, 1)
    if "curves" in report:
        curves = Curves(**report["curves"])
        _costs(axes[0, 2], curves)
        _budgets(axes[1, 2], curves, report["base_model"])
    figure.suptitle(
        f"{report['base_model']['name']}: {found['tokens']:,} tokens; measured on held-out text",
        parse_math=False,
    )
    figure.savefig(path, dpi=120, format="png")


def _costs(axis: Any, curves: Curves) -> None:
    """What each layer's sparsity alone costs at the end of the model."""
    from matplotlib import colormaps

    colors = colormaps["viridis"].resampled(len(curves.kl))
    for layer, row in enumerate(curves.kl):
        costs = [max(kl, 1e-7) for kl in row]
        axis.plot(curves.levels, costs, "o-", color=colors(layer), label=f"{layer}")
    axis.set(
        title="cost of one layer's sparsity, all others dense",
        xlabel="share of its neurons dropped",
        ylabel="KL, nats per token",
        yscale="log",
    )
    if len(curves.kl) <= 16:
        axis.legend(title="layer", fontsize=7, ncols=2)


def _budgets(axis: Any, curves: Curves, base: dict[str, Any]) -> None:
    """What the schedule makes of it."""
    layers, size = len(curves.kl), base["ffn_size"]
    widths = prefilled(size) if isinstance(size, list) else [size] * layers
    for sparsity, marker in ((0.3, "s"), (0.5, "o"), (0.7, "^")):
        kept = measured(curves, widths, sparsity)
        axis.plot(range(layers), kept, f"{marker}-", label=f"{sparsity:.0%} dropped")
    axis.set(title="neurons kept by layer", xlabel="layer", ylabel="share")
    axis.set_ylim(0, 1.05)
    axis.legend(fontsize=7)


def _descent(axis: Any, curves: dict[str, list[Any]]) -> None:
    """Recall, and the loss as a mean of ten neighbours: batches differ in their block size."""
    start, other = 0, axis.twinx()
    for curve in curves.values():
        steps = [start + step for step, _, _ in curve]
        losses = [loss for _, loss, _ in curve]
        near = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
        axis.plot(steps, [recall for _, _, recall in curve], color="tab:blue")
        other.plot(steps, [sum(n) / len(n) for n in near], color="tab:gray")
        start = steps[-1] if steps else start
    axis.set(title="predictors: recall (blue), loss (gray)", xlabel="step")
    other.set_yscale("log")
