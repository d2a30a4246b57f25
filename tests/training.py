"""Tiny runs of training: made, stopped, and what they left."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import models
import pytest

from mlx_fastforward.train import curves, estimate, quality, report
from mlx_fastforward.train import run as run_module
from mlx_fastforward.train import state as state_module
from mlx_fastforward.train.data import BUNDLED, Corpus, Sequences
from mlx_fastforward.train.run import Run, Tick
from mlx_fastforward.train.state import Settings

BLOCK, D, F, LAYERS = models.BLOCK, models.HIDDEN, models.FFN, models.LAYERS
LENGTH = 72
FILES = ["fastforward.json", "fastforward.safetensors", "report.json", "report.png"]
SMALL = Settings(tokens=400, length=LENGTH, steps=8, block_size=BLOCK)
SEQUENTIAL = replace(SMALL, sequential=True)
MLP = replace(SMALL, compensator="mlp")
FIRST = "layers.0.predictor.w1"
SEEDS = itertools.count(77)
Parts = tuple[Sequences, Sequences]
Patch = pytest.MonkeyPatch


class Stop(BaseException):
    """What ends a process."""


@pytest.fixture(autouse=True)
def short(monkeypatch: Patch) -> None:
    """Few and short sequences to judge on, few curves, and no picture: matplotlib takes longest."""
    monkeypatch.setattr(quality, "SHORTEST", 40)
    monkeypatch.setattr(quality, "TOKENS", 8)
    monkeypatch.setattr(curves, "TOKENS", 8)
    monkeypatch.setattr(curves, "LEVELS", (0.3, 0.6))
    few_held_out(2, monkeypatch)
    monkeypatch.setattr(run_module, "IMPORTANCE_SAMPLES", 1)
    monkeypatch.setattr(report, "picture", lambda path, found: path.write_bytes(b""))


def few_held_out(n: int, monkeypatch: Patch) -> None:
    for module in (state_module, run_module, estimate):
        monkeypatch.setattr(module, "HELD_OUT", n)


def parts_of(path: Path) -> Parts:
    corpus, tokenizer = Corpus([path]), models.demo_tokenizer()
    return (
        Sequences(corpus, tokenizer, LENGTH),
        Sequences(corpus, tokenizer, LENGTH, held_out=True),
    )


def lines_of(path: Path, lengths: list[int]) -> Parts:
    """Texts of so many words, in order."""
    entries = ({"text": "word " * n} for n in lengths)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    parts = parts_of(path)
    for part in parts:
        part.lines.sort(key=lambda place: place.start)
    return parts


@functools.cache
def bundled() -> Parts:
    return parts_of(BUNDLED)


def fresh(name: str = "llama", dtype: mx.Dtype = mx.float32, **more: Any) -> nn.Module:
    model = models.tiny(name, vocab=4096, **more)
    model.set_dtype(dtype)
    return model


def prepared(
    out: Path,
    settings: Settings = SMALL,
    tick: Tick = lambda *args: None,
    model: Optional[nn.Module] = None,
    parts: Optional[Parts] = None,
) -> Run:
    """A run, as a process of its own would begin or resume it."""
    mx.random.seed(next(SEEDS))
    return Run(model or fresh(), "tiny", parts or bundled(), out, settings, tick)


def stop(out: Path, settings: Settings, phase: str, count: int = 1) -> None:
    """Begin a run that ends at the ``count``-th tick of a phase."""
    seen: list[str] = []

    def tick(name: str, done: float, total: float, details: str) -> None:
        seen.append(name)
        if seen.count(phase) == count:
            raise Stop

    with pytest.raises(Stop):
        prepared(out, settings, tick)()


def tensors_of(out: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(out / FILES[1]))
    assert isinstance(tensors, dict)
    return tensors


def assert_same(out: Path, wanted: dict[str, mx.array]) -> None:
    """Bit by bit, and nothing is left behind."""
    got = tensors_of(out)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert mx.array_equal(got[name], tensor), name
    assert sorted(p.name for p in out.iterdir()) == FILES


def curve_of(out: Path) -> list[list[float]]:
    """(step, loss, recall) of the dense stage, from the report."""
    descents = json.loads((out / "report.json").read_text())["descents"]
    return list(descents["dense"])
