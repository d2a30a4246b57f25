"""Time to first token, sparse against stock mlx-lm, interleaved in one process.

Stock arms run mlx_lm.stream_generate on the detached model: its own classes, nothing of ours. Each
round runs every arm once, after a warm-up; medians over the rounds.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate as stock_stream_generate

from ..attachment import detach, seat
from ..engine import Engine
from ..families import family_of, float_dtype, layer_mlps
from ..generation import stream_generate
from ..limits import Shape, ideal_speedup
from ..plan import CHUNK

DECODED = 16  # tokens after the first, for the decoding speed


@dataclass
class Row:
    """One arm at one context. Times in seconds, medians; spread is (min, max).

    ideal_speedup is what the FLOPs allow; ffn_share is the FFNs' measured share of stock's time, and
    reachable_speedup what skipping their FLOPs gives if all else takes as long as in stock.
    """

    context: int
    sparsity: float
    block_size: int
    selector: str
    strategy: str
    attention_block: int
    ttft_s: float
    ttft_spread_s: tuple[float, float]
    stock_ttft_s: float
    stock_ttft_spread_s: tuple[float, float]
    speedup: float
    ideal_speedup: float
    ffn_share: float
    reachable_speedup: float
    ffn_flops_skipped: float
    prefill_tps: float
    peak_memory_gb: float
    stock_peak_memory_gb: float
    decode_tps: float
    stock_decode_tps: float


@dataclass
class Timings:
    """One arm's runs."""

    ttft: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    skipped: float = 0.0

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ttft), max(self.ttft)


def run(
    generate: Any, model: nn.Module, tokenizer: Any, ids: mx.array, to: Timings
) -> None:
    """One generation: time to the first token, tokens per second after it, peak memory."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    times = []
    for response in generate(model, tokenizer, ids, max_tokens=DECODED + 1):
        times.append(time.perf_counter())
    to.ttft.append(times[0] - start)
    if len(times) > 1:
        to.decode.append((len(times) - 1) / (times[-1] - times[0]))
    to.peak.append(mx.get_peak_memory() / 1e9)
    to.skipped = getattr(response, "ffn_sparsity", 0.0)


def warm_up(model: nn.Module, tokenizer: Any, engines: list[Engine]) -> None:
    """First calls page weights in, compile kernels and compute column norms: not timed."""
    run(stock_stream_generate, model, tokenizer, mx.zeros(64, mx.int32), Timings())
    for engine in engines:
        seat(model, engine)
        ids = mx.zeros(engine.shortest + 1, dtype=mx.int32)
        run(stream_generate, model, tokenizer, ids, Timings())
        detach(model)


def measure(
    model: nn.Module,
    tokenizer: Any,
    ids: mx.array,
    engines: list[Engine],
    rounds: int,
    delay: float,
    tick: Callable[[], None],
) -> list[Row]:
    """All arms on one prompt, interleaved round by round, ``delay`` seconds before each run."""
    stock, sparse = Timings(), [Timings() for _ in engines]
    ffns = []
    for _ in range(rounds):
        ffns.append(ffn_seconds(model, ids.size))
        time.sleep(delay)
        run(stock_stream_generate, model, tokenizer, ids, stock)
        tick()
        for engine, timings in zip(engines, sparse):
            time.sleep(delay)
            seat(model, engine)
            run(stream_generate, model, tokenizer, ids, timings)
            detach(model)
            tick()
    shape = Shape.of(model)
    share = statistics.median(ffns) / statistics.median(stock.ttft)
    pairs = zip(engines, sparse)
    return [row(shape, ids.size, e, stock, timings, share) for e, timings in pairs]


def ffn_seconds(model: nn.Module, tokens: int) -> float:
    """What the FFNs of a stock prefill take, from one of them over one chunk."""
    mlp = layer_mlps(model, family_of(model))[0]
    chunk, width = min(tokens, CHUNK), Shape.of(model).hidden
    x = mx.random.normal((1, chunk, width)).astype(float_dtype(model))
    mx.eval(x)
    start = time.perf_counter()
    mx.eval(mlp(x))
    return (time.perf_counter() - start) * tokens / chunk * (len(model.layers) - 1)


def row(
    shape: Shape,
    context: int,
    engine: Engine,
    stock: Timings,
    sparse: Timings,
    share: float,
) -> Row:
    config, ttft = engine.config, statistics.median(sparse.ttft)
    stock_ttft = statistics.median(stock.ttft)
    return Row(
        context,
        config.sparsity,
        config.block_size,
        engine.selector.name,
        config.strategy,
        config.attention_block,
        ttft,
        sparse.spread,
        stock_ttft,
        stock.spread,
        stock_ttft / ttft,
        ideal_speedup(shape, context, engine),
        share,
        1 / (1 - share * sparse.skipped),
        sparse.skipped,
        context / ttft,
        max(sparse.peak),
        max(stock.peak),
        statistics.median(sparse.decode or [0.0]),
        statistics.median(stock.decode or [0.0]),
    )


def arm_name(row: Row) -> str:
    """Short, for tables and pictures."""
    if not row.sparsity:
        return "tuned: dense"
    parts = [
        f"{row.selector} {row.sparsity:.0%}",
        f"block {row.block_size}",
        row.strategy,
    ]
    if row.attention_block:
        parts.append(f"attention by {row.attention_block}")
    return ", ".join(parts)
