"""Time and peak memory of a conversion, on a checkpoint of random weights in a large model's shape.

python -m mlx_fastforward.bench.studies.conversion
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import numpy as np
import typer

from ...convert import conversion
from ...convert.files import open_checkpoint
from ...predictors.base import BaseModel
from ...predictors.file import TENSORS_NAME, load_predictor, save_predictor
from ..environment import describe, resident

app = typer.Typer(add_completion=False)
BASE = BaseModel("8B shape", "llama", 32, 4096, 14336, "random")
RANK, HIDDEN = 256, 512


@functools.cache
def matrix(*shape: int) -> np.ndarray:
    """Random float32 weights; the same for every layer, so that making them takes no time."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)


def state_dict() -> dict[str, np.ndarray]:
    """The checkpoint as PyTorch stores it: Linear weights (out, in)."""
    d, f = BASE.hidden_size, BASE.widest
    shapes = {
        "predictor.query": (d,),
        "predictor.w1.weight": (RANK, d),
        "predictor.w2.weight": (f, RANK),
        "compensator.w1.weight": (HIDDEN, d),
        "compensator.w2.weight": (d, HIDDEN),
    }
    return {
        f"layers.{i}.{name}": matrix(*shape)
        for i in range(BASE.layers)
        for name, shape in shapes.items()
    }


def write(path: Path) -> None:
    if path.suffix == ".pt":
        import torch

        # A copy per layer: PyTorch would store shared memory once.
        weights = {k: torch.tensor(v) for k, v in state_dict().items()}
        torch.save(weights, path)
    elif path.suffix == ".npz":
        np.savez(path, **state_dict())  # type: ignore[arg-type]
    else:
        mx.save_safetensors(
            str(path), {k: mx.array(v) for k, v in state_dict().items()}
        )


@app.callback(invoke_without_command=True)
def measure(context: typer.Context) -> None:
    """Convert each format to bfloat16, each in a process of its own."""
    if context.invoked_subcommand is not None:
        return
    env = describe()
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    with tempfile.TemporaryDirectory() as tmp:
        for suffix, bits in (
            (".safetensors", 0),
            (".safetensors", 4),
            (".pt", 0),
            (".npz", 0),
        ):
            source = Path(tmp, f"checkpoint{suffix}")
            if not source.exists():
                run("make", source)
            got = run("one", source, Path(tmp, "predictor"), "--bits", bits)
            print(
                f"{suffix:<13} {source.stat().st_size / 1e9:.2f} GB -> "
                f"{got['size'] / 1e9:.2f} GB{f', w2 in {bits} bits' if bits else ''}: "
                f"{got['seconds']:.1f} s, peak {got['peak'] / 1e9:.2f} GB "
                f"({got['before'] / 1e9:.2f} GB of it before the conversion); "
                f"load_predictor {got['load'] * 1000:.0f} ms"
            )


def run(*command: Any) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        "mlx_fastforward.bench.studies.conversion",
        *map(str, command),
    ]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "{}")


@app.command(hidden=True)
def make(path: Path) -> None:
    write(path)


@app.command(hidden=True)
def one(
    source: Path, out: Path, bits: Annotated[Optional[int], typer.Option()] = None
) -> None:
    before, start = resident(), time.perf_counter()
    checkpoint = open_checkpoint(source)
    plan = conversion.plan(checkpoint, BASE, [])
    tensors = {}
    for _, made in conversion.tensors(plan, mx.bfloat16, bits):
        tensors.update(made)
    save_predictor(out, conversion.information(plan, checkpoint, "relu", bits), tensors)
    seconds, highest = time.perf_counter() - start, resident()
    start = time.perf_counter()
    load_predictor(out)
    found = {
        "seconds": seconds,
        "peak": highest,
        "before": before,
        "load": time.perf_counter() - start,
        "size": (out / TENSORS_NAME).stat().st_size,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    app()
