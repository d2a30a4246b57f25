"""The ablation tables: arms that differ in what they are named after, and rows by hand."""

from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mlx_fastforward.bench.eval.evaluation import Record
from mlx_fastforward.bench.studies.ablations import ARMS, TITLES, Ablation, table


@pytest.mark.parametrize("which", Ablation)
def test_arms_differ_only_in_what_is_asked(which: Ablation) -> None:
    assert which in TITLES
    found = [asdict(a.config) for a in ARMS[which]]
    assert len({a.label for a in ARMS[which]}) == len({str(c) for c in found}) >= 2
    differing = {k for c in found for k in c if c[k] != found[0][k]}
    wanted = {
        Ablation.sparsity: {"sparsity"},
        Ablation.decode: {"sparse_decode"},
        Ablation.schedule: {"schedule", "sparsity"},
        Ablation.edges: {"dense_head", "dense_tail"},
        Ablation.compensator: {"compensator", "sparsity"},
        Ablation.predictors: {"selector", "compensator", "schedule"},
    }
    assert differing == wanted[which]


def record(arm: str, document: str, kl: float, score: float, **more: Any) -> Record:
    fields: dict[str, Any] = {
        "arm": arm,
        "task": "key-value",
        "document": document,
        "name": "",
        "kind": "",
        "turn": 0,
        "length": 9,
        "tokens": 9,
        "depth": None,
        "kl": kl,
        "top1": 0.5,
        "expected": "",
        "dense": "",
        "sparse": "",
        "ffn_sparsity": 0.25,
        "score_dense": 1.0,
        "score_sparse": score,
        "exact_dense": 1.0,
        "exact_sparse": score,
    }
    return Record(**fields | more)


def test_rows_by_hand() -> None:
    records = [record("a", d, kl, 1.0) for d, kl in (("x", 0.1), ("y", 0.3))]
    records += [
        record("b", d, kl, s) for d, kl, s in (("x", 0.2, 0.0), ("y", 0.4, 1.0))
    ]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(Ablation.edges, records))
    rows = [line for line in shown.get().splitlines() if line.startswith("│")]
    cells = [[c.strip() for c in row.strip("│").split("│")] for row in rows]
    assert cells == [
        ["dense", "", "", "", "", "1.000", ""],
        ["a", "25.0%", "0.2000", "", "0.500", "1.000", "+0.000 (+0.000 to +0.000)"],
        [
            "b",
            "25.0%",
            "0.3000",
            "+0.1000 (+0.1000 to +0.1000)",
            "0.500",
            "0.500",
            "-0.500 (-1.000 to +0.000)",
        ],
    ]


def test_one_runs() -> None:
    import typer

    from mlx_fastforward.bench.studies.ablations import main

    app = typer.Typer()
    app.command()(main)
    args = ["edges", "--prompts", "1", "--lengths", "400", "--tasks", "key-value"]
    done = CliRunner().invoke(app, [*args, "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "neither" in done.stdout and "tail only" in done.stdout
