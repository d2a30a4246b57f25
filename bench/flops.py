"""What a prompt costs in FLOPs, by every method at once: neurons, tokens that skip FFNs, tokens not read."""

from dataclasses import dataclass, replace
from typing import Optional

import mlx.nn as nn

from ..engine import Engine
from ..model.families import (
    Heads,
    Mixer,
    found_ffns,
    layer_norm_weights,
    mixers,
)
from ..model.proof import ffn_weights
from ..scorers import DraftScorer, LayersScorer, Scorer
from ..tokens.flops import FlopCount, ideal_speedup, other_than_ffn
from ..tokens.speculative import KeepConfig


@dataclass(frozen=True)
class Cost:
    """Of one prompt.

    ffn: FLOPs of the model's own FFNs. speedup: stock's FLOPs of the whole prefill over all that ran,
    the scoring too: what arithmetic allows.
    """

    ffn: FlopCount
    speedup: float


def cost(
    model: nn.Module,
    engine: Engine,
    tokens: int,
    scorer: Optional[Scorer] = None,
    read: Optional[int] = None,
    layers: Optional[list[Mixer]] = None,
) -> Cost:
    """The cost of a prompt of so many tokens.

    Args:
        scorer: Says which tokens are read, and reads them all itself.
        read: How many the model reads; None: all, and nobody scores them.
        layers: mixers() of the whole model, where only some of its layers are here.
    """
    layers, heads = layers or mixers(model), _heads(model, engine)
    if scorer is None or read is None:
        ffn = engine.counted(tokens)
        return Cost(ffn, ideal_speedup(layers, heads, tokens, ffn))
    below = scorer.layers if isinstance(scorer, LayersScorer) else 0
    ran = engine.counted(read, below).run
    engine.count(whole := FlopCount(), 1, tokens, None)
    engine.count(above := FlopCount(), 1, tokens, None, below)
    ffn = FlopCount(whole.dense, ran + whole.dense - above.dense)
    run = ffn.run + other_than_ffn(layers[below:], heads, read)
    if below:  # none of these layers is the last, of which only keys and values run
        run += other_than_ffn([*layers[:below], Mixer(0, False)], heads, tokens)
    if isinstance(scorer, DraftScorer):
        run += stock_flops(scorer.model, tokens + KeepConfig.look_ahead)
    stock = ffn.dense + other_than_ffn(layers, heads, tokens)
    return Cost(ffn, stock / run)


def stock_flops(model: nn.Module, tokens: int) -> float:
    """A whole prefill by mlx-lm, of any model that it runs; routed experts count as they run."""
    layers = mixers(model)
    prefilled = [f for f in found_ffns(model) if f.layer < len(layers) - 1]
    ffn = 2.0 * tokens * sum(map(ffn_weights, prefilled))
    heads = Heads.of(model, layer_norm_weights(model)[0].size)
    return ffn + other_than_ffn(layers, heads, tokens)


def _heads(model: nn.Module, engine: Engine) -> Heads:
    """Of the part of the model that this process has."""
    heads, n = Heads.of(model, engine.shapes[0][0]), engine.ffns[0].share[1]
    return replace(heads, queries=heads.queries // n, keys=heads.keys // n)
