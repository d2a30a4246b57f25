"""Time to first token, sparse against stock mlx-lm, interleaved in one process.

Stock arms run mlx_lm.stream_generate on the detached model: its own classes, nothing of ours. Each
round runs every arm once, after a warm-up; medians over the rounds.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate as stock_stream_generate
from mlx_lm.models.cache import make_prompt_cache

from ...attachment import seated
from ...engine import Engine
from ...errors import FastForwardError
from ...generation import stream_generate
from ...model.families import (
    Mixer,
    context_length,
    float_dtype,
    layer_norm_weights,
    prefilled,
)
from ...model.ffn import GatedFFN
from ...speculative import Speculative
from ...tokens.plan import CHUNK
from ..flops import cost

DECODED = 16  # tokens after the first, for the decoding speed
ROOM = 32  # tokens of the model's context that are left for them


@dataclass(frozen=True)
class Arm:
    """What runs; with a reader the model reads only a part of the prompt."""

    engine: Engine
    reader: Optional[Speculative] = None

    @property
    def stock(self) -> bool:
        """Whether nothing was asked to be left out."""
        config = self.engine.config
        return not (config.sparsity or config.prune_tokens or self.reader)

    def generate(
        self, model: nn.Module, tokenizer: Any, ids: mx.array, max_tokens: int
    ) -> Iterator[Any]:
        """As mlx-lm's stream_generate; whoever scores tokens has not seen this prompt before."""
        if self.reader is None:
            yield from stream_generate(model, tokenizer, ids, max_tokens)
            return
        self.reader.scorer.forget()
        tokens: Any = ids.tolist()
        cache = make_prompt_cache(model)
        yield from self.reader.stream_generate(tokenizer, tokens, 0, cache, max_tokens)
        for note in self.reader.take_notes():
            raise FastForwardError(note)


@dataclass
class Row:
    """One arm at one context. Times in seconds, medians; spread is (min, max).

    ideal_speedup is what the FLOPs allow, a draft's own counted; ffn_share is the FFNs' measured share of stock's time, and
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
    keep: float = 1.0
    prefill_draft: str = ""


@dataclass
class Timings:
    """One arm's runs."""

    ttft: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    skipped: float = 0.0
    read: Optional[int] = None  # of the prompt's tokens, where not all

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
    to.read = getattr(response, "read_tokens", None)


def warm_up(model: nn.Module, tokenizer: Any, arms: list[Arm]) -> None:
    """First calls page weights in, compile kernels and compute column norms: not timed."""
    run(stock_stream_generate, model, tokenizer, mx.zeros(64, mx.int32), Timings())
    for arm in arms:
        ids = mx.zeros(arm.engine.shortest + 1, dtype=mx.int32)
        with seated(model, arm.engine):
            run(arm.generate, model, tokenizer, ids, Timings())


def default_contexts(model: nn.Module) -> list[int]:
    """512 to 4,096 tokens, as the model's context allows; half of it where that is too short."""
    limit = context_length(model) or 4096
    found = [c for c in (512, 1024, 2048, 4096) if c + ROOM <= limit]
    return found or [limit // 2]


def benchmark(
    model: nn.Module,
    tokenizer: Any,
    arms: list[Arm],
    contexts: list[int],
    rounds: int,
    delay: float = 0,
    tick: Callable[[], None] = lambda: None,
    layers: Optional[list[Mixer]] = None,
) -> list[Row]:
    """All arms on random prompts of these lengths, warmed up first; see measure()."""
    warm_up(model, tokenizer, arms)
    rows: list[Row] = []
    for tokens in contexts:
        ids = mx.random.randint(8, 4096, (tokens,), key=mx.random.key(tokens))
        rows += measure(model, tokenizer, ids, arms, rounds, delay, tick, layers)
    return rows


def measure(
    model: nn.Module,
    tokenizer: Any,
    ids: mx.array,
    arms: list[Arm],
    rounds: int,
    delay: float,
    tick: Callable[[], None],
    layers: Optional[list[Mixer]] = None,
) -> list[Row]:
    """All arms on one prompt, interleaved round by round, ``delay`` seconds before each run.

    Args:
        layers: mixers() of the whole model, where only some of its layers are here.
    """
    stock, sparse = Timings(), [Timings() for _ in arms]
    ffns = []
    for _ in range(rounds):
        ffns.append(ffn_seconds(model, arms[0].engine.ffns, ids.size))
        time.sleep(delay)
        run(stock_stream_generate, model, tokenizer, ids, stock)
        tick()
        for arm, timings in zip(arms, sparse):
            time.sleep(delay)
            with seated(model, arm.engine):
                run(arm.generate, model, tokenizer, ids, timings)
            tick()
    share = statistics.median(ffns) / statistics.median(stock.ttft)
    return [
        row(model, ids.size, arm, stock, timings, share, layers)
        for arm, timings in zip(arms, sparse)
    ]


def ffn_seconds(model: nn.Module, ffns: list[GatedFFN], tokens: int) -> float:
    """What the FFNs of a stock prefill take, from the first of them that is here, over one chunk."""
    chunk = min(tokens, CHUNK)
    width, dtype = layer_norm_weights(model)[0].size, float_dtype(model)
    x = mx.random.normal((1, chunk, width)).astype(dtype)
    mx.eval(x)
    here = set(map(id, model.modules()))
    mlps = [ffn.mlp for ffn in ffns]
    mlp = next((m for m in mlps if id(m) in here), mlps[0])
    start = time.perf_counter()
    mx.eval(mlp(x))
    return (time.perf_counter() - start) * tokens / chunk * len(prefilled(ffns))


def row(
    model: nn.Module,
    context: int,
    arm: Arm,
    stock: Timings,
    sparse: Timings,
    share: float,
    layers: Optional[list[Mixer]] = None,
) -> Row:
    settings, ttft = arm.engine.settings(), statistics.median(sparse.ttft)
    stock_ttft, skipped = statistics.median(stock.ttft), sparse.skipped
    reader = arm.reader if sparse.read is not None else None
    scorer = None if reader is None else reader.scorer
    found = cost(model, arm.engine, context, scorer, sparse.read, layers)
    if reader is not None:  # the engine counts what is read alone
        skipped = found.ffn.sparsity
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
        found.speedup,
        share,
        1 / (1 - share * skipped),
        skipped,
        context / ttft,
        max(sparse.peak),
        max(stock.peak),
        statistics.median(sparse.decode or [0.0]),
        statistics.median(stock.decode or [0.0]),
        settings["unpack"],
        settings["half"],
        1.0 if reader is None else reader.config.keep,
        "" if reader is None else reader.scorer.name,
    )


def arm_name(row: Row) -> str:
    """Short, for tables and pictures."""
    parts = []
    if row.keep < 1:
        parts.append(f"keep {row.keep:.0%} by {row.prefill_draft}")
    if not row.sparsity and not row.prune_tokens:
        if parts:
            return parts[0]
        return f"dense, {_multiplied(row)}" if row.unpack else "tuned: dense"
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


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Each arm's rows by context, under its name."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.context):
        found.setdefault(arm_name(row), []).append(row)
    return found


def _multiplied(row: Row) -> str:
    return "float16" if row.half else "dequantised first"
