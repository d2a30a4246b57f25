"""The one timing loop: alternatives take turns, so that a machine that warms up slows all."""

import statistics
import time
from typing import Any, Callable, Mapping

import mlx.core as mx

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
