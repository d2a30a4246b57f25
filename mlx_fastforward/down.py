"""The down projection over chosen neurons, and the ways to take its columns.

The weight (d, f) lies neuron by neuron along its rows, so a neuron is a column; where it is quantised
it is packed along the neurons, and single columns cannot be taken. Extra memory of each strategy:

- "chunk": transposed once per chunk of tokens and layer, then rows are taken: two float copies of one
  layer's projection while a chunk is in it, and one block's rows.
- "columns": columns are taken as they lie, slower per block; one block's columns, and for a quantised
  weight one float copy of it.
- "stored": a transposed copy of every layer, made once and kept: float as the weight is, or in 8 bits
  where that is quantised.
"""

from typing import Any, Callable, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

STORED_BITS = 8

# (z (n, K), neurons (K,)) -> (n, d), without bias and LoRA
Product = Callable[[mx.array, mx.array], mx.array]


def base_and_lora(linear: nn.Module) -> tuple[Any, Optional[LoRALinear]]:
    """A projection without what LoRA or DoRA put around it, and the LoRA if that is what it is."""
    lora = linear if type(linear) is LoRALinear else None
    return getattr(linear, "linear", linear), lora


def dequantized(linear: nn.Module, dtype: mx.Dtype) -> mx.array:
    """The float weight (out, in) of a Linear or QuantizedLinear."""
    if type(linear) is not nn.QuantizedLinear:
        return linear.weight
    return mx.dequantize(
        linear.weight,
        scales=linear.scales,
        biases=linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        dtype=dtype,
    )


def transposed(w: mx.array) -> mx.array:
    """A contiguous copy of w.T. w: (d, f) -> (f, d).

    Two passes over runs of eight: one strided pass misses the cache at every element.
    """
    d, f = w.shape
    if d % 8:
        return mx.contiguous(w.T)
    runs = mx.contiguous(w.reshape(d // 8, 8, f).transpose(0, 2, 1))
    return mx.contiguous(runs.transpose(1, 0, 2)).reshape(f, d)


class Down:
    """Made once per chunk of tokens. ``stored`` is what the strategy of that name keeps."""

    def __init__(
        self,
        linear: nn.Module,
        dtype: mx.Dtype,
        strategy: str = "chunk",
        stored: Optional[dict[str, Any]] = None,
    ):
        base, self.lora = base_and_lora(linear)
        self.bias = base.get("bias")
        if strategy == "stored":
            self.product = _stored(base, dtype, {} if stored is None else stored)
        elif strategy == "columns":
            self.product = _columns(dequantized(base, dtype))
        else:
            self.product = _rows(transposed(dequantized(base, dtype)))

    def __call__(self, z: mx.array, neurons: mx.array) -> mx.array:
        """z: (n, K), neurons: (K,) -> (n, d)."""
        y = self.product(z, neurons)
        if self.bias is not None:
            y = y + self.bias
        if self.lora is not None:
            u = (z @ mx.take(self.lora.lora_a, neurons, axis=0)) @ self.lora.lora_b
            y = y + (self.lora.scale * u).astype(y.dtype)
        return y


def _rows(rows: mx.array) -> Product:
    """rows: (f, d)."""
    return lambda z, neurons: z @ mx.take(rows, neurons, axis=0)


def _columns(weight: mx.array) -> Product:
    """weight: (d, f)."""
    return lambda z, neurons: z @ mx.take(weight, neurons, axis=1).T


def _stored(base: nn.Module, dtype: mx.Dtype, kept: dict[str, Any]) -> Product:
    """From a copy in ``kept``, renewed where the weight's arrays were replaced."""
    tag = [base.weight, base.get("scales"), base.get("biases")]
    if not same_arrays(kept.get("tag"), tag):
        rows = transposed(dequantized(base, dtype))
        quantised = type(base) is nn.QuantizedLinear
        size = next((g for g in (64, 32) if rows.shape[1] % g == 0), 0)
        parts = mx.quantize(rows, size, STORED_BITS) if quantised and size else (rows,)
        mx.eval(parts)
        kept |= {"tag": tag, "parts": parts, "size": size}
    parts, size = kept["parts"], kept["size"]
    if len(parts) == 1:
        return _rows(parts[0])

    def product(z: mx.array, neurons: mx.array) -> mx.array:
        weight, scales, biases = (mx.take(p, neurons, axis=0) for p in parts)
        return mx.quantized_matmul(
            z, weight, scales, biases, False, group_size=size, bits=STORED_BITS
        )

    return product


def same_arrays(a: Optional[list[Any]], b: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return a is not None and len(a) == len(b) and all(x is y for x, y in zip(a, b))
