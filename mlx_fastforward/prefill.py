"""The one loop that feeds a prompt to a model in chunks."""

import contextlib
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
    model: nn.Module, tick: Callable[[int, float], None], least: int = 512
) -> Iterator[None]:
    """Calls of ``least`` tokens are evaluated a layer at a time: what they compute stays the same.

    So ``tick(tokens, share)`` hears how far a chunk is, and Ctrl-C need not wait for its end. On a GPU one
    layer waits in the queue while the one before it runs, so that it does not idle. The last layer is
    left to mlx-lm, which needs only its keys and values.
    """
    layers, queued = len(model.layers), None  # type: int, Optional[mx.array]

    def around(
        i: int, own: Callable[..., Any], x: Any, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal queued
        y = own(x, *args, **kwargs)
        if isinstance(y, mx.array) and y.shape[1] >= least:
            if mx.default_device() == mx.cpu:
                mx.eval(y)
                tick(y.shape[1], (i + 1) / layers)
                return y
            mx.async_eval(y)
            if i and queued is not None:
                mx.eval(queued)
                tick(y.shape[1], i / layers)
            queued = y
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
