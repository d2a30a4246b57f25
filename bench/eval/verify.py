"""What a few sparsities cost, for a predictor file to carry: prose, planted facts, FLOPs."""

import time
from dataclasses import asdict
from typing import Any, Callable, Optional, Sequence

import mlx.nn as nn

from ...build import engine_for
from ...config import DeviceSettings, PrefillConfig
from ...engine import Engine
from ...errors import FastForwardError
from ...model.families import context_length
from ...predictors.file import PredictorFile
from ...predictors.verified import USUAL
from ..environment import describe
from .arms import Arm
from .evaluation import Record, evaluate
from .frontier import Point, frontier
from .tasks import build, default_lengths

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
UNTRAINED = "no predictor"
PROSE, FACTS = "continuation", "key-value"


def prompt_length(model: nn.Module, engine: Engine) -> int:
    """Tokens of the prompts; FastForwardError where the model's context holds no sparse one."""
    length = default_lengths(context_length(model))[-1]
    if length < engine.shortest:
        raise FastForwardError(
            f"nothing to verify: prompts of fewer than {engine.shortest:,} tokens are read densely, "
            f"and this model's context leaves room for {length:,}."
        )
    return length


def tokens_read(
    model: nn.Module, predictor: Optional[PredictorFile], documents: int
) -> int:
    """Prompt tokens that verify() reads; 0 where the model's context is too short for it."""
    try:
        length = prompt_length(model, engine_for(model, None, predictor))
    except FastForwardError:
        return 0
    return documents * length * len((PROSE, FACTS)) * (len(SPARSITIES) + 2)


def verify(
    model: nn.Module,
    tokenizer: Any,
    predictor: Optional[PredictorFile],
    documents: int = 8,
    device: DeviceSettings = DeviceSettings(),
    tick: Callable[[int, int], None] = lambda done, total: None,
    late: Callable[[], bool] = lambda: False,
    combined: Sequence[Arm] = (),
) -> dict[str, Any]:
    """The table of a detached model, and what it was measured on; see prompt_length().

    Args:
        documents: Of prose, and as many of facts; once ``late()``, two of each at least.
        combined: More than neurons left out; their rows are the ``combined`` ones of the table.
    """
    start = time.perf_counter()
    length = prompt_length(model, engine_for(model, None, predictor, device=device))
    asked = build(tokenizer, [PROSE, FACTS], [length], documents)
    arms = [Arm(f"{s:.0%}", PrefillConfig(s), device) for s in SPARSITIES]
    if predictor is not None and predictor.layers is not None:
        arms.append(_untrained(device))
    arms += combined
    total, done = sum(d.length for d in asked) * (len(arms) + 1), 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        tick(done, total)

    records: list[Record] = []
    for done_pairs, pair in enumerate(zip(asked[:documents], asked[documents:])):
        if done_pairs >= 2 and late():
            documents = done_pairs
            break
        records += evaluate(model, tokenizer, pair, arms, predictor, progress)
    tick(total, total)
    left_out = {arm.label: arm.left_out for arm in arms}
    rows = {p.arm: row(p) for p in frontier(records, left_out)}
    return {
        "rows": [rows[f"{s:.0%}"] for s in SPARSITIES],
        "without": rows.get(UNTRAINED),
        "combined": [rows[arm.label] for arm in combined],
        "prompt_tokens": length,
        "documents": documents,
        "questions": sum(r.task == FACTS and r.arm == arms[0].label for r in records),
        "block_size": device.block_size,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe(),
    }


def _untrained(device: DeviceSettings) -> Arm:
    """What would run at the usual sparsity if there were no predictor file."""
    config = PrefillConfig(
        USUAL, selector="probe", compensator="none", schedule="first-dense"
    )
    return Arm(UNTRAINED, config, device)


def row(point: Point) -> dict[str, Any]:
    """What a predictor file says of an arm."""
    found = {k: v for k, v in asdict(point).items() if not k.startswith("quotes")}
    for name in ("arm", "best"):
        del found[name]
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}
