"""What a run found, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

from ..files import replace, write_text
from ..neurons.schedule import Curves, measured


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.png beside the predictor."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace(folder / "report.png", lambda half: picture(half, report))


def picture(path: Path, report: dict[str, Any]) -> None:
    """Recall and loss over the steps; per layer recall, error removed, importance, cost, budgets."""
    from matplotlib.figure import Figure

    found = report["calibration"]
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    _descents(axes[0, 0], report["descents"])
    share = "share, 0 to 1"
    bars = (
        (axes[0, 1], "recall of the best half of the neurons", share, found["recall"]),
        (
            axes[0, 2],
            "error removed by the compensator",
            share,
            found["error_removed"],
        ),
        (axes[1, 0], "importance (eq. 23)", share, report["importance"]),
    )
    for axis, title, unit, values in bars:
        axis.bar(range(len(values)), values, color="tab:blue")
        axis.set(title=title, xlabel="layer", ylabel=unit)
    axes[0, 1].set_ylim(0.5, 1)
    if (curves := report.get("curves")) is not None:
        _costs(axes[1, 1], curves)
        _budgets(axes[1, 2], Curves(**curves), report["base_model"]["ffn_size"])
    figure.suptitle(
        f"{report['base_model']['name']}: {found['tokens']:,} tokens; measured on held-out text",
        parse_math=False,
    )
    figure.savefig(path, dpi=120, format="png")


def _costs(axis: Any, curves: dict[str, Any]) -> None:
    """What each layer alone costs the model's output."""
    levels = [0, *(100 * level for level in curves["levels"])]
    for layer, row in enumerate(curves["kl"]):
        axis.plot(levels, [0, *row], marker=".", color=_color(layer, curves))
    for layer in {0, len(curves["kl"]) - 1}:
        axis.annotate(f"layer {layer}", (levels[-1], curves["kl"][layer][-1]))
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.set(
        title="cost of one layer's sparsity, others dense",
        xlabel="neurons of this layer dropped, %",
        ylabel="KL to dense, nats per token",
    )


def _budgets(axis: Any, curves: Curves, width: int | list[int]) -> None:
    """What the schedule makes of the costs."""
    layers = len(curves.kl)
    widths = width[:layers] if isinstance(width, list) else [width] * layers
    for sparsity, color in ((0.3, "tab:green"), (0.5, "tab:blue"), (0.7, "tab:red")):
        kept = measured(curves, widths, sparsity)
        label = f"{sparsity:.0%} of all"
        dropped = [100 * (1 - b) for b in kept]
        axis.step(range(layers), dropped, where="mid", color=color, label=label)
    axis.legend(title="dropped")
    axis.set(title="budgets", xlabel="layer", ylabel="neurons dropped, %")


def _color(layer: int, curves: dict[str, Any]) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, len(curves["kl"]) - 1))


def _descents(axis: Any, curves: dict[str, list[Any]]) -> None:
    """Recall, and the loss as a mean of ten neighbours: batches differ in their block size."""
    start, other = 0, axis.twinx()
    for curve in curves.values():
        steps = [start + step for step, _, _ in curve]
        losses = [loss for _, loss, _ in curve]
        near = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
        axis.plot(steps, [recall for _, _, recall in curve], color="tab:blue")
        other.plot(steps, [sum(n) / len(n) for n in near], color="tab:gray")
        start = steps[-1] if steps else start
    title = "predictors: recall (blue), loss (gray)"
    axis.set(title=title, xlabel="step", ylabel="recall, 0 to 1")
    other.set_ylabel("loss")
    other.set_yscale("log")
