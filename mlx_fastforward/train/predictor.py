"""Fitting the expert predictors of all layers at once, by the weighted BCE of eq. 19."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..neurons.predictor import PredictorWeights, token_features
from ..predictors.file import POOLED, TOKENWISE

RATE = 3e-3


class Pooled(nn.Module):
    """The paper's predictor (eq. 12-13): an attention-pooled query, then two matrices."""

    kind = POOLED

    def __init__(self, layers: int, d: int, r: int, f: int):
        super().__init__()
        self.query = mx.random.normal((layers, d)) * 0.02
        self.w1 = mx.random.normal((layers, d, r)) / math.sqrt(d)
        self.w2 = mx.random.normal((layers, r, f)) / math.sqrt(r)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (layers, B, N, d) -> (layers, B, f)."""
        logits = mx.einsum("lbnd,ld->lbn", x, self.query) / math.sqrt(x.shape[-1])
        a = mx.softmax(logits, axis=-1)
        pooled = mx.einsum("lbn,lbnd->lbd", a, x)
        return mx.maximum(pooled @ self.w1, 0) @ self.w2


class TokenWise(nn.Module):
    """First matrix and ReLU per token, pooled after it (mean and root mean square)."""

    kind = TOKENWISE

    def __init__(self, layers: int, d: int, r: int, f: int):
        super().__init__()
        self.w1 = mx.random.normal((layers, d, r)) / math.sqrt(d)
        self.w2 = mx.random.normal((layers, 2 * r, f)) / math.sqrt(2 * r)
        self.bias = mx.zeros((layers, f))

    def __call__(self, x: mx.array) -> mx.array:
        """x: (layers, B, N, d) -> (layers, B, f)."""
        layers, b, n, d = x.shape
        h = mx.maximum(x.reshape(layers, b * n, d) @ self.w1, 0)
        pooled = token_features(h.reshape(layers, b, n, -1))
        return pooled @ self.w2 + self.bias[:, None]


KINDS: dict[str, Any] = {POOLED: Pooled, TOKENWISE: TokenWise}


def labels(norms: mx.array) -> tuple[mx.array, mx.array]:
    """Labels and weights (section 3.2): 32, 16, 8, 4, 2 for the fifths of the upper half."""
    f = norms.shape[-1]
    order = mx.argsort(-norms, axis=-1)
    places = mx.broadcast_to(mx.arange(f, dtype=mx.uint32), order.shape)
    rank = mx.put_along_axis(order, order, places, axis=-1)
    fifth = mx.minimum(rank // max(1, f // 10), 4).astype(mx.float32)
    positive = rank < f // 2
    return positive.astype(mx.float32), mx.where(
        positive, mx.power(2.0, 5 - fifth), 1.0
    )


def loss(net: nn.Module, x: mx.array, norms: mx.array) -> mx.array:
    """Eq. 19, mean over layers, blocks and neurons."""
    positive, weights = labels(norms)
    return nn.losses.binary_cross_entropy(
        net(x), positive, weights=weights, with_logits=True, reduction="mean"
    )


def weights_of(net: nn.Module, layer: int) -> PredictorWeights:
    """One layer's predictor, as a selector runs it."""
    query = net["query"][layer] if "query" in net else None
    bias = net["bias"][layer] if "bias" in net else None
    return PredictorWeights(query, net["w1"][layer], net["w2"][layer], bias=bias)
