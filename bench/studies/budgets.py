"""Do costs add up, and where else could FLOPs go: whole settings against the dense model.

    python -m mlx_fastforward.bench.studies.budgets schedules

Each arm's KL on what follows held-out prompts, prose and chats, beside the sum of its layers' curves.
"""

from dataclasses import fields, replace
from enum import Enum
from typing import Annotated, Any, Optional, Sequence

import mlx.core as mx
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ... import demo
from ...build import engine_for
from ...config import PrefillConfig
from ...continuation import continuation, divergence
from ...engine import Engine
from ...loading import load_stock
from ...model.families import prefilled
from ...model.ffn import GatedFFN
from ...neurons.compensators import LowRankCompensator
from ...neurons.selectors import Oracle, SelectorInputs, Trained
from ...predictors.file import PredictorFile
from ...train.data import Sequences, open_corpus, usual_length
from ..environment import describe
from ..eval.intervals import interval

TOKENS = 64  # compared after each prompt
SEED = 1  # other chats than those that the curves were measured on
SCHEDULES = ("measured", "first-dense", "uniform", "layerwise")


class Which(str, Enum):
    schedules = "schedules"
    blocks = "blocks"
    edges = "edges"
    layers = "layers"


def edged(engine: Engine, head: int, tail: int) -> Engine:
    """The same engine with another dense head and tail."""
    kind = type("Edged", (Engine,), {"edge": head, "tail": tail})
    return kind(**{f.name: getattr(engine, f.name) for f in fields(Engine)})


class OneOracle(Trained):
    """The predictors' choice, but in one layer the best: the most that a better one there can win."""

    def __init__(self, trained: Trained, where: int):
        super().__init__(trained.layers)
        self.where = where

    def score(self, layer: int, ffn: GatedFFN, inputs: SelectorInputs) -> mx.array:
        if layer == self.where:
            return Oracle().score(layer, ffn, inputs)
        return super().score(layer, ffn, inputs)


def silent(compensator: LowRankCompensator, where: Sequence[int]) -> LowRankCompensator:
    """The same, with nothing to say in some layers."""
    layers = enumerate(compensator.layers)
    return LowRankCompensator(
        [replace(w, u=mx.zeros_like(w.u)) if i in where else w for i, w in layers]
    )


def by_layer(base: Engine) -> dict[str, Engine]:
    """What each layer's predictor loses, and what its compensator gives."""
    trained, estimates = base.selector, base.compensator
    assert isinstance(trained, Trained) and isinstance(estimates, LowRankCompensator)
    sparse = [i for i, keep in enumerate(base.keep) if keep is not None]
    found = {"as shipped": base, "best everywhere": replace(base, selector=Oracle())}
    found["no compensator"] = replace(base, compensator=silent(estimates, sparse))
    for i in sparse:
        best, others = OneOracle(trained, i), [j for j in sparse if j != i]
        found[f"best in layer {i}"] = replace(base, selector=best)
        only = silent(estimates, others)
        found[f"compensator in layer {i} alone"] = replace(base, compensator=only)
    return found


def engines(which: Which, make: Any) -> dict[str, Engine]:
    """The arms by name. make: PrefillConfig -> Engine."""
    if which == Which.schedules:
        levels = (0.3, 0.5, 0.6, 0.7)
        return {
            f"{schedule} {s:.0%}": make(PrefillConfig(s, schedule=schedule))
            for s in levels
            for schedule in SCHEDULES
        }
    if which == Which.blocks:
        sizes = (64, 128, 256, 512, 1024)
        return {f"block {n}": make(PrefillConfig(block_size=n)) for n in sizes}
    base = make(PrefillConfig())
    if which == Which.layers:
        return by_layer(base)
    edges = [(head, 256) for head in (0, 32, 128, 256, 512)]
    edges += [(128, tail) for tail in (0, 64, 128, 384, 512)]
    return {f"head {h}, tail {t}": edged(base, h, t) for h, t in edges}


def predicted(engine: Engine, side: PredictorFile) -> Optional[float]:
    """What the layers' curves add up to."""
    if side.curves is None:
        return None
    widths = [f for _, f in prefilled(engine.shapes)]
    kept = [w if k is None else k for k, w in zip(engine.keep, widths)]
    return side.curves.total([1 - k / w for k, w in zip(kept, widths)])


def main(
    which: Annotated[Which, typer.Argument(help="Which table.")],
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    predictor: Annotated[
        Optional[str], typer.Option(help="Default: the one for the model.")
    ] = None,
    prompts: int = 20,
) -> None:
    """Run one study in float32 and print its table."""
    net, tokenizer, side = load_stock(model or str(demo.MODEL), "float32", predictor)
    assert side is not None
    length = usual_length(net)
    held = Sequences(open_corpus(None), tokenizer, length, SEED, held_out=True)
    arms = engines(which, lambda config: engine_for(net, config, side))
    kl: dict[str, list[float]] = {name: [] for name in arms}
    for i in track(range(prompts), console=Console(stderr=True), transient=True):
        ids, prompt = held[i], held[i].size - TOKENS
        dense = continuation(net, ids, prompt, None)
        for name, engine in arms.items():
            sparse = continuation(net, ids, prompt, engine)
            kl[name].append(divergence(dense, sparse)[0])
        mx.clear_cache()
    print(", ".join(f"{k} {v}" for k, v in describe().items()), f"prompts {prompts}")
    table = Table("arm", "FFN skipped", "KL", "95 %", "sum of the curves")
    for name, engine in arms.items():
        low, high = interval(kl[name], [*map(str, range(prompts))]) or (0.0, 0.0)
        total = predicted(engine, side)
        table.add_row(
            name,
            f"{engine.counted(length - TOKENS).sparsity:.1%}",
            f"{sum(kl[name]) / prompts:.5f}",
            f"{low:.5f} to {high:.5f}",
            "-" if total is None else f"{total:.5f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
