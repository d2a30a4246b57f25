"""FFN inputs of a model, and how much each neuron fires, taken on the way through it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attachment import watched
from ..model.families import prefilled
from ..model.ffn import GatedFFN
from ..model.proof import reach

SCORES = ("relative", "weighted", "plain")


def ffns_of(model: nn.Module) -> list[GatedFFN]:
    """The FFNs that a prefill runs."""
    return list(prefilled(reach(model).ffns))


def block_norms(ffn: GatedFFN, x: mx.array, score: str) -> mx.array:
    """How much each neuron fires in each block. x: (blocks, N, d) -> (blocks, f), float32.

    "plain": ||z_j||. "weighted": times the norm of its down column. "relative": the same with every
    token's neurons scaled to norm 1, so that quiet tokens, such as names and digits, count too.
    """
    z = ffn.activations(x).astype(mx.float32)
    if score != "plain":
        z = z * ffn.down_norms()
    if score == "relative":
        z = z / mx.maximum(mx.linalg.norm(z, axis=-1, keepdims=True), 1e-6)
    return mx.sqrt(mx.sum(mx.square(z), axis=-2))


def capture(
    model: nn.Module, ids: mx.array, block: int, score: str
) -> tuple[mx.array, mx.array]:
    """One sequence through the model -> x (layers, blocks, N, d) and norms (layers, blocks, f).

    Both float16; f is the widest layer's, norms of others are padded with zeros. Tokens that fill no block are left out. An attached model is taken as it runs:
    sparsely, inside ``reading``.
    """
    ffns = ffns_of(model)
    widest = max(ffn.shape[1] for ffn in ffns)
    xs: list[mx.array] = []
    norms: list[mx.array] = []

    def keep(layer: int, own: Any, x: mx.array) -> mx.array:
        whole = x.shape[1] // block * block
        blocks = x[0, :whole].reshape(-1, block, x.shape[-1])
        found = block_norms(ffns[layer], blocks, score)
        mx.eval(blocks, found)  # layer by layer: no layer's activations outlive it
        xs.append(blocks.astype(mx.float16))
        padding = [(0, 0), (0, widest - found.shape[1])]
        norms.append(mx.pad(found.astype(mx.float16), padding))
        return own(x)

    with watched([ffn.mlp for ffn in ffns], keep):
        model(ids[None])
    return mx.stack(xs), mx.stack(norms)
