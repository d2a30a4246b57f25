"""What each layer's sparsity costs at the end of the model, measured on held-out text.

One layer at a time runs sparsely at a few levels, everything else densely, and the KL on what
follows the prompt is the price. Measured where it counts: a layer's own error says little about it.
Many layers are sampled: all at the middle level, a few at every level, whose mean shape serves the
others.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..attachment import reading, seated, watched
from ..build import engine_for
from ..config import PrefillConfig
from ..continuation import divergence, follow
from ..engine import Engine
from ..model.families import prefilled
from ..neurons.schedule import Curves
from ..predictors.file import PredictorFile
from ..prefill import read
from ..tokens.plan import CHUNK
from .data import Sequences, open_corpus, usual_length

LEVELS = (0.3, 0.5, 0.7, 0.9)
MIDDLE = 1  # of them
ALL_LEVELS = 8  # models of more layers are sampled
TOKENS = 64  # compared after each prompt
SEQUENCES = 10  # of measured_curves()

Costs = list[float]  # of one sequence, a KL per trial


@dataclass(frozen=True)
class Trial:
    """One layer at one level."""

    layer: int
    level: int


def trials(layers: int) -> list[Trial]:
    """The middle level of every layer first, then the others of as many as are measured in full."""
    shown = range(layers)
    if layers > ALL_LEVELS:
        shown = range(0, layers, -(-layers // (ALL_LEVELS // 2)))
    found = [Trial(i, MIDDLE) for i in range(layers)]
    others = [j for j in range(len(LEVELS)) if j != MIDDLE]
    return found + [Trial(i, j) for i in shown for j in others]


class Meter:
    """Measures a detached model, one sequence at a time.

    Args:
        predictor: Whose selection and compensation are used; None: the probe.
    """

    def __init__(
        self,
        model: nn.Module,
        predictor: Optional[PredictorFile],
        block_size: Optional[int] = None,
    ):
        self.model = model
        self.engines = []
        for s in LEVELS:
            config = PrefillConfig(s, block_size, schedule="uniform")
            self.engines.append(engine_for(model, config, predictor))
        self.trials = trials(len(prefilled(self.engines[0].ffns)))

    @property
    def shortest(self) -> int:
        """Sequences of fewer tokens say nothing."""
        return self.engines[0].shortest + TOKENS

    def costs(self, ids: mx.array, tick: Callable[[], None] = lambda: None) -> Costs:
        """KL of every trial on the last TOKENS of a sequence, in the order of ``trials``.

        What comes before the sparse layer is that of the dense model, and is not run again.
        """
        ids = ids[-(CHUNK + TOKENS) :]  # one chunk: masks are those of an empty cache
        prompt, model = ids.size - TOKENS, self.model
        outputs: list[Any] = []

        def record(layer: int, own: Any, *args: Any, **kwargs: Any) -> Any:
            outputs.append(own(*args, **kwargs))
            return outputs[-1]

        before = make_prompt_cache(model)
        with watched(model.layers, record):
            read(model, ids[: prompt - 1], before, prompt)
        mx.eval(outputs)

        def after(cache: Any) -> mx.array:
            rest = ids[prompt - 1 : prompt]
            return follow(model, rest, ids[prompt:], copy.deepcopy(cache))

        dense, found = after(before), []
        for trial in self.trials:
            # where layers have more caches than one, all of them run again
            one_each = len(before) <= len(model.layers)
            first = self.engines[0].ffns[trial.layer].layer if one_each else 0

            def skip(layer: int, own: Any, *args: Any, **kwargs: Any) -> Any:
                if layer < first:
                    return outputs[layer]
                return own(*args, **kwargs)

            cache: Any = make_prompt_cache(model)
            with seated(model, self.alone(trial)), watched(model.layers, skip):
                with reading(model, prompt):
                    model(ids[None, : prompt - 1], cache=cache)
            cache = before[:first] + cache[first:]
            found.append(divergence(dense, after(cache))[0])
            tick()
        return found

    def alone(self, trial: Trial) -> Engine:
        """An engine under which one layer runs sparsely."""
        engine = self.engines[trial.level]
        keep = [k if i == trial.layer else None for i, k in enumerate(engine.keep)]
        return replace(engine, keep=keep)

    def curves(self, costs: Sequence[Costs]) -> Curves:
        """Means over sequences."""
        columns = list(zip(*costs))
        means = {t: sum(c) / len(c) for t, c in zip(self.trials, columns)}
        layers = len(prefilled(self.engines[0].ffns))
        kl = [_row(means, i) for i in range(layers)]
        size = self.engines[0].block_size
        source = {"sequences": len(costs), "tokens": TOKENS, "block_size": size}
        return Curves(list(LEVELS), kl, source)


def measured_curves(
    model: nn.Module,
    tokenizer: Any,
    predictor: Optional[PredictorFile],
    tick: Callable[[int, int], None],
) -> Optional[Curves]:
    """Of bundled text and chats; None where the model's context is too short for any."""
    meter, costs = Meter(model, predictor), []  # type: Meter, list[Costs]
    corpus, length = open_corpus(None), usual_length(model)
    held = Sequences(corpus, tokenizer, length, 0, held_out=True)
    done, total = itertools.count(1), SEQUENCES * len(meter.trials)
    for i in range(SEQUENCES):
        ids = held[i]
        if ids.size >= meter.shortest:
            costs.append(meter.costs(ids, lambda: tick(next(done), total)))
    return meter.curves(costs) if costs else None


def _row(means: dict[Trial, float], layer: int) -> list[float]:
    """A layer's costs at all levels; by the mean shape of the others where it was not measured."""
    middle = means[Trial(layer, MIDDLE)]
    row = []
    for j in range(len(LEVELS)):
        value = means.get(Trial(layer, j))
        row.append(round(middle * _shape(means, j) if value is None else value, 7))
    return row


def _shape(means: dict[Trial, float], level: int) -> float:
    """Cost at a level over that at the middle one, of the layers measured in full."""
    full = [t.layer for t in means if t.level == level]
    whole = sum(means[Trial(i, MIDDLE)] for i in full)
    return sum(means[Trial(i, level)] for i in full) / whole if whole else 1.0
