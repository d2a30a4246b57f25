"""Which block size and strategy are fastest on this device, measured once and kept.

One FFN of the model runs over a chunk of random inputs, dense and by every candidate, interleaved.
Dense is a candidate: where nothing is faster the prompt stays dense. Each candidate is first checked
against the plain masked FFN; one that is wrong is reported and never used. Attention is measured the
same way: all queries of a chunk at once, as mlx-lm does, or in blocks.
"""

import json
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx

from .config import DeviceSettings
from .engine import Engine
from .files import write_text
from .model import linear
from .model.attention import Attention, by_queries
from .model.families import Heads
from .predictors.search import home
from .timing import interleaved
from .tokens.flops import dense_ffn, overhead
from .tokens.plan import CHUNK, Plan
from .tokens.split import TokenSplit
from .version import __version__

BLOCKS = (128, 256, 512, 1024, 2048)
LENGTHS = (512, 1024)  # short prompts: from which on is sparse faster?
STRATEGIES = ("chunk", "columns")  # "stored" costs memory: only who asks for it gets it
LARGEST = 1024  # of them by default
ROUNDS = 3
ATTENTION_BLOCKS = (256, 512)  # queries
MARGIN = 0.98  # a sparse candidate must beat dense by more than noise
# Largest error, relative to the largest output, by dtype.
TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 6e-2}

Tick = Callable[[float], None]  # the share that is done


@dataclass(frozen=True)
class Candidate:
    """Times in seconds of one FFN over a chunk; ``error`` against the plain path."""

    block_size: int
    strategy: str
    seconds: float
    dense_seconds: float
    error: float
    correct: bool

    @property
    def share(self) -> float:
        """Of the dense time."""
        return self.seconds / self.dense_seconds


@dataclass(frozen=True)
class Choice:
    """What tuning found: settings of the device, and the candidates that were measured."""

    device: DeviceSettings
    candidates: list[Candidate]


def key(engine: Engine, heads: Heads) -> str:
    """What a choice depends on: device, system, versions, shapes, quantisation, settings."""
    layer = _sparse_layer(engine)
    ffn = engine.ffns[layer]
    settings = engine.settings()
    parts = [
        device_name(),
        f"{platform.system()} {platform.release()}",
        f"mlx {version('mlx')}",
        __version__,
        "x".join(map(str, ffn.shape)),
        f"{heads.queries}/{heads.keys} heads of {heads.size}",
        " ".join(sorted({linear.stored_as(m) for m in ffn.projections()})),
        str(linear.dtype(ffn.down)).removeprefix("mlx.core."),
        f"{engine.config.sparsity:g}",
        settings["selector"],
        settings["compensator"],
        f"{_overhead(engine, layer):.3f}",
    ]
    return ", ".join(parts)


def _overhead(engine: Engine, layer: int) -> float:
    """FLOPs of selection and compensation, of the dense FFN's: tells ranks apart."""
    plan = Plan(head=128, blocks=1, block_size=128, tail=128)
    split, (d, f) = TokenSplit(plan, engine.selector.probe_every), engine.shapes[layer]
    parts = (f // 2, engine.selector, engine.compensator)
    return overhead(split, layer, d, f, *parts) / dense_ffn(128, d, f)


def device_name() -> str:
    """Name of the default device."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU {platform.machine()}"


def file() -> Path:
    return home().parent / "tuned.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remembered(key: str) -> Optional[DeviceSettings]:
    """An earlier choice, or None; a damaged file is none."""
    try:
        return DeviceSettings(**_known()[key])
    except (KeyError, TypeError, ValueError):
        return None


def remember(key: str, device: DeviceSettings) -> None:
    """Keep a choice; a folder that cannot be written to is no reason to stop."""
    known = _known() | {key: asdict(device)}
    try:
        write_text(file(), json.dumps(known, indent=2) + "\n")
    except OSError:
        pass


def tune(
    engine: Engine,
    heads: Heads,
    largest: int = LARGEST,
    tick: Tick = lambda share: None,
) -> Choice:
    """Measure, and choose.

    Args:
        engine: Of a model; stays as it is.
        heads: Of the same model, for its attention.
        largest: Largest block size to try; larger ones are faster and a little less exact.
    """
    sizes = [b for b in BLOCKS if b <= largest]
    trials = [(sizes[-1], s) for s in STRATEGIES] + [(b, "") for b in sizes[:-1]]
    x, found = _inputs(engine), []  # type: mx.array, list[Candidate]
    total = len(trials) + len(LENGTHS) + 1
    for done, (block, strategy) in enumerate(trials):
        strategy = strategy or _best(found).strategy
        found.append(_measured(_trial(engine, block, strategy), x))
        tick((done + 1) / total)
    best = _best(found)
    if not best.correct or best.share > MARGIN:
        return Choice(DeviceSettings(dense=True), found)
    trial = _trial(engine, best.block_size, best.strategy)
    shortest = _shortest(trial, x, lambda i: tick((len(trials) + i) / total))
    queries = attention_block(heads, x.dtype)
    device = replace(trial.device, shortest=shortest, attention_block=queries)
    return Choice(device, found)


def _trial(engine: Engine, block: int, strategy: str) -> Engine:
    """The engine with another block size and strategy; the model's own is left alone."""
    trial = engine.on(DeviceSettings(block, strategy))
    return replace(trial, config=replace(engine.config, block_size=None))


def _sparse_layer(engine: Engine) -> int:
    """One that runs sparsely, from the middle; the first if none does."""
    layers = [i for i, keep in enumerate(engine.keep) if keep]
    return layers[len(layers) // 2] if layers else 0


def _best(found: list[Candidate]) -> Candidate:
    """The fastest correct one; the fastest if none is."""
    correct = [c for c in found if c.correct]
    return min(correct or found, key=lambda c: c.share)


def _inputs(engine: Engine) -> mx.array:
    """Random FFN inputs (1, CHUNK, d), the scale of a norm's output."""
    layer = _sparse_layer(engine)
    d, _ = engine.shapes[layer]
    x = mx.random.normal((1, CHUNK, d), key=mx.random.key(0))
    return x.astype(linear.dtype(engine.ffns[layer].down))


def _measured(trial: Engine, x: mx.array) -> Candidate:
    """One candidate over a chunk."""
    plan = trial.plan(x.shape[1], empty=False, after=CHUNK)
    assert plan is not None
    error = _error(trial, x[:, : plan.block_size])
    sparse, dense = _seconds(trial, plan, x)
    device, correct = trial.device, error <= TOLERANCE.get(x.dtype, 1e-2)
    size, strategy = device.block_size, device.strategy
    return Candidate(size, strategy, sparse, dense, error, correct)


def _seconds(trial: Engine, plan: Plan, x: mx.array) -> tuple[float, float]:
    """Of the sparse FFN and of the dense one, interleaved."""
    layer, call = _sparse_layer(trial), trial.call(plan)
    found = interleaved(
        {
            "dense": lambda: trial.ffns[layer].activations_and_output(x)[1],
            "sparse": lambda: trial.forward(call, layer, x),
        },
        ROUNDS,
    )
    return found["sparse"], found["dense"]


def _error(trial: Engine, block: mx.array) -> float:
    """Largest difference from the masked dense FFN, relative to its largest output."""
    ffn = trial.ffns[_sparse_layer(trial)]
    f = ffn.shape[1]
    kept = (mx.arange(f) % 2 == 0).astype(block.dtype)
    plain = ffn.down(ffn.activations(block) * kept)
    neurons = mx.arange(0, f, 2, dtype=mx.uint32)[None]
    return difference(ffn.sparse(block, neurons), plain)


def difference(ours: mx.array, plain: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    ours, plain = ours.astype(mx.float32), plain.astype(mx.float32)
    largest = mx.maximum(mx.max(mx.abs(plain)), 1e-9)
    return float(mx.max(mx.abs(ours - plain)) / largest)


def _shortest(trial: Engine, x: mx.array, tick: Callable[[int], None]) -> int:
    """The least of LENGTHS, or a chunk, from which on a whole prompt's FFN is faster sparse."""
    for i, length in enumerate(LENGTHS):
        plan = trial.plan(length, empty=True, after=0)
        if plan is not None:
            sparse, dense = _seconds(trial, plan, x[:, :length])
            if sparse < MARGIN * dense:
                return length
        tick(i + 1)
    return CHUNK


def attention_block(heads: Heads, dtype: mx.Dtype) -> int:
    """Queries per attention call that are fastest for a first chunk; 0: all of them."""
    q, k, v = (
        mx.random.normal((1, n, CHUNK, heads.size), key=mx.random.key(i)).astype(dtype)
        for i, n in enumerate([heads.queries, heads.keys, heads.keys])
    )

    def whole(q: mx.array, k: mx.array, v: mx.array, *, mask: str) -> mx.array:
        scale = heads.size**-0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    arms: dict[int, Attention] = {0: whole}
    plain = whole(q, k, v, mask="causal")
    for rows in ATTENTION_BLOCKS:
        arm = by_queries(whole, rows)
        error = difference(arm(q, k, v, mask="causal"), plain)
        if error <= TOLERANCE.get(dtype, 1e-2):
            arms[rows] = arm
    seconds = interleaved(
        {rows: lambda arm=arm: arm(q, k, v, mask="causal") for rows, arm in arms.items()},  # type: ignore
        ROUNDS,
    )
    best = min(seconds, key=lambda rows: seconds[rows])
    return best if seconds[best] < MARGIN * seconds[0] else 0


def summary(choice: Choice) -> str:
    """One line for the user, and one per candidate that is wrong."""
    wrong = [c for c in choice.candidates if not c.correct]
    lines = [
        f"block {c.block_size}, {c.strategy}: wrong by {c.error:.1e}, not used"
        for c in wrong
    ]
    device = choice.device
    if device.dense:
        return "\n".join(["Tuned: dense prefill is fastest on this device.", *lines])
    line = (
        f"Tuned: blocks of {device.block_size} tokens, {device.strategy}; an FFN takes "
        f"{_best(choice.candidates).share:.2f} of its dense time. Prompts from "
        f"{device.shortest} tokens on."
    )
    if device.attention_block:
        line += f" Attention in blocks of {device.attention_block} queries."
    return "\n".join([line, *lines])
