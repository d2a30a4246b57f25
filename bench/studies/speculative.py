"""Planted facts after speculative prefill: what is found first, and what a follow-up question finds.

python -m mlx_fastforward.bench.studies.speculative --draft words --keep 0.5,0.3 --follow-up
"""

import time
from typing import Annotated, Any, Optional

import mlx.core as mx
import typer
from rich.progress import track

from ... import demo
from ...attachment import attach
from ...cli.part_read import scorer_of
from ...config import PrefillConfig
from ...heal import Heal
from ...loading import load_stock
from ...model.positions import cut_back
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


def main(
    whole: Annotated[bool, typer.Option(help="Also all tokens, to compare.")] = True,
    draft: Annotated[
        str, typer.Option(help="As --prefill-draft of eval: names with commas.")
    ] = "words,self",
    keep: str = "0.7,0.5,0.3",
    follow_up: Annotated[
        bool, typer.Option("--follow-up", help="Ask a second question, too.")
    ] = False,
    sparsity: float = 0.0,
    model: str = str(demo.MODEL),
    length: int = 1900,
    questions: int = 24,
) -> None:
    """A line per scorer and share."""
    net, tokenizer, predictor = load_stock(model, "float32")
    attach(net, PrefillConfig(sparsity=sparsity), predictor=predictor)
    arms: list[tuple[str, Optional[Speculative]]] = []
    if whole:
        arms.append(("all read", None))
    for name in draft.split(","):
        scorer = scorer_of(name, net, tokenizer, predictor, "float32")
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


if __name__ == "__main__":
    typer.run(main)
