"""Which block size and strategy are fastest on this device, measured once and kept.

One FFN of the model runs over a chunk of random inputs, dense and by every candidate, interleaved.
Dense is a candidate: where nothing is faster the prompt stays dense. Each candidate is first checked
against the plain masked FFN; one that is wrong is reported and never used. Attention is measured the
same way: all queries of a chunk at once, as mlx-lm does, or in blocks.
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx

from .attention import Attention, by_queries
from .down import base_and_lora
from .engine import Call, Engine
from .ffn import GatedFFN
from .finding import home
from .limits import Shape
from .plan import CHUNK, Plan
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


@dataclass(frozen=True)
class Candidate:
    """Times in seconds of one FFN over a chunk; ``error`` against the plain path."""

    block_size: int
    strategy: str
    seconds: float
    error: float
    correct: bool


@dataclass(frozen=True)
class Choice:
    """What tuning found. block_size 0: dense."""

    block_size: int
    strategy: str
    shortest: int
    dense_seconds: float
    candidates: list[dict[str, Any]]
    attention_block: int = 0


def key(engine: Engine, shape: Shape) -> str:
    """What a choice depends on: device, system, versions, shapes, quantisation, settings."""
    ffn = engine.ffns[_sparse_layer(engine)]
    packed = sorted({_stored_as(m) for m in ffn.projections()})
    parts = [
        device(),
        f"{platform.system()} {platform.release()}",
        f"mlx {version('mlx')}",
        __version__,
        "x".join(map(str, ffn.shape)),
        f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}",
        " ".join(packed),
        str(_dtype(engine)).removeprefix("mlx.core."),
        f"{engine.config.sparsity:g}",
        engine.selector.name,
        engine.compensation,
        f"{_overhead(engine):.3f}",
    ]
    return ", ".join(parts)


def _stored_as(linear: Any) -> str:
    base, _ = base_and_lora(linear)
    if "scales" not in base:
        return "float"
    return f"{base.mode} {base.bits} bits/{base.group_size}"


def _overhead(engine: Engine) -> float:
    """FLOPs of selection and compensation, of the dense FFN's: tells ranks apart."""
    d, f = engine.ffns[0].shape
    paid = engine.selector.flops(128, 256, d, f)
    if engine.compensator is not None:
        paid += engine.compensator.flops(128, d, f // 2)
    return paid / (6.0 * 128 * d * f)


def device() -> str:
    """Name of the default device."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU {platform.machine()}"


def apply(engine: Engine, choice: Choice) -> None:
    """Let an engine run as chosen from now on."""
    config = engine.config
    if not choice.block_size:
        engine.config = replace(config, sparsity=0.0)
        engine.keep = [None] * len(engine.keep)
        engine.tuned_dense = True
        return
    engine.config = replace(
        config,
        block_size=choice.block_size,
        strategy=choice.strategy,
        shortest=choice.shortest,
        attention_block=choice.attention_block,
    )
    for ffn in engine.ffns:
        ffn.strategy = choice.strategy


def file() -> Path:
    return home().parent / "tuned.json"


def remembered(key: str) -> Optional[Choice]:
    """An earlier choice, or None; a damaged file is none."""
    try:
        return Choice(**json.loads(file().read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: str, choice: Choice) -> None:
    """Keep a choice; a folder that cannot be written to is no reason to stop."""
    try:
        known = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    known[key] = asdict(choice)
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        half = file().with_suffix(".writing")
        half.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        half.replace(file())
    except OSError:
        pass


def tune(
    engine: Engine,
    shape: Shape,
    largest: int = LARGEST,
    tick: Callable[[float], None] = lambda share: None,
) -> Choice:
    """Measure, and choose.

    Args:
        engine: Of an attached model; stays as it is.
        shape: Of the same model, for its attention.
        largest: Largest block size to try; larger ones are faster and a little less exact.
        tick: Called with the share that is done.
    """
    sizes = [b for b in BLOCKS if b <= largest]
    trials = [(sizes[-1], s) for s in STRATEGIES] + [(b, "") for b in sizes[:-1]]
    x, dense = _inputs(engine), []  # type: mx.array, list[float]
    found: list[Candidate] = []
    total = len(trials) + len(LENGTHS) + 1
    for done, (block, strategy) in enumerate(trials):
        strategy = strategy or _best(found).strategy
        found.append(_measured(_trial(engine, block, strategy), x, dense))
        tick((done + 1) / total)
    base, best = statistics.median(dense), _best(found)
    candidates = [asdict(c) for c in found]
    if not best.correct or best.seconds > MARGIN * base:
        return Choice(0, best.strategy, 0, base, candidates)
    chosen = _trial(engine, best.block_size, best.strategy)
    shortest = _shortest(chosen, x, lambda i: tick((len(trials) + i) / total))
    queries = attention_block(shape, x.dtype)
    return Choice(best.block_size, best.strategy, shortest, base, candidates, queries)


def _trial(engine: Engine, block: int, strategy: str) -> Engine:
    """The engine with another block size and strategy; the model's own is left alone."""
    config = replace(engine.config, block_size=block, strategy=strategy, shortest=0)
    ffns = [GatedFFN(f.mlp, f.family, strategy) for f in engine.ffns]
    return replace(engine, config=config, ffns=ffns, call=None)


def _sparse_layer(engine: Engine) -> int:
    """One that runs sparsely, from the middle; the first if none does."""
    layers = [i for i, keep in enumerate(engine.keep) if keep]
    return layers[len(layers) // 2] if layers else 0


def _best(found: list[Candidate]) -> Candidate:
    """The fastest correct one; the fastest if none is."""
    correct = [c for c in found if c.correct]
    return min(correct or found, key=lambda c: c.seconds)


def _dtype(engine: Engine) -> mx.Dtype:
    """Of the activations; scales of some quantisations are whole numbers."""
    base, _ = base_and_lora(engine.ffns[0].down)
    dtype: mx.Dtype = base.get("scales", base.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def _inputs(engine: Engine) -> mx.array:
    """Random FFN inputs (1, CHUNK, d), the scale of a norm's output."""
    d, _ = engine.ffns[0].shape
    x = mx.random.normal((1, CHUNK, d), key=mx.random.key(0))
    return x.astype(_dtype(engine))


def _measured(engine: Engine, x: mx.array, dense: list[float]) -> Candidate:
    """One candidate over a chunk; the times of the dense runs between go to ``dense``."""
    plan = engine.plan(x.shape[1], empty=False, after=CHUNK)
    assert plan is not None
    error = _error(engine, x[:, : plan.block_size])
    times = _interleaved(engine, plan, x, dense)
    config, tolerance = engine.config, TOLERANCE.get(x.dtype, 1e-2)
    seconds = statistics.median(times)
    correct = error <= tolerance
    return Candidate(config.block_size, config.strategy, seconds, error, correct)


def _interleaved(
    engine: Engine, plan: Plan, x: mx.array, dense: list[float]
) -> list[float]:
    """Seconds of the sparse FFN, after a first run that is not counted."""
    layer, times = _sparse_layer(engine), []
    ffn = engine.ffns[layer]
    engine.call = Call(plan, [{} for _ in engine.ffns])
    mx.eval(engine.forward(layer, x))
    for _ in range(ROUNDS):
        start = time.perf_counter()
        mx.eval(ffn.activations_and_output(x)[1])
        dense.append(time.perf_counter() - start)
        start = time.perf_counter()
        mx.eval(engine.forward(layer, x))
        times.append(time.perf_counter() - start)
    return times


def _error(engine: Engine, block: mx.array) -> float:
    """Largest difference from the masked dense FFN, relative to its largest output."""
    ffn = engine.ffns[_sparse_layer(engine)]
    f = ffn.shape[1]
    kept = (mx.arange(f) % 2 == 0).astype(block.dtype)
    plain = ffn.down(ffn.activations(block) * kept)
    neurons = mx.arange(0, f, 2, dtype=mx.uint32)[None]
    return _difference(ffn.sparse(block, neurons), plain)


def _difference(ours: mx.array, plain: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    ours, plain = ours.astype(mx.float32), plain.astype(mx.float32)
    largest = mx.maximum(mx.max(mx.abs(plain)), 1e-9)
    return float(mx.max(mx.abs(ours - plain)) / largest)


def _shortest(engine: Engine, x: mx.array, tick: Callable[[int], None]) -> int:
    """The least of LENGTHS, or a chunk, from which on a whole prompt's FFN is faster sparse."""
    for i, length in enumerate(LENGTHS):
        plan = engine.plan(length, empty=True, after=0)
        dense: list[float] = []
        if plan is not None:
            times = _interleaved(engine, plan, x[:, :length], dense)
            if statistics.median(times) < MARGIN * statistics.median(dense):
                return length
        tick(i + 1)
    return CHUNK


def attention_block(shape: Shape, dtype: mx.Dtype) -> int:
    """Queries per attention call that are fastest for a first chunk; 0: all of them."""
    q, k, v = (
        mx.random.normal(
            (1, heads, CHUNK, shape.head_dim), key=mx.random.key(i)
        ).astype(dtype)
        for i, heads in enumerate([shape.heads, shape.kv_heads, shape.kv_heads])
    )

    def whole(q: mx.array, k: mx.array, v: mx.array, *, mask: str) -> mx.array:
        scale = shape.head_dim**-0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    arms: dict[int, Attention] = {0: whole}
    plain = whole(q, k, v, mask="causal")
    for rows in ATTENTION_BLOCKS:
        arm = by_queries(whole, rows)
        if _difference(arm(q, k, v, mask="causal"), plain) <= TOLERANCE.get(
            dtype, 1e-2
        ):
            arms[rows] = arm
    times: dict[int, list[float]] = {rows: [] for rows in arms}
    for _ in range(ROUNDS):
        for rows, arm in arms.items():
            start = time.perf_counter()
            mx.eval(arm(q, k, v, mask="causal"))
            times[rows].append(time.perf_counter() - start)
    seconds = {rows: statistics.median(t) for rows, t in times.items()}
    best = min(seconds, key=lambda rows: seconds[rows])
    return best if seconds[best] < MARGIN * seconds[0] else 0


def summary(choice: Choice) -> str:
    """One line for the user, and one per candidate that is wrong."""
    wrong = [c for c in choice.candidates if not c["correct"]]
    lines = [
        f"block {c['block_size']}, {c['strategy']}: wrong by {c['error']:.1e}, not used"
        for c in wrong
    ]
    if not choice.block_size:
        return "\n".join(["Tuned: dense prefill is fastest on this device.", *lines])
    best = min(c["seconds"] for c in choice.candidates if c["correct"])
    line = (
        f"Tuned: blocks of {choice.block_size} tokens, {choice.strategy}; an FFN takes "
        f"{best / choice.dense_seconds:.2f} of its dense time. Prompts from "
        f"{choice.shortest} tokens on."
    )
    if choice.attention_block:
        line += f" Attention in blocks of {choice.attention_block} queries."
    return "\n".join([line, *lines])
