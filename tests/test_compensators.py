import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_fastforward.compensators import ACTIVATIONS, MLPCompensator, MLPWeights
from mlx_fastforward.config import ConfigError

D, H, M, N = 32, 4, 3, 5
REFERENCE = {"relu": reference.relu, "silu": reference.silu, "gelu": reference.gelu}


def layers(count: int = 2, dtype: mx.Dtype = mx.float32) -> list[MLPWeights]:
    keys = mx.random.split(mx.random.key(0), 2 * count)
    arrays = [
        mx.random.normal((D, H) if i % 2 == 0 else (H, D), key=key).astype(dtype)
        for i, key in enumerate(keys)
    ]
    return [MLPWeights(*pair) for pair in zip(arrays[::2], arrays[1::2])]


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def inputs(dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((M, N, D), key=mx.random.key(1)).astype(dtype)


NEURONS = mx.zeros((M, 7), mx.uint32)


def expected(x: mx.array, w: MLPWeights, activation: str) -> np.ndarray:
    act = REFERENCE[activation]
    return np.stack(
        [
            reference.compensator(b, float64(w.w1), float64(w.w2), act)
            for b in float64(x)
        ]
    )


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("layer", [0, 1])
def test_mlp(activation: str, layer: int) -> None:
    weights, x = layers(), inputs()
    y = MLPCompensator(weights, activation)(layer, x, NEURONS)
    assert y.shape == x.shape
    wanted = expected(x, weights[layer], activation)
    assert np.allclose(float64(y), wanted, rtol=1e-4, atol=1e-4)


def test_the_paper_s_activation_is_the_default() -> None:
    weights, x = layers(), inputs()
    y = MLPCompensator(weights)(0, x, NEURONS)
    assert np.allclose(float64(y), expected(x, weights[0], "relu"), atol=1e-4)


def test_every_activation_has_a_reference() -> None:
    assert set(ACTIVATIONS) == set(REFERENCE)


@pytest.mark.parametrize("model", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16], ids=str)
def test_precisions(model: mx.Dtype, own: mx.Dtype) -> None:
    """Computed in the compensator's precision, returned in the model's."""
    weights, x = layers(dtype=own), inputs(model)
    y = MLPCompensator(weights, "silu")(0, x, NEURONS)
    assert y.dtype == model
    wanted = expected(x, weights[0], "silu")
    difference = np.linalg.norm(float64(y) - wanted) / np.linalg.norm(wanted)
    assert difference < (1e-2 if mx.bfloat16 in (model, own) else 1e-3)


def test_blocks_of_other_sizes() -> None:
    """Probes leave a block fewer tokens; single tokens come from sparse decode."""
    weights, x = layers(), inputs()
    compensator = MLPCompensator(weights, "gelu")
    whole = compensator(1, x, NEURONS)
    one = compensator(1, x[:1, 2:3], NEURONS[:1])
    assert one.shape == (1, 1, D)
    assert mx.allclose(one[0, 0], whole[0, 2], atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "ReLU", "", "two\nlines", None])
def test_unknown_activation(activation: object) -> None:
    with pytest.raises(ConfigError) as e:
        MLPCompensator(layers(), activation)  # type: ignore[arg-type]
    text = str(e.value)
    assert "\n" not in text
    assert "activation" in text and "relu, silu, gelu" in text
    assert repr(activation) in text


def test_flops() -> None:
    """Two matmuls of (tokens, d) by (d, h), 2 FLOPs per multiply-add."""
    compensator = MLPCompensator(layers())
    assert compensator.flops(10, D) == 2 * (2 * 10 * D * H)
    assert compensator.flops(0, D) == 0
