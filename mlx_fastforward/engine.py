"""One sparse forward pass: the plan of the call in hand, and the FFN of each layer under it."""

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional, Sequence

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache

from .compensators import Compensator, Estimate
from .config import PrefillConfig
from .ffn import GatedFFN
from .plan import Plan, plan_call, shortest_sparse
from .selectors import Seen, Selector, at_least_one, top_neurons

Cache = Optional[Sequence[Any]]
Memory = list[dict[str, mx.array]]

# Larger blocks do not need a larger dense head: 128 tokens are the paper's block. What follows a
# prompt leans on its end: a tail of 256 costs less than a lower sparsity that is as good.
EDGE, TAIL = 128, 256


@dataclass
class Call:
    """One call of the model: what its layers share."""

    plan: Plan
    memory: Memory
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
    """Per-prompt memory of the selectors, kept on the prompt's first KV cache.

    There it dies with the prompt and is copied with it. mlx-lm swaps cache objects when it
    quantises them: the memory of the call before is handed on. The rows of batch caches come and
    go, so nothing is kept there.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self.last: Optional[Memory] = None

    def of(self, cache: Cache, fresh: bool) -> Memory:
        first: Any = cache[0] if cache else None
        if first is None or hasattr(first, "left_padding"):
            return [{} for _ in range(self.layers)]
        memory = None if fresh else first.__dict__.get("_fastforward")
        if memory is None and not fresh and isinstance(first, QuantizedKVCache):
            memory = self.last
        if memory is None:
            memory = [{} for _ in range(self.layers)]
        first._fastforward = self.last = memory
        return memory


@dataclass
class Engine:
    """Shared by an attached model and its FFNs.

    ``keep[i]`` neurons of layer i survive in a sparse block; None keeps the layer dense.
    ``adapter`` says where the trained weights came from, ``tuned_dense`` that dense is the fastest
    on this device.
    """

    config: PrefillConfig
    ffns: list[GatedFFN]
    keep: list[Optional[int]]
    selector: Selector
    compensator: Optional[Compensator] = None
    adapter: Optional[str] = None
    enabled: bool = True
    tuned_dense: bool = False
    call: Optional[Call] = None
    remaining: Optional[int] = None
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.memory = CacheMemory(len(self.ffns))

    @property
    def edge(self) -> int:
        """Tokens of the dense head."""
        return min(self.config.block_size, EDGE)

    @property
    def tail(self) -> int:
        """Tokens of the dense tail, at least."""
        return TAIL if self.config.block_size >= EDGE else self.edge

    @property
    def shortest(self) -> int:
        """Prompts of fewer tokens stay dense."""
        least = shortest_sparse(self.config.block_size, self.edge, self.tail)
        return max(least, self.config.shortest)

    @contextlib.contextmanager
    def prompt(self, tokens: int) -> Iterator[Tally]:
        """The next ``tokens`` tokens are one whole prompt, however it is chunked."""
        self.tally = Tally()
        self.remaining = tokens if tokens >= self.shortest else None
        try:
            yield self.tally
        finally:
            self.remaining = None

    def begin(
        self, batch: int, new: int, cache: Cache, training: bool
    ) -> Optional[Call]:
        """Plan a call of ``new`` tokens per row; None where it runs dense."""
        after = self._tokens_after(new)
        if new > 1:
            self.drop_unsupported()
        if training or not self.enabled or not any(self.keep):
            return None
        if new == 1:
            sparse = self.config.sparse_decode and after is None
            plan = Plan(head=0, blocks=1, block_size=1, tail=0) if sparse else None
            empty = False
        elif after is None and new < self.shortest:
            plan, empty = None, False
        else:
            empty = is_empty(cache)
            plan = self.plan(new, empty, after)
        if after is not None:
            self._count(batch, new, plan)
        if plan is None:
            return None
        memory = self.memory.of(cache, empty)
        if new == 1 and self.selector.remembers and not any(memory):
            return None
        return Call(plan, memory, valid_tokens(cache, batch, new))

    @property
    def compensation(self) -> str:
        """As in --compensator, whatever was asked for."""
        return "none" if self.compensator is None else self.compensator.name

    def plan(self, new: int, empty: bool, after: Optional[int]) -> Optional[Plan]:
        """plan_call() under this engine's settings."""
        return plan_call(
            new,
            self.config.block_size,
            cache_empty=empty,
            edge=self.edge,
            tail=self.tail,
            after=after,
            dense_head=self.config.dense_head,
            dense_tail=self.config.dense_tail,
            unit=self.selector.unit(self.config.block_size),
        )

    def drop_unsupported(self) -> None:
        """Keep layers dense whose projections cannot be sliced, and say so once."""
        reasons = [k and ffn.unsupported() for k, ffn in zip(self.keep, self.ffns)]
        for reason in sorted({r for r in reasons if isinstance(r, str)}):
            warnings.warn(
                f"{reasons.count(reason)} of {len(self.ffns)} layers stay dense: "
                f"neurons cannot be taken out of a {reason}."
            )
        keep = zip(self.keep, reasons)
        self.keep = [None if isinstance(r, str) else k for k, r in keep]

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
        call, ffn, keep = self.call, self.ffns[layer], self.keep[layer]
        assert call is not None and keep is not None
        split = Split(call.plan, self.selector.probe_every)
        blocks, dense = split.blocks(x), split.dense(x)
        z, exact = ffn.activations_and_output(dense)
        valid = None
        if call.valid is not None:
            valid = (at_least_one(split.blocks(call.valid)), split.dense(call.valid))
        seen = Seen(blocks, dense, z, call.plan.head, valid, call.memory[layer])
        neurons = top_neurons(self.selector(layer, ffn, seen), keep)
        rest = split.rest(blocks)
        back = None if self.compensator is None else self.compensator(layer, rest)
        if isinstance(back, Estimate):
            y = ffn.sparse(rest, neurons, back)
        else:
            y = ffn.sparse(rest, neurons)
            y = y if back is None else y + back
        return split.join(exact, y.astype(x.dtype))

    def _count(self, batch: int, new: int, plan: Optional[Plan]) -> None:
        """Add one call to the tally. The last layer's FFN is never run in a prefill chunk."""
        for ffn, keep in zip(self.ffns[:-1], self.keep):
            d, f = ffn.shape
            dense = 6.0 * batch * new * d * f
            self.tally.dense += dense
            self.tally.run += dense
            if plan is None or keep is None:
                continue
            saved, selection, compensation = self.block_flops(plan, d, f, keep)
            self.tally.run += batch * (selection + compensation - saved)

    def block_flops(
        self, plan: Plan, d: int, f: int, keep: int
    ) -> tuple[float, float, float]:
        """FLOPs of a layer that a plan's blocks save, and that selection and compensation take."""
        split = Split(plan, self.selector.probe_every)
        tokens, blocks = plan.block_size - split.probes, plan.blocks
        saved = 6.0 * tokens * d * (f - keep)
        selection = self.selector.flops(plan.block_size, split.dense_tokens, d, f)
        compensation = 0.0
        if self.compensator is not None:
            compensation = self.compensator.flops(tokens, d, keep)
        return blocks * saved, blocks * selection, blocks * compensation


@dataclass(frozen=True)
class Split:
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


def is_empty(cache: Cache) -> bool:
    """Whether nothing is cached; never waits for the device."""
    first = cache[0] if cache else None
    if first is None:
        return True
    for name in ("offset", "_offset", "_idx"):  # batch caches have an array as offset
        if isinstance(place := getattr(first, name, None), int):
            return place == 0
    return first.empty()


def valid_tokens(cache: Cache, batch: int, new: int) -> Optional[mx.array]:
    """1 for tokens, 0 for padding (B, L); None where the cache cannot hold padding.

    Batch caches know their padding as arrays, and count positions from the first real token. A
    plain one counts right padding from the end of the whole batch, so an earlier chunk may hide a
    few real tokens too: only from the statistics.
    """
    first: Any = cache[0] if cache else None
    if batch == 1 or not hasattr(first, "left_padding"):
        return None
    chunk = mx.arange(new)[None]
    place = first.offset[:, None] + chunk
    valid = place >= 0
    if (lengths := getattr(first, "_lengths", None)) is not None:
        valid = valid & (place < lengths[:, None])
    if (right := getattr(first, "_right_padding", None)) is not None:
        valid = valid & (chunk < (new - right)[:, None])
    return valid.astype(mx.float32)
