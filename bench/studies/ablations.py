"""The paper's ablations, one command each, with paired intervals.

    python -m mlx_fastforward.bench.studies.ablations predictors --dtype float32

Every arm answers the same prompts. Each is compared with the dense model, and its KL with the first
arm's, question by question.
"""

import json
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ... import demo
from ...config import PrefillConfig
from ...files import write_text
from ...loading import load_stock
from ...model.families import context_length
from ..environment import describe
from ..eval.arms import Arm
from ..eval.evaluation import Record, evaluate
from ..eval.intervals import Bounds, interval
from ..eval.summaries import Summary, summary
from ..eval.tasks import BUILT, build, default_lengths


def arm(label: str, sparsity: float = 0.5, **more: Any) -> Arm:
    return Arm(label, PrefillConfig(sparsity, **more))


class Ablation(str, Enum):
    sparsity = "sparsity"
    decode = "decode"
    schedule = "schedule"
    edges = "edges"
    compensator = "compensator"
    predictors = "predictors"


TITLES = {
    Ablation.sparsity: "Sparsity (the paper's table 2)",
    Ablation.decode: "Sparse prefill, and sparse prefill and decoding (table 3)",
    Ablation.schedule: "Budgets of the layers (table 4)",
    Ablation.edges: "Dense first and last tokens (table 5)",
    Ablation.compensator: "Error compensator (table 6)",
    Ablation.predictors: "Predictors (table 7)",
}
ARMS = {
    Ablation.sparsity: [
        arm(f"{s:.0%}", s, selector="trained") for s in (0.3, 0.4, 0.5, 0.6, 0.7)
    ],
    Ablation.decode: [
        arm("prefill", selector="trained"),
        arm("prefill + decode", selector="trained", sparse_decode=True),
    ],
    Ablation.schedule: [
        arm(f"{schedule} {s:.0%}", s, selector="trained", schedule=schedule)
        for s in (0.5, 0.6)
        for schedule in ("measured", "first-dense", "uniform", "layerwise")
    ],
    Ablation.edges: [
        arm("both dense", selector="trained"),
        arm("head only", selector="trained", dense_tail=False),
        arm("tail only", selector="trained", dense_head=False),
        arm("neither", selector="trained", dense_head=False, dense_tail=False),
    ],
    Ablation.compensator: [
        arm(f"{name} {s:.0%}", s, selector="trained", compensator=kind)
        for s in (0.3, 0.5)
        for name, kind in (("with", "auto"), ("without", "none"))
    ],
    # Without compensator and with the same budgets: what differs is who chooses.
    Ablation.predictors: [
        arm(name, selector=name, compensator="none", schedule="measured")
        for name in ("trained", "probe", "first-block", "oracle")
    ]
    + [arm("trained + all of the file", selector="trained")],
}


def main(
    which: Annotated[Ablation, typer.Argument(help="Which table.")],
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    predictor: Annotated[
        Optional[str], typer.Option(help="Default: the one for the model.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Of eval.")
    ] = "continuation,key-value,quote,chat",
    lengths: Annotated[
        Optional[str],
        typer.Option(help="Prompt tokens. Default: the longest of eval's."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Documents per task and length.")] = 12,
    seed: int = 0,
    dtype: Annotated[
        Optional[str], typer.Option(help="Default: the model's own.")
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json")] = None,
) -> None:
    """Run one ablation and print its table."""
    net, tokenizer, side = load_stock(model or str(demo.MODEL), dtype, predictor)
    sizes = default_lengths(context_length(net))[-1:]
    if lengths:
        sizes = [int(n) for n in lengths.split(",")]
    documents = build(tokenizer, tasks.split(","), sizes, prompts, seed, None)
    arms, start = ARMS[which], time.perf_counter()
    with Progress(console=Console(stderr=True)) as bar:
        total = sum(d.length for d in documents) * (len(arms) + 1)
        task = bar.add_task("asking", total=total)
        records = evaluate(
            net, tokenizer, documents, arms, side, lambda n: bar.advance(task, n)
        )
    settings = {
        "tasks": tasks,
        "lengths": sizes,
        "prompts": prompts,
        "dtype": dtype or "the model's own",
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    print(", ".join(f"{k} {v}" for k, v in (describe() | settings).items()))
    Console(width=120).print(table(which, records))
    if json_file:
        report = {
            "environment": describe(),
            "settings": settings | {"ablation": which.value},
            "records": [asdict(r) for r in records],
        }
        write_text(json_file, json.dumps(report, indent=2) + "\n")


def table(which: Ablation, records: list[Record]) -> Table:
    """A row per arm: KL and its difference to the first arm's, and scores by task."""
    asked = [
        t for t in BUILT if t != "continuation" and any(r.task == t for r in records)
    ]
    found = Table(
        "arm", "FFN skipped", "KL", "KL - first arm's", "top-1", *asked, "score - dense"
    )
    found.title, found.title_justify = TITLES[which], "left"
    labels = list(dict.fromkeys(r.arm for r in records))
    first = [r for r in records if r.arm == labels[0]]
    dense = [
        _score(summary([r for r in first if r.task == t], t), "dense") for t in asked
    ]
    found.add_row("dense", "", "", "", "", *dense, "")
    for label in labels:
        own = [r for r in records if r.arm == label]
        whole = summary(own, "all")
        found.add_row(
            label,
            f"{whole.ffn_sparsity:.1%}",
            f"{whole.kl:.4f}",
            "" if label == labels[0] else _versus(own, first),
            f"{whole.top1:.3f}",
            *(
                _score(summary([r for r in own if r.task == t], t), "sparse")
                for t in asked
            ),
            _signed(whole.score_difference, whole.score_difference_bounds, 3),
        )
    return found


def _versus(own: list[Record], first: list[Record]) -> str:
    """Mean difference of the KLs, question by question."""
    differences = [a.kl - b.kl for a, b in zip(own, first)]
    mean = sum(differences) / len(differences)
    return _signed(mean, interval(differences, [r.document for r in own]), 4)


def _score(s: Summary, which: str) -> str:
    value = getattr(s, f"score_{which}")
    return "-" if value is None else f"{value:.3f}"


def _signed(value: Optional[float], bounds: Bounds, digits: int) -> str:
    if value is None:
        return "-"
    spread = f" ({bounds[0]:+.{digits}f} to {bounds[1]:+.{digits}f})" if bounds else ""
    return f"{value:+.{digits}f}{spread}"


if __name__ == "__main__":
    typer.run(main)
