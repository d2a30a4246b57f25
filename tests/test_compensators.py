"""What compensators add, or guess (test_ffn.py), against their equations in float64."""

import mlx.core as mx
import numpy as np
import pytest
import reference
from reference import distance, float64

from mlx_fastforward.errors import ConfigError
from mlx_fastforward.model.ffn import Estimate
from mlx_fastforward.neurons.compensators import (
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)

D, F, H, M, N = 32, 48, 4, 3, 5
ACTIVATIONS = {"relu": reference.relu, "silu": reference.silu, "gelu": reference.gelu}
PRECISIONS = [
    (model, own)
    for model in (mx.float32, mx.float16, mx.bfloat16)
    for own in (mx.float32, mx.bfloat16)
]


def normal(*shape: int, seed: int = 1, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def tolerance(*dtypes: mx.Dtype) -> float:
    if mx.bfloat16 in dtypes:
        return 5e-3
    return 5e-4 if mx.float16 in dtypes else 1e-5


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
@pytest.mark.parametrize("model, own", PRECISIONS, ids=str)
def test_mlp(model: mx.Dtype, own: mx.Dtype, activation: str) -> None:
    """Each layer's own, in the compensator's precision, returned in the model's."""
    layers = [
        MLPWeights(normal(D, H, seed=s, dtype=own), normal(H, D, seed=9, dtype=own))
        for s in (2, 3)
    ]
    x, named = normal(M, N, D, dtype=model), () if activation is None else (activation,)
    act = ACTIVATIONS[activation or "relu"]  # the paper's is the default
    for i, w in enumerate(layers):
        y = MLPCompensator(layers, *named)(i, x)
        w1, w2 = float64(w.w1), float64(w.w2)
        wanted = [reference.compensator(b, w1, w2, act) for b in float64(x)]
        assert isinstance(y, mx.array) and y.dtype == model
        assert distance(y, np.stack(wanted)) < tolerance(model, own)


@pytest.mark.parametrize("activation", ["ReLU", "two\nlines", None])
def test_unknown_activation(activation: object) -> None:
    with pytest.raises(ConfigError) as e:
        MLPCompensator([], activation)  # type: ignore[arg-type]
    text = str(e.value)
    assert "\n" not in text and "activation" in text
    assert "relu, silu, gelu" in text and repr(activation) in text


@pytest.mark.parametrize(
    "model, own, far",
    [(*pair, 0) for pair in PRECISIONS] + [(*pair, 1000) for pair in PRECISIONS[::2]],
)
def test_low_rank_features(model: mx.Dtype, own: mx.Dtype, far: int) -> None:
    """In the precision of the weights, rounded once at the end: x - center may cancel."""
    layers = [
        LowRankWeights(
            far + normal(D, seed=s, dtype=own),
            normal(D, 3, seed=5, dtype=own) / D**0.5,
            normal(F, 4, seed=s, dtype=own),
        )
        for s in (2, 3)
    ]
    x = (far + normal(M, N, D)).astype(model)
    for i, w in enumerate(layers):
        guess = LowRankCompensator(layers)(i, x)
        assert isinstance(guess, Estimate)
        assert guess.u is w.u and guess.phi.dtype == model
        center, v = float64(w.center), float64(w.v)
        wanted = [reference.features(b, center, v) for b in float64(x)]
        assert distance(guess.phi, np.stack(wanted)) < tolerance(model, own)
