"""Which block size and strategy are fastest on this device, measured once and kept.

One FFN of the model runs over a chunk of random inputs, dense and by every candidate, interleaved.
Dense is a candidate: where nothing is faster the prompt stays dense. Each candidate is first checked
against the plain masked FFN; one that is wrong is reported and never used. Packed weights may be
dequantised first, once per call and layer, for a float GEMM: sparse, or densely with the same answer to
rounding. The FFNs of a bfloat16 model may run in float16, for chips that emulate bfloat16. Attention is
measured the same way: all queries of a chunk at once, as mlx-lm does, or in blocks; so are longer calls.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple, Optional

import mlx.core as mx
import mlx.nn as nn

from .attachment import check_model, detach, engine_of, seat
from .calls import attention_block, attention_seconds, longest_gaining, step_seconds
from .config import DeviceSettings
from .engine import Engine
from .errors import ConfigError
from .model import linear
from .model.families import Heads
from .model.ffn import GatedFFN
from .neurons.schedule import neurons_kept
from .timing import MARGIN, ROUNDS, difference, interleaved, is_rounding
from .tokens.plan import CHUNK, Plan
from .tuned import heads_of, key, remember, sparse_layer

BLOCKS = (128, 256, 512, 1024, 2048)
LENGTHS = (512, 1024)  # short prompts: from which on is sparse faster?
STRATEGIES = ("chunk", "columns")  # "stored" costs memory: only who asks for it gets it
UNPACK = (256, 512, 1024)  # tokens: from which on is dequantising first faster?
LARGEST = 1024  # of them by default

Tick = Callable[[float], None]  # the share that is done


@dataclass(frozen=True)
class Candidate:
    """Times in seconds of one FFN over a chunk; ``error`` against the plain path.

    The strategy "dense" is the whole FFN over ``block_size`` tokens; ``dense_seconds`` is what mlx-lm's
    own takes. ``unpack`` and ``half`` are those of DeviceSettings.
    """

    block_size: int
    strategy: str
    seconds: float
    dense_seconds: float
    error: float
    correct: bool
    unpack: int = 0
    half: bool = False

    @property
    def share(self) -> float:
        """Of the dense time."""
        return self.seconds / self.dense_seconds

    @property
    def gains(self) -> bool:
        """Whether it is right, and faster than mlx-lm's own by more than noise."""
        return self.correct and self.share < MARGIN


class Way(NamedTuple):
    """How FFNs multiply: fields of DeviceSettings."""

    unpack: int = 0
    half: bool = False


@dataclass(frozen=True)
class Choice:
    """What tuning found: settings of the device, and the candidates that were measured.

    attention: Seconds of a first chunk's attention, by queries per call; 0: all of them, as in mlx-lm.
    steps: (seconds, seconds with half as many tokens per call) of a layer, by tokens per call.
    """

    device: DeviceSettings
    candidates: list[Candidate]
    attention: dict[int, float] = field(default_factory=dict)
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of mlx-lm's dense time, what an FFN takes over a chunk."""
        if not self.device.dense:
            return _best([c for c in self.candidates if c.strategy != "dense"]).share
        if not self.device.unpack:
            return 1.0
        best = ("dense", CHUNK, self.device.half)
        found = [(c.strategy, c.block_size, c.half) for c in self.candidates]
        return self.candidates[found.index(best)].share


def tune(
    model: nn.Module, largest: int = LARGEST, tick: Tick = lambda share: None
) -> Choice:
    """Measure what is fastest for an attached model on this device, use it, and remember it.

    ``load`` and ``attach`` go by it from then on. What a PrefillConfig says of blocks wins.

    Args:
        model: Attached.
        largest: Largest block size to try; larger ones are faster and a little less exact.
        tick: Called with the share that is done.

    Raises:
        ConfigError: Nothing of this model runs sparsely.
    """
    check_model(model)
    engine = engine_of(model)
    if engine is None:
        raise ConfigError("tune: the model is not attached; use load() or attach().")
    if not any(engine.keep):
        raise ConfigError("nothing to tune: every layer stays dense.")
    heads = heads_of(model, engine)
    choice = search(engine, heads, largest, tick)
    use(model, engine, choice.device)
    remember(key(engine, heads), choice.device)
    return choice


def use(model: nn.Module, engine: Engine, device: DeviceSettings) -> None:
    """Run an attached model under these settings of the device."""
    detach(model)
    seat(model, engine.on(device))


def search(
    engine: Engine,
    heads: Heads,
    largest: int = LARGEST,
    tick: Tick = lambda share: None,
    limit: float = math.inf,
) -> Choice:
    """Measure, and choose; the best so far where ``limit`` seconds are over.

    Args:
        engine: Of a model; stays as it is.
        heads: Of the same model, for its attention.
        largest: Largest block size to try.
        limit: Seconds, about; a prompt's length is not known to gain unless there was time for it.
    """
    start, engine = time.perf_counter(), _average(engine)
    x, found = _inputs(engine), []  # type: mx.array, list[Candidate]
    dense = fastest_dense(engine)
    sizes = [b for b in BLOCKS if b <= largest]
    fast = Way(dense.device.unpack, dense.device.half)
    trials: list[tuple[int, str, Optional[Way]]]
    trials = [(sizes[-1], s, fast) for s in STRATEGIES]
    trials += [(sizes[-1], "", Way())] if fast.unpack else []
    trials += [(b, "", None) for b in sizes[:-1]]
    total = len(trials) + len(LENGTHS) + 1

    def left() -> float:
        return limit - (time.perf_counter() - start)

    def over() -> bool:
        return left() < 0

    for done, (block, strategy, way) in enumerate(trials):
        if found and over():
            break
        strategy = strategy or _best(found).strategy
        way = way or Way(_best(found).unpack, _best(found).half)
        found.append(_measured(_trial(engine, block, strategy, way), x))
        tick((done + 1) / total)
    best = _best(found)
    tried = found + dense.candidates
    if not best.correct or best.share > MARGIN * dense.share:
        return Choice(dense.device, tried)
    way = Way(best.unpack, best.half)
    trial = _trial(engine, best.block_size, best.strategy, way)
    shortest, attention = CHUNK, {}  # type: int, dict[int, float]
    if not over():
        shortest = _shortest(trial, x, lambda i: tick((len(trials) + i) / total))
    if not over():
        attention = attention_seconds(heads, x.dtype)
    queries = attention_block(attention)
    device = replace(trial.device, shortest=shortest, attention_block=queries)
    steps = step_seconds(trial.on(device), heads, x.dtype, left)
    device = replace(device, step=longest_gaining(steps))
    return Choice(device, tried, attention, steps)


def fastest_dense(engine: Engine) -> Choice:
    """How a dense FFN is fastest, and from how many tokens on; ``unpack`` 0: as mlx-lm runs it."""
    ffn, x = engine.ffns[sparse_layer(engine)], _inputs(engine)
    ways = [False] if ffn.packed else []
    ways += [True] if x.dtype == mx.bfloat16 else []
    found = [_dense(ffn, x, half) for half in ways]
    gaining = [c for c in found if c.gains]
    if not gaining:
        return Choice(DeviceSettings(dense=True), found)
    best = min(gaining, key=lambda c: c.share)
    for tokens in UNPACK:
        found.append(_dense(ffn, x[:, :tokens], best.half))
        if found[-1].gains:
            break
    least = found[-1].unpack if found[-1].gains else CHUNK
    return Choice(DeviceSettings(dense=True, unpack=least, half=best.half), found)


def _dense(ffn: GatedFFN, x: mx.array, half: bool) -> Candidate:
    """The dense FFN with its weights dequantised first, or in float16, beside mlx-lm's own."""
    tokens = x.shape[1]
    own, fast = ffn.under(ffn.strategy), ffn.under(ffn.strategy, tokens, half)
    ways = {
        "own": lambda: own.activations_and_output(x)[1],
        "fast": lambda: fast.activations_and_output(x)[1],
    }
    error = _off(ways["fast"](), x, lambda x: own.activations_and_output(x)[1])
    seconds = interleaved(ways, ROUNDS)
    times, correct = (seconds["fast"], seconds["own"]), is_rounding(error, x.dtype)
    return Candidate(tokens, "dense", *times, error, correct, tokens, half)


def chunk_seconds(engine: Engine) -> float:
    """About what one dense FFN takes over a chunk, from a sixteenth of it."""
    few = CHUNK // 16
    x, ffn = _inputs(engine)[:, :few], engine.ffns[sparse_layer(engine)]
    found = interleaved({0: lambda: ffn.activations_and_output(x)[1]}, 3)
    return found[0] * CHUNK / few


def _average(engine: Engine) -> Engine:
    """With the mean budget in the layer that is timed, whose own may be far from it; all tokens run."""
    layer = sparse_layer(engine)
    budgets = [k / f for k, (_, f) in zip(engine.keep, engine.shapes) if k]
    keep = list(engine.keep)
    keep[layer] = neurons_kept(sum(budgets) / len(budgets), engine.shapes[layer][1])
    return replace(engine, keep=keep, config=replace(engine.config, prune_tokens=0.0))


def _trial(engine: Engine, block: int, strategy: str, way: Way) -> Engine:
    """The engine under other settings of the device; the model's own is left alone."""
    device = DeviceSettings(block, strategy, unpack=way.unpack, half=way.half)
    trial = engine.on(device)
    return replace(trial, config=replace(engine.config, block_size=None))


def _best(found: list[Candidate]) -> Candidate:
    """The fastest correct one; the fastest if none is."""
    correct = [c for c in found if c.correct]
    return min(correct or found, key=lambda c: c.share)


def _inputs(engine: Engine) -> mx.array:
    """Random FFN inputs (1, CHUNK, d), the scale of a norm's output."""
    layer = sparse_layer(engine)
    d, _ = engine.shapes[layer]
    x = mx.random.normal((1, CHUNK, d), key=mx.random.key(0))
    return x.astype(linear.dtype(engine.ffns[layer].down))


def _measured(trial: Engine, x: mx.array) -> Candidate:
    """One candidate over a chunk."""
    plan = trial.plan(x.shape[1], cached=CHUNK, after=CHUNK)
    assert plan is not None
    device, own = trial.device, trial.ffns[sparse_layer(trial)]
    error = _error(trial, x[:, : max(plan.block_size, device.unpack)])
    sparse, dense = _seconds(trial, plan, x, own.under(device.strategy))
    return Candidate(
        device.block_size,
        device.strategy,
        sparse,
        dense,
        error,
        is_rounding(error, x.dtype),
        device.unpack,
        device.half,
    )


def _seconds(
    trial: Engine, plan: Plan, x: mx.array, dense: GatedFFN
) -> tuple[float, float]:
    """Of the sparse FFN and of a dense one, interleaved."""
    layer, call = sparse_layer(trial), trial.call(plan)
    found = interleaved(
        {
            "dense": lambda: dense.activations_and_output(x)[1],
            "sparse": lambda: trial.forward(call, layer, x),
        },
        ROUNDS,
    )
    return found["sparse"], found["dense"]


def _error(trial: Engine, block: mx.array) -> float:
    """Largest difference from the masked dense FFN, relative to its largest output."""
    ffn = trial.ffns[sparse_layer(trial)]
    f = ffn.shape[1]
    kept = (mx.arange(f) % 2 == 0).astype(block.dtype)
    neurons = mx.arange(0, f, 2, dtype=mx.uint32)[None]
    ours = ffn.sparse(block, neurons)
    return _off(ours, block, lambda x: ffn.down(ffn.activations(x) * kept))


def _off(ours: mx.array, x: mx.array, plain: Callable[[mx.array], mx.array]) -> float:
    """Difference from the plain path in its own dtype or, where that is less, in float32.

    Quantised products in bfloat16 may themselves be several per cent off: who is closer to the truth
    is not wrong.
    """
    dtypes = {x.dtype, mx.float32}
    return min(difference(ours, plain(x.astype(dtype))) for dtype in dtypes)


def _shortest(trial: Engine, x: mx.array, tick: Callable[[int], None]) -> int:
    """The least of LENGTHS, or a chunk, from which on a whole prompt's FFN is faster sparse."""
    dense = trial.ffns[sparse_layer(trial)]
    for i, length in enumerate(LENGTHS):
        plan = trial.plan(length, cached=0, after=0)
        if plan is not None:
            sparse, whole = _seconds(trial, plan, x[:, :length], dense)
            if sparse < MARGIN * whole:
                return length
        tick(i + 1)
    return CHUNK
