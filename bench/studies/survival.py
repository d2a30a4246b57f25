"""What a speculative prefill can find at best: whose scores keep what is asked for, without asking the model.

python -m mlx_fastforward.bench.studies.survival --draft words,self,DRAFT
python -m mlx_fastforward.bench.studies.survival --data questions.jsonl
"""

from pathlib import Path
from typing import Annotated, Any, Iterator, Optional

import mlx.core as mx
import numpy as np
import typer

from ... import demo
from ...cli.inputs import numbers
from ...cli.part_read import scorer_of
from ...loading import load_stock
from ...scorers import Scorer
from ...tokens.speculative import KeepConfig, kept_places
from ...tokens.words import with_words
from ..eval.tasks import build

TASKS = "needle,key-value,quote,several,table,code,tool"


class Chance(Scorer):
    """Nobody."""

    name = "chance"

    def score(self, ids: Any, start: int, config: KeepConfig) -> np.ndarray:
        return np.random.default_rng(len(ids)).random(len(ids) - start)


def main(
    draft: Annotated[
        str, typer.Option(help="Who chooses, with commas between.")
    ] = "words,self",
    model: str = str(demo.MODEL),
    keep: str = "0.7,0.5,0.3",
    tasks: str = TASKS,
    data: Annotated[
        Optional[Path],
        typer.Option(help="As for eval; the answer is the passage that tells it."),
    ] = None,
    length: int = 1900,
    prompts: int = 8,
    seed: int = 0,
) -> None:
    """A line per task and scorer: the mean share of the answers' tokens that is read at each --keep.

    Answers that stand where everything is kept do not count.
    """
    net, tokenizer, predictor = load_stock(model, "float32")
    scorers: list[Scorer] = [Chance()]
    for name in draft.split(","):
        scorers.append(scorer_of(name, net, tokenizer, predictor, "float32"))
    shares = numbers("--keep", keep, float)
    for task in ["qa"] if data else tasks.split(","):
        found: dict[str, list[list[float]]] = {}
        for document in build(tokenizer, [task], [length], prompts, seed, data):
            for question, ids in zip(document.questions, document.prompts):
                wanted = list(optional(tokenizer, ids, question.answers))
                for scorer in scorers if wanted else ():
                    for name, scores in both(scorer, ids):
                        row = [kept(scores, wanted, share) for share in shares]
                        found.setdefault(name, []).append(row)
        for name, rows in found.items():
            means = ", ".join(f"{x:.2f}" for x in np.mean(rows, axis=0))
            print(f"{task}, {len(rows)} questions, {name}: {means}", flush=True)
        mx.clear_cache()


def both(scorer: Scorer, ids: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """A scorer's own scores, and those together with the question's words."""
    config = KeepConfig()
    own = scorer.score(ids, 0, config)
    if own.any():
        yield scorer.name, own
    if not isinstance(scorer, Chance):
        name = f"{scorer.name} and words" if own.any() else scorer.name
        yield name, with_words(own, ids, 0, config, 0)


def kept(scores: np.ndarray, wanted: list[np.ndarray], share: float) -> float:
    """The share of the answers' tokens that is read."""
    read = kept_places(scores, 0, KeepConfig(keep=share))
    return float(np.isin(np.concatenate(wanted), read).mean())


def optional(
    tokenizer: Any, ids: list[int], answers: list[str]
) -> Iterator[np.ndarray]:
    """The tokens of each answer's first occurrence that may be left out."""
    always = kept_places(np.zeros(len(ids)), 0, KeepConfig(keep=1e-9))
    for answer in answers:
        places = tokens_of(tokenizer, ids, answer)
        if (places := places[~np.isin(places, always)]).size:
            yield places


def tokens_of(tokenizer: Any, ids: list[int], text: str) -> np.ndarray:
    """The tokens that hold the first occurrence of a text; none where it is not there."""
    letters = [tokenizer.decode([i]) for i in ids]
    stops = np.cumsum([len(x) for x in letters])
    starts = stops - [len(x) for x in letters]
    at = "".join(letters).find(text)
    return np.flatnonzero((stops > at) & (starts < at + len(text)) & (at >= 0))


if __name__ == "__main__":
    typer.run(main)
