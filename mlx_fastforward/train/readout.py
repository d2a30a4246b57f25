"""Fitting the readout: where in a prompt the whole model looks, told by its first layers.

The teacher is the published score with the model as its own draft: what the last prompt token and the
answer look at, in all layers. Prompts are texts with a question at their end.
"""

import random
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attachment import watched, watched_attention
from ..errors import UnsupportedModel
from ..session import render
from ..tokens.readout import ASKING, Readout, shares
from ..tokens.speculative import (
    KeepConfig,
    importance,
    kept_places,
    pooled,
    weights,
)
from .data import BYTES_PER_TOKEN, DataError, Sequences
from .descent import Descent
from .state import save_tensors

HEADS, RANK, RATE = 4, 32, 2e-3
POWER = 2  # of the importance: what is looked at most counts most
KINDS = ("facts", "quotes", "facts")
HELD_SHARE = 5  # one prompt in so many is held out
JUDGED = 0.3  # share that is kept when a readout is judged
CONFIG = KeepConfig()

Tick = Callable[[str, int, int], None]


class Questions(Sequences):
    """Prompts with one question at their end, and what the answer begins with; by number."""

    def question(self, i: int) -> Optional[tuple[list[int], list[int]]]:
        """None where a text has nothing to ask for."""
        rng = random.Random(f"{self.seed} {i}")
        place = self.passages[i % len(self.passages)]
        text = self.corpus.passage(place, self.length * BYTES_PER_TOKEN)
        text, turns = getattr(self, f"_{KINDS[i % len(KINDS)]}")(rng, text)
        if not turns:
            return None
        question, answer = turns[0]
        message = {"role": "user", "content": f"{text}\n\n{question}"}
        ids = render(self.tokenizer, [message], {"enable_thinking": False})
        said = self.tokenizer.encode(answer, add_special_tokens=False)
        fits = 4 * ASKING < len(ids) <= self.length
        return (ids, said[: CONFIG.look_ahead]) if fits else None


def observed(
    model: nn.Module, ids: list[int], answer: list[int], layer: int
) -> dict[str, mx.array]:
    """A prompt and its answer, read whole.

    Returns:
        hidden (n, d), what ``layer`` layers make of the prompt, in float16; teacher (n,), whom all
        layers look at; early (n,), whom the first layers look at before the answer is known.
    """
    prompt = len(ids)
    places = list(range(prompt - CONFIG.look_ahead, prompt + len(answer)))
    hidden: list[mx.array] = []
    late: list[mx.array] = []
    early: list[mx.array] = []

    def attend(
        i: int, own: Any, q: mx.array, k: mx.array, *args: Any, **kwargs: Any
    ) -> mx.array:
        rows, keys = q[0, :, places[0] :], k[0, :, :prompt]
        w = weights(rows, keys, float(kwargs["scale"]), places)
        late.append(w[:, CONFIG.look_ahead - 1 :])
        if i < layer:
            early.append(w[:, : CONFIG.look_ahead])
        mx.eval(late, early)
        return own(q, k, *args, **kwargs)

    def keep(_: int, own: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        hidden.append(x[0, :prompt].astype(mx.float16))
        return own(x, *args, **kwargs)

    with (
        watched_attention(model, attend) as there,
        watched([model.layers[layer]], keep),
    ):
        if not there:
            raise UnsupportedModel(
                "a readout needs models whose attention can be watched; this one's cannot."
            )
        mx.eval(model(mx.array([ids + answer])), hidden)
    return {
        "hidden": hidden[0],
        "teacher": mx.array(importance(late, CONFIG.pool)),
        "early": mx.array(importance(early, CONFIG.pool)),
    }


def observe(
    model: nn.Module,
    questions: Questions,
    count: int,
    layer: int,
    folder: Path,
    tick: Tick,
) -> list[Path]:
    """Files of so many prompts; raises DataError where the data has next to none."""
    files: list[Path] = []
    for i in range(4 * count):
        if len(files) == count:
            break
        if (pair := questions.question(i)) is None:
            continue
        files.append(folder / f"{i}.safetensors")
        save_tensors(files[-1], observed(model, *pair, layer))
        tick("reading prompts", len(files), count)
        mx.clear_cache()
    if len(files) < 2 * HELD_SHARE:
        raise DataError(
            f"the data gave {len(files)} prompts with questions; a readout needs {2 * HELD_SHARE} "
            "at least, and paragraphs of text to plant facts in."
        )
    return files


class Net(nn.Module):
    """A readout as it is fitted."""

    def __init__(self, d: int):
        super().__init__()
        bound = d**-0.5
        self.query, self.key = (
            mx.random.uniform(-bound, bound, (d, HEADS * RANK)) for _ in range(2)
        )
        self.bias = mx.zeros((HEADS * RANK,))

    def __call__(self, hidden: mx.array) -> mx.array:
        return shares(hidden, HEADS, self.query, self.bias, self.key)


def middle(n: int) -> slice:
    """The places of a prompt of n tokens that a score decides on."""
    always = kept_places(np.zeros(n), 0, KeepConfig(keep=1e-9))
    free = np.setdiff1d(np.arange(n), always)
    return slice(int(free[0]), int(free[-1]) + 1)


def loss(net: nn.Module, hidden: mx.array, teacher: mx.array) -> mx.array:
    """Cross-entropy of the pooled shares in the middle."""
    part = middle(len(teacher))
    p, t = pooled(net(hidden), CONFIG.pool)[part], teacher[part] ** POWER
    return -mx.sum(t / mx.sum(t) * mx.log(p / mx.sum(p) + 1e-9))


def fit(
    files: Sequence[Path], layer: int, steps: int, seed: int, tick: Tick
) -> tuple[Readout, dict[str, float]]:
    """A readout, and what it is worth on held-out prompts: see worth()."""
    held, fitted = files[::HELD_SHARE], [
        f for i, f in enumerate(files) if i % HELD_SHARE
    ]
    mx.random.seed(seed)
    net = Net(_row(fitted[0])["hidden"].shape[1])

    def batch(step: int) -> tuple[mx.array, mx.array]:
        row = _row(random.Random(f"{seed} {step}").choice(fitted))
        return row["hidden"], row["teacher"]

    descent = Descent(net, loss, steps, RATE, files[0].with_name("net.safetensors"))
    descent(batch, lambda d, _: tick("fitting", d.step, d.steps))
    found = Readout(layer, HEADS, net.query, net.bias, net.key)
    return found, worth(found, [_row(f) for f in held])


def _row(file: Path) -> dict[str, mx.array]:
    found: Any = mx.load(str(file))
    return {k: x.astype(mx.float32) for k, x in found.items()}


def worth(readout: Readout, rows: Sequence[dict[str, mx.array]]) -> dict[str, float]:
    """Share of the middle's importance that is kept, by the readout, by the first layers' own
    attention, and by the teacher itself.
    """
    found: dict[str, list[float]] = {"readout": [], "attention": [], "best": []}
    for row in rows:
        teacher = np.array(row["teacher"])
        scores = {
            "readout": np.array(pooled(readout(row["hidden"]), CONFIG.pool)),
            "attention": np.array(row["early"]),
            "best": teacher,
        }
        part = middle(teacher.size)
        inside = np.zeros(teacher.size)
        inside[part] = teacher[part] / teacher[part].sum()
        for name, score in scores.items():
            kept = kept_places(score, 0, KeepConfig(keep=JUDGED))
            found[name].append(float(inside[kept].sum()))
    return {name: round(sum(x) / len(x), 4) for name, x in found.items()}
