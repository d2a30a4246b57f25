"""What compensators add, against their equations in float64."""

from typing import Any, Callable

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma2, llama

from mlx_fastforward.errors import ConfigError
from mlx_fastforward.model.families import FAMILIES
from mlx_fastforward.model.ffn import GatedFFN
from mlx_fastforward.neurons.compensators import (
    ACTIVATIONS,
    Estimate,
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)

D, F, H, M, N = 32, 48, 4, 3, 5
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


def distance(found: mx.array, wanted: np.ndarray) -> float:
    """Relative to the size of the whole output."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(float64(found) - wanted) / np.linalg.norm(wanted))


# The paper's: an MLP of the input


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
    y = MLPCompensator(weights, activation)(layer, x)
    assert y.shape == x.shape
    wanted = expected(x, weights[layer], activation)
    assert np.allclose(float64(y), wanted, rtol=1e-4, atol=1e-4)


def test_the_paper_s_activation_is_the_default() -> None:
    weights, x = layers(), inputs()
    y = MLPCompensator(weights)(0, x)
    assert np.allclose(float64(y), expected(x, weights[0], "relu"), atol=1e-4)


def test_every_activation_has_a_reference() -> None:
    assert set(ACTIVATIONS) == set(REFERENCE)


@pytest.mark.parametrize("model", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16], ids=str)
def test_precisions(model: mx.Dtype, own: mx.Dtype) -> None:
    """Computed in the compensator's precision, returned in the model's."""
    weights, x = layers(dtype=own), inputs(model)
    y = MLPCompensator(weights, "silu")(0, x)
    assert y.dtype == model
    wanted = expected(x, weights[0], "silu")
    assert distance(y, wanted) < (1e-2 if mx.bfloat16 in (model, own) else 1e-3)


def test_blocks_of_other_sizes() -> None:
    """Probes leave a block fewer tokens; single tokens come from sparse decode."""
    weights, x = layers(), inputs()
    compensator = MLPCompensator(weights, "gelu")
    whole = compensator(1, x)
    one = compensator(1, x[:1, 2:3])
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


@pytest.mark.parametrize("keep", [1, F])
def test_flops(keep: int) -> None:
    """Two matmuls of (tokens, d) by (d, h), 2 FLOPs per multiply-add, whatever is kept."""
    compensator = MLPCompensator(layers())
    assert compensator.flops(10, D, keep) == 2 * (2 * 10 * D * H)
    assert compensator.flops(0, D, keep) == 0


# Low-rank: guesses for the neurons that were dropped


class Layer:
    """A gated FFN with its weights in float64, and guesses for its neurons."""

    def __init__(self, seed: int = 0, rank: int = 3, gelu: bool = False):
        self.rng = np.random.default_rng(seed)
        self.act = reference.gelu_tanh if gelu else reference.silu
        self.mlp = gemma2.MLP(D, F) if gelu else llama_mlp()
        self.family = FAMILIES["gemma2" if gelu else "llama"]
        self.gate, self.up = self.normal(F, D, scale=0.3), self.normal(F, D, scale=0.3)
        self.down, self.gate_bias = self.normal(D, F), np.zeros(F)
        self.center, self.v = self.normal(D), self.normal(D, rank, scale=D**-0.5)
        self.u = self.normal(F, rank + 1)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Numbers that bfloat16 holds exactly."""
        values = mx.array(scale * self.rng.normal(size=shape)).astype(mx.bfloat16)
        return float64(values)

    def ffn(self, dtype: mx.Dtype = mx.float32) -> GatedFFN:
        for name in ("gate", "up", "down"):
            self.mlp[f"{name}_proj"].weight = to_mx(getattr(self, name))
        if "bias" in self.mlp.gate_proj:
            self.mlp.gate_proj.bias = to_mx(self.gate_bias)
            self.mlp.up_proj.bias = mx.zeros(F)
            self.mlp.down_proj.bias = mx.zeros(D)
        self.mlp.set_dtype(dtype)
        return GatedFFN(self.mlp, self.family)

    def weights(self) -> LowRankWeights:
        return LowRankWeights(*map(to_mx, (self.center, self.v, self.u)))

    def features(self, x: mx.array) -> np.ndarray:
        blocks = float64(x)
        return np.stack([reference.features(b, self.center, self.v) for b in blocks])

    def z(self, x: np.ndarray) -> np.ndarray:
        return reference.activations(
            x, self.gate, self.up, self.act, gate_bias=self.gate_bias
        )

    def dense(self, x: mx.array) -> np.ndarray:
        return self.z(float64(x)) @ self.down.T

    def wanted(self, x: mx.array, neurons: list[list[int]]) -> np.ndarray:
        """Dense over all neurons, each block's dropped ones guessed."""
        out = []
        for block, phi, kept in zip(float64(x), self.features(x), neurons):
            z = reference.with_guesses(self.z(block), phi, self.u, kept)
            out.append(z @ self.down.T)
        return np.stack(out)


def llama_mlp() -> Any:
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=D,
        num_hidden_layers=1,
        intermediate_size=F,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=8,
        mlp_bias=True,
    )
    return llama.MLP(args)


def to_mx(x: np.ndarray) -> mx.array:
    return mx.array(x.astype(np.float32))


def estimate(weights: list[LowRankWeights], x: mx.array, layer: int = 0) -> Estimate:
    guess = LowRankCompensator(weights)(layer, x)
    assert isinstance(guess, Estimate)
    return guess


def compensated(
    layer: Layer, x: mx.array, neurons: list[list[int]], dtype: mx.Dtype = mx.float32
) -> mx.array:
    """The whole FFN over the neurons kept."""
    guess = estimate([layer.weights()], x)
    return layer.ffn(dtype).sparse(x, mx.array(neurons), guess)


def picks(keep: int, seed: int = 0) -> list[list[int]]:
    """Other neurons for each block, ascending."""
    rng = np.random.default_rng(seed)
    return [sorted(rng.permutation(F)[:keep].tolist()) for _ in range(M)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("keep", [1, F // 2, F - 1])
def test_low_rank(keep: int, rank: int, gelu: bool) -> None:
    layer, x = Layer(rank=rank, gelu=gelu), inputs()
    neurons = picks(keep)
    wanted = layer.wanted(x, neurons)
    assert distance(compensated(layer, x, neurons), wanted) < 1e-5
    plain = layer.ffn().sparse(x, mx.array(neurons))
    assert distance(plain, wanted) > 0.05  # there is something to compensate


@pytest.mark.parametrize("index", [0, 1])
def test_low_rank_weights_are_those_of_the_layer(index: int) -> None:
    both, x = [Layer(seed=3), Layer(seed=4)], inputs()
    weights = [layer.weights() for layer in both]
    guess = estimate(weights, x, index)
    assert guess.u is weights[index].u
    assert distance(guess.phi, both[index].features(x)) < 1e-5


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    rank=st.integers(1, D),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    gelu=st.booleans(),
)
def test_all_neurons_kept_is_the_dense_ffn(
    seed: int, rank: int, scale: float, gelu: bool
) -> None:
    """Whatever is guessed of neurons: those that were kept are exact."""
    layer, x = Layer(seed, rank, gelu), inputs()
    layer.u = scale * layer.u
    guessed = np.linalg.norm(layer.wanted(x, [[]] * M))
    found = compensated(layer, x, [list(range(F))] * M)
    off = np.linalg.norm(float64(found) - layer.dense(x))
    assert off < 1e-5 * max(guessed, np.linalg.norm(layer.dense(x)))


def linear_layer(seed: int, rank: int) -> Layer:
    """z is linear in ``rank`` directions of x, and the guesses say which.

    The gates are constant, so z_j = silu(c_j) p_j . (V^T x).
    """
    layer = Layer(seed, rank)
    layer.gate[:], layer.gate_bias = 0, layer.normal(F)
    p = layer.normal(F, rank)
    layer.up = p @ layer.v.T
    gates = reference.silu(layer.gate_bias)[:, None]
    layer.u = gates * np.column_stack([p @ layer.v.T @ layer.center, p])
    return layer


@settings(max_examples=25)
@given(st.data())
def test_exact_guesses_give_the_dense_ffn(data: st.DataObject) -> None:
    """Whatever was dropped."""
    layer = linear_layer(data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 6)))
    keep = data.draw(st.integers(1, F))
    neuron = st.integers(0, F - 1)
    one = st.lists(neuron, min_size=keep, max_size=keep, unique=True)
    x = inputs()
    found = compensated(layer, x, [data.draw(one) for _ in range(M)])
    assert distance(found, layer.dense(x)) < 1e-4


def rounded(weights: LowRankWeights, dtype: mx.Dtype) -> LowRankWeights:
    return LowRankWeights(*(w.astype(dtype) for w in vars(weights).values()))


PRECISIONS = [
    (model, own)
    for model in (mx.float16, mx.bfloat16, mx.float32)
    for own in (mx.float32, mx.bfloat16)
]


@pytest.mark.parametrize("model, own", PRECISIONS, ids=str)
@pytest.mark.parametrize("keep", [F // 2, F])
def test_low_rank_precisions(model: mx.Dtype, own: mx.Dtype, keep: int) -> None:
    """Predictors of any precision under models of any other; outputs have the model's."""
    layer, x, neurons = Layer(), inputs(model), picks(keep)
    weights = rounded(layer.weights(), own)
    guess = estimate([weights], x)
    y = layer.ffn(model).sparse(x, mx.array(neurons), guess)
    assert guess.phi.dtype == y.dtype == model
    low = mx.bfloat16 in (model, own)
    tolerance = 3e-2 if low else 5e-3 if model == mx.float16 else 1e-5
    assert distance(y, layer.wanted(x, neurons)) < tolerance


@pytest.mark.parametrize("model", [mx.float16, mx.bfloat16], ids=str)
def test_features_are_computed_in_the_precision_of_the_weights(model: mx.Dtype) -> None:
    """Rounded once at the end: x - center cancels, and rounding there would stay."""
    layer = Layer()
    layer.center = layer.center + 1000
    x = (mx.array(1000.0) + inputs()).astype(model)
    phi = estimate([layer.weights()], x).phi
    assert distance(phi, layer.features(x)) < (5e-3 if model == mx.bfloat16 else 5e-4)


def test_low_rank_blocks_of_other_sizes() -> None:
    layer, x = Layer(), inputs()
    neurons = picks(F // 2)
    whole = compensated(layer, x, neurons)
    one = compensated(layer, x[1:2, 2:3], neurons[1:2])
    assert one.shape == (1, 1, D)
    assert mx.allclose(one[0, 0], whole[1, 2], atol=1e-5)


@pytest.mark.parametrize("keep", [1, F])
@pytest.mark.parametrize("ranks", [(3,), (1, 3, 8)])
def test_low_rank_flops(ranks: tuple[int, ...], keep: int) -> None:
    """Of the mean layer: features (the constant one is free), W U phi, and U_S phi."""
    compensator = LowRankCompensator([Layer(rank=r).weights() for r in ranks])
    tokens = 10
    by_hand = [
        2 * tokens * D * r + 2 * tokens * (r + 1) * D + 2 * tokens * (r + 1) * keep
        for r in ranks
    ]
    found = compensator.flops(tokens, D, keep)
    assert found == pytest.approx(sum(by_hand) / len(ranks), rel=1e-12)
    assert compensator.flops(0, D, keep) == 0


def broken(change: Callable[[Layer], None]) -> float:
    """How far the output is from the dense one once guesses are changed."""
    layer, x = linear_layer(0, 3), inputs()
    change(layer)
    return distance(compensated(layer, x, picks(F // 2)), layer.dense(x))


def without_center(layer: Layer) -> None:
    layer.center[:] = 0


def without_constant(layer: Layer) -> None:
    layer.u[:, 0] = 0


def other_direction(layer: Layer) -> None:
    layer.v[:, 1] = layer.v[:, 0]


@pytest.mark.parametrize("change", [without_center, without_constant, other_direction])
def test_every_part_of_a_guess_counts(change: Callable[[Layer], None]) -> None:
    """Otherwise the tests of exact guesses could not tell."""
    assert broken(lambda layer: None) < 1e-4
    assert broken(change) > 0.05
