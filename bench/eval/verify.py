"""What a few sparsities cost, for a predictor file to carry: prose, planted facts, FLOPs."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Optional

import mlx.nn as nn

from ...build import engine_for
from ...config import DeviceSettings, PrefillConfig
from ...engine import Engine
from ...errors import FastForwardError
from ...model.families import context_length
from ...predictors.file import PredictorFile
from ...predictors.verified import USUAL
from ..environment import describe
from ..speed.ttft import ideal
from .arms import Arm
from .evaluation import Record, evaluate
from .intervals import Bounds
from .summaries import Summary, summary
from .tasks import build, default_lengths

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
UNTRAINED = "no predictor"
PROSE, FACTS = "continuation", "key-value"


@dataclass(frozen=True)
class Row:
    """One sparsity; bounds are 95 % intervals over documents.

    kl: Nats per token of prose that goes on. facts: share of planted facts that are found.
    speedup: What the FLOPs allow of the whole prefill.
    """

    sparsity: float
    kl: float
    kl_bounds: Bounds
    facts_dense: float
    facts: float
    facts_difference_bounds: Bounds
    ffn_skipped: float
    speedup: float


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
) -> dict[str, Any]:
    """The table of a detached model, and what it was measured on; see prompt_length().

    Args:
        documents: Of prose, and as many of facts; once ``late()``, two of each at least.
    """
    start = time.perf_counter()
    length = prompt_length(model, engine_for(model, None, predictor, device=device))
    asked = build(tokenizer, [PROSE, FACTS], [length], documents)
    arms = [Arm(f"{s:.0%}", PrefillConfig(s), device) for s in SPARSITIES]
    if predictor is not None and predictor.layers is not None:
        arms.append(_untrained(device))
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
    rows = {}
    for arm in arms:
        engine = arm.engine(model, predictor)
        assert engine is not None
        speed = ideal(model, engine, length)
        row = _row(engine.config.sparsity, arm.label, records, speed)
        rows[arm.label] = asdict(row)
    without = rows.pop(UNTRAINED, None)
    return {
        "rows": [*rows.values()],
        "without": without,
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


def _row(sparsity: float, label: str, records: list[Record], speed: float) -> Row:
    prose, facts = (_of(records, label, task) for task in (PROSE, FACTS))
    assert facts.score_dense is not None and facts.score_sparse is not None
    return Row(
        sparsity,
        round(prose.kl, 5),
        prose.kl_bounds,
        round(facts.score_dense, 4),
        round(facts.score_sparse, 4),
        facts.score_difference_bounds,
        round(prose.ffn_sparsity, 4),
        round(speed, 3),
    )


def _of(records: list[Record], label: str, task: str) -> Summary:
    return summary([r for r in records if r.arm == label and r.task == task], task)
