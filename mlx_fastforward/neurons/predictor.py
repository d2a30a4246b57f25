"""The expert predictor of one layer: which neurons will a block of tokens need? (eq. 12-13)"""

import math
from dataclasses import dataclass, replace
from typing import Any, Optional

import mlx.core as mx

from ..errors import ConfigError

QUANTIZATION_BITS = (4, 8)


def group_size(f: int) -> int:
    """Neurons that share a scale in a quantised w2; 0 where f allows none."""
    return next((g for g in (64, 32) if f % g == 0), 0)


@dataclass(frozen=True)
class PredictorWeights:
    """One layer's expert predictor.

    Pooled, the paper's (eq. 12-13): query (d,), w1 (d, r), w2 (r, f). Token-wise, without a query:
    w1 (d, r), w2 (2r, f), bias (f,). With ``bits`` w2 is packed along the neurons, and has scales
    and biases.
    """

    query: Optional[mx.array]
    w1: mx.array
    w2: mx.array
    scales: Optional[mx.array] = None
    biases: Optional[mx.array] = None
    bits: int = 0
    bias: Optional[mx.array] = None

    def __call__(self, x: mx.array, valid: Optional[mx.array] = None) -> mx.array:
        """Scores of all neurons. x: (M, N, d), valid: (M, N), 0 hides a token -> (M, f)."""
        if self.query is None:
            hidden = token_features(mx.maximum(x @ self.w1, 0), valid)
        else:
            hidden = mx.maximum(self._pooled(x, valid) @ self.w1, 0)
        scores = self._matmul(hidden)
        return scores if self.bias is None else scores + self.bias

    def _pooled(self, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        """softmax(q X^T / sqrt(d)) X (eq. 12)."""
        assert self.query is not None
        logits = (x @ self.query) / math.sqrt(x.shape[-1])
        if valid is not None:
            logits = mx.where(valid > 0, logits, -mx.inf)
        attention = mx.softmax(logits, axis=-1, precise=True)
        return (attention[:, None, :] @ x)[:, 0]

    def _matmul(self, hidden: mx.array) -> mx.array:
        hidden = hidden.astype(self.w1.dtype)
        if not self.bits:
            return hidden @ self.w2
        assert self.scales is not None
        return mx.quantized_matmul(
            hidden,
            self.w2,
            scales=self.scales,
            biases=self.biases,
            transpose=False,
            group_size=self.w2.shape[1] * 32 // self.bits // self.scales.shape[1],
            bits=self.bits,
        )

    def part(self, rank: int, size: int) -> "PredictorWeights":
        """What one of ``size`` processes needs, for its own neurons."""
        names = ["w2", "scales", "biases", "bias"]
        found = {n: getattr(self, n) for n in names}
        cut: Any = {
            n: columns(w, rank, size) for n, w in found.items() if w is not None
        }
        return replace(self, **cut)

    def flops(self, block: int, d: int, f: int) -> float:
        r = self.w1.shape[1]
        if self.query is None:
            return 2.0 * block * d * r + 4.0 * r * f
        return 4.0 * block * d + 2.0 * r * (d + f)


def columns(w: mx.array, rank: int, size: int) -> mx.array:
    """One of ``size`` equal parts of the last axis; ConfigError where there is none."""
    n, rest = divmod(w.shape[-1], size)
    if rest:
        raise ConfigError(
            f"the predictor file's weights cannot be shared by {size} processes: {w.shape[-1]} "
            "groups of neurons; use --predictor none."
        )
    return mx.contiguous(w[..., rank * n : (rank + 1) * n])


def token_features(h: mx.array, valid: Optional[mx.array] = None) -> mx.array:
    """Mean and root mean square of hidden units over a block's tokens. (..., N, r) -> (..., 2r).

    Neurons fire on single tokens: pooling after the non-linearity keeps what an average of the
    inputs loses.
    """
    h = h.astype(mx.float32)
    if valid is None:
        mean, square = mx.mean(h, axis=-2), mx.mean(mx.square(h), axis=-2)
    else:
        share = (valid / mx.sum(valid, axis=-1, keepdims=True))[..., None]
        mean, square = mx.sum(h * share, axis=-2), mx.sum(mx.square(h) * share, axis=-2)
    return mx.concatenate([mean, mx.sqrt(square + 1e-6)], axis=-1)


PREDICTED = 128  # tokens that a predictor looks at together


def parts(block: int) -> int:
    """Into how many equal parts of about 128 tokens a block is cut for the predictor."""
    divisors = [p for p in range(1, 2 + 2 * block // PREDICTED) if block % p == 0]
    return min(divisors, key=lambda p: abs(math.log(block / p / PREDICTED)))
