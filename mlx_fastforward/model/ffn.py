"""The gated FFN of one layer: dense activations, and the FFN over chosen neurons (eq. 15-18).

Weights are looked up at every call, so LoRA or quantisation applied after attach() are seen.
"""

from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn

from . import linear
from .families import Family
from .gather import Down


@dataclass(frozen=True)
class Estimate:
    """Activations guessed from a few features of the token: z_j is about phi . u_j.

    The FFN puts the guesses in the place of the dropped neurons; kept ones stay exact.

    Args:
        phi: Features of the sparse tokens (M, n, k).
        u: Per neuron (f, k).
    """

    phi: mx.array
    u: mx.array


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
        out, d = linear.shape(self._inputs()[0])
        return d, out // 2 if self.family.fused else out

    @property
    def share(self) -> tuple[int, int]:
        """(rank, processes): which of the equal parts of the neurons is here."""
        return linear.share(self.down)

    def projections(self) -> list[nn.Module]:
        """Gate and up, or both in one, and down."""
        return [*self._inputs(), self.down]

    def unsupported(self) -> Optional[str]:
        """Why this layer cannot be sliced, or None."""
        reasons = (linear.unsupported(m) for m in self.projections())
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
        tag = linear.arrays(self.down)
        if self._norms is None or not linear.same_arrays(self._norms[0], tag):
            self._norms = (tag, linear.column_norms(self.down))
        return self._norms[1]

    def down_matrix(self) -> mx.array:
        """The down projection's weight (d, f), float32, LoRA included."""
        return linear.matrix(self.down)

    def _guessed(self, u: mx.array, dtype: mx.Dtype) -> mx.array:
        """What guesses for all neurons add to the output, per feature. (f, k) -> (k, d).

        Kept until ``u`` or an array of the projection is replaced.
        """
        tag, known = [*linear.arrays(self.down), u], self._guesses
        fresh = known is not None and known[1].dtype == dtype
        if known is None or not fresh or not linear.same_arrays(known[0], tag):
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
            z = self.kept_activations(block, kept)
            if guess is not None:
                z = z - guess.phi[i] @ mx.take(guess.u, kept, axis=0).T.astype(z.dtype)
            out.append(down(z, kept))
        y = mx.stack(out)
        if guess is not None:
            y = y + guess.phi @ self._guessed(guess.u, x.dtype)
        return down.whole(y)

    def kept_activations(self, x: mx.array, neurons: mx.array) -> mx.array:
        """Activations of chosen neurons. x: (n, d), neurons: (K,) -> (n, K)."""
        if self.family.fused:  # one take, one GEMM
            rows = mx.concatenate([neurons, neurons + self.shape[1]])
            gate, up = mx.split(linear.rows(self._inputs()[0], x, rows), 2, axis=-1)
        else:
            gate, up = (linear.rows(m, x, neurons) for m in self._inputs())
        return self.family.combine(gate, up)
