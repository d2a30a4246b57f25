"""Which FFNs of a model can run sparsely: proven on the modules themselves, not looked up by name.

A module's own call is its activation function: it is run with given outputs in the place of the gate's
and up's products. What it does with them may be anything (SiLU, GELU, clipped, relu squared, gated or
not), as long as every neuron is by itself. No weight is touched: a lazily loaded model stays on disk.
"""

import math
from typing import Any, NamedTuple, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UnsupportedModel
from . import linear
from .families import Found, Layout, found_ffns, layout_of, model_type
from .ffn import ORDERS, GatedFFN, Order, Shell

WORTH = 0.15  # of the FFN FLOPs: what is saved of less nobody would notice
NEURONS = 24


class Reach(NamedTuple):
    """What of a model can run sparsely.

    ffns: In order; usually one per layer. A layer of experts has its shared expert here, or nothing.
    share: Their part of a prompt's FFN FLOPs; routed experts count as they run.
    odd: Which FFNs stay dense though all tokens share them, in words.
    """

    ffns: list[GatedFFN]
    share: float
    odd: Optional[str]


def reach(model: nn.Module) -> Reach:
    """Find and prove a model's FFNs; raises UnsupportedModel."""
    found = found_ffns(model)
    ffns = _proven(found)
    proven = {id(ffn.mlp) for ffn in ffns}
    flops = [ffn_weights(f) for f in found]
    within = sum(n for n, f in zip(flops, found) if id(f.module) in proven)
    share = within / max(1, sum(flops))
    odd = _odd([f for f in found if not f.experts and id(f.module) not in proven])
    why = None
    if not found:
        why = "no FFN was found in its layers"
    elif not ffns:
        why = odd or "all of its FFNs are routed experts"
    elif share < WORTH:
        why = f"only {share:.0%} of its FFN FLOPs can run sparsely, which saves too little"
    if why is not None:
        raise UnsupportedModel(
            f"model type {model_type(model)!r} is not supported: {why}."
        )
    return Reach(ffns, share, odd)


def _odd(found: list[Found]) -> Optional[str]:
    if not found:
        return None
    names = ", ".join(sorted({type(f.module).__name__ for f in found}))
    return f"FFNs whose neurons do not work each by itself: {len(found)} ({names})"


def _proven(found: list[Found]) -> list[GatedFFN]:
    """One proof for all modules of a class that have the same settings."""
    known: dict[str, Optional[Order]] = {}
    ffns = []
    for f in (f for f in found if not f.experts):
        if (kind := _kind(f.module)) not in known:
            known[kind] = order_of(f.module, f.layout)
        if (order := known[kind]) is not None:
            ffns.append(GatedFFN(f.module, f.layout, order, layer=f.layer))
    return ffns


def _kind(module: nn.Module) -> str:
    """All that may tell a module's code apart from another's, but for weights."""
    modules = [module, *module.children().values()]
    return repr([(type(m), sorted(_settings(m))) for m in modules])


def _settings(module: Any) -> list[tuple[str, str]]:
    """Plain attributes; weights and modules are kept elsewhere."""
    return [(k, repr(v)) for k, v in vars(module).items() if not k.startswith("_")]


def ffn_of(module: nn.Module, strategy: str = "chunk") -> Optional[GatedFFN]:
    """A module as an FFN of which neurons can be taken, or None where it is none."""
    layout = layout_of(module)
    order = None if layout is None else order_of(module, layout)
    if layout is None or order is None:
        return None
    return GatedFFN(module, layout, order, strategy)


def order_of(module: nn.Module, layout: Layout) -> Optional[Order]:
    """Which rows belong to a neuron, where every neuron works by itself; else None."""
    rows = linear.shape(module[layout.inputs[0]])[0]
    neurons = linear.shape(module[layout.down])[1]
    for order in ORDERS.get(rows // neurons, []) if rows % neurons == 0 else []:
        if proven(Shell(module, layout), order, rows // neurons):
            return order
    return None


def proven(shell: Shell, order: Order, rows: int) -> bool:
    """Whether a module's activations are those of its neurons, each by itself.

    Chosen neurons alone must get what they get among all. Outputs go far enough for clipping to show.
    """
    random = np.random.default_rng(0)
    spread = random.normal(size=(2, 1, 3, NEURONS * rows)) * [[[[1], [4], [40]]]]
    outputs = list(mx.array(spread.astype(np.float32)))
    chosen = mx.array(random.permutation(NEURONS)[: NEURONS // 3])
    try:
        z = shell(outputs)
        alone = shell([x[..., order(chosen, NEURONS)] for x in outputs])
        return bool(mx.allclose(alone, z[..., chosen], 1e-5, 1e-5))
    except Exception:  # what a module's code raises on stand-ins says no more than no
        return False


def ffn_weights(found: Found) -> float:
    """Weights that a token meets in an FFN."""
    weights = [found.module[n] for n in (*found.layout.inputs, found.layout.down)]
    return max(1, found.experts) * sum(math.prod(linear.shape(w)) for w in weights)
