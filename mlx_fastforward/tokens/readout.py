"""Which tokens of a prompt matter, read from hidden states of the model's first layers.

Their own attention does not know where the answer is. What tells is in their hidden states: a few
fitted heads ask the end of the prompt and find it.
"""

from dataclasses import dataclass

import mlx.core as mx

ASKING = 32  # last tokens of a prompt: the question


@dataclass(frozen=True)
class Readout:
    """Fitted heads over the hidden states of one layer.

    Args:
        layer: How many layers have run.
        heads: Heads of equal width, w in all.
        query, bias, key: (d, w), (w,) and (d, w).
    """

    layer: int
    heads: int
    query: mx.array
    bias: mx.array
    key: mx.array

    def __call__(self, hidden: mx.array) -> mx.array:
        """Shares of the importance, float32. (n, d) -> (n,)."""
        return shares(hidden, self.heads, self.query, self.bias, self.key)


def shares(
    hidden: mx.array, heads: int, query: mx.array, bias: mx.array, key: mx.array
) -> mx.array:
    """Attention of the last tokens over all, by content alone; heads and tokens share one softmax.

    A question token that finds nothing has no say: its products are small.
    """
    n, width = len(hidden), key.shape[1] // heads
    h = mx.fast.rms_norm(hidden, None, 1e-5).astype(key.dtype)
    q = (h[-ASKING:] @ query + bias).reshape(-1, heads, width).transpose(1, 0, 2)
    k = (h @ key).reshape(n, heads, width).transpose(1, 2, 0)
    scores = (q.astype(mx.float32) @ k.astype(mx.float32)) * width**-0.5
    return mx.softmax(mx.logsumexp(scores.reshape(-1, n), axis=0), axis=-1)
