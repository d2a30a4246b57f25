"""How many neurons each layer keeps: equal shares, the paper's, or by what was measured to matter."""

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np

from ..errors import ConfigError

MOST = 0.9  # of a layer's neurons that any schedule drops


@dataclass(frozen=True)
class Curves:
    """What the sparsity of one layer alone costs at the end of the model.

    Args:
        levels: Sparsities that were measured, ascending, 0 left out.
        kl: Per layer that a prefill runs, KL(dense || sparse) in nats per token at each level.
        source: What they were measured on, for people.
    """

    levels: list[float]
    kl: list[list[float]]
    source: dict[str, Any]

    def at(self, layer: int, sparsity: float) -> float:
        """The layer's cost at any sparsity, between the measured ones on straight lines."""
        points, costs = [0.0, *self.levels], [0.0, *self.kl[layer]]
        if sparsity > points[-1]:  # on along the last line
            slope = (costs[-1] - costs[-2]) / (points[-1] - points[-2])
            return costs[-1] + slope * (sparsity - points[-1])
        return float(np.interp(sparsity, points, costs))

    def total(self, sparsities: Sequence[float]) -> float:
        """What the layers cost together if costs add up."""
        return sum(self.at(i, s) for i, s in enumerate(sparsities))


def uniform(layers: int, sparsity: float) -> list[float]:
    """The same budget (share of neurons kept) for every layer."""
    return [1 - sparsity] * layers


def first_dense(layers: int, sparsity: float) -> list[float]:
    """The first layer whole, as far as the others may drop as much more; where nothing is known."""
    if layers < 2:
        return uniform(layers, sparsity)
    others = min(sparsity * layers / (layers - 1), max(MOST, sparsity))
    return [1 - (sparsity * layers - others * (layers - 1))] + [1 - others] * (
        layers - 1
    )


def layerwise(importances: Sequence[float], sparsity: float) -> list[float]:
    """Algorithm 1: b_l = min(1, s_l / S_rest * T_rest), in layer order.

    Args:
        importances: s_l of every layer (eq. 23), not negative, not all zero.
        sparsity: Mean share of neurons dropped; the budgets sum to (1 - sparsity) * layers
            unless the last layers are capped at 1.
    """
    if any(not s >= 0 or s == float("inf") for s in importances):
        raise ConfigError("importances must be finite and not negative.")
    rest, total = float(sum(importances)), (1 - sparsity) * len(importances)
    if rest <= 0:
        raise ConfigError("importances must not all be zero.")
    budgets = []
    for s in importances:
        b = min(1.0, s / rest * total) if rest > 0 else 0.0
        budgets.append(b)
        rest, total = rest - s, total - b
    return budgets


def measured(curves: Curves, widths: Sequence[int], sparsity: float) -> list[float]:
    """Budgets with the least cost by the curves, for a mean sparsity over all neurons.

    Greedy on the curves' lower convex hulls, where always taking the step that costs least per
    neuron is optimal; a step is what matmul kernels like (see ``step``).
    """
    hulls = [_hull(curves, i) for i in range(len(widths))]
    most = [max(MOST, sparsity) * width for width in widths]
    dropped, wanted = [0] * len(widths), sparsity * sum(widths)

    def price(i: int) -> float:
        """Of the next step of a layer, per neuron."""
        width, size = widths[i], step(widths[i])
        a, b = dropped[i] / width, (dropped[i] + size) / width
        return (hulls[i](b) - hulls[i](a)) / size

    while True:
        missing = wanted - sum(dropped)
        open_layers = [
            i for i, w in enumerate(widths) if dropped[i] + step(w) <= most[i]
        ]
        if not open_layers:
            break
        best = min(open_layers, key=price)
        if missing < step(widths[best]) / 2:
            break
        dropped[best] += step(widths[best])
    return [1 - n / width for n, width in zip(dropped, widths)]


def _hull(curves: Curves, layer: int) -> Any:
    """The lower convex hull of a layer's curve through (0, 0), as a function; never falling."""
    points = [(0.0, 0.0)]
    levels = [*curves.levels, 1.0]
    costs = [max(0.0, curves.at(layer, s)) for s in levels]
    for point in zip(levels, np.maximum.accumulate(costs)):
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(
            points[-2], point
        ):
            points.pop()
        points.append(point)
    xs, ys = zip(*points)
    return lambda s: float(np.interp(s, xs, ys))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def step(neurons: int) -> int:
    """What numbers of neurons are multiples of: 64 at real sizes, as matmul kernels like it."""
    return max(1, min(64, neurons // 16))


def neurons_kept(budget: float, neurons: int) -> Optional[int]:
    """A budget as a whole number of neurons; None where it keeps them all."""
    if budget >= 1:
        return None
    kept = max(1, round(budget * neurons / step(neurons))) * step(neurons)
    return kept if kept < neurons else None
