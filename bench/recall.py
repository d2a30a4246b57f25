"""How many of the truly best neurons an adapter's predictors pick, per layer, on held-out prose.

python -m mlx_fastforward.bench.recall --adapter adapter
"""

from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.progress import track

from .. import demo
from ..adapter import BaseModel, load_adapter
from ..loading import load
from ..selectors import Oracle, Seen, Selector, Trained
from ..train.capture import capture, ffns_of
from ..train.lost import hits
from .environment import describe
from .prose import HELD_OUT, passages


def per_layer(
    model: nn.Module, selector: Selector, texts: list[mx.array], block: int, keep: int
) -> list[float]:
    """Mean recall per layer over all blocks; the last layer never runs sparsely."""
    ffns = ffns_of(model)
    oracle = Oracle("weighted")
    found: list[list[mx.array]] = [[] for _ in ffns]
    for ids in track(texts, "measuring", transient=True):
        for i, (ffn, x) in enumerate(zip(ffns, capture(model, ids, block, "plain")[0])):
            seen = Seen(x.astype(mx.float32), x[:, :0], x[:, :0])
            found[i].append(hits(selector(i, ffn, seen), oracle(i, ffn, seen), keep))
        mx.eval(found)
    means: list[Any] = [mx.concatenate(f).mean().item() for f in found]
    return means


def main(
    adapter: Annotated[list[Path], typer.Option(help="One or more adapters.")],
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
    net, tokenizer = load(model or str(demo.MODEL), sparsity=0.0, adapter="none")
    net.set_dtype(mx.float32)
    texts = passages(text.read_text(encoding="utf-8"), tokenizer, prompts, tokens)
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    for folder in adapter:
        side = load_adapter(folder)
        side.check(BaseModel.of(net))
        if not side.predictors:
            raise typer.BadParameter(f"{folder} has no predictors.")
        keep = round((1 - sparsity) * side.base.ffn_size)
        found = per_layer(net, Trained(side.predictors), texts, block_size, keep)
        layers = " ".join(f"{r:.4f}" for r in found)
        print(f"{folder}: mean {sum(found) / len(found):.4f}, per layer {layers}")


if __name__ == "__main__":
    typer.run(main)
