"""One sparse forward pass: the plan of the call in hand, and the FFN of each layer under it."""

import contextlib
import weakref
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx

from .compensators import Compensator
from .config import PrefillConfig
from .ffn import GatedFFN
from .plan import Plan, plan_call
from .selectors import Seen, Selector, top_neurons

Cache = Optional[Sequence[Any]]


@dataclass
class Call:
    """One call of the model: what its layers share."""

    plan: Plan
    memory: list[dict[str, mx.array]]
    valid: Optional[mx.array] = None


@dataclass
class Tally:
    """FFN FLOPs of one prompt, over the layers whose FFN a prefill runs."""

    dense: float = 0.0
    run: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the dense FFN FLOPs that was skipped; selection and compensation are paid."""
        return 1 - self.run / self.dense if self.dense else 0.0


class CacheMemory:
    """Per-prompt memory of the selectors, alive as long as the prompt's KV cache."""

    def __init__(self, layers: int):
        self.layers = layers
        self.kept: weakref.WeakKeyDictionary[Any, list] = weakref.WeakKeyDictionary()

    def of(self, cache: Cache, fresh: bool) -> list[dict[str, mx.array]]:
        if not cache or cache[0] is None:
            return [{} for _ in range(self.layers)]
        if fresh or cache[0] not in self.kept:
            self.kept[cache[0]] = [{} for _ in range(self.layers)]
        return self.kept[cache[0]]


@dataclass
class Engine:
    """Shared by an attached model and its FFNs.

    ``keep[i]`` neurons of layer i survive in a sparse block; None keeps the layer dense.
    """

    config: PrefillConfig
    ffns: list[GatedFFN]
    keep: list[Optional[int]]
    selector: Selector
    compensator: Optional[Compensator] = None
    enabled: bool = True
    call: Optional[Call] = None
    remaining: Optional[int] = None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.memory = CacheMemory(len(self.ffns))

    @contextlib.contextmanager
    def prompt(self, tokens: int) -> Iterator[Tally]:
        """The next ``tokens`` tokens are one whole prompt, however it is chunked."""
        self.tally = Tally()
        self.remaining = tokens if tokens >= 3 * self.config.block_size else None
        try:
            yield self.tally
        finally:
            self.remaining = None

    def begin(
        self, batch: int, new: int, cache: Cache, training: bool
    ) -> Optional[Call]:
        """Plan a call of ``new`` tokens per row; None where it runs dense."""
        after = self._tokens_after(new)
        if training or not self.enabled or not any(self.keep):
            return None
        if new == 1:
            sparse = self.config.sparse_decode and after is None
            plan = Plan(head=0, blocks=1, block_size=1, tail=0) if sparse else None
            empty = False
        else:
            empty = is_empty(cache)
            plan = plan_call(
                new,
                self.config.block_size,
                cache_empty=empty,
                after=after,
                dense_head=self.config.dense_head,
                dense_tail=self.config.dense_tail,
            )
        if after is not None:
            self._count(batch, new, plan)
        if plan is None:
            return None
        valid = valid_tokens(cache, batch, new)
        return Call(plan, self.memory.of(cache, empty), valid)

    def _tokens_after(self, new: int) -> Optional[int]:
        """Prompt tokens that follow this call; None outside a known prompt."""
        if not self.remaining:
            return None
        after = self.remaining - new
        self.remaining = max(0, after)
        return after if after >= 0 else None

    def forward(self, layer: int, x: mx.array) -> mx.array:
        """The FFN of one layer under the plan in hand. x: (B, L, d) -> (B, L, d).

        Head, probes and tail are the dense tokens: they share one GEMM per projection. The other
        tokens of the blocks run over the neurons that the selector picked.
        """
        assert self.call is not None
        plan, ffn, keep = self.call.plan, self.ffns[layer], self.keep[layer]
        batch, _, d = x.shape
        assert keep is not None
        n, every = plan.block_size, self.selector.probe_every
        blocks = x[:, plan.start : plan.stop].reshape(-1, n, d)
        dense = [x[:, : plan.head]]
        if every:
            dense.append(blocks[:, ::every].reshape(batch, -1, d))
        dense.append(x[:, plan.stop :])
        sizes = [p.shape[1] for p in dense]
        z = y = None
        if sum(sizes):
            z = ffn.activations(mx.concatenate(dense, axis=1))
            y = ffn.down(z)
        probes = None
        if every and z is not None:
            f = z.shape[-1]
            probes = z[:, plan.head : plan.head + sizes[1]].reshape(
                len(blocks), n // every, f
            )
        valid = self.call.valid
        seen = Seen(
            blocks,
            batch,
            head=z[:, : plan.head] if z is not None and plan.head else None,
            probes=probes,
            valid=None if valid is None else block_mask(valid, plan),
            memory=self.call.memory[layer],
        )
        neurons = top_neurons(self.selector(layer, ffn, seen), keep)
        if every:
            groups = blocks.reshape(len(blocks), n // every, every, d)
            rest = groups[:, :, 1:].reshape(len(blocks), -1, d)
        else:
            rest = blocks
        out = ffn.sparse(rest, neurons)
        if self.compensator is not None:
            out = out + self.compensator(layer, rest, neurons)
        if every and y is not None:
            exact = y[:, plan.head : plan.head + sizes[1]]
            exact = exact.reshape(len(blocks), n // every, 1, d)
            out = out.reshape(len(blocks), n // every, every - 1, d)
            out = mx.concatenate([exact, out], axis=2)
        out = out.reshape(batch, -1, d).astype(x.dtype)
        if y is None:
            return out
        tail = y[:, plan.head + (sizes[1] if every else 0) :]
        return mx.concatenate([y[:, : plan.head], out, tail], axis=1)

    def _count(self, batch: int, new: int, plan: Optional[Plan]) -> None:
        """Add one call to the tally. The last layer's FFN is never run in a prefill chunk."""
        for ffn, keep in zip(self.ffns[:-1], self.keep):
            d, f = ffn.shape
            dense = 6.0 * batch * new * d * f
            self.tally.dense += dense
            self.tally.run += dense
            if plan is None or keep is None:
                continue
            n, every = plan.block_size, self.selector.probe_every
            tokens = n - n // every if every else n
            saved = 6.0 * tokens * d * (f - keep)
            paid = self.selector.flops(n, d, f)
            if self.compensator is not None:
                paid += self.compensator.flops(tokens, d)
            self.tally.run += batch * plan.blocks * (paid - saved)


def is_empty(cache: Cache) -> bool:
    """Whether nothing is cached; never waits for the device."""
    if not cache or cache[0] is None:
        return True
    offset = getattr(cache[0], "offset", None)
    return offset == 0 if isinstance(offset, int) else cache[0].empty()


def valid_tokens(cache: Cache, batch: int, new: int) -> Optional[mx.array]:
    """1 for tokens, 0 for padding (B, L); None where the cache cannot hold padding.

    Batch caches know their padding as arrays. Right padding is counted from the end of the whole
    batch, so an earlier chunk may hide a few real tokens too: only from the statistics.
    """
    left = getattr(cache[0], "left_padding", None) if cache else None
    if batch == 1 or left is None or cache is None:
        return None
    place = mx.arange(new)[None]
    valid = place >= (left - getattr(cache[0], "_idx", 0))[:, None]
    right = getattr(cache[0], "_right_padding", None)
    if right is not None:
        valid = valid & (place < (new - right)[:, None])
    return valid.astype(mx.float32)


def block_mask(valid: mx.array, plan: Plan) -> mx.array:
    """The mask of the sparse blocks (M, N); a block of padding alone counts as real."""
    m = valid[:, plan.start : plan.stop].reshape(-1, plan.block_size)
    return mx.maximum(m, 1 - mx.max(m, axis=-1, keepdims=True))
