"""Train the reference modules in PyTorch on a small model, with the losses of the paper.

An example of "trained elsewhere": its checkpoint converts without options.

    python tests/fit_torch.py --text calibration.txt --chats chats.jsonl --out checkpoint.pt
    mlx_fastforward convert checkpoint.pt --activation silu
"""

import json
import time
from pathlib import Path
from typing import Annotated, Optional

import mlx.core as mx
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch_modules import Compensator, Layer, Network, Predictor

from mlx_fastforward import demo, detach, load
from mlx_fastforward.bench.eval.prose import passages
from mlx_fastforward.session import render
from mlx_fastforward.train.capture import capture

BLOCK = 128


class Frozen(torch.nn.Module):
    """The base model's FFNs of all layers, stacked: gate and up (l, f, d), down (l, d, f)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        for name in ("gate", "up", "down"):
            weights = [getattr(x.mlp, f"{name}_proj").weight for x in model.layers[:-1]]
            stacked = np.stack([np.array(w.astype(mx.float32)) for w in weights])
            self.register_buffer(name, torch.from_numpy(stacked))

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """(l, b, n, d) -> (l, b, n, f)."""
        gate = torch.einsum("lbnd,lfd->lbnf", x, self.gate)
        return torch.nn.functional.silu(gate) * torch.einsum(
            "lbnd,lfd->lbnf", x, self.up
        )


def labels(norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3.2: the top half is positive; 32, 16, 8, 4, 2 for its descending fifths."""
    f = norms.shape[-1]
    rank = norms.argsort(descending=True).argsort()
    fifth = torch.clamp(rank // (f // 10), max=4)
    label = (rank < f // 2).float()
    return label, torch.where(label > 0, 2.0 ** (5 - fifth), 1.0)


def keep_best(scores: torch.Tensor) -> torch.Tensor:
    """1 for the better half of the neurons."""
    half = scores.shape[-1] // 2
    return torch.zeros_like(scores).scatter(-1, scores.topk(half).indices, 1.0)


def train(
    net: Network,
    frozen: Frozen,
    x: torch.Tensor,
    steps: int,
    batch: int,
    console: Console,
) -> None:
    """x: (layers, blocks, N, d). Compensators see oracle masks first, then predicted ones."""
    layers = list(net.layers)[: len(x)]
    column = frozen.down.norm(dim=1)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(
        adam, 3e-3, total_steps=steps, pct_start=0.05
    )
    for step in track(range(steps), "training", console=console):
        inputs = x[:, torch.randint(x.shape[1], (batch,))].float()
        z = frozen.activations(inputs)
        norms = z.norm(dim=2) * column[:, None]
        label, weight = labels(norms)
        scores = torch.stack([m.predictor(i) for m, i in zip(layers, inputs)])
        bce = torch.nn.functional.binary_cross_entropy_with_logits(
            scores, label, weight
        )
        mask = keep_best(norms if step < steps // 2 else scores.detach())
        lost = torch.einsum("lbnf,ldf->lbnd", z * (1 - mask[:, :, None]), frozen.down)
        added = torch.stack([m.compensator(i) for m, i in zip(layers, inputs)])
        error = (added - lost).square().mean((1, 2, 3)) / lost.square().mean((1, 2, 3))
        adam.zero_grad()
        (bce + error.mean()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        decay.step()
    recall = (keep_best(scores) * label).sum(-1).mean(-1) / label.sum(-1).mean(-1)
    print("recall", [round(r, 3) for r in recall.tolist()])
    print(
        "share of the lost output that remains", [round(e, 3) for e in error.tolist()]
    )


def main(
    text: Annotated[Path, typer.Option(help="Prose to fit on.")],
    chats: Annotated[Path, typer.Option(help="JSONL with messages, half of the data.")],
    out: Annotated[Path, typer.Option(help="Checkpoint, .pt.")],
    model: Optional[str] = None,
    sequences: int = 96,
    tokens: int = 1920,
    steps: int = 600,
    batch: int = 8,
    rank: int = 16,
    hidden: int = 32,
) -> None:
    """Train and save a state dict."""
    console = Console(stderr=True)
    torch.manual_seed(0)
    start = time.perf_counter()
    base, tokenizer = load(model or str(demo.MODEL), sparsity=0.0, predictor="none")
    detach(base)
    base.set_dtype(mx.float32)
    half = sequences // 2
    data = passages(text.read_text(encoding="utf-8"), tokenizer, half, tokens)
    lines = [json.loads(x) for x in chats.read_text().splitlines()]
    step = max(1, len(lines) // half)
    data += [mx.array(render(tokenizer, m["messages"])) for m in lines[::step][:half]]
    seen = [
        capture(base, ids, BLOCK, "plain")[0]
        for ids in track(data, "capturing", console=console)
    ]
    inputs = [
        np.concatenate([np.array(s[i]) for s in seen]) for i in range(len(seen[0]))
    ]
    x = torch.from_numpy(np.stack(inputs))
    d, f = x.shape[-1], base.layers[0].mlp.gate_proj.weight.shape[0]
    net = Network(
        [
            Layer(Predictor(d, rank, f), Compensator(d, hidden, "silu"))
            for _ in base.layers
        ]
    )
    train(net, Frozen(base), x, steps, batch, console)
    torch.save(net.state_dict(), out)
    print(f"{sum(t.size for t in data):,} tokens, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
