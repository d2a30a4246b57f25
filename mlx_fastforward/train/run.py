"""The run: capture, predictors, compensators, importances, curves, judgement, predictor file.

Every phase can be interrupted, killed included, and goes on from its last saved state: captured
sequences are files, a descent is saved every so often, compensators layer by layer, curves
sequence by sequence.
"""

import functools
import itertools
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn

from ..attachment import reading, seated
from ..build import engine_for
from ..config import PrefillConfig
from ..errors import PredictorError
from ..model.families import float_dtype, prefilled
from ..neurons.compensators import (
    Compensator,
    LowRankCompensator,
    LowRankWeights,
    MLPCompensator,
    MLPWeights,
)
from ..neurons.schedule import Curves
from ..predictors.base import BaseModel
from ..predictors.file import MLP, PredictorFile
from .capture import capture, ffns_of
from .curves import Meter
from .data import Sequences
from .descent import Curve, Descent
from .importance import importances
from .low_rank import fit_low_rank
from .mlp import ACTIVATION, BLOCKS, fit_mlp
from .output import as_wide, information, write
from .predictor import KINDS, RATE, Predictors, loss, weights_of
from .quality import drift, recall
from .reconstruction import Blocks, error_left, marked
from .report import write_report
from .state import HELD_OUT, Settings, State, forget, save_tensors
from .store import BLOCKS as BATCH
from .store import Batches, Store

WORK = ".training"
IMPORTANCE_SAMPLES = 8
LEVELS = (0.3, 0.4, 0.5, 0.6)  # sparsities that one compensator serves
LEVEL = 0.5  # the one that is judged
FIT_TOKENS = 100_000  # the closed forms need no more
# Parts of --minutes; what is left is for importances and judgement.
HELD, CAPTURE, PREDICTORS, COMPENSATORS, CURVES = 0.04, 0.2, 0.25, 0.1, 0.15
VERIFYING = 0.15  # of the table that the command makes when the file is written

Tick = Callable[[str, float, float, str], None]


class Run:
    """One predictor file in the making.

    Args:
        model: The base model, detached.
        data: Token sequences to fit on, and those that are held out.
        out: Folder of the file; the state is kept in a folder inside it.
        tick: Called with (phase, done, total, details) as the work goes on.
        anew: Whatever the folder holds; it is deleted when the work begins.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        data: tuple[Sequences, Sequences],
        out: Path,
        settings: Settings,
        tick: Tick,
        anew: bool = False,
    ):
        self.anew = anew
        self.base = BaseModel.of(model, name)
        self.ffns = ffns_of(model)
        self.dtype = float_dtype(model)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)  # mlx's bfloat16 is slow on CPUs
        self.model, self.out, self.tick = model, out, tick
        self.sequences, self.held = data
        self.settings = settings.with_ranks(self.base.hidden_size)
        self.stages = ("dense", "sparse") if settings.sequential else ("dense",)
        self.work = out / WORK
        mx.random.seed(settings.seed)
        self.net = self._network()

    def __call__(self) -> dict[str, Any]:
        """All that is not done yet; writes the file and returns its report."""
        if self.anew:
            forget(self.work)
        descents: dict[str, Curve] = {}
        self.capture("held-out")
        for stage in self.stages:
            self.capture(stage)
            descents[stage] = self.predictors(stage)
            self.compensators(stage)
        self.importances()
        predictor = self.fitted_file(self.stages[-1]).astype(self.dtype)
        predictor = replace(predictor, curves=self.curves(predictor))
        findings = self.judge(predictor)
        info = information(self.base, self.settings, self.state, predictor, findings)
        extra = {"descents": descents, "importance": self.state.importance}
        write_report(self.out, info | extra)
        write(self.out, predictor, info)
        forget(self.work)
        return info

    @functools.cached_property
    def state(self) -> State:
        """Where the run is; PredictorError where the folder holds another one."""
        asked = asdict(self.settings) | {"fingerprint": self.base.fingerprint}
        return State(self.work, asked) if self.anew else State.resumed(self.work, asked)

    def seconds(self, share: float) -> float:
        """So much of --minutes; without end if there is none."""
        return 60 * self.settings.minutes * share or float("inf")

    # Capture

    def store(self, stage: str) -> Store:
        return Store(self.work / stage)

    def captured(self, stage: str) -> list[tuple[Store, int]]:
        store = self.store(stage)
        return [(store, i) for i in store.numbers(self.state.captured.get(stage, 0))]

    def fitted(self, stage: str) -> list[tuple[Store, int]]:
        """What to fit a stage's compensators on."""
        return self.captured(stage) or self.captured("dense")

    def held_out(self) -> list[tuple[Store, int]]:
        """What to judge on; with next to no data that is what was fitted on."""
        return self.captured("held-out") or self.captured("dense")

    def capture(self, stage: str) -> None:
        """Run the model over sequences and keep every layer's FFN inputs.

        The held-out ones are few; the sparse stage goes on where the dense one stopped.
        """
        state, settings, n = self.state, self.settings, len(self.stages)
        source, wanted, share = self.sequences, settings.tokens // n, CAPTURE / n
        if stage == "held-out":
            source, wanted, share = self.held, settings.held_out, HELD
        first = state.captured.get("dense", 0) if stage == "sparse" else 0
        budget = self.seconds(share)
        below = self.fitted_file("dense") if stage == "sparse" else None
        start, before = time.perf_counter(), state.tokens.get(stage, 0)
        while stage not in state.enough:
            i = state.captured.setdefault(stage, 0)
            ids = source[first + i]
            if len(ids) >= settings.block_size:
                self.store(stage).add(i, *self._taken(below, ids, i))
            state.captured[stage] = i + 1
            tokens = state.tokens[stage] = state.tokens.get(stage, 0) + len(ids)
            if i > 100 and not tokens:
                raise PredictorError("the data holds no text that the tokenizer knows.")
            late = state.seconds.get(f"capture {stage}", 0.0) > budget
            if tokens >= wanted or late:
                state.enough.append(stage)
            state.save(f"capture {stage}")
            speed = (tokens - before) / (time.perf_counter() - start)
            self.tick(f"capture {stage}", tokens, wanted, f"{speed:,.0f} tok/s")

    def _taken(
        self, below: Optional[PredictorFile], ids: mx.array, i: int
    ) -> tuple[mx.array, mx.array]:
        """One sequence through the dense model, or through the sparse one so far."""
        block, score = self.settings.block_size, self.settings.score
        if below is None:
            return capture(self.model, ids, block, score)
        level = random.Random(f"{self.settings.seed} level {i}").choice(LEVELS)
        config = PrefillConfig(level, block, selector="trained", schedule="uniform")
        engine = engine_for(self.model, config, below)
        with seated(self.model, engine), reading(self.model, len(ids)):
            return capture(self.model, ids, block, score)

    # Predictors

    def _network(self) -> Predictors:
        widths = [ffn.shape[1] for ffn in self.ffns]
        kind = KINDS[self.settings.kind]
        return kind(self.base.hidden_size, self.settings.rank, widths)

    def predictors(self, stage: str) -> Curve:
        """Descent on random blocks; the sparse stage goes on with both kinds of inputs."""
        seen = self.captured("dense")
        seen += self.captured("sparse") if stage == "sparse" else []
        if not seen:
            raise PredictorError(
                f"no sequence fills a block of {self.settings.block_size} tokens; "
                "more or longer texts are needed."
            )
        file = self.work / f"predictors-{stage}.safetensors"
        steps = max(1, self.settings.steps // len(self.stages))
        if not file.exists() and self.settings.minutes:
            share = self.seconds(PREDICTORS / len(self.stages))
            steps = min(steps, max(20, int(share / self.step_seconds())))
        rate = RATE if stage == "dense" else RATE / 2
        descent = Descent(self.net, loss, steps, rate, file)

        def tick(descent: Descent, details: str) -> None:
            if descent.curve:
                details += f", recall {descent.curve[-1][2]:.1%}"
            self.tick(f"predictors {stage}", descent.step, descent.steps, details)

        descent(Batches(seen, self.settings.seed), tick, self._gauge())
        self.state.save("predictors")
        return descent.curve

    def _gauge(self) -> Callable[[], float]:
        """Recall on a few held-out blocks, mean of the layers."""
        held = Batches(self.held_out(), self.settings.seed, longest=1)
        x, norms = held(0)

        def gauge() -> float:
            predictors = [weights_of(self.net, i) for i in range(len(x))]
            return sum(recall(predictors, [(x, norms)])) / len(x)

        return gauge

    def step_seconds(self) -> float:
        """Time of one step, measured on a network that is thrown away."""
        shape = (len(self.ffns), BATCH, self.settings.block_size, self.base.hidden_size)
        x = mx.random.normal(shape)
        norms = mx.random.uniform(shape=(*shape[:2], max(self.net.widths)))
        trial = Descent(self._network(), loss, 10, RATE, self.work / "none")
        trial.once(x, norms)
        start = time.perf_counter()
        for _ in range(3):
            trial.once(x, norms)
        return (time.perf_counter() - start) / 3

    # Compensators

    def compensators(self, stage: str) -> None:
        """Layer by layer, under the predictors' masks."""
        state, done = self.state, self.state.error_left.setdefault(stage, [])
        if self.settings.compensator == "none":
            return
        for layer in range(len(done), len(self.ffns)):
            fit = self._mlp if self.settings.compensator == MLP else self._low_rank
            weights = fit(stage, layer)
            save_tensors(self._file(stage, layer), vars(weights))
            found = self._compensator(stage, layer)
            assert found is not None
            held = self.masked(self.held_out(), layer, (LEVEL,))
            done.append(error_left(self.ffns[layer], found, 0, held()))
            state.save("compensators")
            details = f"{1 - done[-1]:.0%} of the layer's error removed"
            self.tick(f"compensators {stage}", len(done), len(self.ffns), details)

    def _file(self, stage: str, layer: int) -> Path:
        return self.work / f"compensator-{stage}-{layer}.safetensors"

    def _low_rank(self, stage: str, layer: int) -> LowRankWeights:
        blocks = self.masked(self.fitted(stage), layer, LEVELS)
        return fit_low_rank(self.ffns[layer], blocks, self.settings.compensator_rank)

    def _mlp(self, stage: str, layer: int) -> MLPWeights:
        seed, f = self.settings.seed, self.base.widths[layer]
        batches = Batches(self.fitted(stage), seed, blocks=BLOCKS, longest=1)

        def batch(step: int) -> tuple[mx.array, mx.array]:
            x, norms = batches(step, slice(layer, layer + 1))
            return x[0], norms[0, :, :f]

        def tick(descent: Descent, details: str) -> None:
            done = layer + descent.step / descent.steps
            self.tick(f"compensators {stage}", done, len(self.ffns), details)

        return fit_mlp(
            self.ffns[layer],
            weights_of(self.net, layer),
            batch,
            lambda step: f - int(f * LEVELS[step % len(LEVELS)]),
            (self.settings.compensator_rank, self._mlp_steps(), seed),
            self.work / f"mlp-{stage}-{layer}.safetensors",
            tick,
        )

    def _mlp_steps(self) -> int:
        """Per layer, an eighth of the predictors' steps; with --minutes what fits."""
        spent = self.state.seconds.get("compensators", 0.0)
        late = spent > self.seconds(COMPENSATORS)
        return 20 if late else max(20, self.settings.steps // 8)

    def masked(
        self, captured: list[tuple[Store, int]], layer: int, levels: tuple[float, ...]
    ) -> Blocks:
        """A function that gives (x, kept) of a layer, sequence after sequence."""
        share = 0.5 if self.settings.minutes else 1.0
        enough = FIT_TOKENS / self.settings.length
        most = max(1, int(min(enough, share * len(captured))))
        chosen = captured[:: -(-len(captured) // most)]
        weights, f = weights_of(self.net, layer), self.base.widths[layer]

        def blocks() -> Iterator[tuple[mx.array, mx.array]]:
            for store, i in chosen:
                rng = random.Random(f"{self.settings.seed} level {i}")
                x = mx.array(store.load(i)[0][layer]).astype(mx.float32)
                yield x, marked(weights(x), f - int(f * rng.choice(levels)))

        return blocks

    def _compensator(self, stage: str, *layers: int) -> Optional[Compensator]:
        """The fitted one, of these layers."""
        if self.settings.compensator == "none":
            return None
        found: list[Any] = [mx.load(str(self._file(stage, i))) for i in layers]
        if self.settings.compensator == MLP:
            return MLPCompensator([MLPWeights(**w) for w in found], ACTIVATION)
        return LowRankCompensator([LowRankWeights(**w) for w in found])

    # What it is worth

    def importances(self) -> None:
        """Importances, from held-out sequences."""
        if self.state.importance is None:
            samples = IMPORTANCE_SAMPLES // (2 if self.settings.minutes else 1)
            ids = (self.held[i] for i in range(samples))
            block = self.settings.block_size
            self.state.importance = importances(self.model, ids, block)
            self.state.save("importances")
            self.tick("importances", 1, 1, "")

    def curves(self, predictor: PredictorFile) -> Optional[Curves]:
        """What each layer's sparsity costs, held out; None where no sequence is long enough."""
        state = self.state
        meter = Meter(self.model, predictor, self.settings.block_size)
        late = self.seconds(CURVES)
        while state.measured < HELD_OUT:
            if state.costs and state.seconds.get("curves", 0.0) > late:
                break
            ids, done = self.held[state.measured], state.measured
            trials = itertools.count(1)

            def tick() -> None:
                share = next(trials) / len(meter.trials)
                self.tick("curves", done + share, HELD_OUT, "")

            if ids.size >= meter.shortest:
                state.costs.append(meter.costs(ids, tick))
            state.measured += 1
            state.save("curves")
        self.tick("curves", HELD_OUT, HELD_OUT, "")
        return meter.curves(state.costs) if state.costs else None

    def judge(self, predictor: PredictorFile) -> dict[str, Any]:
        """Recall and error removed per layer, and the distance from the dense model, held out."""
        captured = [store.load(i) for store, i in self.held_out()]
        assert predictor.layers is not None
        found = recall(prefilled(predictor.layers), captured)
        sequences = [(self.held.kind(i), self.held[i]) for i in range(HELD_OUT)]
        spent = sum(self.state.seconds.values())
        end = time.perf_counter() + self.seconds(1 - VERIFYING) - spent
        distance = drift(
            self.model,
            predictor,
            sequences,
            LEVEL,
            self.settings.block_size,
            lambda done: self.tick("judgement", done, HELD_OUT, ""),
            lambda: time.perf_counter() > end,
        )
        self.state.save("judgement")
        left = self.state.error_left.get(self.stages[-1], [])
        return {
            "recall": [round(r, 4) for r in found],
            "error_removed": [round(1 - e, 4) for e in left],
            "from_dense": distance,
        }

    # The file

    def fitted_file(self, stage: str) -> PredictorFile:
        """What is fitted so far. The last layer never runs sparsely: a copy."""
        layers = [*range(len(self.ffns)), len(self.ffns) - 1][: self.base.layers]
        pairs = list(zip(layers, self.base.widths))
        predictors = [as_wide(weights_of(self.net, i), f) for i, f in pairs]
        compensator = self._compensator(stage, *layers)
        if compensator is not None:
            fitted = zip(compensator.layers, self.base.widths)
            compensator.layers = [as_wide(w, f) for w, f in fitted]
        importance = self.state.importance
        return PredictorFile(self.base, predictors, compensator, importance, {}, "")
