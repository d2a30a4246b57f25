"""Which tokens are dense and which sparse: plans, chunks, and tokens cut and joined."""

from dataclasses import replace
from typing import Any, Optional

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fastforward.config import DeviceSettings, PrefillConfig
from mlx_fastforward.engine import Engine
from mlx_fastforward.neurons.selectors import Probe
from mlx_fastforward.tokens.plan import Plan, plan_call
from mlx_fastforward.tokens.split import TokenSplit

FLAG, EDGE = st.booleans(), st.one_of(st.none(), st.integers(1, 50))
SETTINGS = st.fixed_dictionaries(
    {
        "block_size": st.integers(2, 40),
        "edge": EDGE,
        "tail": EDGE,
        "dense_head": FLAG,
        "dense_tail": FLAG,
        "unit": st.sampled_from([1, 1, 2, 8]),
    }
)
AFTER = st.one_of(st.none(), st.just(0), st.integers(0, 100))


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 60), AFTER, SETTINGS)
def test_equal_blocks_fill_what_head_and_tail_leave(
    new: int, cached: int, after: Optional[int], given: dict[str, Any]
) -> None:
    """Of about the size asked for; what is left over is less than a unit per block.

    ``after`` tokens follow in other calls: however chunked, the end of a prompt is dense.
    """
    block, unit = given["block_size"], given["unit"]
    edge = given["edge"] or block
    end = given["tail"] or edge
    plan = plan_call(new, cached=cached, after=after, **given)
    head = max(0, edge - cached) if given["dense_head"] else 0
    tail = max(0, end - (after or 0)) if given["dense_tail"] else 0
    room = new - head - tail
    short = after is None and new < min(block, edge) + edge + end
    if short or room < max(2, min(block, edge)):
        assert plan is None
        return
    if plan is None:  # no block of a whole number of units fits
        assert room < unit or unit > block
        return
    assert plan.head == plan.start == head
    assert plan.tokens == new and plan.tail == new - plan.stop
    assert plan.stop - plan.start == plan.blocks * plan.block_size
    assert plan.blocks >= 1 and plan.block_size >= 1 and plan.block_size % unit == 0
    left = plan.tail - tail
    assert 0 <= left < plan.blocks * unit
    each = room / plan.blocks
    assert each < 2 * block and (plan.blocks == 1 or 2 / 3 * block <= each)
    if block % unit == 0 and room >= block:
        assert left <= room / 2


def test_plans_by_hand() -> None:
    def plan(new: int, block: int, **more: Any) -> Optional[Plan]:
        return plan_call(new, block, **{"cached": 0, **more})

    assert plan(100, 16) == Plan(16, 4, 17, 16)
    assert plan(100, 16, cached=16) == Plan(0, 5, 16, 20)
    assert plan(100, 16, cached=10) == Plan(6, 4, 19, 18)
    assert plan(100, 16, after=6) == Plan(16, 4, 18, 12)
    assert plan(100, 16, after=12) == Plan(16, 5, 16, 4)
    assert plan(32, 16, cached=99, after=0) == Plan(0, 1, 16, 16)
    assert plan(16, 16, cached=16, after=16) == Plan(0, 1, 16, 0)
    assert plan(100, 32, edge=8) == Plan(8, 3, 28, 8)
    assert plan(100, 32, edge=8, tail=20) == Plan(8, 2, 36, 20)
    assert plan(100, 32, edge=8, unit=8) == Plan(8, 2, 40, 12)
    assert plan(1900, 2048, edge=128) == Plan(128, 1, 1644, 128)
    assert plan(100, 16, dense_head=False, dense_tail=False) == Plan(0, 6, 16, 4)
    assert plan(1, 16, cached=99, after=40) is None


@pytest.mark.parametrize(
    "block, edge, tail", [(8, 8, 8), (128, 128, 256), (2048, 128, 256)]
)
def test_large_blocks_do_not_need_large_edges(block: int, edge: int, tail: int) -> None:
    engine = Engine(PrefillConfig(), [], [], Probe(), device=DeviceSettings(block))
    assert (engine.edge, engine.tail, engine.shortest) == (edge, tail, 2 * edge + tail)
    assert engine.on(DeviceSettings(block, shortest=700)).shortest == 700
    bare = PrefillConfig(block_size=16, dense_head=False, dense_tail=False)
    assert replace(engine, config=bare).plan(100, 0, None) == Plan(0, 6, 16, 4)


@st.composite
def splits(draw: st.DrawFn) -> TokenSplit:
    block = draw(st.sampled_from([1, 2, 6, 8, 12]))
    divisors = [p for p in range(2, block + 1) if block % p == 0]
    head, tail = draw(st.sampled_from([0, block])), draw(st.integers(0, 15))
    plan = Plan(head, draw(st.integers(1, 4)), block, tail)
    return TokenSplit(plan, draw(st.sampled_from([0, *divisors])))


@given(splits(), st.integers(1, 3))
def test_split_takes_the_tokens_that_it_says_and_join_puts_them_back(
    split: TokenSplit, batch: int
) -> None:
    """On (B, L) too: padding masks are cut the same way."""
    plan, every = split.plan, split.probe_every
    sparse = [
        i
        for i in range(plan.start, plan.stop)
        if not every or (i - plan.head) % plan.block_size % every
    ]
    where = [i for i in range(plan.tokens) if i not in sparse]
    assert split.dense_tokens == len(where)
    assert plan.blocks * split.sparse_tokens == len(sparse)
    x = np.arange(batch * plan.tokens).reshape(batch, -1)
    for y in (x, np.stack([x, -x], axis=-1)):
        dense, blocks = split.dense(mx.array(y)), split.blocks(mx.array(y))
        middle = y[:, plan.start : plan.stop]
        wanted = middle.reshape(-1, plan.block_size, *y.shape[2:])
        assert np.array_equal(np.array(dense), y[:, where])
        assert np.array_equal(np.array(blocks), wanted)
    rest = split.rest(blocks)
    assert np.array_equal(np.array(rest).reshape(batch, -1, 2), y[:, sparse])
    assert len(rest) == batch * plan.blocks
    assert np.array_equal(np.array(split.join(dense, rest)), y)
