"""One sparse forward pass: how a call is planned, and the FFN of each layer under the plan.

An engine keeps nothing between calls: what belongs to a prompt is its ``Prompt``, and what a call's
layers share is its ``Call``. The module that mlx-lm calls hands both down (attachment.py).
"""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, Optional

import mlx.core as mx

from .config import DeviceSettings, PrefillConfig
from .model.caches import Cache, Memory, is_empty, memory_of, valid_tokens
from .model.ffn import Estimate, GatedFFN
from .neurons.compensators import Compensator
from .neurons.selectors import Selector, SelectorInputs, at_least_one, top_neurons
from .tokens.flops import FlopCount, Shapes, Skipping, count_call
from .tokens.plan import Plan, plan_call, shortest_sparse
from .tokens.pruning import (
    FIRST,
    CentredNorm,
    Kept,
    Pruner,
    keep_best,
    mean_token,
    survivors,
)
from .tokens.split import TokenSplit

# Larger blocks do not need a larger dense head: 128 tokens are the paper's block. What follows a
# prompt leans on its end: a tail of 256 costs less than a lower sparsity that is as good.
EDGE, TAIL = 128, 256


@dataclass
class Call:
    """One call of the model: what its layers share.

    survivors: How those are split who do not skip the FFN; None where nobody skips it.
    """

    split: TokenSplit
    memory: Memory
    valid: Optional[mx.array] = None
    survivors: Optional[TokenSplit] = None

    def of(self, kept: Kept) -> "Call":
        """The call of those who stay."""
        assert self.survivors is not None
        valid = None if self.valid is None else kept.take(self.valid)
        return Call(self.survivors, self.memory, valid)


@dataclass
class Prompt:
    """One prompt on its way through the model, however it is chunked.

    left: Tokens that are still to come; None for a prompt that is too short to be read sparsely.
    """

    left: Optional[int]
    flops: FlopCount = field(default_factory=FlopCount)

    def tokens_after(self, new: int) -> Optional[int]:
        """Tokens that follow a call of ``new`` tokens; None where the call is no part of it."""
        if not self.left:
            return None
        after = self.left - new
        self.left = max(0, after)
        return after if after >= 0 else None


@dataclass
class Engine:
    """Settings, FFNs and budgets of an attached model.

    ``keep[i]`` neurons of layer i survive in a sparse block; None keeps the layer dense.
    ``predictor`` says where the trained weights came from, ``chosen`` why this sparsity was taken
    where that was left to the predictor file, ``share`` which part of the FFN FLOPs the FFNs here are,
    and ``left_dense`` which of the rest are no routed experts.
    """

    config: PrefillConfig
    ffns: list[GatedFFN]
    keep: list[Optional[int]]
    selector: Selector
    compensator: Optional[Compensator] = None
    predictor: Optional[str] = None
    device: DeviceSettings = DeviceSettings()
    schedule: str = "uniform"
    chosen: Optional[str] = None
    share: float = 1.0
    left_dense: Optional[str] = None
    pruner: Pruner = CentredNorm()

    @property
    def sparse(self) -> bool:
        """Whether any prompt would be read sparsely."""
        return any(map(self.thins, range(len(self.ffns))))

    @property
    def neurons(self) -> list[Optional[int]]:
        """``keep``; all None on a device on which no sparse FFN is faster."""
        return [None] * len(self.keep) if self.device.dense else self.keep

    def thins(self, layer: int) -> bool:
        """Whether a layer runs fewer neurons or fewer tokens."""
        return self.neurons[layer] is not None or self.prunes(layer)

    def prunes(self, layer: int) -> bool:
        """Whether tokens skip this layer's FFN."""
        last = len(self.ffns) - 1  # a prefill never runs it
        return self.config.prune_tokens > 0 and FIRST <= layer < last

    @property
    def block_size(self) -> int:
        """Tokens of a block, about: the user's word, else what is fastest on this device."""
        return self.config.block_size or self.device.block_size

    @property
    def edge(self) -> int:
        """Tokens of the dense head."""
        return min(self.block_size, EDGE)

    @property
    def tail(self) -> int:
        """Tokens of the dense tail, at least."""
        return TAIL if self.block_size >= EDGE else self.edge

    @property
    def shortest(self) -> int:
        """Prompts of fewer tokens stay dense."""
        least = shortest_sparse(self.block_size, self.edge, self.tail)
        return max(least, self.device.shortest)

    @property
    def shapes(self) -> Shapes:
        """(d, f) of every layer."""
        return [ffn.shape for ffn in self.ffns]

    def settings(self) -> dict[str, Any]:
        """What runs, whatever was asked for."""
        compensator = self.compensator
        return {
            "sparsity": self.config.sparsity if any(self.neurons) else 0.0,
            "prune_tokens": self.config.prune_tokens,
            "block_size": self.block_size,
            "selector": self.selector.name,
            "compensator": "none" if compensator is None else compensator.name,
            "schedule": self.schedule,
            "predictor": self.predictor,
            "strategy": self.device.strategy,
            "shortest": self.shortest,
            "attention_block": self.device.attention_block,
            "unpack": self.device.unpack,
            "half": self.device.half,
        }

    def on(self, device: DeviceSettings) -> "Engine":
        """The same under other settings of the device; this one stays as it is."""
        how = (device.strategy, device.unpack, device.half)
        ffns = [ffn.under(*how) for ffn in self.ffns]
        return replace(self, ffns=ffns, device=device)

    def prompt(self, tokens: int) -> Prompt:
        """A prompt of so many tokens that is about to be read."""
        return Prompt(tokens if tokens >= self.shortest else None)

    def begin(
        self, prompt: Optional[Prompt], batch: int, new: int, cache: Cache
    ) -> Optional[Call]:
        """Plan a call of ``new`` tokens per row; None where it runs dense.

        Args:
            prompt: The one that is being read, None where nobody knows.
        """
        after = None if prompt is None else prompt.tokens_after(new)
        if new > 1:
            self.drop_unsupported()
        if not self.sparse:
            return None
        empty = new > 1 and is_empty(cache)
        if new == 1:
            sparse = self.config.sparse_decode and after is None
            plan = Plan(head=0, blocks=1, block_size=1, tail=0) if sparse else None
        elif after is None and new < self.shortest:
            plan = None
        else:
            plan = self.plan(new, empty, after)
        if prompt is not None and after is not None:
            self.count(prompt.flops, batch, new, plan)
        if plan is None:
            return None
        memory: Memory = [{} for _ in self.ffns]
        if self.selector.remembers:
            memory = memory_of(cache, len(self.ffns), empty)
            if new == 1 and not any(memory):
                return None
        return self.call(plan, memory, valid_tokens(cache, batch, new))

    def call(
        self,
        plan: Plan,
        memory: Optional[Memory] = None,
        valid: Optional[mx.array] = None,
    ) -> Call:
        """A call under a plan, for those who measure single layers too."""
        split = TokenSplit(plan, self.selector.probe_every)
        stay = self.survivors(plan)
        kept = None if stay is None else TokenSplit(stay, self.selector.probe_every)
        return Call(split, memory or [{} for _ in self.ffns], valid, kept)

    def survivors(self, plan: Plan) -> Optional[Plan]:
        """The plan of those who do not skip the FFN; a decode step's token never does."""
        if not self.config.prune_tokens or plan.tokens == 1:
            return None
        unit = self.selector.unit(self.block_size)
        return survivors(plan, self.config.prune_tokens, self.block_size, unit)

    def plan(self, new: int, empty: bool, after: Optional[int]) -> Optional[Plan]:
        """plan_call() under this engine's settings."""
        return plan_call(
            new,
            self.block_size,
            cache_empty=empty,
            edge=self.edge,
            tail=self.tail,
            after=after,
            dense_head=self.config.dense_head,
            dense_tail=self.config.dense_tail,
            unit=self.selector.unit(self.block_size),
        )

    def plans(self, tokens: int) -> Iterator[tuple[int, Optional[Plan]]]:
        """(new tokens, plan) of every call that generation makes of a prompt; the last comes alone."""
        done = 0
        while done < tokens:
            new = min(self.device.step, tokens - 1 - done) or 1
            sparse = new > 1 and tokens >= self.shortest
            after = tokens - done - new
            yield new, self.plan(new, done == 0, after) if sparse else None
            done += new

    def count(
        self, count: FlopCount, batch: int, new: int, plan: Optional[Plan]
    ) -> None:
        """count_call() under this engine's settings."""
        skipping = None
        if plan is not None and (stay := self.survivors(plan)) is not None:
            pruned = [self.prunes(i) for i in range(len(self.ffns))]
            skipping = Skipping(stay, pruned, self.pruner)
        parts = (self.shapes, self.neurons, self.selector, self.compensator)
        products = [ffn.products for ffn in self.ffns]
        count_call(count, (batch, new), plan, *parts, skipping, products)

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

    def forward(self, call: Call, layer: int, x: mx.array) -> mx.array:
        """The FFN of one layer under a call's plan. x: (B, L, d) -> (B, L, d)."""
        if call.survivors is None or not self.prunes(layer):
            return self.run(call, layer, x)
        kept = self.who_stays(call, layer, x)
        inside = call.of(kept)
        y = self.run(inside, layer, kept.take(x))
        return kept.put(y, self.without_ffn(inside, layer, y, kept.others(x)))

    def who_stays(self, call: Call, layer: int, x: mx.array) -> Kept:
        """The tokens that do not skip a layer's FFN. Padding goes first."""
        plan, valid = call.split.plan, call.valid
        assert call.survivors is not None
        middle = slice(plan.start, plan.stop)
        if valid is not None:
            valid = valid[:, middle]
        scores = self.pruner.score(layer, x[:, middle], valid)
        if valid is not None:
            scores = mx.where(valid > 0, scores, -mx.inf)
        return keep_best(scores, plan, call.survivors.plan.tokens)

    def without_ffn(
        self, inside: Call, layer: int, y: mx.array, x: mx.array
    ) -> mx.array:
        """What tokens x (B, n, d) get that skip the FFN: the mean output of the middle's others.

        Args:
            y: Outputs of those who stay, whose call is ``inside``.
        """
        plan, valid = inside.split.plan, inside.valid
        middle = slice(plan.start, plan.stop)
        mean = mean_token(y[:, middle], None if valid is None else valid[:, middle])
        return mx.broadcast_to(mean.astype(x.dtype), x.shape)

    def run(self, call: Call, layer: int, x: mx.array) -> mx.array:
        """The FFN of all of a call's tokens, sparse where the layer is."""
        if self.neurons[layer] is None:
            return self.ffns[layer].activations_and_output(x)[1]
        inputs, exact = self.run_dense(call, layer, x)
        neurons = self.choose(layer, inputs)
        return self.apply(call, layer, inputs.blocks, exact, neurons, self.compensator)

    def run_dense(
        self, call: Call, layer: int, x: mx.array
    ) -> tuple[SelectorInputs, mx.array]:
        """Run head, probes and tail, which share one GEMM per projection: outputs (B, T, d)."""
        split, valid = call.split, None
        blocks, dense = split.blocks(x), split.dense(x)
        z, exact = self.ffns[layer].activations_and_output(dense)
        if call.valid is not None:
            valid = (at_least_one(split.blocks(call.valid)), split.dense(call.valid))
        head, memory = split.plan.head, call.memory[layer]
        return SelectorInputs(blocks, dense, z, head, valid, memory), exact

    def choose(self, layer: int, inputs: SelectorInputs) -> mx.array:
        """The neurons that each block keeps, (M, K)."""
        keep = self.keep[layer]
        assert keep is not None
        scores = self.selector.score(layer, self.ffns[layer], inputs)
        return top_neurons(scores, keep)

    def apply(
        self,
        call: Call,
        layer: int,
        blocks: mx.array,
        exact: mx.array,
        neurons: mx.array,
        compensator: Optional[Compensator],
    ) -> mx.array:
        """The other tokens of the blocks over their neurons, and all outputs in order (B, L, d)."""
        ffn, rest = self.ffns[layer], call.split.rest(blocks)
        back = None if compensator is None else compensator(layer, rest)
        if isinstance(back, Estimate):
            y = ffn.sparse(rest, neurons, back)
        else:
            y = ffn.sparse(rest, neurons)
            y = y if back is None else y + back
        return call.split.join(exact, y.astype(blocks.dtype))
