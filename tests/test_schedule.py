import math

import pytest
import reference
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_fastforward.errors import ConfigError
from mlx_fastforward.neurons.schedule import layerwise, neurons_kept, uniform

SPARSITY = st.floats(0, 0.99)
IMPORTANCES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=40
)


@given(st.integers(0, 100), SPARSITY)
def test_uniform(layers: int, sparsity: float) -> None:
    budgets = uniform(layers, sparsity)
    assert len(budgets) == layers
    assert all(b == 1 - sparsity for b in budgets)


def test_layerwise_by_hand() -> None:
    """A capped layer hands its surplus to the layers after it."""
    assert layerwise([1, 3], 0.5) == pytest.approx([0.25, 0.75])
    assert layerwise([8, 1, 1], 0.5) == pytest.approx([1, 0.25, 0.25])
    assert layerwise([1, 1, 8], 0.5) == pytest.approx([0.15, 0.15, 1])
    assert layerwise([2, 2, 2], 0.4) == pytest.approx([0.6, 0.6, 0.6])
    assert layerwise([1, 0, 1], 0.5) == pytest.approx([0.75, 0, 0.75])


@given(IMPORTANCES, SPARSITY)
def test_layerwise_is_algorithm_1(importances: list[float], sparsity: float) -> None:
    assume(any(importances))
    expected = reference.layerwise(importances, sparsity)
    assert layerwise(importances, sparsity) == pytest.approx(expected, abs=1e-6)


@given(IMPORTANCES, SPARSITY)
def test_layerwise_spends_the_whole_budget(
    importances: list[float], sparsity: float
) -> None:
    """Only a cap on the last layer that counts leaves some of it unspent."""
    assume(any(importances))
    budgets = layerwise(importances, sparsity)
    assert len(budgets) == len(importances)
    assert all(-1e-9 <= b <= 1 for b in budgets)
    target = (1 - sparsity) * len(importances)
    last = max(i for i, s in enumerate(importances) if s)
    if budgets[last] < 1:
        assert sum(budgets) == pytest.approx(target, abs=1e-6)
    else:
        assert sum(budgets) <= target + 1e-6


@given(IMPORTANCES, SPARSITY, st.sampled_from([1e-3, 0.5, 1e3]))
def test_layerwise_needs_only_ratios(
    importances: list[float], sparsity: float, scale: float
) -> None:
    assume(any(importances))
    scaled = layerwise([scale * s for s in importances], sparsity)
    assert scaled == pytest.approx(layerwise(importances, sparsity), abs=1e-6)


@pytest.mark.parametrize(
    "importances",
    [
        [],
        [0.0],
        [0.0, 0.0],
        [1.0, -1e-9],
        [-1.0, 3.0],
        [1.0, math.nan],
        [math.nan],
        [1.0, math.inf],
        [-math.inf, 1.0],
    ],
)
def test_bad_importances(importances: list[float]) -> None:
    with pytest.raises(ConfigError) as e:
        layerwise(importances, 0.5)
    assert str(e.value).startswith("importances") and "\n" not in str(e.value)


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(1, 30000))
def test_neurons_kept(budgets: list[float], neurons: int) -> None:
    """Bounds, multiples, and no further from the budget than half a multiple."""
    step = max(1.0, min(64.0, neurons / 16))
    keep = neurons_kept(budgets, neurons)
    assert len(keep) == len(budgets)
    for k, b in zip(keep, budgets):
        assert isinstance(k, int) and 1 <= k <= neurons
        if neurons >= 1024:
            assert k % 64 == 0 or k == neurons
        at_least_one_step = k <= step and b * neurons < k
        assert at_least_one_step or abs(k - b * neurons) <= step / 2 + 1e-6


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30000))
def test_a_larger_budget_never_keeps_fewer(a: float, b: float, neurons: int) -> None:
    small, large = neurons_kept(sorted([a, b]), neurons)
    assert small <= large


def test_neurons_kept_at_real_sizes() -> None:
    assert neurons_kept([0.5, 0.501, 0.25, 1.0, 0.0], 8192) == [
        4096,
        4096,
        2048,
        8192,
        64,
    ]
    assert neurons_kept([0.5], 11008) == [5504]


@given(st.integers(1, 30000))
def test_a_full_budget_keeps_every_neuron(neurons: int) -> None:
    """A layer capped at 1 is dense, also where f is no multiple of the step."""
    assert neurons_kept([1.0], neurons) == [neurons]
