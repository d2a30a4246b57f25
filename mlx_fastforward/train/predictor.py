"""Fitting the expert predictors of all layers at once, by the weighted BCE of eq. 19.

Layers of fewer neurons than the widest are padded: what is beyond their width has no label and no weight.
"""

import math
from typing import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..neurons.predictor import PredictorWeights, token_features
from ..predictors.file import POOLED, TOKENWISE

RATE = 3e-3


class Predictors(nn.Module):
    """One per layer. ``widths`` are the neurons of each."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)  # which mlx takes for no parameter


class Pooled(Predictors):
    """The paper's predictor (eq. 12-13): an attention-pooled query, then two matrices."""

    kind = POOLED

    def __init__(self, d: int, r: int, widths: Sequence[int]):
        super().__init__(widths)
        layers, f = len(widths), max(widths)
        self.query = mx.random.normal((layers, d)) * 0.02
        self.w1 = mx.random.normal((layers, d, r)) / math.sqrt(d)
        self.w2 = mx.random.normal((layers, r, f)) / math.sqrt(r)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (layers, B, N, d) -> (layers, B, f)."""
        logits = mx.einsum("lbnd,ld->lbn", x, self.query) / math.sqrt(x.shape[-1])
        a = mx.softmax(logits, axis=-1)
        pooled = mx.einsum("lbn,lbnd->lbd", a, x)
        return mx.maximum(pooled @ self.w1, 0) @ self.w2


class TokenWise(Predictors):
    """First matrix and ReLU per token, pooled after it (mean and root mean square)."""

    kind = TOKENWISE

    def __init__(self, d: int, r: int, widths: Sequence[int]):
        super().__init__(widths)
        layers, f = len(widths), max(widths)
        self.w1 = mx.random.normal((layers, d, r)) / math.sqrt(d)
        self.w2 = mx.random.normal((layers, 2 * r, f)) / math.sqrt(2 * r)
        self.bias = mx.zeros((layers, f))

    def __call__(self, x: mx.array) -> mx.array:
        """x: (layers, B, N, d) -> (layers, B, f)."""
        layers, b, n, d = x.shape
        h = mx.maximum(x.reshape(layers, b * n, d) @ self.w1, 0)
        pooled = token_features(h.reshape(layers, b, n, -1))
        return pooled @ self.w2 + self.bias[:, None]


KINDS: dict[str, Callable[[int, int, Sequence[int]], Predictors]] = {
    POOLED: Pooled,
    TOKENWISE: TokenWise,
}


def labels(norms: mx.array, widths: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Labels and weights (section 3.2): 32, 16, 8, 4, 2 for the fifths of the upper half.

    norms: (layers, B, f), of ``widths[layer]`` neurons each and then padding.
    """
    f = mx.array(list(widths), mx.uint32)[:, None, None]
    places = mx.arange(norms.shape[-1], dtype=mx.uint32)
    inside = places < f
    order = mx.argsort(mx.where(inside, -norms, mx.inf), axis=-1)
    rank = mx.put_along_axis(
        order, order, mx.broadcast_to(places, order.shape), axis=-1
    )
    fifth = mx.minimum(rank // mx.maximum(1, f // 10), 4).astype(mx.float32)
    positive = rank < f // 2
    weights = mx.where(positive, mx.power(2.0, 5 - fifth), inside)
    return positive.astype(mx.float32), weights


def loss(net: Predictors, x: mx.array, norms: mx.array) -> mx.array:
    """Eq. 19, mean over layers, blocks and neurons."""
    positive, weights = labels(norms, net.widths)
    total = nn.losses.binary_cross_entropy(
        net(x), positive, weights=weights, with_logits=True, reduction="sum"
    )
    return total / (norms.shape[1] * sum(net.widths))


def weights_of(net: Predictors, layer: int) -> PredictorWeights:
    """One layer's predictor, as a selector runs it."""
    f = net.widths[layer]
    query = net["query"][layer] if "query" in net else None
    bias = net["bias"][layer, :f] if "bias" in net else None
    return PredictorWeights(query, net["w1"][layer], net["w2"][layer, :, :f], bias=bias)
