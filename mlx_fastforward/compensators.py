"""What is added back for the neurons that a block dropped."""

from dataclasses import dataclass
from typing import Protocol, Sequence

import mlx.core as mx
import mlx.nn as nn

from .config import ConfigError

ACTIVATIONS = {"relu": nn.relu, "silu": nn.silu, "gelu": nn.gelu}


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


class Compensator(Protocol):
    """What the engine asks of a compensator. name: as in --compensator."""

    name: str

    def __call__(self, layer: int, x: mx.array) -> mx.array | Estimate:
        """What to add to the sparse FFN's output (M, n, d), or guesses for the dropped neurons.

        Args:
            x: FFN inputs (M, n, d) of the tokens that ran sparsely.
        """
        ...

    def flops(self, tokens: int, d: int, keep: int) -> float:
        """FLOPs for this many tokens, with this many neurons kept."""
        ...


@dataclass(frozen=True)
class MLPWeights:
    """One layer's compensator: w1 (d, h), w2 (h, d)."""

    w1: mx.array
    w2: mx.array


class MLPCompensator:
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

    def flops(self, tokens: int, d: int, keep: int) -> float:
        ranks = [w.w1.shape[1] for w in self.layers]
        return 4.0 * tokens * d * sum(ranks) / len(ranks)


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


class LowRankCompensator:
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

    def flops(self, tokens: int, d: int, keep: int) -> float:
        k = sum(w.u.shape[1] for w in self.layers) / len(self.layers)
        return 2.0 * tokens * ((2 * k - 1) * d + k * keep)
