"""Planted facts after speculative prefill: what is found first, and what a follow-up question finds.

python -m mlx_fastforward.bench.studies.speculative --draft DRAFT --keep 0.7,0.5,0.3
"""

import time
from typing import Annotated, Any, Optional

import mlx.core as mx
import typer
from mlx.utils import tree_map
from rich.progress import track

from ...attachment import attach
from ...config import PrefillConfig
from ...heal import Heal
from ...loading import load_stock
from ...model.positions import cut_back
from ...scorers import DraftScorer, LayersScorer, Scorer
from ...session import Session
from ...speculative import Speculative
from ...tokens.speculative import KeepConfig
from ..eval.scores import found
from ..eval.tasks import Document, Question, build


def say(session: Session, text: str) -> tuple[str, Any]:
    said = list(session.answer(text, max_tokens=12))
    return "".join(r.text for r in said), said[-1]


def asked(session: Session, doc: Document, first: Question) -> tuple[str, Any]:
    session.reset()
    return say(session, f"{doc.text}\n\n{first.text}")


def healed(session: Session) -> list[float]:
    """Make the conversation whole; seconds of each step."""
    heal, steps = Heal(session), list[float]()
    while True:
        start = time.perf_counter()
        if not heal.step():
            return steps
        steps.append(time.perf_counter() - start)


def rounded(w: mx.array, bits: int) -> mx.array:
    """A weight as it is in so many bits: kernels for packed ones are slow on CPUs."""
    if not bits or w.ndim < 2:
        return w
    return mx.dequantize(*mx.quantize(w, 64, bits), 64, bits)


def main(
    whole: Annotated[bool, typer.Option(help="Also all tokens, to compare.")] = True,
    draft: Annotated[
        Optional[str], typer.Option(help="A model; none: dense only.")
    ] = None,
    layers: Annotated[
        Optional[str],
        typer.Option(
            help="Layers of the model's own that score: 2,4; or fitted, by the readout."
        ),
    ] = None,
    bits: Annotated[
        int, typer.Option(help="Of the draft's weights, then float again; 0: as it is.")
    ] = 0,
    keep: str = "0.7,0.5,0.3",
    follow_up: Annotated[
        bool, typer.Option("--follow-up", help="Ask a second question, too.")
    ] = False,
    sparsity: float = 0.0,
    model: Optional[str] = None,
    length: int = 1900,
    questions: int = 24,
) -> None:
    net, tokenizer, predictor = load_stock(model or _demo(), "float32")
    attach(net, PrefillConfig(sparsity=sparsity), predictor=predictor)
    scorers: list[tuple[str, Scorer]] = []
    if draft:
        small, _, _ = load_stock(draft, "float32", "none")
        name = f"draft in {bits} bits" if bits else "draft"
        small.update(tree_map(lambda w: rounded(w, bits), small.parameters()))
        scorers.append((name, DraftScorer(small, "draft")))
    for n in filter(None, (layers or "").split(",")):
        own = LayersScorer(net, None if n == "fitted" else int(n))
        kind = "a readout" if own.readout else "attention"
        scorers.append((f"self, {own.layers} layers by {kind}", own))
    arms: list[tuple[str, Optional[Speculative]]] = []
    if whole:
        arms.append(("all read", None))
    for name, scorer in scorers:
        for share in keep.split(","):
            config = KeepConfig(keep=float(share), threshold=256)
            arms.append((f"{name}, keep {share}", Speculative(net, scorer, config)))
    docs = build(tokenizer, ["key-value"], [length], 1 + questions // 3)
    pairs = [(d, q) for d in docs for q in d.questions][:questions]
    session = Session(net, tokenizer)
    for name, speculative in arms:
        session.speculative = speculative
        right = after = again = read = new = 0
        speed, ttft, steps = [], [], [0.0]
        for doc, question in track(pairs, name, transient=True):
            answer, last = asked(session, doc, question)
            right += int(found(answer, question.answers))
            read += last.prompt_tokens if last.read_tokens is None else last.read_tokens
            new += last.prompt_tokens
            speed.append(last.generation_tps)
            ttft.append(last.ttft)
            if not follow_up:
                continue
            others = [q for q in doc.questions if q is not question]
            second = others[0]
            cache = [list(session.cache), list(session.cached), list(session.messages)]
            count = session.cache[0].offset
            answer, _ = say(session, second.text)
            after += int(found(answer, second.answers))
            if speculative is None:
                again += int(found(answer, second.answers))
                continue
            session.cache, session.cached, session.messages = cache
            cut_back(session.cache, count)
            steps += healed(session)
            answer, _ = say(session, second.text)
            again += int(found(answer, second.answers))
        line = f"{name}: {right}/{len(pairs)} found, {read / new:.0%} read, "
        line += f"TTFT {sorted(ttft)[len(ttft) // 2]:.2f} s, "
        line += f"{sorted(speed)[len(speed) // 2]:.0f} tok/s"
        if follow_up:
            line += f"; second question {after}, after healing {again}; "
            line += f"longest step {max(steps):.2f} s"
        print(line, flush=True)
        mx.clear_cache()


def _demo() -> str:
    from ... import demo

    return str(demo.MODEL)


if __name__ == "__main__":
    typer.run(main)
