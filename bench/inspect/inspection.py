"""What sparse prefill does inside a model, on one text: neurons kept, recall, errors by depth.

The text is read twice at once, as a batch of two: row 0 dense, row 1 sparse. So every layer is
compared while it runs, and nothing but masks and sums outlives it.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ...attachment import watched
from ...engine import Call, Engine
from ...errors import FastForwardError
from ...model.families import prefilled
from ...neurons.schedule import layerwise, neurons_kept
from ...neurons.selectors import Oracle, top_neurons
from ...prefill import prefill
from ...tokens.plan import CHUNK
from ...train.importance import importances


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
        neurons: Of the FFN.
        kept: Of these, what a sparse block keeps.
        by_importance: Neurons that algorithm 1 gives the layer, None without importances.
        recall: Share of the oracle's neurons among the selector's, both ``kept`` many.
        error: Of the FFN's output, from the dense model's inputs, without compensator.
        error_compensated: The same with the compensator, None without one.
        stream_error: Of the residual stream after the layer, all layers so far being sparse.
        selector, oracle: How alike the blocks' neurons are.
    """

    layer: int
    neurons: int
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
    ffn_sparsity: float
    layers: list[LayerFigures]
    masks: list[tuple[np.ndarray, np.ndarray]]


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
    """Stands in for the calls of a detached model on batches of a dense and a sparse row."""

    def __init__(self, engine: Engine, tokens: int, tick: Callable[[], None]):
        self.engine = engine
        self.prompt = engine.prompt(tokens)
        self.tick = tick
        self.truth = Oracle()
        self.found = [Found() for _ in prefilled(engine.ffns)]
        self.blocks = 0
        self.call: Optional[Call] = None

    def model(self, _: int, own: Any, rows: mx.array, cache: Any) -> mx.array:
        self.call = self.engine.begin(self.prompt, 1, rows.shape[1], cache)
        self.blocks += self.call.split.plan.blocks if self.call else 0
        return own(rows, cache=cache)

    def ffn(self, layer: int, own: Any, x: mx.array) -> mx.array:
        if self.call is None or self.engine.keep[layer] is None:
            return own(x)
        shape, x = x.shape, x.reshape(2, -1, x.shape[-1])  # experts' modules join rows
        dense = own(x[:1])
        self._judge(self.call, layer, x[:1], dense)
        sparse = self.engine.forward(self.call, layer, x[1:])
        return mx.concatenate([dense, sparse]).reshape(shape)

    def layer(self, layer: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out  # Gemma 4 hands keys on, too
        if self.call is not None:
            plan = self.call.split.plan
            middle = h[:, plan.start : plan.stop]
            self.found[layer].stream.add(middle[1], middle[0])
        self.tick()
        return out

    def _judge(self, call: Call, layer: int, x: mx.array, dense: mx.array) -> None:
        """One FFN on the dense model's inputs: what is kept, and what that costs."""
        engine, found, plan = self.engine, self.found[layer], call.split.plan
        keep, ffn = engine.keep[layer], engine.ffns[layer]
        assert keep is not None
        inputs, exact = engine.run_dense(call, layer, x)
        inputs.memory = found.memory  # the sparse row has its own
        neurons = engine.choose(layer, inputs)
        found.selector.append(_mask(neurons, ffn.shape[1]))
        best = top_neurons(self.truth.score(layer, ffn, inputs), keep)
        found.oracle.append(_mask(best, ffn.shape[1]))
        middle, arms = slice(plan.start, plan.stop), [(found.plain, None)]
        if engine.compensator is not None:
            arms.append((found.compensated, engine.compensator))  # type: ignore
        for energy, compensator in arms:
            y = engine.apply(call, layer, inputs.blocks, exact, neurons, compensator)
            energy.add(y[:, middle], dense[:, middle])


def _mask(neurons: mx.array, f: int) -> np.ndarray:
    """(M, K) -> (M, f), True for the neurons that a block keeps."""
    kept = np.zeros((len(neurons), f), bool)
    np.put_along_axis(kept, np.array(neurons).astype(np.int64), True, axis=1)
    return kept


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
    return -(-(tokens - 1) // CHUNK) * len(prefilled(engine.ffns))


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
    observer = Observer(engine, ids.size, tick)
    cache: Any = make_prompt_cache(model)
    ffns = [ffn.mlp for ffn in prefilled(engine.ffns)]
    layers = [model.layers[ffn.layer] for ffn in prefilled(engine.ffns)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched([model], observer.model))
        stack.enter_context(watched(ffns, observer.ffn))
        stack.enter_context(watched(layers, observer.layer))
        prefill(model, mx.stack([ids[:-1], ids[:-1]]), cache)
    return _inspection(ids.size, observer, weights)


def _inspection(
    tokens: int, observer: Observer, weights: Optional[Sequence[float]]
) -> Inspection:
    engine = observer.engine
    shares: Sequence[Optional[float]] = [None] * len(observer.found)
    if weights is not None:
        shares = layerwise(prefilled(weights), engine.config.sparsity)
    layers, masks = [], []
    for i, found in enumerate(observer.found):
        keep, neurons, share = engine.keep[i], engine.shapes[i][1], shares[i]
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
                neurons,
                None if weights is None else weights[i],
                keep,
                None if share is None else neurons_kept(share, neurons) or neurons,
                float((picked & best).sum(axis=1).mean() / keep),
                found.plain.relative,
                compensated,
                found.stream.relative,
                *both,
            )
        )
        masks.append((picked, best))
    skipped = observer.prompt.flops.sparsity
    return Inspection(tokens, observer.blocks, skipped, layers, masks)
