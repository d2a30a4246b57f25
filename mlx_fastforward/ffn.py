"""The gated FFN of one layer: dense activations, and the FFN over chosen neurons (eq. 15-18).

Weights are looked up at every call, so LoRA or quantisation applied after attach() are seen.
"""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from .families import Family


def unsupported_linear(linear: nn.Module) -> Optional[str]:
    """Why neurons cannot be taken out of this projection, or None if they can."""
    base = linear.linear if type(linear) is LoRALinear else linear
    known = {"weight", "bias"}
    if type(base) is nn.QuantizedLinear:
        known |= {"scales", "biases"}
    elif type(base) is not nn.Linear:
        return type(base).__name__
    extra = {k for k, v in base.items() if v is not None} - known
    return f"{type(base).__name__} with {', '.join(sorted(extra))}" if extra else None


def rows_linear(linear: nn.Module, x: mx.array, rows: mx.array) -> mx.array:
    """``linear(x)[..., rows]`` without the other outputs. x: (n, d), rows: (K,) -> (n, K)."""
    if type(linear) is LoRALinear:
        z = (x @ linear.lora_a) @ mx.take(linear.lora_b, rows, axis=1)
        base = rows_linear(linear.linear, x, rows)
        return base + (linear.scale * z).astype(x.dtype)
    weight = mx.take(linear.weight, rows, axis=0)
    if type(linear) is nn.QuantizedLinear:
        biases = linear.get("biases")
        y = mx.quantized_matmul(
            x,
            weight,
            scales=mx.take(linear.scales, rows, axis=0),
            biases=None if biases is None else mx.take(biases, rows, axis=0),
            transpose=True,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    else:
        y = x @ weight.T
    return y + mx.take(linear.bias, rows) if "bias" in linear else y


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


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


class DownRows:
    """The down projection with one row per neuron, made once per chunk of tokens.

    Quantised down projections are packed along the neurons, so single columns cannot be taken:
    the matrix is dequantised for the chunk and dropped after it. Extra memory while a chunk is
    in this layer: two float copies of the down projection, besides one block's gathered weights.
    """

    def __init__(self, linear: nn.Module, dtype: mx.Dtype):
        self.lora = linear if type(linear) is LoRALinear else None
        base = linear.linear if self.lora is not None else linear
        self.rows = transposed(dequantized(base, dtype))
        self.bias = base.get("bias")

    def __call__(self, z: mx.array, neurons: mx.array) -> mx.array:
        """z: (n, K), neurons: (K,) -> (n, d)."""
        y = z @ mx.take(self.rows, neurons, axis=0)
        if self.bias is not None:
            y = y + self.bias
        if self.lora is not None:
            u = (z @ mx.take(self.lora.lora_a, neurons, axis=0)) @ self.lora.lora_b
            y = y + (self.lora.scale * u).astype(y.dtype)
        return y


class GatedFFN:
    """One layer's FFN: Y = down(act(gate(X)) * up(X))."""

    def __init__(self, mlp: nn.Module, family: Family):
        self.mlp = mlp
        self.family = family
        self._norms: Optional[tuple[list[Any], mx.array]] = None

    @property
    def down(self) -> nn.Module:
        return getattr(self.mlp, self.family.down)

    def _inputs(self) -> list[nn.Module]:
        names = [self.family.gate, self.family.up]
        if self.family.fused:
            names = [self.family.gate_up]
        return [getattr(self.mlp, name) for name in names]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, f): hidden size and number of neurons."""
        first = self._inputs()[0]
        base: Any = getattr(first, "linear", first)  # LoRA and DoRA wrap one
        out, d = base.weight.shape
        if base.weight.dtype == mx.uint32:
            d = d * 32 // base.bits
        return d, out // 2 if self.family.fused else out

    def unsupported(self) -> Optional[str]:
        """Why this layer cannot be sliced, or None."""
        reasons = (unsupported_linear(m) for m in [*self._inputs(), self.down])
        return next((r for r in reasons if r), None)

    def activations(self, x: mx.array) -> mx.array:
        """Z of every neuron. x: (..., d) -> (..., f)."""
        if self.family.fused:
            gate, up = mx.split(self._inputs()[0](x), 2, axis=-1)
        else:
            gate, up = (m(x) for m in self._inputs())
        return self.family.combine(gate, up)

    def activations_and_output(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Z and the dense FFN's output. x: (B, T, d) -> (B, T, f), (B, T, d).

        T may be 0, which mlx's quantised matmul on the CPU does not survive.
        """
        if x.shape[1] == 0:
            return mx.zeros((*x.shape[:2], self.shape[1]), x.dtype), x
        z = self.activations(x)
        return z, self.down(z)

    def down_norms(self) -> mx.array:
        """Norm of each neuron's down column (f,), float32, LoRA included.

        Kept until an array of the projection is replaced; a change in place goes unnoticed.
        """
        linear = self.down
        lora = linear if type(linear) is LoRALinear else None
        base = linear.linear if lora is not None else linear
        tag = [base.weight, base.get("scales"), base.get("biases")]
        if lora is not None:
            tag += [lora.lora_a, lora.lora_b, lora.scale]
        if self._norms is None or not _same(self._norms[0], tag):
            w = dequantized(base, mx.float32).astype(mx.float32)
            if lora is not None:
                w = w + lora.scale * (lora.lora_a @ lora.lora_b).T
            self._norms = (tag, mx.sqrt(mx.sum(mx.square(w), axis=0)))
        return self._norms[1]

    def sparse(self, x: mx.array, neurons: mx.array) -> mx.array:
        """The FFN over chosen neurons. x: (M, n, d), neurons: (M, K) -> (M, n, d)."""
        down = DownRows(self.down, x.dtype)
        out: list[mx.array] = []
        for block, kept in zip(x, neurons):
            if out:  # one block's gathered weights at a time, whatever the scheduler
                kept = mx.depends([kept], [out[-1]])[0]
            out.append(self._block(block, kept, down))
        return mx.stack(out)

    def _block(self, x: mx.array, neurons: mx.array, down: DownRows) -> mx.array:
        if self.family.fused:
            fused = self._inputs()[0]
            f = self.shape[1]
            gate = rows_linear(fused, x, neurons)
            up = rows_linear(fused, x, neurons + f)
        else:
            gate, up = (rows_linear(m, x, neurons) for m in self._inputs())
        return down(self.family.combine(gate, up), neurons)
