"""The gated FFN of one layer: dense activations, and the FFN over chosen neurons (eq. 15-18).

Weights are looked up at every call, so LoRA or quantisation applied after attach() are seen.
"""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from .compensators import Estimate
from .down import Down, base_and_lora, dequantized, same_arrays
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


class GatedFFN:
    """One layer's FFN: Y = down(act(gate(X)) * up(X))."""

    def __init__(self, mlp: nn.Module, family: Family, strategy: str = "chunk"):
        self.mlp = mlp
        self.family = family
        self.strategy = strategy
        self._stored: dict[str, Any] = {}
        self._norms: Optional[tuple[list[Any], mx.array]] = None
        self._guesses: Optional[tuple[list[Any], mx.array]] = None

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
        base, _ = base_and_lora(first)
        out, d = base.weight.shape
        if base.weight.dtype == mx.uint32:
            d = d * 32 // base.bits
        return d, out // 2 if self.family.fused else out

    def projections(self) -> list[nn.Module]:
        """Gate and up, or both in one, and down."""
        return [*self._inputs(), self.down]

    def unsupported(self) -> Optional[str]:
        """Why this layer cannot be sliced, or None."""
        reasons = (unsupported_linear(m) for m in self.projections())
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
        tag = self._tag()
        if self._norms is None or not same_arrays(self._norms[0], tag):
            w = self.down_matrix()
            self._norms = (tag, mx.sqrt(mx.sum(mx.square(w), axis=0)))
        return self._norms[1]

    def down_matrix(self) -> mx.array:
        """The down projection's weight (d, f), float32, LoRA included."""
        base, lora = base_and_lora(self.down)
        w = dequantized(base, mx.float32).astype(mx.float32)
        return w if lora is None else w + lora.scale * (lora.lora_a @ lora.lora_b).T

    def _tag(self) -> list[Any]:
        """The arrays of the down projection."""
        base, lora = base_and_lora(self.down)
        own = [] if lora is None else [lora.lora_a, lora.lora_b, lora.scale]
        return [base.weight, base.get("scales"), base.get("biases"), *own]

    def _guessed(self, u: mx.array, dtype: mx.Dtype) -> mx.array:
        """What guesses for all neurons add to the output, per feature. (f, k) -> (k, d).

        Kept until ``u`` or an array of the projection is replaced.
        """
        tag, known = [*self._tag(), u], self._guesses
        if known is None or known[1].dtype != dtype or not same_arrays(known[0], tag):
            y = u.T.astype(mx.float32) @ self.down_matrix().T
            self._guesses = known = (tag, y.astype(dtype))
        return known[1]

    def sparse(
        self, x: mx.array, neurons: mx.array, guess: Optional[Estimate] = None
    ) -> mx.array:
        """The FFN over chosen neurons, and guesses for the others.

        x: (M, n, d), neurons: (M, K) -> (M, n, d).
        """
        down = Down(self.down, x.dtype, self.strategy, self._stored)
        out: list[mx.array] = []
        for i, (block, kept) in enumerate(zip(x, neurons)):
            if out:  # one block's gathered weights at a time, whatever the scheduler
                kept = mx.depends([kept], [out[-1]])[0]
            z = self._kept(block, kept)
            if guess is not None:
                z = z - guess.phi[i] @ mx.take(guess.u, kept, axis=0).T.astype(z.dtype)
            out.append(down(z, kept))
        y = mx.stack(out)
        return y if guess is None else y + guess.phi @ self._guessed(guess.u, x.dtype)

    def _kept(self, x: mx.array, neurons: mx.array) -> mx.array:
        """Activations of chosen neurons. x: (n, d), neurons: (K,) -> (n, K)."""
        if self.family.fused:  # one take, one GEMM
            rows = mx.concatenate([neurons, neurons + self.shape[1]])
            gate, up = mx.split(rows_linear(self._inputs()[0], x, rows), 2, axis=-1)
        else:
            gate, up = (rows_linear(m, x, neurons) for m in self._inputs())
        return self.family.combine(gate, up)
