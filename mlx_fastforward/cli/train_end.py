"""How train ends: the table of what the predictor costs, and in plain words what was reached."""

import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

from .tables import say
from .verified_table import show_verified

DOCUMENTS = 8


def verified(
    net: Any,
    tokenizer: Any,
    out: Path,
    minutes: float,
    tick: Callable[..., None],
) -> Optional[dict[str, Any]]:
    """Make the table and keep it in the file; None where the model's context is too short.

    Args:
        minutes: That are left, about; two documents of each kind are read even so.
    """
    from ..bench.eval.verify import tokens_read, verify
    from ..predictors.file import load_predictor, update_predictor

    end, made = time.perf_counter() + 60 * minutes, load_predictor(out)
    if not tokens_read(net, made, DOCUMENTS):
        return None
    found = verify(
        net,
        tokenizer,
        made,
        DOCUMENTS,
        tick=partial(tick, "verifying"),
        late=lambda: time.perf_counter() > end,
    )
    update_predictor(out, verified=found)
    return found


def conclude(
    report: dict[str, Any],
    found: Optional[dict[str, Any]],
    out: Path,
    model: Optional[str],
    seconds: float,
) -> None:
    """What was fitted, what it costs, what to type next."""
    made = report["calibration"]
    recall = sum(made["recall"]) / len(made["recall"])
    say(f"{made['tokens']:,} tokens, {seconds / 60:.1f} minutes. On held-out text:")
    say(f"recall of the best half of the neurons: {recall:.1%}")
    if removed := made["error_removed"]:
        share = sum(removed) / len(removed)
        say(f"error removed by the compensator, mean of the layers: {share:.0%}")
    for arm, row in (made["from_dense"] or {}).items():
        say(f"at 50 %, {arm}: KL {row['kl']:.4f}, top-1 agreement {row['top1']:.1%}")
    say(f"predictor: {out} (with report.json and report.png)")
    if found is not None:
        show_verified(found)
    say(_reached(found, out, model))


def _reached(found: Optional[dict[str, Any]], out: Path, model: Optional[str]) -> str:
    from ..predictors.verified import better_than_none, chosen

    details: dict[str, Any] = {} if found is None else {"verified": found}
    named = f" --model {model}" if model else ""
    if found is None:
        return (
            "Not verified: the model's context is too short for a sparse prompt and answers. "
            f"Try it: mlx_fastforward chat{named} --predictor {out}"
        )
    if not better_than_none(details):
        return (
            "On held-out text it did no better than no predictor: it is kept, and used only "
            "where it is named. Train longer (more --minutes), or on more text (--data)."
        )
    sparsity, _ = chosen(details)
    if not sparsity:
        return (
            "It is better than no predictor, but no sparsity keeps the answers as they should "
            "be: --sparsity auto reads densely. Train longer, or on more text (--data)."
        )
    return (
        f"Next: mlx_fastforward chat{named} (skips {sparsity:.0%} of the FFN neurons)"
    )
