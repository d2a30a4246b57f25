"""Tokens that skip the FFN: who should, what they get instead, and what it costs beside neurons.

python -m mlx_fastforward.bench.studies.pruning --prompts 6

Attention is that of the last tokens of what is read: --separate lets it see each question.
"""

import functools
import time
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.console import Console
from rich.progress import track

from ...attachment import watched_attention
from ...config import PrefillConfig
from ...engine import Call, Engine
from ...model.ffn import GatedFFN
from ...predictors.file import PredictorFile
from ...tokens.pruning import CentredNorm, Pruner, mean_token
from ..environment import describe
from ..eval.arms import Arm
from ..eval.evaluation import Record, evaluate
from ..eval.summaries import summary
from ..eval.tasks import Document, build
from ..flops import cost

LAST = 64  # queries whose attention says who matters
PROSE, FACTS = "continuation", "key-value"


class Random(Pruner):
    """Anybody."""

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        return mx.random.uniform(shape=x.shape[:2], key=mx.random.key(layer))

    def flops(self, tokens: int, d: int) -> float:
        return 0.0


class Attention(Pruner):
    """Whom the last tokens of the call look at: mean over heads and queries, pooled over neighbours."""

    def __init__(self, received: dict[int, mx.array], head: int):
        self.received = received
        self.head = head

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        scores = self.received[layer]
        padded = mx.pad(scores, [(0, 0), (6, 6)])
        pooled = sum(padded[:, i : i + scores.shape[1]] for i in range(13))
        return pooled[:, self.head : self.head + x.shape[1]]  # type: ignore

    def flops(self, tokens: int, d: int) -> float:
        return 2.0 * LAST * tokens * d


@dataclass
class Oracle(Pruner):
    """Whose output is farthest from the mean one: saves nothing, for measuring."""

    ffns: list[GatedFFN]

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        y = self.ffns[layer].activations_and_output(x)[1]
        return mx.sum(mx.square(y - mean_token(y, valid)), axis=-1)

    def flops(self, tokens: int, d: int) -> float:
        return 0.0


@dataclass
class Sampled(Pruner):
    """How far some of the neurons are from their means: one in ``every`` speaks for the others."""

    ffns: list[GatedFFN]
    every: int

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        ffn = self.ffns[layer]
        some = mx.arange(self.every // 2, ffn.shape[1], self.every)
        z = ffn.kept_activations(x.reshape(-1, x.shape[-1]), some)
        z = z.reshape(*x.shape[:2], -1)
        far = (z - mean_token(z, valid)) * mx.take(ffn.down_norms(), some)
        return mx.sum(mx.square(far), axis=-1)

    def flops(self, tokens: int, d: int) -> float:
        return 4.0 * tokens * d * (self.ffns[1].shape[1] // self.every)


class OutOfReach(CentredNorm):
    """What of a token's FFN input the compensator's directions do not see."""

    def __init__(self, compensator: Any):
        self.compensator = compensator

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        w = self.compensator.layers[layer]
        v = w.v.astype(mx.float32)
        basis = mx.linalg.qr(v, stream=mx.cpu)[0]
        x = x.astype(mx.float32) - w.center
        return mx.sum(mx.square(x), -1) - mx.sum(mx.square(x @ basis), -1)


@dataclass
class Tap:
    """What the last queries of each layer's newest call look at."""

    received: dict[int, mx.array] = field(default_factory=dict)

    def __call__(
        self, layer: int, own: Any, q: mx.array, k: mx.array, v: Any, **more: Any
    ) -> mx.array:
        new, heads = q.shape[2], k.shape[1]
        if new > LAST:
            last = q[:, :, -LAST:].reshape(len(q), heads, -1, LAST, q.shape[3])
            scores = more["scale"] * (last @ k[:, :, None].swapaxes(-1, -2))
            seen = k.shape[2]
            rows = mx.arange(seen - LAST, seen)[:, None]
            scores = mx.where(rows >= mx.arange(seen), scores, -mx.inf)
            weights = mx.softmax(scores.astype(mx.float32), axis=-1)
            self.received[layer] = mx.mean(weights, axis=(1, 2, 3))[:, -new:]
        return own(q, k, v, **more)


class Nothing(Engine):
    """Tokens that skip the FFN get nothing."""

    def without_ffn(
        self, inside: Call, layer: int, y: mx.array, x: mx.array
    ) -> mx.array:
        return mx.zeros_like(x)


class Estimated(Engine):
    """They get the low-rank compensator's guesses of all neurons through the down projection."""

    def without_ffn(
        self, inside: Call, layer: int, y: mx.array, x: mx.array
    ) -> mx.array:
        guess: Any = self.compensator(layer, x)  # type: ignore
        return guess.phi @ (guess.u.T @ self.ffns[layer].down_matrix().T)


class Corrected(Estimated):
    """The same, and the mean of what the guesses miss in those who stay."""

    def forward(self, call: Call, layer: int, x: mx.array) -> mx.array:
        if call.survivors is None or not self.prunes(layer):
            return self.run(call, layer, x)
        kept = self.who_stays(call, layer, x)
        inside, stayed = call.of(kept), kept.take(x)
        y = self.run(inside, layer, stayed)
        guess = functools.partial(self.without_ffn, inside, layer, y)
        missed = super(Estimated, self).without_ffn(
            inside, layer, y - guess(stayed), x[:, :1]
        )
        return kept.put(y, guess(kept.others(x)) + missed)


INSTEAD = {"nothing": Nothing, "estimate": Estimated, "corrected": Corrected}


@dataclass(frozen=True)
class Variant(Arm):
    """Settings, with another importance and perhaps something else instead of the FFN."""

    importance: str = "norm"
    tap: Tap = field(default_factory=Tap)
    instead: str = "mean"

    def engine(
        self, model: nn.Module, predictor: Optional[PredictorFile]
    ) -> Optional[Engine]:
        engine = super().engine(model, predictor)
        assert engine is not None
        if self.instead in INSTEAD:
            parts = {f.name: getattr(engine, f.name) for f in fields(engine)}
            engine = INSTEAD[self.instead](**parts)
        pruners: dict[str, Any] = {
            "norm": CentredNorm,
            "random": Random,
            "attention": lambda: Attention(self.tap.received, engine.edge),
            "oracle": lambda: Oracle(engine.ffns),
            "sampled": lambda: Sampled(engine.ffns, 16),
            "few sampled": lambda: Sampled(engine.ffns, 64),
            "out of reach": lambda: OutOfReach(engine.compensator),
        }
        return replace(engine, pruner=pruners[self.importance]())


def arms(tap: Tap) -> Iterator[Variant]:
    """Neurons; tokens by every importance, with the estimate and without; both."""
    for sparsity in (0.5, 0.6, 0.7):
        yield Variant(f"neurons {sparsity:.0%}", PrefillConfig(sparsity))
    for sparsity, share in ((0.5, 0.1), (0.5, 0.25), (0.6, 0.1), (0.6, 0.25)):
        config = PrefillConfig(sparsity, prune_tokens=share)
        yield Variant(f"neurons {sparsity:.0%}, tokens {share:.0%}", config)
    for share in (0.25, 0.5):
        config = PrefillConfig(0.0, prune_tokens=share)
        for name in (
            "norm",
            "attention",
            "random",
            "oracle",
            "out of reach",
            "sampled",
            "few sampled",
        ):
            said = f"tokens {share:.0%} by {name}"
            yield Variant(said, config, importance=name, tap=tap)
            if name in ("norm", "random"):
                for instead in INSTEAD:
                    other = f"{said}, {instead} instead"
                    yield Variant(other, config, importance=name, instead=instead)


def alone(documents: list[Document]) -> Iterator[Document]:
    """One document per question; its id stays, for the intervals."""
    for d in documents:
        for question, prompt in zip(d.questions, d.prompts):
            yield replace(d, questions=[question], prompts=[prompt])


def line(label: str, records: list[Record], speed: float) -> str:
    """Name, FFN FLOPs skipped, speed-up by FLOPs, KL of prose, KL of answers, facts."""
    own = [r for r in records if r.arm == label]
    prose, facts = (
        summary([r for r in own if r.task == task], task) for task in (PROSE, FACTS)
    )
    low, high = prose.kl_bounds or (prose.kl, prose.kl)
    found = round((facts.score_sparse or 0) * facts.scored)
    return (
        f"{label:42} {prose.ffn_sparsity:6.1%}  {speed:.2f}  {prose.kl:.4f} ({low:.4f}-{high:.4f})  "
        f"{facts.kl:.4f}  {found} of {facts.scored}"
    )


def main(
    length: int = 1900,
    prompts: int = 6,
    seed: int = 0,
    only: Annotated[str, typer.Option(help="Arms whose names hold one of these.")] = "",
    separate: Annotated[
        bool, typer.Option(help="Every question a prompt of its own, for attention.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Then it ends early.")] = 1e9,
    model: Optional[str] = None,
) -> None:
    """A line per arm: FFN FLOPs skipped, speed-up by FLOPs, KL of prose and answers, facts."""
    from ...cli.models import stock_model

    net, tokenizer, side = stock_model(model, "float32")
    start = time.monotonic()
    prose, facts = (
        build(tokenizer, [task], [length], prompts, seed) for task in (PROSE, FACTS)
    )
    documents = [d for pair in zip(prose, facts) for d in pair]
    documents = list(alone(documents)) if separate else documents
    tap = Tap()
    chosen = [a for a in arms(tap) if any(o in a.label for o in only.split(","))]
    records: list[Record] = []
    with watched_attention(net, tap):
        for document in track(documents, console=Console(stderr=True)):
            records += evaluate(net, tokenizer, [document], chosen, side, max_tokens=12)
            if records[-1].task == FACTS and time.monotonic() - start > 60 * minutes:
                break
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    first = [r for r in records if r.arm == chosen[0].label]
    dense = [r.score_dense for r in first if r.score_dense is not None]
    print(f"dense: {sum(dense):.0f} of {len(dense)} facts")
    for arm in chosen:
        engine = arm.engine(net, side)
        assert engine is not None
        print(line(arm.label, records, cost(net, engine, length).speedup))


if __name__ == "__main__":
    typer.run(main)
