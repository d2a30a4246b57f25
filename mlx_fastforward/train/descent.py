"""Adam on one network, saved to a file at intervals and resumed from it exactly."""

import json
import math
import time
from pathlib import Path
from typing import Any, Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import PredictorError
from .state import save_tensors

INTERVAL = 20.0  # seconds of work that a crash may cost

Curve = list[tuple[int, float, float]]  # step, loss, gauge


class Descent:
    """Warm-up over a twentieth of the steps, a cosine to zero, gradients clipped to norm 1.

    Args:
        net: Trained in place.
        loss: (net, *batch) -> scalar.
        steps: How many; a file that is there knows better.
        rate: The highest learning rate.
        file: Where weights, moments, step and curve are kept.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[..., mx.array],
        steps: int,
        rate: float,
        file: Path,
    ):
        self.net, self.steps, self.rate, self.file = net, steps, rate, file
        self.step = 0
        self.curve: Curve = []
        self.adam = optim.Adam(learning_rate=self._rate)
        self.adam.init(net.trainable_parameters())
        self._gradients = nn.value_and_grad(net, loss)
        if file.is_file():
            self._load()

    def _rate(self, step: mx.array) -> mx.array:
        warm = max(1, self.steps // 20)
        left = mx.minimum((step - warm) / max(1, self.steps - warm), 1.0)
        falling = 0.5 * (1 + mx.cos(math.pi * left))
        return self.rate * mx.where(step < warm, (step + 1) / warm, falling)

    def __call__(
        self,
        batch: Callable[[int], tuple[mx.array, ...]],
        tick: Callable[["Descent", str], None],
        gauge: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """The steps that are left. ``batch(step)`` gives a step's data, ``gauge()`` a measure that
        is kept with the loss, two hundred times in all.
        """
        first, start = self.step, time.perf_counter()
        saved = start
        while self.step < self.steps:
            value = self.once(*batch(self.step))
            if self.step % max(1, self.steps // 200) == 0 or self.step == self.steps:
                row = (self.step, round(float(value), 6), round(gauge(), 6))
                self.curve.append(row)
            now = time.perf_counter()
            if now - saved > INTERVAL or self.step == self.steps:
                self._save()
                saved = now
            speed = (self.step - first) / (now - start)
            tick(self, f"loss {float(value):.3f}, {speed:.1f} steps/s")

    def once(self, *batch: mx.array) -> mx.array:
        """One step; returns the loss before it."""
        value, gradients = self._gradients(self.net, *batch)
        self.adam.update(self.net, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(self.net.parameters(), self.adam.state, value)
        self.step += 1
        return value

    def _save(self) -> None:
        parts = {"net": self.net.parameters(), "adam": self.adam.state}
        tensors: dict[str, Any] = dict(tree_flatten(parts))
        where = {"step": self.step, "steps": self.steps, "curve": self.curve}
        save_tensors(self.file, tensors, {k: json.dumps(v) for k, v in where.items()})

    def _load(self) -> None:
        try:
            loaded: Any = mx.load(str(self.file), return_metadata=True)
        except (RuntimeError, ValueError) as e:
            raise PredictorError(
                f"{self.file} is damaged; start anew with --restart."
            ) from e
        tensors, where = loaded
        self.step, self.steps = json.loads(where["step"]), json.loads(where["steps"])
        self.curve = [(s, x, g) for s, x, g in json.loads(where["curve"])]
        tree: Any = tree_unflatten(list(tensors.items()))
        self.net.update(tree["net"])
        self.adam.state = tree["adam"]
        mx.eval(self.net.parameters(), self.adam.state)
