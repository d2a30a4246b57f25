"""Time to first token, sparse against stock mlx-lm, interleaved in one process.

Stock arms run mlx_lm.stream_generate on the detached model: its own classes, nothing of ours.
Each round runs every arm once, after a warm-up on a short prompt; medians over the rounds.

    python -m mlx_fastforward.bench.ttft --contexts 1024,1900
    python -m mlx_fastforward.bench.ttft --random llama-3.2-1b --layers 4 --contexts 1024,2048,4096
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.generate import stream_generate as stock_stream_generate
from mlx_lm.models import llama
from mlx_lm.utils import load_tokenizer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import demo
from ..adapter import load_adapter
from ..attachment import attach, detach, seat
from ..config import PrefillConfig
from ..engine import Engine
from ..generation import stream_generate
from ..loading import load
from .environment import describe

SHAPES = {
    "llama-3.2-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "llama-3.2-3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


@dataclass
class Row:
    """One arm. Times are medians in seconds; spread is (min, max)."""

    context: int
    block_size: int
    sparsity: float
    selector: str
    ttft_s: float
    spread_s: tuple[float, float]
    stock_ttft_s: float
    stock_spread_s: tuple[float, float]
    speedup: float
    ffn_sparsity: float


def random_model(name: str, layers: Optional[int], dtype: mx.Dtype) -> nn.Module:
    """A randomly initialised Llama of a real shape, with a small vocabulary."""
    shape = dict(SHAPES[name])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    args = llama.ModelArgs(
        model_type="llama",
        rms_norm_eps=1e-5,
        vocab_size=4096,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        **shape,  # type: ignore[arg-type]
    )
    model = llama.Model(args)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def stock_ttft(model: nn.Module, tokenizer: Any, ids: mx.array) -> float:
    start = time.perf_counter()
    next(stock_stream_generate(model, tokenizer, ids, max_tokens=2))
    return time.perf_counter() - start


def sparse_ttft(model: nn.Module, tokenizer: Any, ids: mx.array) -> tuple[float, float]:
    response = next(stream_generate(model, tokenizer, ids, max_tokens=2))
    return response.ttft, response.ffn_sparsity


def warm_up(model: nn.Module, tokenizer: Any, engines: list[Engine]) -> None:
    """First calls page weights in, compile kernels and compute column norms: not timed."""
    stock_ttft(model, tokenizer, mx.zeros(64, dtype=mx.int32))
    for engine in engines:
        ids = mx.zeros(engine.config.block_size + 2 * engine.edge, dtype=mx.int32)
        seat(model, engine)
        sparse_ttft(model, tokenizer, ids)
        detach(model)


def measure(
    model: nn.Module,
    tokenizer: Any,
    context: int,
    engines: list[Engine],
    rounds: int,
    tick: Any,
) -> list[Row]:
    """All arms at one context, interleaved round by round."""
    vocabulary = model.args.vocab_size
    ids = mx.random.randint(8, vocabulary, (context,))
    stock: list[float] = []
    sparse: list[list[float]] = [[] for _ in engines]
    skipped = [0.0] * len(engines)
    for _ in range(rounds):
        stock.append(stock_ttft(model, tokenizer, ids))
        tick()
        for i, engine in enumerate(engines):
            seat(model, engine)
            ttft, skipped[i] = sparse_ttft(model, tokenizer, ids)
            detach(model)
            mx.clear_cache()
            sparse[i].append(ttft)
            tick()
    base = statistics.median(stock)
    rows = []
    for engine, times, share in zip(engines, sparse, skipped):
        c, t = engine.config, statistics.median(times)
        rows.append(
            Row(
                context,
                c.block_size,
                c.sparsity,
                c.selector,
                t,
                (min(times), max(times)),
                base,
                (min(stock), max(stock)),
                base / t,
                share,
            )
        )
    return rows


def main(
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    random: Annotated[
        Optional[str], typer.Option(help=f"Random weights: {', '.join(SHAPES)}.")
    ] = None,
    layers: Annotated[Optional[int], typer.Option(help="With --random.")] = None,
    adapter: Optional[Path] = None,
    contexts: str = "1024,1900",
    blocks: str = "128,512",
    sparsities: str = "0.5",
    selectors: str = "probe",
    probe_every: int = 8,
    rounds: int = 5,
    dtype: Annotated[
        Optional[str], typer.Option(help="Default: the model's own; random: float32.")
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json")] = None,
) -> None:
    """Measure TTFT, sparse against stock."""
    if random is not None:
        if random not in SHAPES:
            raise typer.BadParameter(f"--random knows {', '.join(SHAPES)}.")
        net = random_model(random, layers, getattr(mx, dtype or "float32"))
        tokenizer = load_tokenizer(demo.MODEL)
    else:
        net, tokenizer = load(model or str(demo.MODEL), sparsity=0.0)
        detach(net)
        if dtype:
            net.set_dtype(getattr(mx, dtype))
    side = load_adapter(adapter) if adapter else None
    engines = []
    for s in selectors.split(","):
        for x in sparsities.split(","):
            for b in blocks.split(","):
                config = PrefillConfig(
                    float(x), int(b), selector=s, probe_every=probe_every
                )
                engines.append(attach(net, config, adapter=side))
                detach(net)
    sizes = [int(c) for c in contexts.split(",")]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("timing", total=len(sizes) * rounds * (len(engines) + 1))
        warm_up(net, tokenizer, engines)
        for context in sizes:
            rows += measure(
                net, tokenizer, context, engines, rounds, lambda: bar.advance(task)
            )
    name = random or model or "demo model"
    settings = {
        "model": f"{name}, {len(net.layers)} layers",
        "dtype": dtype or ("float32" if random else "the model's own"),
        "probe_every": probe_every,
        "rounds": rounds,
    }
    show(rows, settings)
    if json_file:
        report = {
            "environment": describe(),
            "settings": settings,
            "rows": [asdict(r) for r in rows],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def show(rows: list[Row], settings: dict[str, Any]) -> None:
    print(", ".join(f"{k} {v}" for k, v in (describe() | settings).items()))
    table = Table(
        "context", "block", "sparsity", "selector", "FFN skipped", "TTFT", "stock", "x"
    )
    for r in rows:
        table.add_row(
            f"{r.context:,}",
            str(r.block_size),
            f"{r.sparsity:.0%}",
            r.selector,
            f"{r.ffn_sparsity:.1%}",
            _time(r.ttft_s, r.spread_s),
            _time(r.stock_ttft_s, r.stock_spread_s),
            f"{r.speedup:.2f}",
        )
    Console(width=110).print(table)


def _time(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.2f} s ({spread[0]:.2f}-{spread[1]:.2f})"


if __name__ == "__main__":
    typer.run(main)
