"""How many neurons each layer keeps."""

from typing import Optional, Sequence

from ..errors import ConfigError


def uniform(layers: int, sparsity: float) -> list[float]:
    """The same budget (share of neurons kept) for every layer."""
    return [1 - sparsity] * layers


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


def neurons_kept(budget: float, neurons: int) -> Optional[int]:
    """A budget as a whole number of neurons; None where it keeps them all.

    A multiple that matmul kernels like: 64 at real sizes.
    """
    if budget >= 1:
        return None
    multiple = max(1, min(64, neurons // 16))
    kept = max(1, round(budget * neurons / multiple)) * multiple
    return kept if kept < neurons else None
