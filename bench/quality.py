"""Does sparse prefill keep the answers? Each selector and sparsity against the dense model.

Two measures, because they rank selectors differently:
- continuation: KL(dense || sparse) and top-1 agreement on the 64 tokens after long prompts of
  held-out prose; the prompt is prefilled sparsely, everything after it runs dense;
- retrieval: share of exact answers about facts planted in long texts.

    python -m mlx_fastforward.bench.quality --selectors probe,oracle --sparsities 0.4,0.5
"""

import copy
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Iterable, Optional

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import demo
from ..adapter import BaseModel, load_adapter
from ..attachment import attach, detach
from ..config import PrefillConfig
from ..continuation import continuation, divergence, prefill
from ..engine import Engine
from ..finding import adapter_for
from ..loading import load
from .environment import describe

DATA = Path(__file__).parent / "data"


@dataclass
class Row:
    """One line of the table. kl in nats per token; top1 and exact are shares."""

    selector: str
    compensator: str
    sparsity: float
    ffn_sparsity: float
    kl: float
    kl_stderr: float
    top1: float
    exact: Optional[float] = None


def passages(text: str, tokenizer: Any, count: int, tokens: int) -> list[mx.array]:
    """``count`` stretches of ``tokens`` tokens, evenly spaced over the text."""
    books = [b for b in text.split("<|end of book|>") if b.strip()]
    stretch = [ids for b in books for ids in _stretches(tokenizer.encode(b), tokens)]
    if len(stretch) < count:
        raise typer.BadParameter(
            f"the text holds {len(stretch)} stretches of {tokens} tokens, asked for {count}."
        )
    step = len(stretch) / count
    return [mx.array(stretch[int(i * step)]) for i in range(count)]


def _stretches(ids: list[int], tokens: int) -> Iterable[list[int]]:
    return (ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens))


def ask(
    model: nn.Module, tokenizer: Any, task: dict, engine: Optional[Engine]
) -> list[bool]:
    """Exact answers to every question about one text; the text is prefilled once."""
    text = task["messages"][0]["content"].removesuffix(task["questions"][0][0])
    prompts = []
    for question, _ in task["questions"]:
        message = [{"role": "user", "content": text + question}]
        prompts.append(
            tokenizer.apply_chat_template(message, add_generation_prompt=True)
        )
    shared = _common_prefix(prompts)
    cache = make_prompt_cache(model)
    right = []
    longest = max(len(p) for p in prompts)
    if engine is None:
        prefill(model, mx.array(prompts[0][:shared]), cache)
    else:
        with engine.prompt(longest):
            prefill(model, mx.array(prompts[0][:shared]), cache)
    for ids, (_, answer) in zip(prompts, task["questions"]):
        got = _greedy(model, tokenizer, mx.array(ids[shared:]), copy.deepcopy(cache))
        right.append(_normal(got) == _normal(answer))
    return right


def _greedy(
    model: nn.Module, tokenizer: Any, ids: mx.array, cache: Any, limit: int = 40
) -> str:
    out: list[int] = []
    while len(out) < limit:
        logits = model(ids[None], cache=cache)
        token: Any = mx.argmax(logits[0, -1]).item()
        if token in tokenizer.eos_token_ids:
            break
        out.append(token)
        ids = mx.array([token])
    return tokenizer.decode(out)


def _common_prefix(prompts: list[list[int]]) -> int:
    n = min(len(p) for p in prompts) - 1
    return next(
        (i for i in range(n) if len({p[i] for p in prompts}) > 1 and len(prompts) > 1),
        n,
    )


def _normal(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()


def measure(
    model: nn.Module,
    tokenizer: Any,
    texts: list[mx.array],
    tasks: list[dict],
    dense: list[mx.array],
    prompt: int,
    engine: Optional[Engine],
) -> tuple[mx.array, float, Optional[float], float]:
    """KL per prompt, top-1 agreement, share of exact answers, and FFN FLOPs skipped."""
    kls: list[float] = []
    same: list[float] = []
    skipped = 0.0
    for tokens, p in zip(texts, dense):
        q = continuation(model, tokens, prompt, engine)
        kl, top1 = divergence(p, q)
        kls.append(kl)
        same.append(top1)
        skipped = engine.tally.sparsity if engine else 0.0
    right = [r for t in tasks for r in ask(model, tokenizer, t, engine)]
    return mx.array(kls), sum(same) / len(same), _share(right), skipped


def main(
    text: Annotated[
        Path, typer.Option(help="Held-out prose, UTF-8. Default: bundled.")
    ] = DATA
    / "heldout.txt",
    tasks: Annotated[
        Path, typer.Option(help="JSONL with messages and questions. Default: bundled.")
    ] = DATA
    / "keyval.jsonl",
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model.")
    ] = None,
    adapter: Annotated[
        Optional[Path],
        typer.Option(
            help="For every arm. Default: the one beside the model, for trained."
        ),
    ] = None,
    selectors: str = "probe,first-block,oracle",
    sparsities: str = "0.3,0.4,0.5",
    block_size: int = 128,
    probe_every: int = 8,
    score: str = "weighted",
    compensators: str = "auto",
    schedule: str = "auto",
    prompts: int = 32,
    tokens: int = 1900,
    dtype: Annotated[
        Optional[str], typer.Option(help="Default: the model's own.")
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json")] = None,
) -> None:
    """Measure quality after a sparse prefill."""
    console = Console(stderr=True)
    net, tokenizer = load(model or str(demo.MODEL), sparsity=0.0, adapter="none")
    detach(net)
    if dtype:
        net.set_dtype(getattr(mx, dtype))
    place = model or str(demo.MODEL)
    side = load_adapter(adapter) if adapter else None
    found = side or adapter_for(place, BaseModel.of(net))
    texts = passages(text.read_text(encoding="utf-8"), tokenizer, prompts, tokens + 64)
    jobs = [json.loads(x) for x in tasks.read_text().splitlines()]
    dense = [continuation(net, t, tokens, None) for t in texts]
    right = [r for t in jobs for r in ask(net, tokenizer, t, None)]
    rows = [Row("dense", "", 0.0, 0.0, 0.0, 0.0, 1.0, _share(right))]
    arms = [
        (s, c, float(x))
        for s in selectors.split(",")
        for c in compensators.split(",")
        for x in sparsities.split(",")
    ]
    for name, compensator, sparsity in track(arms, "measuring", console=console):
        config = PrefillConfig(
            sparsity,
            block_size,
            selector=name,
            score=score,
            compensator=compensator,
            schedule=schedule,
            probe_every=probe_every,
        )
        engine = attach(net, config, adapter=found if name == "trained" else side)
        kl, top1, exact, skipped = measure(
            net, tokenizer, texts, jobs, dense, tokens, engine
        )
        detach(net)
        error: Any = mx.std(kl, ddof=1) / max(1, len(texts)) ** 0.5
        mean: Any = kl.mean().item()
        rows.append(
            Row(
                name,
                compensator_name(engine),
                sparsity,
                skipped,
                mean,
                error.item() if len(texts) > 1 else 0.0,
                top1,
                exact,
            )
        )
    settings = {
        "prompts": prompts,
        "tokens": tokens,
        "block_size": block_size,
        "probe_every": probe_every,
        "score": score,
        "schedule": schedule,
        "dtype": dtype or "the model's own",
        "questions": len(right),
    }
    show(rows, settings)
    if json_file:
        report = {
            "environment": describe(),
            "settings": settings,
            "rows": [asdict(r) for r in rows],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def compensator_name(engine: Engine) -> str:
    """As in --compensator, whatever was asked for."""
    names = {"MLPCompensator": "mlp", "LowRankCompensator": "low-rank"}
    return names.get(type(engine.compensator).__name__, "none")


def _share(right: list[bool]) -> Optional[float]:
    return sum(right) / len(right) if right else None


def show(rows: list[Row], settings: dict[str, Any]) -> None:
    env = describe()
    print(", ".join(f"{k} {v}" for k, v in (env | settings).items()))
    table = Table(
        "selector",
        "compensator",
        "sparsity",
        "FFN FLOPs skipped",
        "KL",
        "top-1",
        "exact",
    )
    for r in rows:
        table.add_row(
            r.selector,
            r.compensator,
            f"{r.sparsity:.0%}",
            f"{r.ffn_sparsity:.1%}",
            f"{r.kl:.4f} ± {r.kl_stderr:.4f}",
            f"{r.top1:.3f}",
            "-" if r.exact is None else f"{r.exact:.3f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
