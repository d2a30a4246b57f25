"""tune's table for random weights of any size, dtype and packing: every candidate with its time.

python -m mlx_fastforward.bench.studies.candidates --dtype bfloat16 --bits 4
"""

from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.console import Console

from ...attachment import attach
from ...cli.first_use import tuning_bar
from ...cli.tables import say, show
from ...cli.tune import table
from ...config import DeviceSettings
from ...tuned import heads_of
from ...tuning import search
from ..environment import describe
from . import zoo

HEAD = 64  # size of an attention head


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
    say(f"Chosen: {choice.device}")


if __name__ == "__main__":
    typer.run(main)
