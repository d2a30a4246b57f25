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

from .linear import PACKED, arrays, dequantized, same_arrays, summed, unwrapped

STORED_BITS = 8

# (z (n, K), neurons (K,)) -> (n, d), without bias and LoRA
Product = Callable[[mx.array, mx.array], mx.array]


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
        self.base, self.lora = unwrapped(linear)
        if strategy == "stored":
            self.product = _stored(self.base, dtype, {} if stored is None else stored)
        elif strategy == "columns":
            self.product = _columns(dequantized(self.base, dtype))
        else:
            self.product = _rows(transposed(dequantized(self.base, dtype)))

    def __call__(self, z: mx.array, neurons: mx.array) -> mx.array:
        """What these neurons add to the output. z: (n, K), neurons: (K,) -> (n, d)."""
        y = self.product(z, neurons)
        if self.lora is not None:
            u = (z @ mx.take(self.lora.lora_a, neurons, axis=0)) @ self.lora.lora_b
            y = y + (self.lora.scale * u).astype(y.dtype)
        return y

    def whole(self, y: mx.array) -> mx.array:
        """The processes' parts added up, once for all blocks, and the bias."""
        y, bias = summed(self.base, y), self.base.get("bias")
        return y if bias is None else y + bias.astype(y.dtype)


def _rows(rows: mx.array) -> Product:
    """rows: (f, d)."""
    return lambda z, neurons: z @ mx.take(rows, neurons, axis=0)


def _columns(weight: mx.array) -> Product:
    """weight: (d, f)."""
    return lambda z, neurons: z @ mx.take(weight, neurons, axis=1).T


def _stored(base: nn.Module, dtype: mx.Dtype, kept: dict[str, Any]) -> Product:
    """From a copy in ``kept``, renewed where the weight's arrays were replaced."""
    tag = arrays(base)
    if not same_arrays(kept.get("tag"), tag):
        rows = transposed(dequantized(base, dtype))
        size = next((g for g in (64, 32) if rows.shape[1] % g == 0), 0)
        packed = type(base) in PACKED and size
        parts = mx.quantize(rows, size, STORED_BITS) if packed else (rows,)
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
