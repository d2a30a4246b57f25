"""What the FFN loses with the neurons that a block drops, and how much of it is given back."""

from typing import Callable, Iterable

import mlx.core as mx

from ..model.ffn import Estimate, GatedFFN
from ..neurons.compensators import Compensator
from ..neurons.selectors import top_neurons

# (x (B, n, d), kept (B, f)) pairs, kept being 1 for the neurons that a block keeps.
Blocks = Callable[[], Iterable[tuple[mx.array, mx.array]]]


def marked(scores: mx.array, keep: int) -> mx.array:
    """1 for the best ``keep`` of each row, 0 for the others. (M, f) -> (M, f)."""
    chosen = top_neurons(scores, keep)
    return mx.put_along_axis(mx.zeros(scores.shape), chosen, mx.array(1.0), axis=-1)


def hits(scores: mx.array, truth: mx.array, keep: int) -> mx.array:
    """Share of the best ``keep`` neurons of ``truth`` among those of ``scores``. (M, f) -> (M,)."""
    return mx.sum(marked(scores, keep) * marked(truth, keep), axis=-1) / keep


def dropped(ffn: GatedFFN, x: mx.array, kept: mx.array) -> mx.array:
    """Activations of the dropped neurons, 0 for the kept. (B, n, d), (B, f) -> (B, n, f)."""
    return ffn.activations(x).astype(mx.float32) * (1 - kept)[:, None]


def error_left(
    ffn: GatedFFN,
    compensator: Compensator,
    layer: int,
    blocks: Iterable[tuple[mx.array, mx.array]],
) -> float:
    """Share of the lost output's energy that remains: 1 without a compensator, 0 at best."""
    down = ffn.down_matrix()
    before = after = mx.array(0.0)
    for x, kept in blocks:
        lost = dropped(ffn, x, kept) @ down.T
        back = compensator(layer, x)
        if isinstance(back, Estimate):
            back = ((back.phi @ back.u.T) * (1 - kept)[:, None]) @ down.T
        before = before + mx.sum(mx.square(lost))
        after = after + mx.sum(mx.square(lost - back))
        mx.eval(before, after)
    return float(after) / max(float(before), 1e-12)
