"""Fitting the low-rank compensator in closed form, layer by layer.

A linear fit of a neuron over all tokens makes things worse: a neuron is dropped exactly where it is
small. So each neuron is fitted on the tokens of blocks that drop it, from sums that need no more
memory however many tokens they run over.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.ffn import GatedFFN
from ..neurons.compensators import LowRankWeights, features
from .reconstruction import Blocks, dropped

# A neuron that few blocks drop is drawn towards zero by this many typical blocks.
PRIOR_BLOCKS = 4
SOLVED_AT_ONCE = 1024  # neurons


@dataclass
class Directions:
    """Sums for the rank-k directions of x that tell most about the lost output."""

    xx: mx.array
    xe: mx.array
    x: mx.array
    e: mx.array
    tokens: int = 0

    @classmethod
    def zeros(cls, d: int) -> "Directions":
        return cls(mx.zeros((d, d)), mx.zeros((d, d)), mx.zeros((d,)), mx.zeros((d,)))

    def add(self, x: mx.array, e: mx.array) -> None:
        """x, e: (tokens, d), what goes in and what is lost."""
        self.xx = self.xx + x.T @ x
        self.xe = self.xe + x.T @ e
        self.x, self.e = self.x + mx.sum(x, axis=0), self.e + mx.sum(e, axis=0)
        self.tokens += len(x)
        mx.eval(self.xx, self.xe, self.x, self.e)

    def solve(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Reduced-rank regression of e on x: center (d,), v (d, rank)."""
        n = max(1, self.tokens)
        xx, xe, x, e = (
            np.array(a, np.float64) / n for a in (self.xx, self.xe, self.x, self.e)
        )
        covariance = xx - np.outer(x, x)
        covariance += 1e-4 * np.trace(covariance) / len(x) * np.eye(len(x))
        values, vectors = np.linalg.eigh(covariance)
        root = np.sqrt(np.maximum(values, 1e-12))
        whiten = (vectors / root) @ vectors.T
        left, _, _ = np.linalg.svd(whiten @ (xe - np.outer(x, e)))
        return x, whiten @ left[:, :rank]


def fit_low_rank(ffn: GatedFFN, blocks: Blocks, rank: int) -> LowRankWeights:
    """One layer's compensator.

    Args:
        ffn: The layer.
        blocks: Gives the same (x, kept) pairs each time it is called.
        rank: Directions of x, k = rank + 1 features.
    """
    d, f = ffn.shape
    down = ffn.down_matrix()
    sums = Directions.zeros(d)
    for x, kept in blocks():
        lost = dropped(ffn, x, kept) @ down.T
        sums.add(x.reshape(-1, d), lost.reshape(-1, d))
    center, v = (mx.array(a.astype(np.float32)) for a in sums.solve(min(rank, d)))
    k = v.shape[1] + 1
    gram, moment = mx.zeros((f, k * k)), mx.zeros((f, k))
    total, count = mx.zeros((k * k,)), 0
    for x, kept in blocks():
        phi = features(x, center, v)
        per_block = (phi.swapaxes(-1, -2) @ phi).reshape(len(x), -1)
        gram = gram + (1 - kept).T @ per_block
        z = dropped(ffn, x, kept)
        moment = moment + mx.sum(z.swapaxes(-1, -2) @ phi, axis=0)
        total, count = total + mx.sum(per_block, axis=0), count + len(x)
        mx.eval(gram, moment, total)
    prior = PRIOR_BLOCKS / max(1, count) * total
    u = solve(gram + prior, moment)
    return LowRankWeights(center, v, u)


def solve(gram: mx.array, moment: mx.array) -> mx.array:
    """Normal equations per neuron, in float64. gram: (f, k*k), moment: (f, k) -> (f, k)."""
    f, k = moment.shape
    found = []
    for start in range(0, f, SOLVED_AT_ONCE):
        part = slice(start, start + SOLVED_AT_ONCE)
        g = np.array(gram[part], np.float64).reshape(-1, k, k)
        g += 1e-6 * np.trace(g, axis1=1, axis2=2)[:, None, None] / k * np.eye(k)
        found.append(np.linalg.solve(g, np.array(moment[part], np.float64)[..., None]))
    return mx.array(np.concatenate(found)[..., 0].astype(np.float32))
