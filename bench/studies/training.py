"""Time and memory of `train` at the size of a real model: random weights, a few layers.

python -m mlx_fastforward.bench.studies.training --random llama-3.2-1b --layers 4
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Optional

import mlx.core as mx
import typer
from mlx_lm.utils import load_tokenizer

from ... import demo
from ...train import estimate
from ...train.data import Sequences, open_corpus
from ...train.run import Run
from ...train.state import Settings
from ..environment import describe, resident
from ..speed.shapes import SHAPES, random_model


def main(
    random: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-3.2-1b",
    layers: Annotated[
        int, typer.Option(help="Of them all, the last is never fitted.")
    ] = 4,
    tokens: int = 8192,
    steps: int = 60,
    dtype: str = "float32",
    sequential: bool = False,
    folder: Annotated[Optional[Path], typer.Option(help="For the run's files.")] = None,
) -> None:
    """Fit a predictor for a model of random weights; phases per layer and 100k tokens."""
    model = random_model(random, layers, getattr(mx, dtype))
    tokenizer = load_tokenizer(demo.MODEL)
    settings = Settings(tokens, steps=steps, sequential=sequential)
    out = Path(tempfile.mkdtemp(dir=folder))
    data = open_corpus(None)
    parts = [
        Sequences(data, tokenizer, settings.length, 0, held) for held in (False, True)
    ]
    before, mx_before = resident(), mx.get_active_memory()
    mx.reset_peak_memory()
    run = Run(model, random, (parts[0], parts[1]), out, settings, lambda *_: None)
    start = time.perf_counter()
    try:
        run()
    finally:
        shutil.rmtree(out)
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    print(
        f"{random}, {layers} layers, {dtype}, {time.perf_counter() - start:.0f} s in all"
    )
    for phase, seconds in run.state.seconds.items():
        print(f"  {phase}: {seconds:.1f} s")
    done = run.state.tokens["dense"]
    capture = run.state.seconds["capture dense"]
    print(f"capture: {1e5 * capture / done:.0f} s per 100k tokens")
    print(f"predictors: {run.state.seconds['predictors'] / steps:.2f} s per step")
    print(
        f"disk: {estimate.bytes_per_token(run.base, 128) * 1e5 / 1e9:.2f} GB per 100k tokens"
    )
    peak = mx.get_peak_memory() - mx_before
    print(
        f"memory besides the model: {estimate.memory(run.base, run.settings) / 1e9:.2f} GB said, "
        f"{peak / 1e9:.2f} GB in mlx, {(resident() - before) / 1e9:.2f} GB more resident"
    )


if __name__ == "__main__":
    typer.run(main)
