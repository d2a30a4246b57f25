"""Several runs of `eval --json` as one: other seeds, other arms, other tasks of the same model.

python -m mlx_fastforward.bench.studies.frontier a.json b.json --png frontier.png
"""

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ...cli.eval_tables import scores_and_kl
from ...cli.outputs import write
from ..eval.evaluation import Record
from ..eval.frontier import frontier
from ..eval.picture import picture
from ..eval.summaries import summaries

SETTINGS = ("sparsity", "prune_tokens", "keep", "prefill_draft")


def main(
    files: Annotated[list[Path], typer.Argument(help="Files of eval --json.")],
    png: Annotated[Optional[Path], typer.Option(help="Write a picture here.")] = None,
) -> None:
    """Tables over all documents of all files; one that several files have counts once per arm."""
    records: dict[tuple[Any, ...], Record] = {}
    left_out: dict[str, dict[str, Any]] = {}
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        seed = report["settings"]["seed"]
        for point in report["frontier"]:
            left_out[point["arm"]] = {name: point[name] for name in SETTINGS}
        for r in report["records"]:
            r["document"] = f"{seed} {r['document']}"
            records[r["arm"], r["document"], r["turn"]] = Record(**r)
    asked = list(records.values())
    found, points = summaries(asked), frontier(asked, left_out)
    scores_and_kl(found, points)
    env = report["environment"]
    title = f"{env['model']}, {env['dtype']}"
    write(png, lambda half: picture(half, asked, found, points, title))


if __name__ == "__main__":
    typer.run(main)
