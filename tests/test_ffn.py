"""The FFN over chosen neurons against eq. 15-18, and what is kept between calls."""

from typing import Any, Callable, Optional
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma2, phi3
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from reference import distance, float64

from mlx_fastforward.config import STRATEGIES
from mlx_fastforward.model import proof
from mlx_fastforward.model.ffn import Estimate, GatedFFN

D, F, TOKENS, BLOCKS = models.HIDDEN, models.FFN, 5, 2
LOOSE = {mx.float32: 1e-5, mx.float16: 3e-3, mx.bfloat16: 2e-2}
NAMES = ["gate_proj", "up_proj", "down_proj"]
BIASES = "llama-bias-sliding"


def mlp_of(family: str = BIASES, seed: int = 0, **sizes: int) -> nn.Module:
    """Weights large enough for the gates to bend, and for a llama biases."""
    return models.tiny(family, seed, **sizes).layers[0].mlp


def with_lora(mlp: nn.Module) -> nn.Module:
    """lora_b starts at zero, which would hide mistakes."""
    for i, name in enumerate(list(mlp.children())):
        mlp[name] = lora = LoRALinear.from_base(mlp[name], r=4, scale=3.0)
        shape = lora.lora_b.shape
        lora.lora_b = 0.1 * mx.random.normal(shape, key=mx.random.key(100 + i))
    mlp.eval()
    return mlp


def ffn_of(mlp: nn.Module, strategy: str = "chunk") -> GatedFFN:
    ffn = proof.ffn_of(mlp, strategy)
    assert ffn is not None
    return ffn


def float_parts(mlp: nn.Module) -> tuple[list[np.ndarray], list[Any]]:
    """Gate, up and down in float64, and their biases."""
    if isinstance(mlp, phi3.MLP):
        both, down = map(reference.weight, (mlp.gate_up_proj, mlp.down_proj))
        return [both[:F], both[F:], down], []
    parts = [mlp[name] for name in NAMES]
    bases = [getattr(part, "linear", part) for part in parts]
    biases = [float64(b.bias) if "bias" in b else None for b in bases]
    return [reference.weight(part) for part in parts], biases


def expected(
    mlp: nn.Module, x: mx.array, chosen: list[Any], guess: Optional[Estimate] = None
) -> np.ndarray:
    """Every block over its own neurons, and guesses for the others."""
    (gate, up, down), biases = float_parts(mlp)
    act = reference.gelu_tanh if isinstance(mlp, gemma2.MLP) else reference.silu
    out = [
        reference.gated_ffn(block, gate, up, down, kept, act, *biases)
        for block, kept in zip(float64(x), chosen)
    ]
    if guess is not None:
        none = np.zeros((x.shape[1], len(guess.u)))
        for y, phi, kept in zip(out, float64(guess.phi), chosen):
            y += reference.with_guesses(none, phi, float64(guess.u), kept) @ down.T
    return np.stack(out)


def inputs(dtype: mx.Dtype = mx.float32, d: int = D) -> mx.array:
    return mx.random.normal((BLOCKS, TOKENS, d), key=mx.random.key(7)).astype(dtype)


def picks(keep: int, f: int = F, seed: int = 3) -> list[list[int]]:
    """Other neurons for each block, in no order."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(f)[:keep].tolist() for _ in range(BLOCKS)]


def estimate(f: int = F, dtype: mx.Dtype = mx.float32) -> Estimate:
    """Guesses that are small per feature in the output: not to be rounded with the bias."""
    phi = 100 * mx.random.normal((BLOCKS, TOKENS, 3), key=mx.random.key(8))
    u = mx.random.normal((f, 3), key=mx.random.key(9)) / 100
    return Estimate(phi.astype(dtype), u)


@pytest.mark.parametrize("family", [BIASES, "phi3", "gemma2"])
@pytest.mark.parametrize(
    "dtype, packing, lora",
    [
        (mx.float32, "", False),
        (mx.bfloat16, "", False),
        (mx.float16, "", True),  # LoRA stays float32, as mlx-lm makes it
        (mx.float32, "affine", False),
        (mx.float32, "affine", True),
        (mx.float32, "mxfp4", True),
    ],
)
def test_few_half_and_all_neurons(
    family: str, dtype: mx.Dtype, packing: str, lora: bool
) -> None:
    """With guesses for the others and without; all are also mlx-lm's own output."""
    mlp = mlp_of(family)
    mlp.set_dtype(dtype)
    if packing:
        nn.quantize(mlp, 32, 4, mode=packing)
    ffn = ffn_of(with_lora(mlp) if lora else mlp)
    assert ffn.shape == (D, F) and ffn.unsupported() is None
    x, guess = inputs(dtype), estimate(F, dtype)
    for keep in (1, F // 2, F):
        chosen = picks(keep)
        for guessed in (guess, None):
            y = ffn.sparse(x, mx.array(chosen), guessed)
            assert y.dtype == dtype
            assert distance(y, expected(mlp, x, chosen, guessed)) < LOOSE[dtype]
    z, whole = ffn.activations_and_output(x)
    assert distance(y, float64(mlp(x))) < LOOSE[dtype]
    assert mx.array_equal(whole, mlp(x)) and mx.array_equal(whole, ffn.down(z))


SMALL = mlp_of(hidden_size=36, intermediate_size=65)


@settings(max_examples=25)
@given(st.data())
def test_any_neurons(data: st.DataObject) -> None:
    """Any number, in any order, of each block its own; exact guesses give the dense FFN."""
    keep = data.draw(st.integers(1, 65))
    one = st.lists(st.integers(0, 64), min_size=keep, max_size=keep, unique=True)
    chosen, x = [data.draw(one), data.draw(one)], inputs(d=36)
    guess = data.draw(st.sampled_from([None, estimate(65)]))
    wanted = expected(SMALL, x, chosen, guess)
    exact = Estimate(ffn_of(SMALL).activations(x), mx.eye(65))
    for strategy in STRATEGIES:
        ffn = ffn_of(SMALL, strategy)
        assert distance(ffn.sparse(x, mx.array(chosen), guess), wanted) < 1e-5
        y = ffn.sparse(x, mx.array(chosen), exact)
        assert distance(y, float64(SMALL(x))) < 1e-5


def test_no_dense_tokens() -> None:
    """A middle chunk without head, tail and probes."""
    mlp = mlp_of()
    nn.quantize(mlp, 32, 4)
    z, y = ffn_of(mlp).activations_and_output(mx.zeros((3, 0, D)))
    mx.eval(z, y)
    assert (z.shape, y.shape) == ((3, 0, F), (3, 0, D))


# Weights that change after attach()

Change = Callable[[nn.Module], Any]


def twice(*path: str) -> Change:
    def change(mlp: nn.Module) -> None:
        owner = mlp.down_proj
        for name in path[:-1]:
            owner = owner[name]
        setattr(owner, path[-1], 2 * getattr(owner, path[-1]))

    return change


def quantised(mlp: nn.Module) -> None:
    nn.quantize(mlp, 32, 4)


CHANGES: list[tuple[Change, Optional[Change]]] = [
    (twice("weight"), None),
    (quantised, None),
    (with_lora, None),
    (twice("lora_a"), with_lora),
    (twice("lora_b"), with_lora),
    (twice("scale"), with_lora),
    (twice("linear", "weight"), with_lora),
    (twice("scales"), quantised),
    (twice("biases"), quantised),
]


@pytest.mark.parametrize("strategy", ["chunk", "stored"])
@pytest.mark.parametrize("change, before", CHANGES)
def test_what_is_kept_follows_the_weights(
    change: Change, before: Optional[Change], strategy: str
) -> None:
    """Norms, what guesses add, and stored copies: LoRA and quantisation may come later."""
    mlp, x, chosen, guess = mlp_of(), inputs(), picks(20), estimate()
    if before:
        before(mlp)
    ffn = ffn_of(mlp, strategy)

    def found() -> list[mx.array]:
        sparse = [ffn.sparse(x, mx.array(chosen), g) for g in (None, guess)]
        return [ffn.down_norms(), *sparse]

    mx.eval(old := found())
    change(mlp)
    norms = reference.column_norms(reference.weight(mlp.down_proj))
    wanted = [norms, *(expected(mlp, x, chosen, g) for g in (None, guess))]
    loose = 8e-3 if strategy == "stored" else 1e-5
    for new, earlier, right in zip(found(), old, wanted):
        assert distance(earlier, right) > 1e-2
        assert distance(new, right) < loose


@pytest.mark.parametrize("before", [None, quantised, with_lora])
def test_what_is_kept_is_computed_once(
    before: Optional[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one u and precision of the tokens, whatever else is replaced."""
    mlp = mlp_of()
    if before:
        before(mlp)
    ffn, guess = ffn_of(mlp, "stored"), estimate()
    whole = Mock(wraps=ffn.down_matrix)
    monkeypatch.setattr(ffn, "down_matrix", whole)
    ffn.sparse(inputs(), mx.array(picks(20)), guess)
    norms, stored = ffn.down_norms(), ffn._stored["parts"]
    mlp.gate_proj = mlp_of(seed=5).gate_proj
    base = getattr(mlp.down_proj, "linear", mlp.down_proj)
    base.bias = base.bias + 1
    chosen, half = picks(30, seed=4), estimate(dtype=mx.float16).phi
    for phi, u, computed in (
        (3 * guess.phi, guess.u, 1),
        (half, guess.u, 2),
        (2 * half, guess.u, 2),
        (guess.phi, 2 * guess.u, 3),
    ):
        x = inputs(phi.dtype)
        y = ffn.sparse(x, mx.array(chosen), Estimate(phi, u))
        wanted = expected(mlp, x, chosen, Estimate(phi, u))
        assert distance(y, wanted) < 8e-3 and whole.call_count == computed
    assert ffn.down_norms() is norms and ffn._stored["parts"] is stored


@pytest.mark.parametrize("family", [BIASES, "phi3"])
def test_an_unknown_projection_is_named(family: str) -> None:
    """What is unknown: test_linear.py."""
    for name in mlp_of(family).children():
        mlp = mlp_of(family)
        mlp[name] = DoRALinear.from_base(mlp[name])
        assert ffn_of(mlp).unsupported() == "DoRALinear"
        assert ffn_of(mlp).shape == (D, F)
