"""Where the time of a chunk of 2,048 tokens goes, piece by piece, in the shape of a real model.

python -m mlx_fastforward.bench.studies.breakdown --shape llama-3.2-1b
"""

import io
import statistics
import time
from typing import Annotated, Any, Callable

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.table import Table

from ...attachment import seated
from ...build import engine_for
from ...config import STRATEGIES, DeviceSettings, PrefillConfig
from ...engine import Engine
from ...model.attention import by_queries
from ...model.families import Heads
from ...model.gather import transposed
from ...timing import interleaved
from ...tokens.plan import CHUNK
from ..environment import describe
from ..speed import shapes

BLOCKS = (128, 256, 512, 1024, 2048)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    return interleaved({"": run}, rounds)[""]


def normal(*size: int, dtype: mx.Dtype) -> mx.array:
    x = mx.random.normal(size).astype(dtype)
    mx.eval(x)
    return x


def pieces(
    d: int, f: int, heads: Heads, dtype: mx.Dtype
) -> dict[str, tuple[Callable[[], Any], float]]:
    """What a chunk consists of, and the FLOPs of products."""
    k = f // 2
    x, w, down = (normal(*n, dtype=dtype) for n in ((CHUNK, d), (f, d), (d, f)))
    gate, up = (normal(CHUNK, f, dtype=dtype) for _ in range(2))
    neurons = mx.sort(mx.random.permutation(f)[:k])
    q, key = (
        normal(1, n, CHUNK, heads.size, dtype=dtype)
        for n in (heads.queries, heads.keys)
    )
    scores = normal(heads.queries, CHUNK, CHUNK, dtype=dtype)
    mx.eval(neurons)

    def attention(q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, **kwargs)

    def gemm(n: int) -> tuple[Callable[[], Any], float]:
        a, b = x[:n], w[:k]
        mx.eval(a, b)
        return lambda: a @ b.T, 2.0 * n * d * k

    found = {f"GEMM of {n:,} tokens, half of the neurons": gemm(n) for n in BLOCKS}
    rest: dict[str, Callable[[], Any]] = {
        "SwiGLU of all neurons": lambda: swiglu(gate, up),
        "take half of the rows": lambda: mx.take(w, neurons, axis=0),
        "take half of the columns": lambda: mx.take(down, neurons, axis=1),
        "transpose the down projection": lambda: transposed(down),
        "attention": lambda: attention(q, key, key, mask="causal"),
        "attention, 256 queries at a time": lambda: by_queries(attention, 256)(
            q, key, key, mask="causal"
        ),
        "softmax of all scores": lambda: mx.softmax(scores, axis=-1, precise=True),
    }
    return found | {name: (run, 0.0) for name, run in rest.items()}


def sparse_ffn(engine: Engine, x: mx.array) -> Callable[[], Any]:
    """A layer's FFN over a chunk in the middle of a prompt."""
    plan = engine.plan(CHUNK, cached=CHUNK, after=CHUNK)
    assert plan is not None
    call = engine.call(plan)
    return lambda: engine.forward(call, 0, x)


def graph(model: nn.Module) -> tuple[float, int]:
    """Seconds of Python to build a chunk's graph, and its nodes; nothing is computed."""
    times = []
    for _ in range(5):
        cache = make_prompt_cache(model)
        start = time.perf_counter()
        model(mx.zeros((1, CHUNK), mx.int32), cache=cache)
        times.append(time.perf_counter() - start)
    dot = io.StringIO()
    mx.export_to_dot(dot, *[a for c in cache for a in (c.keys, c.values)])
    return statistics.median(times), dot.getvalue().count("shape=rectangle")


def main(
    shape: Annotated[str, typer.Option(help=", ".join(shapes.SHAPES))] = "llama-3.2-1b",
    dtype: str = "float32",
    layers: Annotated[int, typer.Option(min=2, help="For the graph.")] = 2,
    num_trials: Annotated[int, typer.Option("--num-trials", "-n", min=1)] = 3,
) -> None:
    """Time the pieces of a chunk, and an FFN by block size and strategy."""
    kind = getattr(mx, dtype)
    model = shapes.random_model(shape, layers, kind)
    predictor = shapes.random_predictor(model)
    env = describe() | {"shape": shape, "dtype": dtype, "trials": num_trials}
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    console = Console(width=100)
    table = Table("piece", "ms", "GFLOP/s")
    d, f = engine_for(model).shapes[0]
    found = pieces(d, f, Heads.of(model, d), kind)
    for name, (run, flops) in found.items():
        took = seconds(run, num_trials)
        speed = f"{flops / took / 1e9:.0f}" if flops else ""
        table.add_row(name, f"{took * 1e3:.1f}", speed)
    console.print(table)
    mx.clear_cache()
    x = normal(1, CHUNK, d, dtype=kind)
    dense = seconds(lambda: model.layers[0].mlp(x), num_trials)
    table = Table("sparse FFN, of dense", *map(str, BLOCKS))
    for strategy in STRATEGIES:
        shares = []
        for block in BLOCKS:
            device = DeviceSettings(block, strategy)
            engine = engine_for(model, None, predictor, device=device)
            shares.append(seconds(sparse_ffn(engine, x), num_trials) / dense)
        table.add_row(strategy, *(f"{share:.2f}" for share in shares))
    console.print(f"dense FFN: {dense * 1e3:.0f} ms")
    console.print(table)
    table = Table("a chunk's graph", "Python ms", "nodes per layer")
    arms: dict[str, Any] = {"stock": None}
    for b in BLOCKS:
        arms[f"block {b}"] = engine_for(model, PrefillConfig(block_size=b), predictor)
    for name, engine in arms.items():
        with seated(model, engine):
            took, nodes = graph(model)
        each = nodes / (layers - 1)  # the last layer's FFN is not run
        table.add_row(name, f"{took * 1e3:.1f}", f"{each:.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
