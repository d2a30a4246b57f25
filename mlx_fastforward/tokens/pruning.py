"""Tokens that skip the FFN (FTP): which of the middle stay, how they are taken out and put back.

Head and tail always stay, and every token keeps its keys and values: prompt caches are as whole as
before. How many stay is known before the forward pass is built.
"""

from dataclasses import dataclass
from typing import Optional

import mlx.core as mx

from .plan import Plan, cut

# The first layer's FFN makes of a token what the others work on: nobody skips it
FIRST = 1


@dataclass(frozen=True)
class Kept:
    """An ordered subset of a call's tokens and the way back.

    Args:
        order: Places of the kept tokens in ascending order, then those of the others, (B, L).
        count: How many are kept.
    """

    order: mx.array
    count: int

    def take(self, x: mx.array) -> mx.array:
        """The kept tokens. (B, L, ...) -> (B, count, ...)."""
        return _rows(x, self.order[:, : self.count])

    def others(self, x: mx.array) -> mx.array:
        """(B, L, ...) -> (B, L - count, ...)."""
        return _rows(x, self.order[:, self.count :])

    def put(self, y: mx.array, rest: mx.array) -> mx.array:
        """Outputs of the kept tokens and of the others -> (B, L, ...)."""
        whole = mx.concatenate([y, rest], axis=1)
        return _rows(whole, mx.argsort(self.order, axis=1))


def _rows(x: mx.array, places: mx.array) -> mx.array:
    return x[mx.arange(len(x))[:, None], places]


def survivors(plan: Plan, share: float, block_size: int, unit: int) -> Optional[Plan]:
    """The plan of those who stay when about ``share`` of the middle skips; None where nobody does.

    Args:
        block_size, unit: As for plan_call(): blocks of survivors are as long as blocks of tokens.
    """
    middle = plan.stop - plan.start
    blocks, length = cut(round((1 - share) * middle), block_size, unit)
    if length < 1 or blocks * length >= middle:
        return None
    return Plan(plan.head, blocks, length, plan.tail)


def keep_best(scores: mx.array, plan: Plan, count: int) -> Kept:
    """``count`` tokens of a call: head, tail, and the best of the middle.

    Args:
        scores: Of the middle's tokens (B, m), larger is more wanted.
    """
    stay = count - plan.head - plan.tail
    ranked = mx.argpartition(-scores, stay - 1, axis=-1).astype(mx.uint32) + plan.head
    batch = len(scores)
    head, tail = (
        mx.broadcast_to(mx.arange(start, stop, dtype=mx.uint32), (batch, stop - start))
        for start, stop in ((0, plan.head), (plan.stop, plan.tokens))
    )
    best = mx.sort(ranked[:, :stay], axis=-1)
    return Kept(mx.concatenate([head, best, tail, ranked[:, stay:]], axis=1), count)


def mean_token(x: mx.array, valid: Optional[mx.array]) -> mx.array:
    """The mean of the tokens that are real, float32. (B, n, d), valid (B, n) -> (B, 1, d)."""
    x = x.astype(mx.float32)
    if valid is None:
        return mx.mean(x, axis=1, keepdims=True)
    real = mx.maximum(mx.sum(valid, axis=1), 1)[:, None, None]
    return mx.sum(x * valid[..., None], axis=1, keepdims=True) / real


class Pruner:
    """Scores tokens: who needs the FFN. A new one is these two methods."""

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        """Scores (B, m), larger is more wanted.

        Args:
            x: FFN inputs of the middle's tokens (B, m, d).
            valid: 1 for tokens and 0 for padding (B, m); None where all are real.
        """
        raise NotImplementedError

    def flops(self, tokens: int, d: int) -> float:
        """FLOPs to score so many tokens."""
        raise NotImplementedError


class CentredNorm(Pruner):
    """Who is far from the mean FFN input of the call's middle is no ordinary token.

    It looks at nothing but the layer's own input: a chunk that does not see the question chooses as
    well as the one that does.
    """

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        far = x.astype(mx.float32) - mean_token(x, valid)
        return mx.sum(mx.square(far), axis=-1)

    def flops(self, tokens: int, d: int) -> float:
        return 2.0 * tokens * d
