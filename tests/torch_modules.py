"""The trained parts in PyTorch, written from the equations; nothing imports the package.

A ``Network``'s state dict is what ``mlx_fastforward convert`` reads without any options:

    layers.{i}.predictor.query          (d,)
    layers.{i}.predictor.w1.weight      (r, d), as a Linear stores it
    layers.{i}.predictor.w2.weight      (f, r)
    layers.{i}.compensator.w1.weight    (h, d)
    layers.{i}.compensator.w2.weight    (d, h)
    importance                          (layers,), optional
"""

import math
from typing import Callable, Optional, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


class Predictor(nn.Module):
    """Which neurons a block needs (eq. 12-13): s = ReLU(a W1) W2, a = softmax(q X^T / sqrt(d)) X."""

    def __init__(self, d: int, r: int, f: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(d))
        self.w1 = nn.Linear(d, r, bias=False)
        self.w2 = nn.Linear(r, f, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blocks (..., tokens, d) -> a score for every neuron (..., f)."""
        weights = torch.softmax(x @ self.query / math.sqrt(x.shape[-1]), dim=-1)
        pooled = (weights[..., None, :] @ x)[..., 0, :]
        return self.w2(torch.relu(self.w1(pooled)))


class Compensator(nn.Module):
    """What is added for the neurons that were dropped (eq. 20-21): W_c2 act(W_c1 x)."""

    def __init__(self, d: int, h: int, activation: str = "relu"):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.w1 = nn.Linear(d, h, bias=False)
        self.w2 = nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d) -> (..., d)."""
        return self.w2(self.act(self.w1(x)))


class Layer(nn.Module):
    """The trained parts of one FFN."""

    def __init__(self, predictor: Predictor, compensator: Compensator):
        super().__init__()
        self.predictor = predictor
        self.compensator = compensator


class Network(nn.Module):
    """All layers of a model, and s_l of eq. 23 where it was measured."""

    importance: Optional[Tensor]

    def __init__(
        self, layers: Sequence[Layer], importance: Optional[Sequence[float]] = None
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        values = None if importance is None else torch.tensor(importance)
        self.register_buffer("importance", values)


def trained(
    layers: int, d: int, f: int, r: int, h: int, seed: int = 0
) -> dict[str, Tensor]:
    """The state dict of random weights, with importances 1, 2, 3, ..."""
    torch.manual_seed(seed)
    parts = [Layer(Predictor(d, r, f), Compensator(d, h)) for _ in range(layers)]
    return Network(parts, [i + 1.0 for i in range(layers)]).state_dict()
