"""Algorithm 1, and budgets as whole numbers of neurons."""

import math

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from mlx_fastforward.errors import ConfigError
from mlx_fastforward.neurons.schedule import layerwise, neurons_kept, uniform

IMPORTANCE = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
IMPORTANCES = st.lists(IMPORTANCE, min_size=1, max_size=40).filter(any)


def test_budgets_by_hand() -> None:
    """A capped layer hands its surplus to the layers after it."""
    assert uniform(3, 0.25) == [0.75] * 3
    assert layerwise([1, 3], 0.5) == pytest.approx([0.25, 0.75])
    assert layerwise([8, 1, 1], 0.5) == pytest.approx([1, 0.25, 0.25])
    assert layerwise([1, 1, 8], 0.5) == pytest.approx([0.15, 0.15, 1])
    assert layerwise([2, 2, 2], 0.4) == pytest.approx([0.6, 0.6, 0.6])
    assert layerwise([1, 0, 1], 0.5) == pytest.approx([0.75, 0, 0.75])


@given(IMPORTANCES, st.floats(0, 0.99), st.sampled_from([1e-3, 1, 1e3]))
def test_layerwise(importances: list[float], sparsity: float, scale: float) -> None:
    """Algorithm 1; only a cap on the last layer that counts leaves some budget unspent."""
    budgets = layerwise([scale * s for s in importances], sparsity)
    wanted = reference.layerwise(importances, sparsity)
    assert budgets == pytest.approx(wanted, abs=1e-6)
    assert all(-1e-9 <= b <= 1 for b in budgets)
    target = (1 - sparsity) * len(importances)
    last = max(i for i, s in enumerate(importances) if s)
    assert sum(budgets) <= target + 1e-6
    assert budgets[last] == 1 or sum(budgets) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize(
    "importances",
    [[], [0.0, 0.0], [1.0, -1e-9], [1.0, math.nan], [1.0, math.inf], [-math.inf, 1.0]],
)
def test_bad_importances(importances: list[float]) -> None:
    with pytest.raises(ConfigError, match="^importances [^\n]*$"):
        layerwise(importances, 0.5)


def test_neurons_kept_by_hand() -> None:
    """Multiples of 64 at real sizes; None for all, also where f is no multiple."""
    budgets = [0.5, 0.501, 0.25, 0.0, 0.999, 1.0]
    wanted = [4096, 4096, 2048, 64, None, None]
    assert [neurons_kept(b, 8192) for b in budgets] == wanted
    assert neurons_kept(0.5, 11008) == 5504 and neurons_kept(1.0, 100) is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30000))
def test_neurons_kept(a: float, b: float, neurons: int) -> None:
    """Bounds, multiples, no further from the budget than half a multiple, and monotonic."""
    step, budgets = max(1, min(64, neurons // 16)), sorted([a, b])
    keep = [neurons_kept(budget, neurons) for budget in budgets]
    assert all(k is None or 1 <= k < neurons and k % step == 0 for k in keep)
    small, large = (neurons if k is None else k for k in keep)
    assert small <= large
    for k, budget in zip((small, large), budgets):
        lowest = k <= step and budget * neurons < k
        assert lowest or abs(k - budget * neurons) <= step / 2 + 1e-6
