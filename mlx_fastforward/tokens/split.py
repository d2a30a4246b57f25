"""Dense tokens and sparse blocks cut out of a call, and put together again."""

from dataclasses import dataclass

import mlx.core as mx

from .plan import Plan


@dataclass(frozen=True)
class TokenSplit:
    """Cuts a call's tokens into dense tokens and blocks by its plan, and joins them again.

    Works on (B, L, d) and (B, L). Every ``probe_every``-th token of a block, from its first on,
    is a probe and counts as dense; 0 means no probes.
    """

    plan: Plan
    probe_every: int

    @property
    def probes(self) -> int:
        """Probes per block."""
        return self.plan.block_size // self.probe_every if self.probe_every else 0

    @property
    def dense_tokens(self) -> int:
        """Dense tokens per row."""
        return self.plan.head + self.plan.blocks * self.probes + self.plan.tail

    @property
    def sparse_tokens(self) -> int:
        """Tokens of a block that run sparsely."""
        return self.plan.block_size - self.probes

    def blocks(self, x: mx.array) -> mx.array:
        """(B, L, ...) -> (M, N, ...), probes included."""
        p = self.plan
        return x[:, p.start : p.stop].reshape(-1, p.block_size, *x.shape[2:])

    def dense(self, x: mx.array) -> mx.array:
        """(B, L, ...) -> (B, T, ...): head, probes, tail."""
        p = self.plan
        parts = [x[:, : p.head], x[:, p.stop :]]
        if self.probe_every:
            parts.insert(1, x[:, p.start : p.stop : self.probe_every])
        return mx.concatenate(parts, axis=1)

    def rest(self, blocks: mx.array) -> mx.array:
        """(M, N, d) -> (M, N - probes, d)."""
        if not self.probe_every:
            return blocks
        m, _, d = blocks.shape
        groups = blocks.reshape(m, self.probes, self.probe_every, d)
        return groups[:, :, 1:].reshape(m, -1, d)

    def join(self, dense: mx.array, rest: mx.array) -> mx.array:
        """Outputs (B, T, d) of ``dense`` and (M, N - probes, d) of ``rest`` -> (B, L, d)."""
        p = self.plan
        batch, _, d = dense.shape
        tail = dense.shape[1] - p.tail
        if self.probe_every:
            exact = dense[:, p.head : tail].reshape(len(rest), self.probes, 1, d)
            rest = rest.reshape(len(rest), self.probes, self.probe_every - 1, d)
            rest = mx.concatenate([exact, rest], axis=2)
        middle = rest.reshape(batch, -1, d)
        return mx.concatenate([dense[:, : p.head], middle, dense[:, tail:]], axis=1)
