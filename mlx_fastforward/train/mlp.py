"""The paper's compensator, one layer at a time, by layerwise distillation (section 3.3)."""

import math
from pathlib import Path
from typing import Callable

import mlx.core as mx
import mlx.nn as nn

from ..model.ffn import GatedFFN
from ..neurons.compensators import MLPWeights
from .descent import Descent
from .reconstruction import dropped, marked

RATE = 2e-3
BLOCKS = 8  # of a batch
ACTIVATION = "silu"


class MLP(nn.Module):
    """W_c2 silu(W_c1 x) (eq. 20); adds nothing at first."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.w1 = mx.random.normal((d, h)) / math.sqrt(d)
        self.w2 = mx.zeros((h, d))

    def __call__(self, x: mx.array) -> mx.array:
        return nn.silu(x @ self.w1) @ self.w2


def loss(net: nn.Module, x: mx.array, lost: mx.array) -> mx.array:
    """Share of the lost output's energy that remains: eq. 22 over what it is without."""
    error = mx.sum(mx.square(lost - net(x)))
    return error / mx.maximum(mx.sum(mx.square(lost)), 1e-12)


def fit_mlp(
    ffn: GatedFFN,
    scores: Callable[[mx.array], mx.array],
    batch: Callable[[int], tuple[mx.array, mx.array]],
    keep: Callable[[int], int],
    settings: tuple[int, int, int],
    file: Path,
    tick: Callable[[Descent, str], None],
) -> MLPWeights:
    """One layer's compensator; the first half of the steps with the truly best neurons.

    Args:
        ffn: The layer.
        scores: The layer's predictor: (B, N, d) -> (B, f).
        batch: A step's x (B, N, d), and norms (B, f) that tell the truly best neurons.
        keep: How many neurons a step keeps: the levels it serves take turns.
        settings: Hidden units, steps, seed.
        file: Where an unfinished fit is kept.
    """
    hidden, steps, seed = settings
    mx.random.seed(seed)
    down = ffn.down_matrix()

    net = MLP(ffn.shape[0], hidden)
    descent = Descent(net, loss, steps, RATE, file)

    def data(step: int) -> tuple[mx.array, mx.array]:
        x, norms = batch(step)
        ranked = norms if step < descent.steps // 2 else scores(x)
        return x, dropped(ffn, x, marked(ranked, keep(step))) @ down.T

    descent(data, tick)
    return MLPWeights(net.w1, net.w2)
