"""What sparse prefill does inside a model, on one text: neurons kept, recall, errors by depth.

The text is read twice at once, as a batch of two: row 0 dense, row 1 sparse. So every layer is
compared while it runs, and nothing but masks and sums outlives it.
"""

import contextlib
import functools
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..config import FastForwardError
from ..engine import Call, Engine, Split
from ..plan import CHUNK
from ..schedule import layerwise, neurons_kept
from ..selectors import Oracle, Seen
from ..train.importance import importances
from ..train.lost import marked


@dataclass(frozen=True)
class Overlap:
    """How alike the blocks' neurons are.

    ``in_all`` and ``in_one``: shares of a layer's neurons that all blocks keep, and only one.
    ``neighbours`` and ``pairs``: Jaccard index (of what either block keeps, the share that both
    keep), mean over neighbouring blocks and over all pairs; None where there is one block.
    """

    in_all: float
    in_one: float
    neighbours: Optional[float]
    pairs: Optional[float]

    @classmethod
    def of(cls, kept: np.ndarray) -> "Overlap":
        """kept: (blocks, f), True for the neurons that a block keeps."""
        times, blocks = kept.sum(axis=0), len(kept)
        in_all, in_one = np.mean(times == blocks), np.mean(times == 1)
        if blocks < 2:
            return cls(float(in_all), float(in_one), None, None)
        a = kept.astype(np.float32)
        both, size = a @ a.T, a.sum(axis=1)
        jaccard = both / (size[:, None] + size - both)
        neighbours = np.diagonal(jaccard, 1).mean()
        pairs = jaccard[np.triu_indices(blocks, 1)].mean()
        return cls(float(in_all), float(in_one), float(neighbours), float(pairs))


@dataclass(frozen=True)
class LayerFigures:
    """One layer. Errors are ||sparse - dense|| / ||dense|| over all tokens of the sparse blocks.

    Args:
        importance: Attention mass (eq. 23), None where it is unknown.
        kept: Neurons that a sparse block keeps.
        by_importance: Neurons that algorithm 1 gives the layer, None without importances.
        recall: Share of the oracle's neurons among the selector's, both ``kept`` many.
        error: Of the FFN's output, from the dense model's inputs, without compensator.
        error_compensated: The same with the compensator, None without one.
        stream_error: Of the residual stream after the layer, all layers so far being sparse.
        selector, oracle: How alike the blocks' neurons are.
    """

    layer: int
    importance: Optional[float]
    kept: int
    by_importance: Optional[int]
    recall: float
    error: float
    error_compensated: Optional[float]
    stream_error: float
    selector: Overlap
    oracle: Overlap


@dataclass(frozen=True)
class Inspection:
    """All layers whose FFN a prefill runs, on one text.

    ``masks``: per layer the selector's and the oracle's neurons, (blocks, f) each, True where kept.
    """

    tokens: int
    blocks: int
    neurons: int
    ffn_sparsity: float
    layers: list[LayerFigures]
    masks: list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Given:
    """A selector whose scores are known."""

    scores: mx.array
    probe_every: int
    name: str = "given"
    remembers: bool = False

    def __call__(self, layer: int, ffn: Any, seen: Seen) -> mx.array:
        return self.scores

    def unit(self, block: int) -> int:
        return 1

    def flops(self, block: int, dense: int, d: int, f: int) -> float:
        return 0.0


@dataclass
class Energy:
    """Of an error and of what it is relative to, summed over chunks."""

    error: float = 0.0
    dense: float = 0.0

    def add(self, sparse: mx.array, dense: mx.array) -> None:
        dense = dense.astype(mx.float32)
        lost: Any = mx.sum(mx.square(sparse.astype(mx.float32) - dense)).item()
        whole: Any = mx.sum(mx.square(dense)).item()
        self.error, self.dense = self.error + lost, self.dense + whole

    @property
    def relative(self) -> float:
        return (self.error / self.dense) ** 0.5 if self.dense else 0.0


@dataclass
class Found:
    """What one layer has shown so far."""

    memory: dict[str, mx.array] = field(default_factory=dict)
    selector: list[np.ndarray] = field(default_factory=list)
    oracle: list[np.ndarray] = field(default_factory=list)
    plain: Energy = field(default_factory=Energy)
    compensated: Energy = field(default_factory=Energy)
    stream: Energy = field(default_factory=Energy)


class Observer:
    """Stands in for the calls of FFNs and layers, on batches of a dense and a sparse row."""

    def __init__(self, engine: Engine, tick: Callable[[], None]):
        self.engine = engine
        self.tick = tick
        self.truth = Oracle(engine.config.score)
        self.found = [Found() for _ in engine.ffns[:-1]]
        self.blocks = 0

    def ffn(self, layer: int, own: Any, x: mx.array) -> mx.array:
        engine = self.engine
        if engine.call is None or engine.keep[layer] is None:
            return own(x)
        dense = own(x[:1])
        self._judge(layer, x[:1], dense, engine.call)
        return mx.concatenate([dense, engine.forward(layer, x[1:])])

    def layer(self, layer: int, own: Any, *args: Any, **kwargs: Any) -> mx.array:
        h = own(*args, **kwargs)
        if self.engine.call is not None:
            plan = self.engine.call.plan
            middle = h[:, plan.start : plan.stop]
            self.found[layer].stream.add(middle[1], middle[0])
        self.tick()
        return h

    def _judge(self, layer: int, x: mx.array, dense: mx.array, call: Call) -> None:
        """One FFN on the dense model's inputs: what is kept, and what that costs."""
        engine, ffn, found = self.engine, self.engine.ffns[layer], self.found[layer]
        keep, plan = engine.keep[layer], call.plan
        assert keep is not None
        split = Split(plan, engine.selector.probe_every)
        exact = split.dense(x)
        z, _ = ffn.activations_and_output(exact)
        seen = Seen(split.blocks(x), exact, z, plan.head, None, found.memory)
        scores = engine.selector(layer, ffn, seen)
        found.selector.append(_mask(scores, keep))
        found.oracle.append(_mask(self.truth(layer, ffn, seen), keep))
        given = Given(scores, engine.selector.probe_every)
        middle = slice(plan.start, plan.stop)
        plain = replace(engine, selector=given, compensator=None)
        found.plain.add(plain.forward(layer, x)[:, middle], dense[:, middle])
        if engine.compensator is not None:
            full = replace(engine, selector=given)
            found.compensated.add(full.forward(layer, x)[:, middle], dense[:, middle])


def _mask(scores: mx.array, keep: int) -> np.ndarray:
    return np.array(marked(scores, keep)) > 0


Around = Callable[..., mx.array]


@contextlib.contextmanager
def watched(modules: Sequence[nn.Module], around: Around) -> Iterator[None]:
    """Call ``around(i, own, ...)`` in the place of each module's own call."""
    classes = [type(m) for m in modules]

    def stand_in(i: int, own: Any) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
            return around(i, functools.partial(own.__call__, self), *args, **kwargs)

        return type(f"Watched{own.__name__}", (own,), {"__call__": call})

    try:
        for i, (module, own) in enumerate(zip(modules, classes)):
            module.__class__ = stand_in(i, own)
        yield
    finally:
        for module, own in zip(modules, classes):
            module.__class__ = own


def measured_importances(
    model: nn.Module, ids: mx.array, block: int
) -> Optional[list[float]]:
    """s_l (eq. 23) of a text's first chunk; None where the model's attention cannot be watched."""
    found = importances(model, [ids[:CHUNK]], block)
    return None if all(s == 1 for s in found) else found


def check_length(engine: Engine, tokens: int) -> None:
    """Raises FastForwardError where nothing of so many tokens would run sparsely."""
    if not any(engine.keep):
        raise FastForwardError("no layer of this model runs sparsely; nothing to show.")
    if tokens < engine.shortest:
        raise FastForwardError(
            f"the text has {tokens:,} tokens, and prompts of less than {engine.shortest:,} are "
            "read densely: give a longer --file, or a smaller --block-size."
        )


def steps(engine: Engine, tokens: int) -> int:
    """How often ``inspect`` ticks."""
    return -(-(tokens - 1) // CHUNK) * (len(engine.ffns) - 1)


def inspect(
    model: nn.Module,
    ids: mx.array,
    engine: Engine,
    weights: Optional[Sequence[float]],
    tick: Callable[[], None],
) -> Inspection:
    """Read a prompt densely and sparsely, layer by layer.

    Args:
        model: Detached.
        ids: The whole prompt; its last token, which runs dense, is left out.
        engine: As attach() made it for this model.
        weights: Importances of all layers, for the figures only.
        tick: Called after each layer of each chunk.

    Raises:
        FastForwardError: Nothing of it would run sparsely.
    """
    check_length(engine, ids.size)
    observer = Observer(engine, tick)
    cache: Any = make_prompt_cache(model)
    ffns = [ffn.mlp for ffn in engine.ffns[:-1]]
    with contextlib.ExitStack() as stack:
        tally = stack.enter_context(engine.prompt(ids.size))
        stack.enter_context(watched(ffns, observer.ffn))
        stack.enter_context(watched(model.layers[:-1], observer.layer))
        for start in range(0, ids.size - 1, CHUNK):
            _read(model, ids[start:-1][:CHUNK], cache, observer)
    return _inspection(ids.size, observer, weights, tally.sparsity)


def _read(model: nn.Module, ids: mx.array, cache: Any, observer: Observer) -> None:
    """One chunk, dense and sparse."""
    engine = observer.engine
    engine.call = engine.begin(1, ids.size, cache, False)
    observer.blocks += engine.call.plan.blocks if engine.call else 0
    try:
        model(mx.stack([ids, ids]), cache=cache)
    finally:
        engine.call = None
    mx.eval([c.state for c in cache])


def _inspection(
    tokens: int,
    observer: Observer,
    weights: Optional[Sequence[float]],
    ffn_sparsity: float,
) -> Inspection:
    engine, neurons = observer.engine, observer.engine.ffns[0].shape[1]
    budgets: Sequence[Optional[int]] = [None] * len(observer.found)
    if weights is not None:
        shares = layerwise(weights[:-1], engine.config.sparsity)
        budgets = neurons_kept(shares, neurons)
    layers, masks = [], []
    for i, found in enumerate(observer.found):
        keep = engine.keep[i]
        if keep is None:  # a dense layer keeps them all
            keep, picked = neurons, np.ones((observer.blocks, neurons), bool)
            best = picked
        else:
            picked, best = (np.concatenate(m) for m in (found.selector, found.oracle))
        both = Overlap.of(picked), Overlap.of(best)
        compensated = found.compensated.relative if engine.compensator else None
        layers.append(
            LayerFigures(
                i,
                None if weights is None else weights[i],
                keep,
                budgets[i],
                float((picked & best).sum(axis=1).mean() / keep),
                found.plain.relative,
                compensated,
                found.stream.relative,
                *both,
            )
        )
        masks.append((picked, best))
    return Inspection(tokens, observer.blocks, neurons, ffn_sparsity, layers, masks)
