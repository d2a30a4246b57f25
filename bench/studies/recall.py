"""How many of the truly best neurons a predictor's predictors pick, per layer, on held-out prose.

python -m mlx_fastforward.bench.studies.recall --predictor predictor
"""

from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.progress import track

from ... import demo
from ...loading import load_stock
from ...neurons.selectors import Oracle, Selector, SelectorInputs, Trained
from ...predictors.base import BaseModel
from ...predictors.file import load_predictor
from ...train.capture import capture, ffns_of
from ...train.reconstruction import hits
from ..environment import describe
from ..eval.prose import HELD_OUT, passages


def per_layer(
    model: nn.Module, selector: Selector, texts: list[mx.array], block: int, keep: int
) -> list[float]:
    """Mean recall per layer over all blocks; the last layer never runs sparsely."""
    ffns = ffns_of(model)
    oracle = Oracle()
    found: list[list[mx.array]] = [[] for _ in ffns]
    for ids in track(texts, "measuring", transient=True):
        for i, (ffn, x) in enumerate(zip(ffns, capture(model, ids, block, "plain")[0])):
            inputs = SelectorInputs(x.astype(mx.float32))
            scores, truth = (s.score(i, ffn, inputs) for s in (selector, oracle))
            found[i].append(hits(scores, truth, keep))
        mx.eval(found)
    means: list[Any] = [mx.concatenate(f).mean().item() for f in found]
    return means


def main(
    predictor: Annotated[list[Path], typer.Option(help="One or more predictors.")],
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    text: Annotated[Path, typer.Option(help="Prose, UTF-8.")] = HELD_OUT,
    prompts: int = 32,
    tokens: int = 1900,
    block_size: int = 128,
    sparsity: float = 0.5,
) -> None:
    """Top-K recall against the oracle."""
    net, tokenizer, _ = load_stock(model or str(demo.MODEL), "float32", "none")
    texts = passages(text.read_text(encoding="utf-8"), tokenizer, prompts, tokens)
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    for folder in predictor:
        side = load_predictor(folder)
        side.check(BaseModel.of(net))
        if not side.layers:
            raise typer.BadParameter(f"{folder} has no predictors.")
        keep = round((1 - sparsity) * side.base.widths[0])
        found = per_layer(net, Trained(side.layers), texts, block_size, keep)
        layers = " ".join(f"{r:.4f}" for r in found)
        print(f"{folder}: mean {sum(found) / len(found):.4f}, per layer {layers}")


if __name__ == "__main__":
    typer.run(main)
