"""What a projection may be: float, packed in any mode, sharded, LoRA around any of them.

The only file that knows these classes. A weight is (out, in); of a sharded projection it is this
process's part: rows of an all-to-sharded one, columns of a sharded-to-all one.
"""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx_lm.tuner.lora import LoRALinear

FLOAT = (nn.Linear, distributed.AllToShardedLinear, distributed.ShardedToAllLinear)
PACKED = (
    nn.QuantizedLinear,
    distributed.QuantizedAllToShardedLinear,
    distributed.QuantizedShardedToAllLinear,
)
SUMMED = (distributed.ShardedToAllLinear, distributed.QuantizedShardedToAllLinear)


def unsupported(linear: nn.Module) -> Optional[str]:
    """Why neurons cannot be taken out of this projection, or None if they can."""
    base = linear.linear if type(linear) is LoRALinear else linear
    known = {"weight", "bias"}
    if type(base) in PACKED:
        known |= {"scales", "biases"}
    elif type(base) not in FLOAT:
        return type(base).__name__
    extra = {k for k, v in base.items() if v is not None} - known
    return f"{type(base).__name__} with {', '.join(sorted(extra))}" if extra else None


def unwrapped(linear: nn.Module) -> tuple[Any, Optional[LoRALinear]]:
    """A projection without what LoRA or DoRA put around it, and the LoRA if that is what it is."""
    lora = linear if type(linear) is LoRALinear else None
    return getattr(linear, "linear", linear), lora


def shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of the weight, unpacked; of this process's part where it is sharded.

    Of routed experts' stacked weights that of one.
    """
    base, _ = unwrapped(linear)
    out, width = base.weight.shape[-2:]
    packed = base.weight.dtype == mx.uint32
    return out, width * 32 // base.bits if packed else width


def is_packed(linear: nn.Module) -> bool:
    """Whether unpacked() does anything for it."""
    base, _ = unwrapped(linear)
    return type(base) in PACKED and not unsupported(linear)


def is_matrix(module: nn.Module) -> bool:
    """Whether this is a projection: no convolution, no table, no experts."""
    return isinstance(module, (*FLOAT, *PACKED))


def is_routed(linear: nn.Module) -> bool:
    """Whether this holds the stacked weights of routed experts."""
    base, _ = unwrapped(linear)
    return bool(base.weight.ndim > 2)


def dtype(linear: nn.Module) -> mx.Dtype:
    """What it computes in; scales of some packings are whole numbers, and say nothing."""
    base, _ = unwrapped(linear)
    found: mx.Dtype = base.get("scales", base.weight).dtype
    return found if mx.issubdtype(found, mx.floating) else mx.bfloat16


def stored_as(linear: nn.Module) -> str:
    """How the weight is kept, for people and for the keys of tuned choices."""
    base, _ = unwrapped(linear)
    if "scales" not in base:
        return "float"
    return f"{base.mode} {base.bits} bits/{base.group_size}"


def arrays(linear: nn.Module) -> list[Any]:
    """The arrays that its product depends on, to notice that one was replaced."""
    base, lora = unwrapped(linear)
    own = [] if lora is None else [lora.lora_a, lora.lora_b, lora.scale]
    return [base.weight, base.get("scales"), base.get("biases"), *own]


def same_arrays(a: Optional[list[Any]], b: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return a is not None and len(a) == len(b) and all(x is y for x, y in zip(a, b))


def dequantized(base: nn.Module, dtype: mx.Dtype) -> mx.array:
    """The float weight (out, in) of an unwrapped projection."""
    if type(base) not in PACKED:
        weight: mx.array = base.weight.astype(dtype)
        return weight
    return _dequantize(base, base.weight, base.scales, base.get("biases"), dtype)


def _dequantize(
    base: Any,
    weight: mx.array,
    scales: mx.array,
    biases: Optional[mx.array],
    dtype: mx.Dtype,
) -> mx.array:
    """Rows as they are packed in ``base``, as floats."""
    return mx.dequantize(weight, scales, biases, **_packing(base), dtype=dtype)


def _packing(base: Any) -> dict[str, Any]:
    return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}


def matrix(linear: nn.Module) -> mx.array:
    """The weight (out, in), float32, LoRA included."""
    base, lora = unwrapped(linear)
    w = dequantized(base, mx.float32).astype(mx.float32)
    return w if lora is None else w + lora.scale * (lora.lora_a @ lora.lora_b).T


def column_norms(linear: nn.Module) -> mx.array:
    """Norm of each column (in,), float32; of sharded-to-all ones those of this process."""
    return mx.sqrt(mx.sum(mx.square(matrix(linear)), axis=0))


def unpacked(linear: nn.Module, x: mx.array) -> mx.array:
    """``linear(x)``, the weight in x's dtype first: one float GEMM. x: (..., in) -> (..., out).

    A quantised product over many rows dequantises the same tile many times. The weight waits for x, so
    that the float copies of different layers never exist together.
    """
    base, lora = unwrapped(linear)
    if not is_packed(linear) and (dtype(linear) == x.dtype or unsupported(linear)):
        own: mx.array = linear(x)
        return own
    weight = mx.depends([base.weight], [x])[0]
    if type(base) in PACKED:
        parts = (weight, base.scales, base.get("biases"))
        weight = _dequantize(base, *parts, x.dtype)
    y = summed(base, x @ weight.astype(x.dtype).T)
    if "bias" in base:
        y = y + base.bias.astype(y.dtype)
    if lora is not None:
        y = y + (lora.scale * ((x @ lora.lora_a) @ lora.lora_b)).astype(x.dtype)
    return y


def rows(
    linear: nn.Module, x: mx.array, chosen: mx.array, unpack: bool = False
) -> mx.array:
    """``linear(x)[..., chosen]`` without the other outputs. x: (n, d), chosen: (K,) -> (n, K).

    unpack: Dequantise packed rows first: one float GEMM.
    """
    if type(linear) is LoRALinear:
        z = (x @ linear.lora_a) @ mx.take(linear.lora_b, chosen, axis=1)
        y = rows(linear.linear, x, chosen, unpack)
        return y + (linear.scale * z).astype(x.dtype)
    weight = mx.take(linear.weight, chosen, axis=0)
    if type(linear) in PACKED:
        scales, biases = mx.take(linear.scales, chosen, axis=0), linear.get("biases")
        biases = None if biases is None else mx.take(biases, chosen, axis=0)
        if unpack:
            y = x @ _dequantize(linear, weight, scales, biases, x.dtype).T
        else:
            y = mx.quantized_matmul(x, weight, scales, biases, True, **_packing(linear))
    else:
        y = x @ weight.astype(x.dtype).T
    return y + mx.take(linear.bias, chosen).astype(y.dtype) if "bias" in linear else y


def share(linear: nn.Module) -> tuple[int, int]:
    """(rank, processes) of a sharded-to-all projection; (0, 1) of any other."""
    base, _ = unwrapped(linear)
    if type(base) not in SUMMED:
        return 0, 1
    return base.group.rank(), base.group.size()


def summed(base: nn.Module, y: mx.array) -> mx.array:
    """The processes' parts of a sharded-to-all product added up; any other product as it is."""
    if type(base) not in SUMMED:
        return y
    return mx.distributed.all_sum(y, group=base.group)
