"""How one call's new tokens are split: dense head, sparse blocks, dense tail.

Pure Python, no mlx: everything here is known before the forward pass is built.
"""

from dataclasses import dataclass
from typing import Optional

from ..config import STEP

CHUNK = STEP


@dataclass(frozen=True)
class Plan:
    """head + blocks * block_size + tail tokens, in this order (section 3.1)."""

    head: int
    blocks: int
    block_size: int
    tail: int

    @property
    def start(self) -> int:
        """The first sparse token."""
        return self.head

    @property
    def stop(self) -> int:
        """One past the last sparse token."""
        return self.head + self.blocks * self.block_size

    @property
    def tokens(self) -> int:
        return self.stop + self.tail


def shortest_sparse(block_size: int, edge: int, tail: Optional[int] = None) -> int:
    """Prompts of fewer tokens stay dense: a head, a small block and a tail."""
    return min(block_size, edge) + edge + (edge if tail is None else tail)


def plan_call(
    new: int,
    block_size: int,
    *,
    cache_empty: bool,
    edge: Optional[int] = None,
    tail: Optional[int] = None,
    after: Optional[int] = None,
    dense_head: bool = True,
    dense_tail: bool = True,
    unit: int = 1,
) -> Optional[Plan]:
    """Split a call of ``new`` tokens, or return None where the whole call stays dense.

    What head and tail leave is cut into equal blocks, as many as come closest to ``block_size``:
    large blocks leave no remainder that would run dense.

    Args:
        new: Tokens in this call.
        block_size: Tokens per sparse block, about.
        cache_empty: Nothing is cached yet: the first tokens are the attention sinks.
        edge: Tokens of the dense head; default: one block.
        tail: Tokens of the dense tail, at least; default: as many as the head.
        after: Prompt tokens that follow in later calls, 0 at the prompt's end. None where the
            caller does not know: the call is then taken for the end of a prompt, and anything
            short (decode, verification of drafts) stays dense.
        dense_head: Keep the first ``edge`` tokens dense if the cache is empty.
        dense_tail: Keep at least the last ``tail`` tokens of the prompt dense. Tokens that do
            not fill a block are always dense, as part of the tail.
        unit: Block lengths are multiples of this.
    """
    edge = block_size if edge is None else edge
    tail = edge if tail is None else tail
    if after is None:
        if new < shortest_sparse(block_size, edge, tail):
            return None
        after = 0
    head = edge if cache_empty and dense_head else 0
    least_tail = max(0, tail - after) if dense_tail else 0
    room = new - head - least_tail
    if room < max(2, min(block_size, edge)):
        return None
    blocks, length = cut(room, block_size, unit)
    if length < 1:
        return None
    return Plan(head, blocks, length, new - head - blocks * length)


def cut(room: int, block_size: int, unit: int) -> tuple[int, int]:
    """How many equal blocks, and how long: of about ``block_size``, and leaving little over."""
    near = max(1, (2 * room + block_size) // (2 * block_size))
    cuts = [(n, room // n // unit * unit) for n in (near, max(1, room // block_size))]
    return max(cuts, key=lambda cut: cut[0] * cut[1])
