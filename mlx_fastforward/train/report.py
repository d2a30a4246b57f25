"""What a run found, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

from ..files import replace, write_text


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json and report.png beside the predictor."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace(folder / "report.png", lambda half: picture(half, report))


def picture(path: Path, report: dict[str, Any]) -> None:
    """Recall and loss over the steps; per layer recall, error removed and importance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = report["calibration"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _curves(axes[0, 0], report["curves"])
    bars = (
        (axes[0, 1], "recall of the best half of the neurons", found["recall"]),
        (axes[1, 0], "error removed by the compensator", found["error_removed"]),
        (axes[1, 1], "importance (eq. 23)", report["importance"]),
    )
    for axis, title, values in bars:
        axis.bar(range(len(values)), values, color="tab:blue")
        axis.set(title=title, xlabel="layer")
    axes[0, 1].set_ylim(0.5, 1)
    figure.suptitle(
        f"{report['base_model']['name']}: {found['tokens']:,} tokens; measured on held-out text",
        parse_math=False,
    )
    figure.savefig(path, dpi=120, format="png")


def _curves(axis: Any, curves: dict[str, list[Any]]) -> None:
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
