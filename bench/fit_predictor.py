"""Fit the paper's expert predictor for a small model, to have the trained selector in the tables.

Captures FFN inputs and activation norms of the dense model once, in memory, then trains all
layers together with the weighted BCE of eq. 19. Meant for the demo model: it keeps every FFN
input (tokens x layers x hidden x 2 bytes).

    python -m mlx_fastforward.bench.fit_predictor --text calibration.txt --out adapter
"""

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import typer
from rich.console import Console
from rich.progress import track

from .. import demo
from ..adapter import BaseModel, save_adapter
from ..attachment import detach
from ..families import family_of, layer_mlps
from ..ffn import GatedFFN
from ..loading import load
from ..session import render
from .environment import describe
from .quality import passages


def capture(
    model: nn.Module, ids: mx.array, block: int
) -> tuple[list[mx.array], list[mx.array]]:
    """Per layer: FFN inputs (blocks, N, d) and neuron norms over each block (blocks, f)."""
    family = family_of(model)
    inputs: list[mx.array] = []

    def tapped(base: type) -> type:
        def call(self: Any, x: mx.array) -> mx.array:
            inputs.append(x)
            return base.__call__(self, x)

        return type("Tapped", (base,), {"__call__": call})

    mlps = layer_mlps(model, family)
    base = type(mlps[0])
    try:
        for mlp in mlps:
            mlp.__class__ = tapped(base)
        model(ids[None])
    finally:
        for mlp in mlps:
            mlp.__class__ = base
    xs, norms = [], []
    for mlp, x in zip(mlps[:-1], inputs):
        ffn = GatedFFN(mlp, family)
        blocks = x[0, : x.shape[1] // block * block].reshape(-1, block, x.shape[-1])
        z = ffn.activations(blocks)
        norms.append(mx.linalg.norm(z, axis=1) * ffn.down_norms())
        xs.append(blocks.astype(mx.float16))
    mx.eval(xs, norms)
    return xs, norms


def weights_by_rank(norms: mx.array) -> tuple[mx.array, mx.array]:
    """Labels and BCE weights (section 3.2): 32, 16, 8, 4, 2 for the fifths of the upper half."""
    f = norms.shape[-1]
    rank = mx.argsort(mx.argsort(-norms, axis=-1), axis=-1)
    label = (rank < f // 2).astype(mx.float32)
    fifth = mx.minimum(rank // max(1, f // 10), 4)
    return label, mx.where(label > 0, mx.power(2.0, 5 - fifth), 1.0)


class Predictors(nn.Module):
    """Eq. 12-13 for all layers at once."""

    def __init__(self, layers: int, d: int, r: int, f: int):
        super().__init__()
        self.query = mx.random.normal((layers, d)) * 0.02
        self.w1 = mx.random.normal((layers, d, r)) / math.sqrt(d)
        self.w2 = mx.random.normal((layers, r, f)) / math.sqrt(r)

    def __call__(self, x: mx.array) -> mx.array:
        """x: (layers, B, N, d) -> (layers, B, f)."""
        logits = mx.einsum("lbnd,ld->lbn", x, self.query) / math.sqrt(x.shape[-1])
        a = mx.softmax(logits, axis=-1)
        pooled = mx.einsum("lbn,lbnd->lbd", a, x)
        return mx.maximum(pooled @ self.w1, 0) @ self.w2


def loss_fn(model: Predictors, x: mx.array, label: mx.array, weight: mx.array):
    scores = model(x)
    return nn.losses.binary_cross_entropy(
        scores, label, weights=weight, with_logits=True, reduction="mean"
    )


def train(
    x: mx.array, norms: mx.array, steps: int, rank: int, batch: int, console: Console
) -> Predictors:
    """x: (layers, blocks, N, d), norms: (layers, blocks, f)."""
    layers, blocks, _, d = x.shape
    net = Predictors(layers, d, rank, norms.shape[-1])
    warm_up = max(1, steps // 20)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, 3e-3, warm_up),
            optim.cosine_decay(3e-3, steps - warm_up),
        ],
        [warm_up],
    )
    adam = optim.Adam(learning_rate=schedule)
    step = nn.value_and_grad(net, loss_fn)
    for _ in track(range(steps), "training", console=console):
        pick = mx.random.randint(0, blocks, (batch,))
        label, weight = weights_by_rank(norms[:, pick])
        loss, grads = step(net, x[:, pick].astype(mx.float32), label, weight)
        adam.update(net, optim.clip_grad_norm(grads, 1.0)[0])
        mx.eval(net.parameters(), adam.state, loss)
    return net


def recall(net: Predictors, x: mx.array, norms: mx.array) -> list[float]:
    """Share of the true top half among the predicted top half, per layer."""
    half = norms.shape[-1] // 2
    scores = mx.concatenate(
        [net(x[:, i : i + 64].astype(mx.float32)) for i in range(0, x.shape[1], 64)],
        axis=1,
    )

    def top(s: mx.array) -> mx.array:
        return mx.argsort(mx.argsort(-s, axis=-1), axis=-1) < half

    both = (top(scores) & top(norms)).astype(mx.float32)
    found: Any = mx.mean(mx.sum(both, axis=-1), axis=-1) / half
    return found.tolist()


def main(
    text: Annotated[Path, typer.Option(help="Prose to fit on, UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    chats: Annotated[
        Optional[Path], typer.Option(help="JSONL with messages, for half of the data.")
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    sequences: int = 240,
    tokens: int = 1920,
    block_size: int = 128,
    rank: int = 16,
    steps: int = 3000,
    batch: int = 48,
    seed: int = 0,
) -> None:
    """Fit predictors and write an adapter."""
    console = Console(stderr=True)
    mx.random.seed(seed)
    start = time.perf_counter()
    net, tokenizer = load(model or str(demo.MODEL), sparsity=0.0)
    detach(net)
    net.set_dtype(mx.float32)
    prose = sequences // 2 if chats else sequences
    data = passages(text.read_text(encoding="utf-8"), tokenizer, prose, tokens)
    if chats:
        lines = [json.loads(x) for x in chats.read_text().splitlines()]
        data += [mx.array(render(tokenizer, m["messages"])) for m in lines[:prose]]
    random.Random(seed).shuffle(data)
    pairs = [
        capture(net, ids, block_size)
        for ids in track(data, "capturing", console=console)
    ]
    xs = mx.stack([mx.concatenate(list(x)) for x in zip(*(p[0] for p in pairs))])
    norms = mx.stack([mx.concatenate(list(n)) for n in zip(*(p[1] for p in pairs))])
    held = max(1, xs.shape[1] // 20)
    fitted = train(xs[:, held:], norms[:, held:], steps, rank, batch, console)
    recalls = recall(fitted, xs[:, :held], norms[:, :held])
    layers = len(net.layers)
    tensors = {}
    for i in range(layers):  # the last layer never runs sparsely; it gets a copy
        j = min(i, layers - 2)
        for name in ("query", "w1", "w2"):
            tensors[f"layers.{i}.predictor.{name}"] = fitted[name][j]
    info = {
        "base_model": asdict(BaseModel.of(net, model or "demo model")),
        "predictor": {"kind": "pooled", "rank": rank},
        "block_size": block_size,
        "calibration": {"tokens": sum(t.size for t in data), "recall": recalls},
        "tool": describe(),
    }
    save_adapter(out, info, tensors)
    print(
        f"{sum(t.size for t in data):,} tokens, {time.perf_counter() - start:.0f} s; "
        f"recall of the top half per layer: {', '.join(f'{r:.3f}' for r in recalls)}"
    )


if __name__ == "__main__":
    typer.run(main)
