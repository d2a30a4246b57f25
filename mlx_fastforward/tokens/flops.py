"""The one count of FLOPs: of a prompt's FFNs as they run, and of a whole prefill.

Counted as the engine runs: the plan of each call, the last layer's FFN never. A whole prefill is a
limit, not a forecast: every product at full speed, norms, softmax and sampling for nothing. Sliding
windows are counted as full attention.
"""

from dataclasses import dataclass
from typing import Optional, Sequence

from ..model.families import Heads, Mixer, prefilled
from ..neurons.compensators import Compensator
from ..neurons.selectors import Selector
from .plan import Plan
from .pruning import Pruner
from .split import TokenSplit

Shapes = Sequence[tuple[int, int]]  # (d, f) of every layer's FFN


@dataclass
class FlopCount:
    """FFN FLOPs of one prompt, over the layers whose FFN a prefill runs.

    dense: what stock mlx-lm runs. run: what ran, selection and compensation included.
    """

    dense: float = 0.0
    run: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the dense FFN FLOPs that was skipped; selection and compensation are paid."""
        return 1 - self.run / self.dense if self.dense else 0.0


@dataclass(frozen=True)
class Skipping:
    """Tokens of a call that skip FFNs.

    Args:
        survivors: The plan of those who stay.
        layers: Whether tokens skip it, for every layer.
        pruner: Who scores them.
    """

    survivors: Plan
    layers: Sequence[bool]
    pruner: Pruner


def dense_ffn(tokens: int, d: int, f: int, products: int = 3) -> float:
    """All products of one layer; two without a gate."""
    return 2.0 * products * tokens * d * f


def overhead(
    split: TokenSplit,
    layer: int,
    d: int,
    f: int,
    keep: int,
    selector: Selector,
    compensator: Optional[Compensator],
) -> float:
    """Selection and compensation of one block in one layer."""
    paid = selector.flops(layer, split.plan.block_size, split.dense_tokens, d, f)
    if compensator is not None:
        paid += compensator.flops(layer, split.sparse_tokens, d, keep)
    return paid


def count_call(
    count: FlopCount,
    tokens: tuple[int, int],
    plan: Optional[Plan],
    shapes: Shapes,
    keep: Sequence[Optional[int]],
    selector: Selector,
    compensator: Optional[Compensator],
    skipping: Optional[Skipping] = None,
    products: Sequence[int] = (),
    first: int = 0,
) -> None:
    """Add one call to a count.

    Args:
        tokens: Rows of the call, and tokens per row.
        plan: None where the call ran densely.
        keep: Neurons that each layer keeps, None for a dense layer.
        skipping: None where every token stays.
        products: Of each layer's FFN; without, three.
        first: The layers below are not counted.
    """
    batch, new = tokens
    for layer, ((d, f), kept) in enumerate(prefilled(list(zip(shapes, keep)))):
        if layer < first:
            continue
        n = products[layer] if products else 3
        count.dense += batch * dense_ffn(new, d, f, n)
        here, stay = plan, new
        if plan is not None and skipping is not None and skipping.layers[layer]:
            here, stay = skipping.survivors, skipping.survivors.tokens
            count.run += batch * skipping.pruner.flops(plan.stop - plan.start, d)
        count.run += batch * dense_ffn(stay, d, f, n)
        if here is None or kept is None:
            continue
        split = TokenSplit(here, selector.probe_every)
        saved = dense_ffn(split.sparse_tokens, d, f - kept, n)
        paid = overhead(split, layer, d, f, kept, selector, compensator)
        count.run += batch * here.blocks * (paid - saved)


def other_than_ffn(layers: Sequence[Mixer], heads: Heads, tokens: int) -> float:
    """FLOPs of stock mlx-lm reading a prompt: projections and attention.

    The last layer has keys and values only. Routed experts, scans of states and convolutions are left out.
    """
    seen = tokens * (tokens + 1) / 2
    share = heads.keys / (heads.queries + heads.keys)
    total = 2.0 * tokens * layers[-1].weights * share
    for weights, attends in prefilled(layers):
        total += 2.0 * tokens * weights
        total += attends * 4.0 * seen * heads.queries * heads.size
    return total


def ideal_speedup(
    layers: Sequence[Mixer], heads: Heads, tokens: int, ffn: FlopCount
) -> float:
    """Stock FLOPs over the sparse prefill's, both with all that is not FFN: what arithmetic allows."""
    rest = other_than_ffn(layers, heads, tokens)
    return (rest + ffn.dense) / (rest + ffn.run)
