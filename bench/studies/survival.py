"""Which planted facts a draft keeps, without asking the model: what a speculative prefill can find at best.

python -m mlx_fastforward.bench.studies.survival DRAFT
"""

from typing import Any

import numpy as np
import typer
from mlx_lm.utils import load_tokenizer

from ... import demo
from ...cli.inputs import numbers
from ...loading import load_stock
from ...scorers import DraftScorer
from ...tokens.speculative import KeepConfig, kept_places
from ..eval.tasks import build


def main(
    draft: str,
    keep: str = "0.7,0.5,0.3",
    length: int = 1900,
    key_values: int = 5,
    needles: int = 10,
) -> None:
    """A line per kind of document: facts asked for, and how many whole values are read at each share."""
    tokenizer = load_tokenizer(demo.MODEL)
    small, _, _ = load_stock(draft, "float32", "none")
    scorer, shares = DraftScorer(small, "draft"), numbers("--keep", keep, float)
    for task, seeds in (("key-value", key_values), ("needle", needles)):
        asked, kept = 0, dict.fromkeys(shares, 0)
        for seed in range(seeds):
            (document,) = build(tokenizer, [task], [length], 1, seed)
            for question, ids in zip(document.questions, document.prompts):
                scores = scorer.score(ids, 0, KeepConfig())
                value = places(tokenizer, ids, question.answers[0])
                asked += 1
                for share in shares:
                    read = kept_places(scores, 0, KeepConfig(keep=share))
                    kept[share] += bool(np.isin(value, read).all())
        print(f"{task}: {asked} facts, {kept}", flush=True)


def places(tokenizer: Any, ids: list[int], text: str) -> np.ndarray:
    """The tokens that hold the first occurrence of a text."""
    letters = [tokenizer.decode([i]) for i in ids]
    stops = np.cumsum([len(x) for x in letters])
    starts = stops - [len(x) for x in letters]
    at = "".join(letters).index(text)
    return np.flatnonzero((stops > at) & (starts < at + len(text)))


if __name__ == "__main__":
    typer.run(main)
