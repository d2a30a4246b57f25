"""How fast the FLOPs of a real shape allow each combination to be; nothing is run, and no memory taken.

python -m mlx_fastforward.bench.studies.ideal --shape llama-3.2-1b --draft smollm2-135m
"""

import itertools
from typing import Optional

import mlx.core as mx
import typer

from ...build import engine_for
from ...cli.inputs import numbers
from ...config import PrefillConfig
from ...scorers import DraftScorer, LayersScorer, Scorer, WordsScorer
from ...speculative import Speculative
from ...tokens.speculative import KeepConfig
from ..eval.arms import label
from ..flops import cost
from ..speed.shapes import random_model, random_predictor


def main(
    shape: str = "llama-3.2-1b",
    draft: Optional[str] = None,
    contexts: str = "4096,8192",
    sparsities: str = "0,0.4,0.5,0.6",
    prune_tokens: str = "0,0.25,0.5",
    keep: str = "1,0.7,0.5,0.3",
) -> None:
    """A line per combination, a column per prompt length: stock's FLOPs over those that would run."""
    net = random_model(shape, None, mx.float32, lazy=True)
    side = random_predictor(net)
    scorers: list[Scorer] = [WordsScorer(), LayersScorer(net)]
    if draft is not None:
        small = random_model(draft, None, mx.float32, lazy=True)
        scorers.append(DraftScorer(small, draft))
    shares = numbers("--keep", keep, float)
    parts: list[Optional[Speculative]] = [None] if 1 in shares else []
    for scorer, share in itertools.product(scorers, shares):
        if share < 1:
            parts.append(Speculative(net, scorer, KeepConfig(keep=share)))
    lengths = numbers("--contexts", contexts, int)
    print(f"{'':60}" + "".join(f"{n:8,}" for n in lengths))
    for sparsity, skip in itertools.product(
        numbers("--sparsities", sparsities, float),
        numbers("--prune-tokens", prune_tokens, float),
    ):
        engine = engine_for(net, PrefillConfig(sparsity, prune_tokens=skip), side)
        for reader in parts:
            line = f"{label(engine, reader=reader):60}"
            for n in lengths:
                if reader is None:
                    found = cost(net, engine, n)
                else:
                    read = round(reader.config.keep * n)
                    found = cost(net, engine, n, reader.scorer, read)
                line += f"{found.speedup:8.2f}"
            print(line)


if __name__ == "__main__":
    typer.run(main)
