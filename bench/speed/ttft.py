"""Time to first token, sparse against stock mlx-lm, interleaved in one process.

Stock arms run mlx_lm.stream_generate on the detached model: its own classes, nothing of ours. Each
round runs every arm once, after a warm-up; medians over the rounds.
"""

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate as stock_stream_generate

from ...attachment import seated
from ...engine import Engine
from ...generation import stream_generate
from ...model.families import (
    Heads,
    float_dtype,
    layer_norm_weights,
    mixers,
    prefilled,
)
from ...model.proof import reach
from ...tokens.flops import ideal_speedup
from ...tokens.plan import CHUNK

DECODED = 16  # tokens after the first, for the decoding speed


@dataclass
class Row:
    """One arm at one context. Times in seconds, medians; spread is (min, max).

    ideal_speedup is what the FLOPs allow; ffn_share is the FFNs' measured share of stock's time, and
    reachable_speedup what skipping their FLOPs gives if all else takes as long as in stock.
    """

    context: int
    sparsity: float
    prune_tokens: float
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
    unpack: int = 0
    half: bool = False


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
        ids = mx.zeros(engine.shortest + 1, dtype=mx.int32)
        with seated(model, engine):
            run(stream_generate, model, tokenizer, ids, Timings())


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
            with seated(model, engine):
                run(stream_generate, model, tokenizer, ids, timings)
            tick()
    share = statistics.median(ffns) / statistics.median(stock.ttft)
    return [
        row(ids.size, engine, stock, timings, share, ideal(model, engine, ids.size))
        for engine, timings in zip(engines, sparse)
    ]


def ideal(model: nn.Module, engine: Engine, tokens: int) -> float:
    """The speed-up that the FLOPs of a prompt allow."""
    heads, n = Heads.of(model, engine.shapes[0][0]), engine.ffns[0].share[1]
    heads = replace(heads, queries=heads.queries // n, keys=heads.keys // n)
    return ideal_speedup(mixers(model), heads, tokens, engine.counted(tokens))


def ffn_seconds(model: nn.Module, tokens: int) -> float:
    """What the FFNs of a stock prefill take, from the first of them over one chunk."""
    chunk = min(tokens, CHUNK)
    width, dtype = layer_norm_weights(model)[0].size, float_dtype(model)
    x = mx.random.normal((1, chunk, width)).astype(dtype)
    mx.eval(x)
    ffns = reach(model).ffns
    start = time.perf_counter()
    mx.eval(ffns[0].mlp(x))
    return (time.perf_counter() - start) * tokens / chunk * len(prefilled(ffns))


def row(
    context: int,
    engine: Engine,
    stock: Timings,
    sparse: Timings,
    share: float,
    ideal: float,
) -> Row:
    settings, ttft = engine.settings(), statistics.median(sparse.ttft)
    stock_ttft = statistics.median(stock.ttft)
    return Row(
        context,
        settings["sparsity"],
        settings["prune_tokens"],
        settings["block_size"],
        settings["selector"],
        settings["strategy"],
        settings["attention_block"],
        ttft,
        sparse.spread,
        stock_ttft,
        stock.spread,
        stock_ttft / ttft,
        ideal,
        share,
        1 / (1 - share * sparse.skipped),
        sparse.skipped,
        context / ttft,
        max(sparse.peak),
        max(stock.peak),
        statistics.median(sparse.decode or [0.0]),
        statistics.median(stock.decode or [0.0]),
        settings["unpack"],
        settings["half"],
    )


def arm_name(row: Row) -> str:
    """Short, for tables and pictures."""
    if not row.sparsity and not row.prune_tokens:
        return f"dense, {_multiplied(row)}" if row.unpack else "tuned: dense"
    parts = []
    if row.sparsity:
        parts.append(f"{row.selector} {row.sparsity:.0%}")
    if row.prune_tokens:
        parts.append(f"tokens {row.prune_tokens:.0%}")
    parts += [f"block {row.block_size}", row.strategy]
    if row.attention_block:
        parts.append(f"attention by {row.attention_block}")
    if row.unpack:
        parts.append(_multiplied(row))
    return ", ".join(parts)


def _multiplied(row: Row) -> str:
    return "float16" if row.half else "dequantised first"
