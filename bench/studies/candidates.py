"""tune's table for random weights of any size, dtype and packing: every candidate with its time.

python -m mlx_fastforward.bench.studies.candidates --dtype bfloat16 --bits 4

Below it, what tune does not try: twice as many tokens per call, beside two calls of the usual size.
"""

from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.console import Console
from rich.table import Table

from ...attachment import attach
from ...cli.first_use import tuning_bar
from ...cli.tables import say, show
from ...cli.tune import table
from ...config import DeviceSettings
from ...engine import Engine
from ...model.attention import by_queries
from ...model.families import Heads
from ...timing import Ways, interleaved
from ...tokens.plan import CHUNK
from ...tuned import heads_of, sparse_layer
from ...tuning import search
from ..environment import describe
from . import zoo

HEAD = 64  # size of an attention head


def layer(engine: Engine, heads: Heads, calls: int, dtype: mx.Dtype) -> list[mx.array]:
    """A layer's FFN and attention over two chunks, in so many calls: outputs of each."""
    at, n = sparse_layer(engine), 2 * CHUNK // calls
    d, _ = engine.shapes[at]
    x = mx.random.normal((1, 2 * CHUNK, d), key=mx.random.key(0)).astype(dtype)
    q, k, v = (
        mx.random.normal((1, h, 2 * CHUNK, heads.size), key=mx.random.key(h))
        for h in (heads.queries, heads.keys, heads.keys)
    )
    whole = mx.fast.scaled_dot_product_attention
    rows = engine.device.attention_block
    attend = by_queries(whole, rows) if rows else whole
    out = []
    for end in range(n, 2 * CHUNK + 1, n):
        part = x[:, end - n : end]
        plan = None if engine.device.dense else engine.plan(n, False, CHUNK)
        if plan is None:
            out.append(engine.ffns[at].activations_and_output(part)[1])
        else:
            out.append(engine.forward(engine.call(plan), at, part))
        seen = [a[:, :, :end].astype(dtype) for a in (k, v)]
        ask = q[:, :, end - n : end].astype(dtype)
        out.append(attend(ask, *seen, scale=HEAD**-0.5, mask="causal"))
    return out


def main(
    hidden: int = 256,
    neurons: int = 1024,
    dtype: str = "float32",
    bits: Annotated[int, typer.Option(help="Quantised weights; 0: float.")] = 0,
    largest: Annotated[int, typer.Option(help="Largest block.")] = 1024,
    limit: Annotated[float, typer.Option(help="Seconds, about.")] = 1e9,
) -> None:
    """Time every candidate on this device."""
    heads = hidden // HEAD
    model = zoo.tiny(
        "llama",
        hidden_size=hidden,
        intermediate_size=neurons,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD,
    )
    model.set_dtype(getattr(mx, dtype))
    if bits:
        nn.quantize(model, 64, bits)
    env = describe() | {"shape": f"{hidden}x{neurons}", "bits": bits, "dtype": dtype}
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    engine = attach(model, device=DeviceSettings())
    sizes = heads_of(model, engine)
    with tuning_bar(Console(stderr=True)) as tick:
        choice = search(engine, sizes, largest, tick, limit)
    show(table(choice))
    found = Table("tokens per call", "ms for two chunks of a layer")
    best, kind = engine.on(choice.device), getattr(mx, dtype)
    ways: Ways = {n: lambda n=n: layer(best, sizes, n, kind) for n in (2, 1)}
    for n, seconds in interleaved(ways, 3).items():
        found.add_row(f"{2 * CHUNK // n:,}", f"{seconds * 1e3:.1f}")
    show(found)
    say(f"Chosen: {choice.device}")


if __name__ == "__main__":
    typer.run(main)
