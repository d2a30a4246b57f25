"""How one call's new tokens are split: dense head, sparse blocks, dense tail.

Pure Python, no mlx: everything here is known before the forward pass is built.
"""

from dataclasses import dataclass
from typing import Optional


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


def shortest_sparse(block_size: int, edge: int) -> int:
    """Prompts of fewer tokens stay dense: a head, a block and a tail."""
    return block_size + 2 * edge


def plan_call(
    new: int,
    block_size: int,
    *,
    cache_empty: bool,
    edge: Optional[int] = None,
    after: Optional[int] = None,
    dense_head: bool = True,
    dense_tail: bool = True,
) -> Optional[Plan]:
    """Split a call of ``new`` tokens, or return None where the whole call stays dense.

    Args:
        new: Tokens in this call.
        block_size: Tokens per sparse block.
        cache_empty: Nothing is cached yet: the first tokens are the attention sinks.
        edge: Tokens of the dense head, and of the dense tail at least; default: one block.
        after: Prompt tokens that follow in later calls, 0 at the prompt's end. None where the
            caller does not know: the call is then taken for the end of a prompt, and anything
            short (decode, verification of drafts) stays dense.
        dense_head: Keep the first ``edge`` tokens dense if the cache is empty.
        dense_tail: Keep at least the last ``edge`` tokens of the prompt dense. Tokens that do
            not fill a block are always dense, as part of the tail.
    """
    edge = block_size if edge is None else edge
    if after is None:
        if new < shortest_sparse(block_size, edge):
            return None
        after = 0
    head = edge if cache_empty and dense_head else 0
    least_tail = max(0, edge - after) if dense_tail else 0
    blocks = (new - head - least_tail) // block_size
    if blocks < 1:
        return None
    return Plan(head, blocks, block_size, new - head - blocks * block_size)
