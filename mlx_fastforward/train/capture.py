"""FFN inputs of a model, and how much each neuron fires, taken on the way through it."""

import contextlib
from typing import Any, Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from ..families import family_of, layer_mlps
from ..ffn import GatedFFN

SCORES = ("relative", "weighted", "plain")


def ffns_of(model: nn.Module) -> list[GatedFFN]:
    """The FFNs that a prefill runs sparsely: all but the last."""
    family = family_of(model)
    return [GatedFFN(mlp, family) for mlp in layer_mlps(model, family)][:-1]


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


@contextlib.contextmanager
def tapped(model: nn.Module, tap: Callable[[int, mx.array], None]) -> Iterator[None]:
    """Call ``tap(layer, x)`` with the input of every FFN but the last."""
    mlps = layer_mlps(model, family_of(model))
    number = {id(mlp): i for i, mlp in enumerate(mlps[:-1])}

    def call(self: Any, x: mx.array) -> mx.array:
        if id(self) in number:
            tap(number[id(self)], x)
        return type(self).__bases__[0].__call__(self, x)

    own = type(mlps[0])
    watched = type(f"Tapped{own.__name__}", (own,), {"__call__": call})
    try:
        for mlp in mlps:
            mlp.__class__ = watched
        yield
    finally:
        for mlp in mlps:
            mlp.__class__ = own


def capture(
    model: nn.Module, ids: mx.array, block: int, score: str
) -> tuple[mx.array, mx.array]:
    """One sequence through the model -> x (layers, blocks, N, d) and norms (layers, blocks, f).

    Both float16. Tokens that fill no block are left out. An attached model is taken as it runs:
    sparsely, inside ``engine.prompt``.
    """
    ffns = ffns_of(model)
    xs: list[mx.array] = []
    norms: list[mx.array] = []

    def tap(layer: int, x: mx.array) -> None:
        whole = x.shape[1] // block * block
        blocks = x[0, :whole].reshape(-1, block, x.shape[-1])
        found = block_norms(ffns[layer], blocks, score)
        mx.eval(blocks, found)  # layer by layer: no layer's activations outlive it
        xs.append(blocks.astype(mx.float16))
        norms.append(found.astype(mx.float16))

    with tapped(model, tap):
        model(ids[None])
    return mx.stack(xs), mx.stack(norms)
