"""Captured sequences on disk, and batches of blocks out of them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import numpy as np

from ..files import replace

BLOCKS, SEQUENCES = 32, 4  # of a batch


@dataclass(frozen=True)
class Store:
    """Two files a sequence: ``x`` (layers, blocks, N, d), the FFN inputs, and ``norms`` (layers,
    blocks, f), how much each neuron fires in a block; both float16.
    """

    folder: Path

    def file(self, i: int, what: str = "x") -> Path:
        return self.folder / f"{i:06d}.{what}.npy"

    def add(self, i: int, x: mx.array, norms: mx.array) -> None:
        for what, array in (("norms", norms), ("x", x)):  # x says that both are there
            values = np.array(array)
            replace(self.file(i, what), _writer(values))

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """x and norms of a sequence, mapped: only what is used is read."""
        x = np.load(self.file(i), mmap_mode="r")
        return x, np.load(self.file(i, "norms"), mmap_mode="r")

    def numbers(self, captured: int) -> list[int]:
        """Those of the first ``captured`` sequences that filled a block."""
        return [i for i in range(captured) if self.file(i).is_file()]


def _writer(values: np.ndarray) -> Callable[[Path], None]:
    return lambda half: np.save(half, values)


@dataclass(frozen=True)
class Batches:
    """Random blocks of a few random sequences; batch i depends on the seed and on i alone.

    Half of the batches have blocks as they were captured, the others twice and four times as long
    ones and so many fewer: one predictor serves them all.
    """

    sequences: list[tuple[Store, int]]
    seed: int
    blocks: int = BLOCKS
    longest: int = 4

    def __call__(self, step: int, layers: slice = slice(None)) -> Any:
        """x (layers, B, N, d) and norms (layers, B, f), float32."""
        rng = random.Random(f"{self.seed} step {step}")
        merge = rng.choice([m for m in (1, 1, 2, 4) if m <= self.longest])
        count = max(1, self.blocks // SEQUENCES // merge)
        xs, norms = [], []
        for store, i in rng.choices(self.sequences, k=SEQUENCES):
            x, n = store.load(i)
            for start in rng.choices(range(max(1, x.shape[1] - merge + 1)), k=count):
                part = (start + np.arange(merge)) % x.shape[1]  # short: blocks again
                xs.append(
                    x[layers, part].reshape(x[layers].shape[0], 1, -1, x.shape[-1])
                )
                squares = np.square(n[layers, part].astype(np.float32))
                norms.append(np.sqrt(squares.sum(axis=1, keepdims=True)))
        joined = mx.array(np.concatenate(xs, axis=1)).astype(mx.float32)
        return joined, mx.array(np.concatenate(norms, axis=1))
