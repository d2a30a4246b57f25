"""The FFN of one layer: dense activations, and the FFN over chosen neurons (eq. 15-18).

Weights are looked up at every call, so LoRA or quantisation applied after attach() are seen.
"""

import copy
import operator
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn

from . import linear
from .families import Layout
from .gather import Down

PACKAGE = "mlx_fastforward"


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


class Shell:
    """A module's own call as the activation function of its neurons.

    The call gets the outputs of the input projections, and what it hands to the down projection is Z.
    Anything else that it does with its input or its output raises.
    """

    def __init__(self, mlp: nn.Module, layout: Layout):
        self.twin: Any = copy.copy(mlp)
        own = (c for c in type(mlp).__mro__ if not c.__module__.startswith(PACKAGE))
        self.twin.__class__ = next(own)  # an attached module's own, too
        self.twin.__dict__.pop("_fastforward", None)
        for i, name in enumerate(layout.inputs):
            self.twin[name] = operator.itemgetter(i)
        self.twin[layout.down] = _Activations

    def __call__(self, outputs: Sequence[mx.array]) -> mx.array:
        """Outputs (..., f), or (..., 2 f) where gate and up share one -> Z (..., f)."""
        z: _Activations = self.twin(_Outputs(outputs))
        return z.value


class _Outputs:
    """Stands for the input x, of which an activation needs no more than its dtype."""

    def __init__(self, outputs: Sequence[mx.array]):
        self.outputs, self.dtype = outputs, outputs[0].dtype

    def __getitem__(self, i: int) -> mx.array:
        return self.outputs[i]


@dataclass
class _Activations:
    """Stands for the output."""

    value: mx.array


def single(neurons: mx.array, f: int) -> mx.array:
    return neurons


def halves(neurons: mx.array, f: int) -> mx.array:
    return mx.concatenate([neurons, neurons + f])


def pairs(neurons: mx.array, f: int) -> mx.array:
    return (2 * neurons[:, None] + mx.arange(2, dtype=neurons.dtype)).flatten()


Order = Callable[[mx.array, int], mx.array]  # rows of a projection that neurons need
ORDERS: dict[int, list[Order]] = {1: [single], 2: [halves, pairs]}  # by rows per neuron


class GatedFFN:
    """One layer's FFN: Y = down(act(gate(X)) * up(X)), or Y = down(act(up(X))).

    Args:
        mlp: A module that proof.py has found to be one.
        order: Which rows of the input projections belong to a neuron.
        layer: Of the model, where this FFN is.
        unpack: Calls of at least so many tokens dequantise packed weights first; 0: never.
        half: Those calls compute in float16.
    """

    def __init__(
        self,
        mlp: nn.Module,
        layout: Layout,
        order: Order,
        strategy: str = "chunk",
        layer: int = 0,
        unpack: int = 0,
        half: bool = False,
    ):
        self.mlp = mlp
        self.layout = layout
        self.order = order
        self.strategy = strategy
        self.layer = layer
        self.unpack = unpack
        self.half = half
        self._activation = Shell(mlp, layout)
        self._stored: dict[str, Any] = {}
        self._norms: Optional[tuple[list[Any], mx.array]] = None
        self._guesses: Optional[tuple[list[Any], mx.array]] = None

    def under(self, strategy: str, unpack: int = 0, half: bool = False) -> "GatedFFN":
        """The same with other ways to take columns of the down projection, and to multiply."""
        parts = (self.mlp, self.layout, self.order)
        return GatedFFN(*parts, strategy, self.layer, unpack, half)

    @property
    def down(self) -> nn.Module:
        return getattr(self.mlp, self.layout.down)

    def _inputs(self) -> list[nn.Module]:
        return [getattr(self.mlp, name) for name in self.layout.inputs]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, f): hidden size and number of neurons."""
        return linear.shape(self._inputs()[0])[1], linear.shape(self.down)[1]

    @property
    def products(self) -> int:
        """Matrix products of d x f: three, or two without a gate."""
        rows = sum(linear.shape(m)[0] for m in self._inputs())
        return 1 + rows // self.shape[1]

    @property
    def share(self) -> tuple[int, int]:
        """(rank, processes): which of the equal parts of the neurons is here."""
        return linear.share(self.down)

    def projections(self) -> list[nn.Module]:
        """Gate and up, or both in one, or up alone; and down."""
        return [*self._inputs(), self.down]

    def unsupported(self) -> Optional[str]:
        """Why this layer cannot be sliced, or None."""
        reasons = (linear.unsupported(m) for m in self.projections())
        return next((r for r in reasons if r), None)

    def activations(self, x: mx.array) -> mx.array:
        """Z of every neuron. x: (..., d) -> (..., f)."""
        return self._activation([m(x) for m in self._inputs()])

    def activations_and_output(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Z and the dense FFN's output. x: (B, T, d) -> (B, T, f), (B, T, d).

        T may be 0, which mlx's quantised matmul on the CPU does not survive.
        """
        if x.shape[1] == 0:
            return mx.zeros((*x.shape[:2], self.shape[1]), x.dtype), x
        if not self.unpacks(x.shape[1]):
            z = self.activations(x)
            return z, self.down(z)
        fast = self._as_multiplied(x)
        z = self._activation([linear.unpacked(m, fast) for m in self._inputs()])
        return z.astype(x.dtype), linear.unpacked(self.down, z).astype(x.dtype)

    @property
    def packed(self) -> bool:
        """Whether any of its weights can be dequantised first."""
        return any(linear.is_packed(m) for m in self.projections())

    def unpacks(self, tokens: int) -> bool:
        """Whether packed weights are dequantised first for so many tokens."""
        return 0 < self.unpack <= tokens

    def _as_multiplied(self, x: mx.array) -> mx.array:
        return x.astype(mx.float16) if self.half else x

    def finite(self, tokens: int, run: Callable[[], mx.array]) -> mx.array:
        """What ``run`` makes of so many tokens with this FFN.

        Where float16 overflows it runs again in the model's own dtype, which is kept from then on.
        Waits for the device where float16 is used.
        """
        y = run()
        if self.half and self.unpacks(tokens) and not mx.all(mx.isfinite(y)).item():
            self.half = False
            y = run()
        return y

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
        unpack = self.unpacks(x.shape[0] * x.shape[1])
        fast = self._as_multiplied(x) if unpack else x
        down = Down(self.down, fast.dtype, self.strategy, self._stored)
        out: list[mx.array] = []
        for i, (block, kept) in enumerate(zip(fast, neurons)):
            if out:  # one block's gathered weights at a time, whatever the scheduler
                kept = mx.depends([kept], [out[-1]])[0]
            z = self.kept_activations(block, kept, unpack)
            if guess is not None:
                guessed = guess.phi[i] @ mx.take(guess.u, kept, axis=0).T
                z = z - guessed.astype(z.dtype)
            out.append(down(z, kept))
        y = mx.stack(out).astype(x.dtype)
        if guess is not None:
            y = y + guess.phi @ self._guessed(guess.u, x.dtype)
        return down.whole(y)

    def kept_activations(
        self, x: mx.array, neurons: mx.array, unpack: bool = False
    ) -> mx.array:
        """Activations of chosen neurons. x: (n, d), neurons: (K,) -> (n, K)."""
        chosen = self.order(neurons, self.shape[1])
        inputs = self._inputs()
        return self._activation([linear.rows(m, x, chosen, unpack) for m in inputs])
