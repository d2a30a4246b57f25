"""Tokens by importance: counts that follow the text, fitted errors, and four tiers in one prefill.

python -m mlx_fastforward.bench.studies.tiers tiers --draft DRAFT
"""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import typer
from mlx_lm.models.cache import make_prompt_cache

from ... import demo
from ...attachment import seated
from ...build import engine_for
from ...config import PrefillConfig
from ...continuation import divergence, follow
from ...engine import Call, Engine
from ...loading import load_stock
from ...model.families import Heads, mixers, prefilled
from ...model.ffn import GatedFFN
from ...prefill import read
from ...scorers import DraftScorer
from ...speculative import read_places
from ...tokens.flops import FlopCount, dense_ffn, other_than_ffn
from ...tokens.plan import Plan, cut
from ...tokens.pruning import (
    CentredNorm,
    Kept,
    Pruner,
    keep_best,
    mean_token,
    survivors,
)
from ...tokens.speculative import KeepConfig, kept_places
from ...tokens.split import TokenSplit
from ...train.capture import capture, ffns_of
from ...train.data import Sequences, open_corpus
from ...train.descent import Descent
from ..eval.intervals import interval
from ..eval.tasks import build

app = typer.Typer()
PROSE, FACTS = "continuation", "key-value"


@dataclass
class Item:
    """A prompt, what follows it, and what the dense model thinks of that."""

    task: str
    document: str
    prompt: list[int]
    target: mx.array
    dense: mx.array

    def right(self, logprobs: mx.array) -> bool:
        return bool(mx.all(mx.argmax(logprobs, -1) == self.target))


def items(
    net: nn.Module, tokenizer: Any, prose: int, facts: int, length: int
) -> list[Item]:
    """Prose, and questions about planted facts, each a prompt of its own."""
    found = []
    docs = build(tokenizer, [PROSE], [length], prose)
    docs += build(tokenizer, [FACTS], [length], 1 + facts // 3)
    left = {PROSE: prose, FACTS: facts}
    for d in docs:
        for question, prompt in zip(d.questions, d.prompts):
            if not left[d.task]:
                continue
            left[d.task] -= 1
            said = d.following
            if d.task == FACTS:
                said = tokenizer.encode(question.answers[0], add_special_tokens=False)
                said = [*said, tokenizer.eos_token_id]
            target, cache = mx.array(said), make_prompt_cache(net)
            read(net, mx.array(prompt[:-1]), cache, len(prompt))
            dense = follow(net, mx.array(prompt[-1:]), target, cache)
            found.append(Item(d.task, d.id, prompt, target, dense))
            mx.clear_cache()
    return found


@dataclass
class Result:
    kl: float
    right: bool
    sparsity: float


def measured(
    net: nn.Module, engine: Optional[Engine], item: Item, places: Any = None
) -> Result:
    """One item under an engine, read in part where there are places."""
    cache = make_prompt_cache(net)
    with seated(net, engine):
        if places is None:
            sparsity = read(net, mx.array(item.prompt[:-1]), cache, len(item.prompt))
        else:
            sparsity = read_places(net, item.prompt, places[:-1], cache)
    logprobs = follow(net, mx.array(item.prompt[-1:]), item.target, cache)
    return Result(divergence(item.dense, logprobs)[0], item.right(logprobs), sparsity)


def line(
    label: str, all_items: list[Item], results: list[Result], extra: str = ""
) -> str:
    said = []
    for task in (PROSE, FACTS):
        own = [(i, r) for i, r in zip(all_items, results) if i.task == task]
        if own:
            kl = [r.kl for _, r in own]
            low, high = interval(kl, [i.document for i, _ in own]) or (0.0, 0.0)
            said.append(f"{sum(kl) / len(kl):.4f} ({low:.4f}-{high:.4f})")
    right = sum(r.right for i, r in zip(all_items, results) if i.task == FACTS)
    of = sum(i.task == FACTS for i in all_items)
    skipped = sum(r.sparsity for r in results) / len(results)
    return f"{label:44} {skipped:6.1%} {extra} {'  '.join(said)}  {right} of {of}"


def made(engine: Engine, kind: type, **more: Any) -> Any:
    """The same engine of another class."""
    new = kind(**{f.name: getattr(engine, f.name) for f in fields(Engine)})
    for name, value in more.items():
        setattr(new, name, value)
    return new


# Counts that follow the text


class TrueError(Pruner):
    """The error itself: distance of the FFN's output from the mean one. Saves nothing."""

    def __init__(self, ffns: list[GatedFFN]):
        self.ffns = ffns

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        y = self.ffns[layer].activations_and_output(x)[1]
        return mx.sum(mx.square(y - mean_token(y, valid)), axis=-1)

    def flops(self, tokens: int, d: int) -> float:
        return 0.0


class Fitted(Pruner):
    """A small network's guess of the error that a fitted substitute leaves."""

    def __init__(self, parts: list[dict[str, mx.array]]):
        self.parts = parts

    def score(self, layer: int, x: mx.array, valid: Optional[mx.array]) -> mx.array:
        return guessed(self.parts[layer], x.astype(mx.float32))

    def flops(self, tokens: int, d: int) -> float:
        w = self.parts[1]  # substitutes are counted for all, though some need none
        return 2.0 * tokens * d * (w["w1"].shape[1] + 2 * w["a"].shape[1])


def guessed(w: dict[str, mx.array], x: mx.array) -> mx.array:
    """The error of each token, from a few relu units that guess its logarithm."""
    return mx.exp(mx.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"])


def substitute(w: dict[str, mx.array], x: mx.array) -> mx.array:
    """What a token gets in the place of its FFN: affine, of low rank."""
    return w["mean"] + (x - w["center"]) @ w["a"] @ w["b"]


class Counted(Engine):
    """How many tokens skip is told by the layer, or by the text: a share of the importance, in sixteenths."""

    skips: dict[int, float] = {}
    held: Optional[float] = None
    parts: Optional[list[dict[str, mx.array]]] = None  # of substitutes; None: the mean
    counts: dict[int, list[float]]

    def forward(self, call: Call, layer: int, x: mx.array) -> mx.array:
        if call.survivors is None or not self.prunes(layer):
            return self.run(call, layer, x)
        plan, skip = call.split.plan, self.skips.get(layer, 0.0)
        scores = self.pruner.score(layer, x[:, plan.start : plan.stop], None)
        if self.held is not None:
            ranked = np.sort(np.array(scores[0]))[::-1].cumsum()
            most = np.searchsorted(ranked, self.held * ranked[-1]) + 1
            skip = 1 - min(1.0, np.ceil(16 * most / ranked.size) / 16)
        stay = survivors(
            plan, skip, self.block_size, self.selector.unit(self.block_size)
        )
        self.counts.setdefault(layer, []).append(skip if stay else 0.0)
        if stay is None:
            return self.run(call, layer, x)
        inside = Call(TokenSplit(stay, self.selector.probe_every), call.memory, None)
        kept = keep_best(scores, plan, stay.tokens)
        y = self.run(inside, layer, kept.take(x))
        rest = kept.others(x)
        if self.parts is None:
            return kept.put(y, self.without_ffn(inside, layer, y, rest))
        return kept.put(y, substitute(self.parts[layer], rest))


def affine(x: np.ndarray, y: np.ndarray, rank: int) -> dict[str, np.ndarray]:
    """Reduced-rank regression with a little ridge."""
    center, mean = x.mean(0), y.mean(0)
    u, v = x - center, y - mean
    gram = u.T @ u
    gram += 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
    w = np.linalg.solve(gram, u.T @ v)
    right = np.linalg.svd(u @ w, full_matrices=False)[2][:rank].T
    return {"center": center, "mean": mean, "a": w @ right, "b": right.T}


@app.command()
def errors(
    out: Path, units: int = 32, rank: int = 32, sequences: int = 10, steps: int = 500
) -> None:
    """Per layer a substitute for the FFN and a guess of the error that it leaves."""
    net, tokenizer, _ = load_stock(str(demo.MODEL), "float32", "none")
    texts = Sequences(open_corpus(None), tokenizer, 1900, 5)
    held = Sequences(open_corpus(None), tokenizer, 1900, 5, held_out=True)
    ffns = ffns_of(net)
    rows = [capture(net, texts[i], 128, "plain")[0] for i in range(sequences)]
    tests = [capture(net, held[i], 128, "plain")[0] for i in range(4)]
    mx.eval(rows, tests)
    found: dict[str, mx.array] = {}
    for layer, ffn in enumerate(ffns):
        d = ffn.shape[0]

        def pair(x: mx.array) -> tuple[mx.array, mx.array]:
            x = x[layer].astype(mx.float32).reshape(-1, d)[128:-256]
            return x, ffn.activations_and_output(x[None])[1][0]

        data = [pair(x) for x in rows]
        mx.eval(data)
        x = np.concatenate([np.array(x) for x, _ in data])
        y = np.concatenate([np.array(y) for _, y in data])
        for kind in ("mean", "affine"):
            chosen = np.arange(len(x))
            for _ in range(3):  # who would skip decides what they get
                part = affine(x[chosen], y[chosen], rank if kind == "affine" else 0)
                w = {k: mx.array(v.astype(np.float32)) for k, v in part.items()}
                left = np.array(
                    mx.sum(mx.square(mx.array(y) - substitute(w, mx.array(x))), -1)
                )
                chosen = np.argsort(left)[: len(x) // 2]
            w |= guess_of(mx.array(x), mx.log(mx.array(left) + 1e-9), units, steps)
            found |= {f"{kind}.{layer}.{k}": v for k, v in w.items()}
            said = []
            for test in tests:
                tx, ty = pair(test)
                true = mx.sum(mx.square(ty - substitute(w, tx)), -1)
                whole = mx.sum(mx.square(ty - mx.mean(ty, 0)), -1)
                norm = CentredNorm().score(layer, tx[None], None)[0]
                order = [
                    mx.argsort(s)[: len(true) // 4]
                    for s in (true, guessed(w, tx), norm)
                ]
                said.append([float(mx.sum(true[o]) / mx.sum(whole)) for o in order])
            best, ours, norm = np.mean(said, axis=0)
            print(
                f"layer {layer}, {kind}: error of the quarter skipped: by true {best:.3f}, "
                f"fitted {ours:.3f}, norm {norm:.3f}",
                flush=True,
            )
    mx.save_safetensors(str(out), found)


def guess_of(x: mx.array, e: mx.array, units: int, steps: int) -> dict[str, mx.array]:
    net = nn.Sequential(nn.Linear(x.shape[1], units), nn.ReLU(), nn.Linear(units, 1))
    net.layers[2].bias = net.layers[2].bias + mx.mean(e)

    def loss(net: nn.Module, x: mx.array, e: mx.array) -> mx.array:
        return mx.mean(mx.square(net(x)[:, 0] - e))

    descent = Descent(net, loss, steps, 3e-3, Path("/nonexistent"))
    for step in range(steps):
        some = mx.random.randint(0, len(x), (1024,), key=mx.random.key(step))
        descent.once(x[some], e[some])
    first, _, second = net.layers
    return {
        "w1": first.weight.T,
        "b1": first.bias,
        "w2": second.weight[0],
        "b2": second.bias,
    }


def parts_of(path: Path, kind: str, layers: int) -> list[dict[str, mx.array]]:
    found: Any = mx.load(str(path))
    names = ("center", "mean", "a", "b", "w1", "b1", "w2", "b2")
    return [{n: found[f"{kind}.{i}.{n}"] for n in names} for i in range(layers)]


@app.command()
def counts(
    arms: Annotated[
        str,
        typer.Option(
            help="importance:sparsity:skip; skip as s.9: as many as hold .9 of the importance"
        ),
    ] = "norm:0:.25,mean:0:.25,affine:0:.25,affine:0:s.9",
    fits: Optional[Path] = None,
    prose: int = 6,
    facts: int = 8,
    length: int = 1900,
) -> None:
    """Fixed and dynamic counts: importance norm, true, mean or affine (fitted), or - for neurons alone."""
    net, tokenizer, side = load_stock(str(demo.MODEL), "float32")
    data = items(net, tokenizer, prose, facts, length)
    dense = sum(i.right(i.dense) for i in data if i.task == FACTS)
    print(f"dense finds {dense} of {facts}", flush=True)
    for arm in arms.split(","):
        name, sparsity, skip = arm.split(":")
        if name == "-":
            engine = engine_for(net, PrefillConfig(float(sparsity)), side)
            results = [measured(net, engine, i) for i in data]
            print(
                line(arm, data, results, f"FLOPs {cost(net, engine, 0, length):.3f}"),
                flush=True,
            )
            continue
        base = engine_for(net, PrefillConfig(float(sparsity), prune_tokens=0.25), side)
        more: dict[str, Any] = {}
        if name in ("mean", "affine"):
            assert fits is not None
            parts = parts_of(fits, name, len(prefilled(base.ffns)))
            more = {"pruner": Fitted(parts), "parts": parts}
        elif name == "true":
            more = {"pruner": TrueError(base.ffns)}
        if skip[0] == "s":
            more["held"] = float(skip[1:])
        else:
            more["skips"] = {i: float(skip) for i in range(len(base.ffns))}
        spread = run_counts(net, base, data, arm, more, length)
        if skip[0] == "s":
            del more["held"]
            more["skips"] = {k: round(16 * v) / 16 for k, v in spread.items()}
            run_counts(net, base, data, "  its means, per layer", more, length)


def run_counts(
    net: nn.Module,
    base: Engine,
    data: list[Item],
    label: str,
    more: dict[str, Any],
    length: int,
) -> dict[int, float]:
    engine = made(base, Counted, counts={}, **more)
    start = time.time()
    results = [measured(net, engine, i) for i in data]
    spread = {k: float(np.mean(v)) for k, v in engine.counts.items()}
    mean = float(np.mean(list(spread.values())))
    said = " ".join(f"{v:.2f}" for v in spread.values())
    share = cost(net, base, mean, length, more.get("pruner"))
    print(
        line(label, data, results, f"FLOPs {share:.3f} skip {mean:.3f} [{said}]"),
        f"{time.time() - start:.0f} s",
        flush=True,
    )
    mx.clear_cache()
    return spread


def cost(
    net: nn.Module,
    engine: Engine,
    skip: float,
    length: int,
    pruner: Optional[Pruner] = None,
) -> float:
    """Of a whole dense prefill's FLOPs, when on average this share of the middle skips."""
    if skip:
        config = replace(engine.config, prune_tokens=skip)
        engine = replace(engine, config=config, pruner=pruner or engine.pruner)
    count = FlopCount()
    for new, plan in engine.plans(length):
        engine.count(count, 1, new, plan)
    return flops_share(net, engine, length, length, count.sparsity)


# Four tiers


class Tiered(Engine):
    """The most important tokens of the middle run whole, the least important skip, the others are sparse."""

    whole: float = 0.0
    skip: float = 0.0
    scores: np.ndarray  # of the call's tokens

    def prunes(self, layer: int) -> bool:
        return 1 <= layer < len(self.ffns) - 1

    def survivors(self, plan: Plan) -> Optional[Plan]:
        if plan.tokens == 1:
            return None
        middle = plan.stop - plan.start
        skip, top = round(self.skip * middle), round(self.whole * middle)
        unit = self.selector.unit(self.block_size)
        blocks, length = cut(middle - skip - top, self.block_size, unit)
        head = plan.head + middle - skip - blocks * length
        return Plan(head, blocks, length, plan.tail)

    def order(self, plan: Plan, stay: Plan) -> Kept:
        """Head, the best, the sparse ones, tail, and who skips."""
        ranked = (
            np.argsort(-self.scores[plan.start : plan.stop], kind="stable") + plan.start
        )
        best = np.sort(ranked[: stay.head - plan.head])
        count = stay.blocks * stay.block_size
        some = np.sort(ranked[best.size : best.size + count])
        rest = np.sort(ranked[best.size + count :])
        head, tail = np.arange(plan.start), np.arange(plan.stop, plan.tokens)
        places = np.concatenate([head, best, some, tail, rest]).astype(np.uint32)
        return Kept(mx.array(places)[None], stay.tokens)

    def forward(self, call: Call, layer: int, x: mx.array) -> mx.array:
        if call.survivors is None or not self.prunes(layer):
            return self.run(call, layer, x)
        kept = self.order(call.split.plan, call.survivors.plan)
        inside = call.of(kept)
        y = self.run(inside, layer, kept.take(x))
        if kept.count == x.shape[1]:
            return y[:, mx.argsort(kept.order[0])]
        return kept.put(y, self.without_ffn(inside, layer, y, kept.others(x)))


def flops_share(
    net: nn.Module, engine: Engine, kept: int, total: int, skipped: float
) -> float:
    """Of a whole dense prefill; the scorer is not counted."""
    heads = Heads.of(net, engine.shapes[0][0])

    def cost(n: int, ffn: float) -> float:
        dense = sum(dense_ffn(n, d, f) for d, f in prefilled(engine.shapes))
        return other_than_ffn(mixers(net), heads, n) + ffn * dense

    return cost(kept, 1 - skipped) / cost(total, 1.0)


@app.command()
def tiers(
    draft: str,
    arms: Annotated[
        str,
        typer.Option(help="keep:whole:skip:sparsity of the others, several by commas"),
    ] = "1:0:0:.5,1:.25:0:.65",
    prose: int = 8,
    facts: int = 24,
    length: int = 1900,
) -> None:
    """One importance, the draft's, decides who is dropped, skips the FFN, is sparse, is whole."""
    net, tokenizer, side = load_stock(str(demo.MODEL), "float32")
    small, _, _ = load_stock(draft, "float32", "none")
    scorer = DraftScorer(small, "draft")
    start = time.time()
    data = items(net, tokenizer, prose, facts, length)
    scores = [scorer.score(i.prompt, 0, KeepConfig()) for i in data]
    dense = sum(i.right(i.dense) for i in data if i.task == FACTS)
    print(f"dense finds {dense} of {facts}, {time.time() - start:.0f} s", flush=True)
    for arm in arms.split(","):
        keep, whole, skip, sparsity = map(float, arm.split(":"))
        plain = engine_for(net, PrefillConfig(sparsity), side)
        results, costs = [], []
        for item, score in zip(data, scores):
            places = None
            if keep < 1:
                places = kept_places(score, 0, KeepConfig(keep=keep))
            engine: Optional[Engine] = plain if sparsity else None
            if whole or skip:
                own = score if places is None else score[places]
                engine = made(plain, Tiered, whole=whole, skip=skip, scores=own)
            results.append(measured(net, engine, item, places))
            n = len(item.prompt)
            kept = n if places is None else places.size
            costs.append(flops_share(net, plain, kept, n, results[-1].sparsity))
        label = f"keep {keep:g}, whole {whole:g}, skip {skip:g}, neurons {sparsity:g}"
        print(line(label, data, results, f"FLOPs {np.mean(costs):.3f}"), flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    app()
