"""The inspection's picture: which neurons the blocks keep, and four figures by depth."""

from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np

from .inspection import Inspection, Overlap

BLUE, GREY, LIGHT = "tab:blue", "0.45", "#b9d3ea"
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
COLUMNS = 512  # of an image; a column is the mean of neighbouring neurons where there are more


def picture(
    path: Path, found: Inspection, shown: Sequence[int], selector: str, title: str
) -> None:
    """Write a PNG: one row of images per layer of ``shown``, then curves over all layers."""
    from matplotlib.figure import Figure

    top, bottom = 1.6 * len(shown) + 0.5, 5.4
    figure = Figure(figsize=(12, top + bottom + 0.5), layout="constrained")
    figure.suptitle(
        f"{title}\ndark: a block keeps these neurons, white: it drops them",
        fontsize=11,
        parse_math=False,
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(top, bottom))
    above, below = parts
    _images(above, found, shown, selector)
    axes = below.subplots(2, 2)
    _recall(axes[0, 0], found, selector)
    _budgets(axes[0, 1], found)
    _ffn_error(axes[1, 0], found)
    _stream_error(axes[1, 1], found)
    for axis in axes.flat:
        _finish(axis, len(found.layers))
    figure.savefig(path, dpi=150, format="png")


def ordered(kept: np.ndarray) -> np.ndarray:
    """Neurons by how many blocks keep them, most first. (blocks, f) -> (f,)."""
    return np.argsort(-kept.sum(axis=0), kind="stable")


def binned(kept: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Neighbouring neurons averaged into at most ``columns`` columns. (blocks, f) -> (blocks, c)."""
    parts = np.array_split(kept.astype(np.float32), min(columns, kept.shape[1]), axis=1)
    return np.stack([p.mean(axis=1) for p in parts], axis=1)


def _images(
    figure: Any, found: Inspection, shown: Sequence[int], selector: str
) -> None:
    """Blocks x neurons, the selector's beside the oracle's, in one order."""
    axes = figure.subplots(len(shown), 2, squeeze=False, sharex=True, sharey=True)
    for row, layer in zip(axes, shown):
        figures = found.layers[layer]
        order = ordered(found.masks[layer][1])
        names = (selector, figures.selector), ("oracle", figures.oracle)
        for axis, mask, (name, overlap) in zip(row, found.masks[layer], names):
            axis.imshow(
                binned(mask[:, order]),
                aspect="auto",
                cmap="Blues",
                vmin=0,
                vmax=1,
                interpolation="nearest",
                extent=(0, figures.neurons, found.blocks - 0.5, -0.5),
            )
            axis.set_title(f"{name}: {_words(overlap)}", fontsize=8.5)
            axis.tick_params(labelsize=8)
        row[0].set_ylabel(f"layer {layer}\nblock", fontsize=9)
        row[0].yaxis.set_major_locator(_whole_numbers(5))
    for axis in axes[-1]:
        axis.set_xlabel("neurons, those that the oracle keeps most often first", size=9)


def _words(overlap: Overlap) -> str:
    text = f"kept by all blocks {overlap.in_all:.0%}, by one {overlap.in_one:.0%}"
    if overlap.neighbours is None:
        return text
    return (
        f"{text}; overlap of neighbours {overlap.neighbours:.0%}, "
        f"of any two {overlap.pairs:.0%}"
    )


def _recall(axis: Any, found: Inspection, selector: str) -> None:
    chance = [x.kept / x.neurons for x in found.layers]
    _curve(axis, [x.recall for x in found.layers], BLUE, selector)
    axis.plot(chance, "--", color=GREY, lw=1, label="by chance")
    axis.set_title("recall (more is better)")
    axis.set_ylabel("share of the oracle's neurons", fontsize=9)
    axis.set_yticks(QUARTERS)


def _budgets(axis: Any, found: Inspection) -> None:
    """Shares of neurons kept, and the importances, which are shares of attention."""
    shares = [x.kept / x.neurons for x in found.layers]
    axis.bar(range(len(shares)), shares, color=LIGHT, label="neurons kept")
    _curve(axis, [x.importance for x in found.layers], BLUE, "importance (eq. 23)")
    axis.set_title("budget")
    axis.set_ylabel("share of the layer's neurons", fontsize=9)
    if axis.get_ylim()[1] < 1.1:  # importances of a predictor may be on another scale
        axis.set_yticks(QUARTERS)


def _ffn_error(axis: Any, found: Inspection) -> None:
    _curve(axis, [x.error for x in found.layers], GREY, "without compensator")
    _curve(axis, [x.error_compensated for x in found.layers], BLUE, "with compensator")
    axis.set_title("error of one sparse FFN (less is better)")
    axis.set_ylabel("of its dense output", fontsize=9)


def _stream_error(axis: Any, found: Inspection) -> None:
    _curve(axis, [x.stream_error for x in found.layers], BLUE, "all layers sparse")
    axis.set_title("error that reaches the layer (less is better)")
    axis.set_ylabel("of the dense residual stream", fontsize=9)


def _curve(
    axis: Any, values: Sequence[Optional[float]], color: str, label: str
) -> None:
    if None not in values:
        axis.plot(values, "o-", color=color, ms=4, label=label)


def _finish(axis: Any, layers: int) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(_whole_numbers(12))
    axis.yaxis.set_major_formatter(_percent())
    axis.set_xlim(-0.6, layers - 0.4)
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])  # room for the legend
    axis.set_xlabel("layer", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(10)
    axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _whole_numbers(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
