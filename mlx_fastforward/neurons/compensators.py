"""What is added back for the neurons that a block dropped."""

from dataclasses import dataclass, replace
from typing import Any, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from ..model.ffn import Estimate
from .predictor import columns

ACTIVATIONS = {"relu": nn.relu, "silu": nn.silu, "gelu": nn.gelu}


class Compensator:
    """Gives back what dropped neurons would have added. A new one is a name and two methods.

    name: as in --compensators of eval.
    """

    name = ""
    layers: Sequence[Any] = ()

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        """What to add to the sparse FFN's output (M, n, d), or guesses for the dropped neurons.

        Args:
            x: FFN inputs (M, n, d) of the tokens that ran sparsely.
        """
        raise NotImplementedError

    def part(self, rank: int, size: int) -> "Compensator":
        """What one of ``size`` processes needs, for its own neurons."""
        return self

    def flops(self, layer: int, tokens: int, d: int, keep: int) -> float:
        """FLOPs for this many tokens, with this many neurons kept."""
        raise NotImplementedError


@dataclass(frozen=True)
class MLPWeights:
    """One layer's compensator: w1 (d, h), w2 (h, d)."""

    w1: mx.array
    w2: mx.array


class MLPCompensator(Compensator):
    """The paper's error compensator, W_c2 act(W_c1 X) (eq. 20-21)."""

    name = "mlp"

    def __init__(self, layers: Sequence[MLPWeights], activation: str = "relu"):
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"compensator activation must be one of {', '.join(ACTIVATIONS)}; "
                f"got {activation!r}."
            )
        self.layers = layers
        self.activation = activation

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        w = self.layers[layer]
        act = ACTIVATIONS[self.activation]
        return (act(x.astype(w.w1.dtype) @ w.w1) @ w.w2).astype(x.dtype)

    def flops(self, layer: int, tokens: int, d: int, keep: int) -> float:
        return 4.0 * tokens * d * self.layers[layer].w1.shape[1]


@dataclass(frozen=True)
class LowRankWeights:
    """One layer's low-rank compensator, with k = rank + 1 features [1, (x - center) V].

    center (d,), v (d, rank), u (f, k): activations of dropped neurons from the features.
    """

    center: mx.array
    v: mx.array
    u: mx.array


def features(x: mx.array, center: mx.array, v: mx.array) -> mx.array:
    """phi = [1, (x - center) V]. (M, n, d) -> (M, n, k)."""
    h = (x - center) @ v
    return mx.concatenate([mx.ones((*h.shape[:-1], 1), h.dtype), h], axis=-1)


class LowRankCompensator(Compensator):
    """Dropped neurons are replaced by linear guesses from a few directions of x; it knows the mask.

    y = W U phi + W_S (z_S - U_S phi), phi = [1, V (x - m)]: kept neurons stay exact. The guess of a
    neuron is fitted on tokens of blocks that drop it, where it is small. W is the model's own, so
    one fit serves all of its quantisations.
    """

    name = "low-rank"

    def __init__(self, layers: Sequence[LowRankWeights]):
        self.layers = layers

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        w = self.layers[layer]
        phi = features(x.astype(w.v.dtype), w.center, w.v)
        return Estimate(phi.astype(x.dtype), w.u)

    def part(self, rank: int, size: int) -> Compensator:
        return LowRankCompensator(
            [replace(w, u=columns(w.u.T, rank, size).T) for w in self.layers]
        )

    def flops(self, layer: int, tokens: int, d: int, keep: int) -> float:
        k = self.layers[layer].u.shape[1]
        return 2.0 * tokens * ((2 * k - 1) * d + k * keep)
