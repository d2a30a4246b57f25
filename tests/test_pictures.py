"""Every axis of a picture says what it shows; ticks, bars and legends agree with the figures."""

import importlib
from typing import Any

import pytest
from matplotlib.figure import Figure
from test_tables import BENCH, EVAL, WORST

from mlx_fastforward.bench.eval.frontier import Point
from mlx_fastforward.bench.speed.ttft import Row

SPEED = importlib.import_module("mlx_fastforward.bench.speed.picture")
FRONTIER = importlib.import_module("mlx_fastforward.bench.eval.frontier_picture")
SCORES = importlib.import_module("mlx_fastforward.bench.eval.picture")


def rows() -> list[Row]:
    """Two arms at two lengths."""
    made = []
    for context, factor in ((1024, 0.25), (4096, 1.0)):
        for selector in ("probe", "trained"):
            values = {**vars(BENCH[0]), "context": context, "selector": selector}
            for name in ("ttft_s", "stock_ttft_s"):
                values[name] *= factor
            for name in ("ttft_spread_s", "stock_ttft_spread_s"):
                values[name] = tuple(factor * v for v in values[name])
            made.append(Row(**values))
    return made


def words(axis: Any) -> list[str]:
    return [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]


def test_bench() -> None:
    figure = SPEED.draw(rows(), "title")
    left, right = figure.axes
    assert all([*words(left), *words(right)])
    assert "seconds" in left.get_ylabel() and "times as fast" in right.get_ylabel()
    for axis in (left, right):
        assert list(axis.get_xticks()) == [1024, 4096]
    stock, *arms = left.containers
    assert len(arms) == 2 and all(c.has_yerr for c in left.containers)
    for container, spread in ((stock, (66.1, 70.91)), (arms[0], (46.02, 51.33))):
        _, _, (bars,) = container
        assert [y for _, y in bars.get_segments()[-1]] == pytest.approx(spread)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(right.lines) == 5


def test_eval() -> None:
    found = [*EVAL, type(EVAL[0])(**{**vars(EVAL[0]), "task": "all"})]
    for s in found:
        s.score_dense_bounds = s.score_sparse_bounds = (0.6, 0.9)
    worst = {**vars(WORST), "arm": EVAL[0].arm, "document": "a"}
    worst |= {"score_dense": 1.0, "score_sparse": 0.0}
    figure = SCORES.draw([type(WORST)(**worst)], found, [], "title")
    for axis in figure.axes:
        assert all(words(axis))
    (legend,) = figure.subfigs[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["dense", EVAL[0].arm]


def test_the_frontier() -> None:
    """Three axes; a colour for what is left out, bars for the intervals, dense as a line."""
    settings = [(0.5, 0, 1), (0.6, 0, 1), (0, 0.25, 1), (0, 0, 0.5), (0.5, 0, 0.5)]
    points = [
        Point("a", *s, "D", 1 + i, 0.01 * i, (0, 0.02 * i), 0.7, (0.6, 0.8), 0.9)
        for i, s in enumerate(settings)
    ]
    figure = Figure()
    axes = figure.subplots(1, 3)
    FRONTIER.draw(axes, points)
    kl, facts, quotes = axes
    assert all([*words(kl), *words(facts), quotes.get_title(), quotes.get_ylabel()])
    assert "by FLOPs" in kl.get_xlabel() and kl.get_yscale() == "log"
    names = facts.get_legend_handles_labels()[1]
    assert names == ["dense model", *list(FRONTIER.KINDS)[:3], "several of these"]
    assert all(c.has_yerr for c in [*kl.containers, *facts.containers])
    beside = [t.get_text() for t in kl.texts]
    assert beside == ["50%", "60%", "skip 25%", "keep 50%", "50%, keep 50%"]
    assert [t.get_text() for t in quotes.texts] == ["not asked"]
