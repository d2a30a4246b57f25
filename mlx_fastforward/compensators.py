"""What is added back for the neurons that a block dropped."""

from dataclasses import dataclass
from typing import Protocol, Sequence

import mlx.core as mx
import mlx.nn as nn

from .config import ConfigError

ACTIVATIONS = {"relu": nn.relu, "silu": nn.silu, "gelu": nn.gelu}


class Compensator(Protocol):
    def __call__(self, layer: int, x: mx.array, neurons: mx.array) -> mx.array:
        """What to add to the sparse FFN's output.

        Args:
            x: FFN inputs (M, n, d) of the tokens that ran sparsely.
            neurons: The neurons kept (M, K), for compensators that know the mask.

        Returns:
            (M, n, d).
        """
        ...

    def flops(self, tokens: int, d: int) -> float:
        """FLOPs for this many tokens."""
        ...


@dataclass(frozen=True)
class MLPWeights:
    """One layer's compensator: w1 (d, h), w2 (h, d)."""

    w1: mx.array
    w2: mx.array


class MLPCompensator:
    """The paper's error compensator, W_c2 act(W_c1 X) (eq. 20-21)."""

    def __init__(self, layers: Sequence[MLPWeights], activation: str = "relu"):
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"compensator activation must be one of {', '.join(ACTIVATIONS)}; "
                f"got {activation!r}."
            )
        self.layers = layers
        self.activation = activation

    def __call__(self, layer: int, x: mx.array, neurons: mx.array) -> mx.array:
        w = self.layers[layer]
        act = ACTIVATIONS[self.activation]
        return (act(x.astype(w.w1.dtype) @ w.w1) @ w.w2).astype(x.dtype)

    def flops(self, tokens: int, d: int) -> float:
        ranks = [w.w1.shape[1] for w in self.layers]
        return 4.0 * tokens * d * sum(ranks) / len(ranks)
