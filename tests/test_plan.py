from typing import Optional

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.engine import Engine
from mlx_fastforward.neurons.selectors import Probe
from mlx_fastforward.tokens.plan import Plan, plan_call, shortest_sparse
from mlx_fastforward.tokens.split import TokenSplit

NEW = st.integers(0, 400)
BLOCK = st.integers(2, 40)
EDGE = st.one_of(st.none(), st.integers(1, 50))
AFTER = st.one_of(st.none(), st.just(0), st.integers(0, 100))
FLAG = st.booleans()
FLAGS = st.fixed_dictionaries({"dense_head": FLAG, "dense_tail": FLAG})


@given(NEW, BLOCK, EDGE, FLAG, AFTER, FLAGS)
def test_every_token_is_in_one_segment_and_in_order(
    new: int,
    block: int,
    edge: Optional[int],
    empty: bool,
    after: Optional[int],
    flags: dict[str, bool],
) -> None:
    plan = plan_call(new, block, cache_empty=empty, edge=edge, after=after, **flags)
    if plan is None:
        return
    segments = [("head", plan.head)]
    segments += [(f"block {i}", plan.block_size) for i in range(plan.blocks)]
    segments += [("tail", plan.tail)]
    assert all(size >= 0 for _, size in segments)
    names = [name for name, size in segments for _ in range(size)]
    assert len(names) == new == plan.tokens
    assert plan.block_size >= 1 and plan.blocks >= 1
    sparse = [i for i, name in enumerate(names) if name.startswith("block")]
    assert (plan.start, plan.stop) == (sparse[0], sparse[-1] + 1)
    assert len(sparse) == plan.stop - plan.start


@given(NEW, BLOCK, EDGE, FLAG, AFTER, FLAGS, st.sampled_from([1, 1, 2, 8]))
def test_equal_blocks_fill_what_head_and_tail_leave(
    new: int,
    block: int,
    edge: Optional[int],
    empty: bool,
    after: Optional[int],
    flags: dict[str, bool],
    unit: int,
) -> None:
    """Of about the size asked for; what is left over is less than a unit per block."""
    plan = plan_call(
        new, block, cache_empty=empty, edge=edge, after=after, unit=unit, **flags
    )
    edge = edge or block
    first = edge if empty and flags["dense_head"] else 0
    last = max(0, edge - (after or 0)) if flags["dense_tail"] else 0
    room = new - first - last
    if after is None and new < min(block, edge) + 2 * edge:
        assert plan is None
    elif room < max(2, min(block, edge)):
        assert plan is None
    elif plan is None:
        assert room < unit or unit > block
    else:
        assert plan.head == first
        assert plan.block_size % unit == 0
        left = plan.tail - last
        assert 0 <= left < plan.blocks * unit
        each = room / plan.blocks
        assert plan.blocks == 1 or 2 / 3 * block <= each < 2 * block
        assert plan.blocks > 1 or each < 2 * block
        if block % unit == 0 and room >= block:
            assert left <= room / 2


@given(NEW, BLOCK, EDGE, AFTER, FLAGS)
def test_a_filled_cache_has_no_head(
    new: int,
    block: int,
    edge: Optional[int],
    after: Optional[int],
    flags: dict[str, bool],
) -> None:
    plan = plan_call(new, block, cache_empty=False, edge=edge, after=after, **flags)
    assert plan is None or plan.head == 0


@given(BLOCK, EDGE, FLAG, FLAGS, st.data())
def test_short_calls_of_an_unknown_prompt_are_dense(
    block: int,
    edge: Optional[int],
    empty: bool,
    flags: dict[str, bool],
    data: st.DataObject,
) -> None:
    """Three blocks, or with smaller edges three of those."""
    shortest = 3 * block if edge is None else min(block, edge) + 2 * edge
    assert shortest_sparse(block, edge or block) == shortest
    new = data.draw(st.integers(0, shortest - 1))
    flags = {"cache_empty": empty, **flags}
    assert plan_call(new, block, edge=edge, after=None, **flags) is None
    least = max(shortest, 2 + 2 * (edge or block))
    assert plan_call(least, block, edge=edge, after=None, **flags) is not None


@given(BLOCK, EDGE, FLAG, AFTER, FLAGS)
def test_one_token_is_dense(
    block: int,
    edge: Optional[int],
    empty: bool,
    after: Optional[int],
    flags: dict[str, bool],
) -> None:
    plan = plan_call(1, block, cache_empty=empty, edge=edge, after=after, **flags)
    assert plan is None


@given(NEW, BLOCK, EDGE, FLAG, FLAG, st.sampled_from([None, 0]))
def test_the_end_of_a_prompt_is_dense(
    new: int,
    block: int,
    edge: Optional[int],
    empty: bool,
    head: bool,
    after: Optional[int],
) -> None:
    plan = plan_call(
        new, block, cache_empty=empty, edge=edge, after=after, dense_head=head
    )
    assert plan is None or plan.tail >= (edge or block)


@given(NEW, BLOCK, EDGE, FLAG, st.integers(1, 100))
def test_tokens_to_come_shorten_the_tail(
    new: int, block: int, edge: Optional[int], empty: bool, after: int
) -> None:
    """What later calls bring counts towards the last tokens of the prompt."""
    plan = plan_call(new, block, cache_empty=empty, edge=edge, after=after)
    if plan is not None:
        least = max(0, (edge or block) - after)
        assert least <= plan.tail < least + plan.blocks


@given(
    BLOCK,
    EDGE,
    st.lists(st.integers(1, 150), min_size=1, max_size=8),
    FLAG,
    FLAGS,
)
def test_however_chunked_the_end_of_a_prompt_is_dense(
    block: int,
    edge: Optional[int],
    chunks: list[int],
    empty: bool,
    flags: dict[str, bool],
) -> None:
    total, done = sum(chunks), 0
    dense: list[bool] = []
    for new in chunks:
        first = done == 0
        done += new
        plan = plan_call(
            new,
            block,
            cache_empty=empty and first,
            edge=edge,
            after=total - done,
            **flags,
        )
        if plan is None:
            dense += [True] * new
        else:
            dense += [not plan.start <= i < plan.stop for i in range(new)]
    edge = edge or block
    assert len(dense) == total
    if flags["dense_tail"]:
        assert all(dense[-edge:])
    if empty and flags["dense_head"]:
        assert all(dense[: min(edge, chunks[0])])


def test_a_prompt_by_hand() -> None:
    assert plan_call(100, 16, cache_empty=True) == Plan(16, 4, 17, 16)
    assert plan_call(100, 16, cache_empty=False) == Plan(0, 5, 16, 20)
    assert plan_call(100, 16, cache_empty=True, after=6) == Plan(16, 4, 18, 12)
    assert plan_call(100, 16, cache_empty=True, after=12) == Plan(16, 5, 16, 4)
    assert plan_call(32, 16, cache_empty=False, after=0) == Plan(0, 1, 16, 16)
    assert plan_call(16, 16, cache_empty=False, after=16) == Plan(0, 1, 16, 0)
    assert plan_call(100, 32, cache_empty=True, edge=8) == Plan(8, 3, 28, 8)
    assert plan_call(100, 32, cache_empty=True, edge=8, unit=8) == Plan(8, 2, 40, 12)
    assert plan_call(1900, 2048, cache_empty=True, edge=128) == Plan(128, 1, 1644, 128)
    bare = {"dense_head": False, "dense_tail": False}
    assert plan_call(100, 16, cache_empty=True, **bare) == Plan(0, 6, 16, 4)


@pytest.mark.parametrize("block, edge", [(8, 8), (128, 128), (512, 128), (2048, 128)])
def test_large_blocks_do_not_need_large_edges(block: int, edge: int) -> None:
    engine = Engine(PrefillConfig(block_size=block), [], [], Probe("weighted", 8))
    assert engine.edge == edge


@st.composite
def splits(draw: st.DrawFn) -> TokenSplit:
    block = draw(st.sampled_from([1, 2, 6, 8, 12]))
    divisors = [p for p in range(2, block + 1) if block % p == 0]
    head = draw(st.sampled_from([0, block]))
    blocks, tail = draw(st.integers(1, 4)), draw(st.integers(0, 15))
    return TokenSplit(
        Plan(head, blocks, block, tail), draw(st.sampled_from([0, *divisors]))
    )


def numbered(*shape: int) -> mx.array:
    return mx.arange(np.prod(shape).item()).astype(mx.float32).reshape(*shape)


@settings(deadline=None)
@given(splits(), st.integers(1, 3), st.integers(1, 3))
def test_split_and_join_are_inverse(split: TokenSplit, batch: int, d: int) -> None:
    x = numbered(batch, split.plan.tokens, d)
    blocks, dense = split.blocks(x), split.dense(x)
    rest = split.rest(blocks)
    plan = split.plan
    assert blocks.shape == (batch * plan.blocks, plan.block_size, d)
    assert dense.shape == (batch, split.dense_tokens, d)
    sparse = plan.block_size - split.probes
    assert rest.shape == (batch * plan.blocks, sparse, d)
    assert batch * split.dense_tokens + len(blocks) * sparse == batch * plan.tokens
    assert np.array_equal(np.array(split.join(dense, rest)), np.array(x))


@settings(deadline=None)
@given(splits(), st.integers(1, 3))
def test_split_takes_the_tokens_that_it_says(split: TokenSplit, batch: int) -> None:
    """Also on (B, L): padding masks are cut the same way."""
    x, plan = numbered(batch, split.plan.tokens), split.plan
    probes = set()
    if split.probe_every:
        probes = {
            plan.head + i * plan.block_size + j
            for i in range(plan.blocks)
            for j in range(0, plan.block_size, split.probe_every)
        }
    assert split.probes * plan.blocks == len(probes)
    sparse = range(plan.start, plan.stop)
    dense = [i for i in range(plan.tokens) if i not in sparse or i in probes]
    assert np.array_equal(np.array(split.dense(x)), np.array(x)[:, dense])
    blocks = np.array(x)[:, plan.start : plan.stop].reshape(-1, plan.block_size)
    assert np.array_equal(np.array(split.blocks(x)), blocks)
    rest = np.array(split.rest(split.blocks(x)[..., None]))[..., 0]
    expected = [[t for t in row if t % plan.tokens not in probes] for row in blocks]
    assert rest.tolist() == expected


def test_a_prompt_without_probes_keeps_blocks_whole() -> None:
    split = TokenSplit(Plan(head=4, blocks=2, block_size=4, tail=3), probe_every=0)
    assert (split.probes, split.dense_tokens) == (0, 7)
    blocks = split.blocks(numbered(1, 15, 1))
    assert np.array_equal(np.array(split.rest(blocks)), np.array(blocks))


@pytest.mark.parametrize("every, probes", [(2, 4), (4, 2), (8, 1)])
def test_probes_per_block(every: int, probes: int) -> None:
    split = TokenSplit(Plan(head=8, blocks=3, block_size=8, tail=9), every)
    assert split.probes == probes
    assert split.dense_tokens == 8 + 3 * probes + 9
