"""The one timing loop: alternatives take turns, so that a machine that warms up slows all.

And when one of them is right, and faster by more than noise.
"""

import statistics
import time
from typing import Any, Callable, Mapping

import mlx.core as mx

MARGIN = 0.98  # a sparse candidate must beat dense by more than noise
# Largest error, relative to the largest output, by dtype.
TOLERANCE = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 6e-2}
ROUNDS = 3  # where nobody says how many

Ways = Mapping[Any, Callable[[], Any]]


def interleaved(
    ways: Ways, rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[Any, float]:
    """Median seconds of each way, evaluated, after a first run that is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in ways}
    for counted in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            mx.eval(way())
            if counted:
                times[name].append(time.perf_counter() - start)
        tick()
    return {name: statistics.median(found) for name, found in times.items()}


def is_rounding(error: float, dtype: mx.Dtype) -> bool:
    """Whether a difference() is no more than that."""
    return error <= TOLERANCE.get(dtype, 1e-2)


def difference(ours: mx.array, plain: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    ours, plain = ours.astype(mx.float32), plain.astype(mx.float32)
    largest = mx.maximum(mx.max(mx.abs(plain)), 1e-9)
    return float(mx.max(mx.abs(ours - plain)) / largest)
