"""The one loop that feeds a prompt to a model in chunks."""

import contextlib
import time
from typing import Any, Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn

from .attachment import reading, watched
from .model.families import prefilled
from .tokens.plan import CHUNK


def prefill(model: nn.Module, tokens: mx.array, cache: Any) -> None:
    """Feed all of ``tokens``, (L,) or (B, L), in chunks, as mlx-lm does."""
    rows = tokens if tokens.ndim == 2 else tokens[None]
    for start in range(0, rows.shape[1], CHUNK):
        model(rows[:, start : start + CHUNK], cache=cache)
        mx.eval([c.state for c in cache])


def read(model: nn.Module, tokens: mx.array, cache: Any, prompt: int) -> float:
    """Prefill ``tokens``, the first of a prompt's; sparsely where the model is attached.

    Args:
        prompt: Tokens of the whole prompt.

    Returns:
        float: Share of their FFN FLOPs that was skipped.
    """
    with reading(model, prompt) as state:
        prefill(model, tokens, cache)
    return state.flops.sparsity


@contextlib.contextmanager
def by_layers(
    model: nn.Module,
    tick: Callable[[int, float], None],
    least: int = 512,
    every: float = 0.1,
) -> Iterator[None]:
    """Calls of ``least`` tokens are evaluated a few layers at a time: what they compute stays the same.

    So ``tick(tokens, share)`` hears how far a chunk is, and Ctrl-C need not wait for its end. Where
    layers are fast, more of them go together, so that a device waits about ``every`` seconds at the most
    often. On a GPU a layer is in the queue while the one before it is waited for. The last layer is left
    to mlx-lm, which needs only its keys and values.
    """
    layers, stride, last = len(model.layers), 1, 0.0
    queued: Optional[mx.array] = None
    cpu = mx.default_device() == mx.cpu

    def around(
        i: int, own: Callable[..., Any], x: Any, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal queued, stride, last
        y = own(x, *args, **kwargs)
        if not isinstance(y, mx.array) or y.shape[1] < least:
            return y
        if i == 0:
            queued, last = None, time.perf_counter()
        if (i + 1) % stride == 0:
            before, queued = queued, y
            mx.async_eval(y)
            done = y if cpu else before
            if done is not None:
                mx.eval(done)
                tick(y.shape[1], (i + 1 if cpu else i + 1 - stride) / layers)
                now = time.perf_counter()
                if now - last < every:
                    stride *= 2
                last = now
        return y

    with watched(prefilled(model.layers), around):
        yield


@contextlib.contextmanager
def pausing(
    model: nn.Module, places: list[int], at: Callable[[int], None]
) -> Iterator[None]:
    """Calls of the model in here end at these places of their tokens, and ``at(place)`` is called there.

    mlx-lm's chunks stay what they are, its statistics too; one with a place inside takes several calls.
    """
    done, left = 0, sorted(places)

    def around(_: int, own: Any, tokens: mx.array, cache: Any, **kwargs: Any) -> Any:
        nonlocal done
        while left and left[0] < done + tokens.shape[1]:
            if n := left[0] - done:
                own(tokens[:, :n], cache=cache, **kwargs)
                mx.eval([c.state for c in cache])
            done, tokens = done + n, tokens[:, n:]
            at(left.pop(0))
        done += tokens.shape[1]
        return own(tokens, cache=cache, **kwargs)

    with watched([model], around):
        yield
