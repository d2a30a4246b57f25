"""How much of a prompt one call takes: queries per attention call, and tokens per call of the model.

Both are exact whatever their size; tuning.py times them on this device.
"""

import os
import time
from typing import Callable

import mlx.core as mx

from .engine import Engine
from .model.attention import Attention, by_queries
from .model.families import Heads
from .timing import MARGIN, ROUNDS, difference, interleaved, is_rounding
from .tokens.plan import CHUNK
from .tuned import sparse_layer

ATTENTION_BLOCKS = (256, 512)  # queries
STEPS = (2 * CHUNK, 4 * CHUNK)  # tokens per call of the model


def attention_block(seconds: dict[int, float]) -> int:
    """Queries per attention call that are fastest; 0: all of them."""
    best = min(seconds, key=lambda rows: seconds[rows], default=0)
    return best if best and seconds[best] < MARGIN * seconds[0] else 0


def attention_seconds(heads: Heads, dtype: mx.Dtype) -> dict[int, float]:
    """Of a first chunk's attention, by queries per call; wrong ones are left out."""
    q, k, v = (
        mx.random.normal((1, n, CHUNK, heads.size), key=mx.random.key(i)).astype(dtype)
        for i, n in enumerate([heads.queries, heads.keys, heads.keys])
    )

    def whole(q: mx.array, k: mx.array, v: mx.array, *, mask: str) -> mx.array:
        scale = heads.size**-0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    arms: dict[int, Attention] = {0: whole}
    plain = whole(q, k, v, mask="causal")
    for rows in ATTENTION_BLOCKS:
        arm = by_queries(whole, rows)
        error = difference(arm(q, k, v, mask="causal"), plain)
        if is_rounding(error, dtype):
            arms[rows] = arm
    return interleaved(
        {rows: lambda arm=arm: arm(q, k, v, mask="causal") for rows, arm in arms.items()},  # type: ignore
        ROUNDS,
    )


def longest_gaining(steps: dict[int, tuple[float, float]]) -> int:
    """Tokens per call that are fastest, of what step_seconds() found."""
    gaining = [n for n, (long, usual) in steps.items() if long < MARGIN * usual]
    return max(gaining, default=CHUNK)


def step_seconds(
    engine: Engine, heads: Heads, dtype: mx.Dtype, left: Callable[[], float]
) -> dict[int, tuple[float, float]]:
    """Seconds of a layer's FFN and attention, by tokens per call, and with half as many: STEPS that gain.

    The last one may not. A step that would take longer than the time that is ``left``, or more memory
    than there is, is not tried.
    """
    found: dict[int, tuple[float, float]] = {}
    for step in STEPS:
        if not _fits(engine, heads, step, dtype):
            break
        inputs = _inputs(engine, heads, step, dtype)
        start = time.perf_counter()
        mx.eval(_layer(engine, inputs, 2))
        if 2 * (ROUNDS + 1) * (time.perf_counter() - start) > left():
            break
        ways = {n: lambda n=n: _layer(engine, inputs, n) for n in (1, 2)}  # type: ignore
        seconds = interleaved(ways, ROUNDS)
        found[step] = (seconds[1], seconds[2])
        if seconds[1] >= MARGIN * seconds[2]:
            break
    return found


def _fits(engine: Engine, heads: Heads, step: int, dtype: mx.Dtype) -> bool:
    """Whether half of the free memory holds such a call: activations, and scores where they are whole."""
    scores = heads.queries * step * (engine.device.attention_block or step)
    activations = 4 * step * max(engine.shapes)[1]
    if mx.default_device() == mx.gpu:
        free = mx.device_info().get("max_recommended_working_set_size", 0)
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = (scores + activations) * dtype.size
    return 2 * needed < int(free) - mx.get_active_memory()


def _inputs(
    engine: Engine, heads: Heads, tokens: int, dtype: mx.Dtype
) -> list[mx.array]:
    """Of an FFN (1, tokens, d), and queries, keys and values (1, heads, tokens, size)."""
    d, _ = engine.shapes[sparse_layer(engine)]
    shapes = [(1, n, tokens, heads.size) for n in (heads.queries, heads.keys)]
    found = [
        mx.random.normal(shape, key=mx.random.key(i)).astype(dtype)
        for i, shape in enumerate([(1, tokens, d), *shapes, shapes[1]])
    ]
    mx.eval(found)
    return found


def _layer(engine: Engine, inputs: list[mx.array], calls: int) -> list[mx.array]:
    """What a layer computes of its inputs in so many calls: FFN and attention."""
    x, q, k, v = inputs
    n, out = x.shape[1] // calls, []  # type: int, list[mx.array]
    whole: Attention = mx.fast.scaled_dot_product_attention
    rows = engine.device.attention_block
    attend = by_queries(whole, rows) if rows else whole
    for end in range(n, x.shape[1] + 1, n):
        plan = engine.plan(n, empty=False, after=CHUNK)
        assert plan is not None
        part, seen = slice(end - n, end), slice(end)
        call, layer = engine.call(plan), sparse_layer(engine)
        scale = q.shape[-1] ** -0.5
        keys, values = k[:, :, seen], v[:, :, seen]
        out.append(engine.forward(call, layer, x[:, part]))
        out.append(attend(q[:, :, part], keys, values, scale=scale, mask="causal"))
        mx.eval(out)
    return out
