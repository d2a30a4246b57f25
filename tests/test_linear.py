"""What a projection may be: its rows and its columns, against the weight in float64."""

from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from reference import distance, float64

from mlx_fastforward.config import STRATEGIES
from mlx_fastforward.model import linear as projection
from mlx_fastforward.model.gather import Down

OUT, IN, TOKENS = 96, 128, 5
ROWS, COLUMNS = "all-to-sharded", "sharded-to-all"
AFFINE = {2: 64, 3: 32, 4: 32, 5: 64, 6: 64, 8: 128}  # group sizes by bits
PACKINGS = [f"affine {bits} bits/{group}" for bits, group in AFFINE.items()]
PACKINGS += ["float", "mxfp4 4 bits/32", "mxfp8 8 bits/32", "nvfp4 4 bits/16"]
SHARDED = ["float", "affine 4 bits/32", "affine 8 bits/128", "mxfp4 4 bits/32"]
KINDS = [(packing, "") for packing in PACKINGS]
KINDS += [(packing, sharding) for packing in SHARDED for sharding in (ROWS, COLUMNS)]
ALL = pytest.mark.parametrize("packing, sharding", KINDS)
LORA = pytest.mark.parametrize("lora", [False, True])


def normal(*shape: int, seed: int = 1) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def made(
    packing: str = "float",
    sharding: str = "",
    lora: bool = False,
    dtype: Any = mx.float32,
) -> Any:
    """A projection of 128 inputs and 96 outputs, with a bias."""
    linear: Any = nn.Linear(IN, OUT)
    linear.weight, linear.bias = 0.1 * normal(OUT, IN), normal(OUT, seed=2)
    linear.set_dtype(dtype)
    if packing != "float":
        mode, *numbers = packing.replace(" bits/", " ").split()
        bits, group = map(int, numbers)
        linear = nn.QuantizedLinear.from_linear(linear, group, bits, mode=mode)
    if sharding:
        linear = shard_linear(linear, sharding)
    return with_lora(linear) if lora else linear


def with_lora(linear: nn.Module) -> nn.Module:
    """LoRALinear.from_base() knows plain and packed projections only."""
    found = LoRALinear(IN, OUT, r=4, scale=3.0)
    found.linear, found.lora_b = linear, 0.1 * normal(4, OUT, seed=3)
    return found


def product(x: mx.array, linear: Any, times: int = 1) -> np.ndarray:
    bias = float64(getattr(linear, "linear", linear).bias)
    return times * float64(x) @ reference.weight(linear).T + bias


@LORA
@ALL
def test_rows_matrix_and_norms(packing: str, sharding: str, lora: bool) -> None:
    linear, x = made(packing, sharding, lora), normal(TOKENS, IN, seed=4)
    w, chosen = reference.weight(linear), [95, 3, 3, 0, 60]
    assert projection.unsupported(linear) is None
    assert projection.shape(linear) == w.shape == (OUT, IN)
    found = projection.rows(linear, x, mx.array(chosen))
    assert distance(found, product(x, linear)[:, chosen]) < 1e-5
    assert distance(projection.matrix(linear), w) < 1e-5
    norms = projection.column_norms(linear)
    assert distance(norms, np.linalg.norm(w, axis=0)) < 1e-5
    whole = "mx" in packing or "nv" in packing  # scales that say nothing
    assert projection.dtype(linear) == (mx.bfloat16 if whole else mx.float32)
    assert projection.stored_as(linear) == packing


@LORA
@ALL
def test_weights_dequantised_first(packing: str, sharding: str, lora: bool) -> None:
    """The same products: all outputs, in any shape, and chosen ones."""
    linear, x = made(packing, sharding, lora), normal(2, TOKENS, IN, seed=4)
    assert projection.is_packed(linear) == (packing != "float")
    wanted, chosen = product(x, linear), [95, 3, 3, 0, 60]
    assert distance(projection.unpacked(linear, x), wanted) < 1e-5
    found = projection.rows(linear, x[0], mx.array(chosen), unpack=True)
    assert distance(found, wanted[0][:, chosen]) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@LORA
@ALL
def test_columns(packing: str, sharding: str, lora: bool, strategy: str) -> None:
    """Of the neurons chosen; a packed weight that is stored is rounded to 8 bits again."""
    linear = made(packing, sharding, lora)
    down = Down(linear, mx.float32, strategy)
    tolerance = 8e-3 if strategy == "stored" and packing != "float" else 1e-5
    for keep in (1, 7, IN):
        neurons = mx.random.permutation(IN, key=mx.random.key(keep))[:keep]
        z = normal(TOKENS, IN, seed=keep)
        only = mx.zeros_like(z)
        only[:, neurons] = z[:, neurons]
        found = down.whole(down(z[:, neurons], neurons))
        assert distance(found, product(only, linear)) < tolerance


@pytest.mark.parametrize("packing", SHARDED[:2])
@pytest.mark.parametrize("sharding", ["", ROWS, COLUMNS])
def test_parts_of_several_processes_are_added_before_the_bias(
    packing: str, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say two others have parts that come to twice this one's."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group: 3 * y)
    linear, z = made(packing, sharding), normal(TOKENS, IN, seed=4)
    wanted = product(z, linear, 3 if sharding == COLUMNS else 1)
    assert distance(linear(z), wanted) < 1e-5  # so does mlx
    assert distance(projection.unpacked(linear, z), wanted) < 1e-5
    down = Down(linear, mx.float32)
    assert distance(down.whole(down(z, mx.arange(IN))), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision(dtype: mx.Dtype) -> None:
    """Of outputs: test_ffn.py."""
    for packing in SHARDED[:2]:
        assert projection.dtype(made(packing, lora=True, dtype=dtype)) == dtype
    linear = made(dtype=dtype)
    linear.weight = 3000 * linear.weight  # squares overflow
    norms, wanted = projection.column_norms(linear), float64(linear.weight)
    assert norms.dtype == mx.float32
    assert distance(norms, np.linalg.norm(wanted, axis=0)) < 1e-5


# What might compute anything

UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "DoRALinear": lambda: DoRALinear.from_base(made()),
    "QQLinear": lambda: nn.QQLinear(IN, OUT),
    "OtherLinear": lambda: type("OtherLinear", (nn.Linear,), {})(IN, OUT),
    "OtherPacked": lambda: type("OtherPacked", (nn.QuantizedLinear,), {})(IN, OUT),
    "OtherLoRA": lambda: type("OtherLoRA", (LoRALinear,), {})(IN, OUT),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_projections_are_named(kind: str) -> None:
    """Such a layer stays dense and is still counted: its sizes must be known."""
    linear = UNKNOWN[kind]()
    assert projection.unsupported(linear) == kind
    linear.eval()  # QQLinear packs its weight here
    assert projection.shape(linear) == (OUT, IN)
    if not hasattr(linear, "lora_a"):
        assert projection.unsupported(with_lora(linear)) == kind


@LORA
@pytest.mark.parametrize("packing, sharding", [*KINDS[5:8], *KINDS[-2:]])
def test_parameters_that_nobody_knows(packing: str, sharding: str, lora: bool) -> None:
    """Say, a global scale of some later mlx: known by type, computed otherwise."""
    linear = made(packing, sharding, lora)
    base = linear.linear if lora else linear
    base.global_scale = mx.ones((1,))
    reason = f"{type(base).__name__} with global_scale"
    assert projection.unsupported(linear) == reason
    assert not projection.is_packed(linear)
