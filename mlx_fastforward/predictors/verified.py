"""Sparsity that was checked: a predictor file's table of what each one costs, and what auto takes."""

from dataclasses import fields
from typing import Any, Optional, Sequence

from ..config import PrefillConfig
from ..errors import ConfigError
from .file import PredictorFile

AUTO = "auto"
USUAL = 0.5  # where nothing was verified
# What may be lost: KL in nats per token of prose that goes on, and share of planted facts.
MOST_KL, MOST_FACTS = 0.01, 0.03
# under its own defaults of these was anything verified
OWN = [
    f.name for f in fields(PrefillConfig) if f.name not in ("sparsity", "block_size")
]
ENOUGH = 20  # facts, for more than the usual sparsity
UNVERIFIED = "not verified for this model: mlx_fastforward train, or eval --save"


def rows(details: dict[str, Any]) -> list[dict[str, Any]]:
    """The table by ascending sparsity; empty where there is none, or none that can be read.

    Args:
        details: A predictor file's JSON.
    """
    found = _section(details).get("rows")
    found = found if isinstance(found, list) else []
    good = [r for r in found if isinstance(r, dict) and _complete(r)]
    return sorted(good, key=lambda r: r["sparsity"])


def _section(details: dict[str, Any]) -> dict[str, Any]:
    found = details.get("verified")
    return found if isinstance(found, dict) else {}


def _complete(row: dict[str, Any]) -> bool:
    return all(
        isinstance(row.get(key), (int, float))
        for key in ("sparsity", "kl", "facts", "facts_dense")
    )


def passes(row: dict[str, Any]) -> bool:
    """Whether a row stays within what may be lost."""
    lost = row["facts_dense"] - row["facts"]
    return bool(row["kl"] <= MOST_KL and lost <= MOST_FACTS + 1e-9)


def better_than_none(details: dict[str, Any]) -> bool:
    """Whether a file is worth using by itself: at 50 % it did no worse than no file at all.

    Without a comparison it is.
    """
    without = _section(details).get("without")
    own = [r for r in rows(details) if r["sparsity"] == USUAL]
    if not own or not isinstance(without, dict) or not _complete(without):
        return True
    lost = without["facts"] - own[0]["facts"]
    return bool(own[0]["kl"] <= without["kl"] and lost <= MOST_FACTS + 1e-9)


def _few(details: dict[str, Any], table: list[dict[str, Any]]) -> bool:
    """Facts that the dense model does not find cannot be lost."""
    questions = _section(details).get("questions")
    found = min((r["facts_dense"] for r in table), default=0)
    return isinstance(questions, int) and questions * found < ENOUGH


def chosen(details: dict[str, Any]) -> tuple[float, str]:
    """The largest sparsity that passes with all below it, and why, in a few words."""
    table = rows(details)
    if _few(details, table):  # a few facts cannot tell more sparsity from luck
        table = [r for r in table if r["sparsity"] <= USUAL]
    if not table:
        return USUAL, UNVERIFIED
    best = None
    for row in table:
        if not passes(row):
            break
        best = row
    if best is None:
        return 0.0, (
            f"no sparsity loses at most {MOST_FACTS:.0%} of planted facts and {MOST_KL:g} nats"
        )
    return best["sparsity"], (
        f"auto, as verified: {best['facts']:.0%} of planted facts found, dense "
        f"{best['facts_dense']:.0%}, KL {best['kl']:.4f}"
    )


def resolved(
    sparsity: float | str,
    predictor: Optional[PredictorFile],
    settings: dict[str, Any] = {},
) -> tuple[float, Optional[str]]:
    """A number, and why it was taken where that was left to the file; raises ConfigError.

    Args:
        settings: Of PrefillConfig; only under its own defaults was anything verified.
    """
    if not isinstance(sparsity, str):
        return sparsity, None
    if sparsity != AUTO:
        raise ConfigError(f"sparsity must be a number or {AUTO!r}, got {sparsity!r}.")
    value, why = chosen({} if predictor is None else predictor.details)
    plain = PrefillConfig()
    if other := [
        n for n in OWN if settings.get(n, getattr(plain, n)) != getattr(plain, n)
    ]:
        return min(value, USUAL), f"not verified with another {', '.join(other)}"
    return value, why


def combinations(details: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was measured, also where more than neurons was left out."""
    more = _section(details).get("combined")
    more = [r for r in more or [] if isinstance(r, dict) and _complete(r)]
    return [
        {"prune_tokens": 0.0, "keep": 1.0, "prefill_draft": ""} | r
        for r in rows(details) + more
    ]


def reaching(
    details: dict[str, Any], speedup: float, drafts: Sequence[str] = ()
) -> dict[str, Any]:
    """The best measured combination that is this fast by its FLOPs; raises ConfigError.

    Best: of those that lose no more than MOST_FACTS of the facts beside each other the least KL.

    Args:
        drafts: That are at hand; a repository, words and the model's own layers always are.
    """
    timed = (r for r in combinations(details) if isinstance(r.get("speedup"), float))
    found = [r for r in timed if _at_hand(r["prefill_draft"], drafts)]
    if not found:
        raise ConfigError(
            "--speedup needs combinations that were measured for this model: "
            "mlx_fastforward eval --save, with --prune-tokens or --prefill-draft for more."
        )
    fast = [r for r in found if r["speedup"] >= speedup]
    if not fast:
        most = max(found, key=lambda r: r["speedup"])
        raise ConfigError(
            f"nothing that was measured for this model is {speedup:g} times as fast by its FLOPs; "
            f"{named(most)} is {most['speedup']:.2f}. eval --save --prefill-draft words --keep "
            "0.5,0.3 measures more."
        )
    top = max(r["facts"] for r in fast)
    near = [r for r in fast if r["facts"] >= top - MOST_FACTS - 1e-9]
    return min(near, key=lambda r: r["kl"])


def _at_hand(draft: str, drafts: Sequence[str]) -> bool:
    """Folders are known by their last name only, and must be named again."""
    return draft in ("", "self", "words", *drafts) or (not drafts and "/" in draft)


def named(row: dict[str, Any]) -> str:
    """A combination in words."""
    parts = []
    if row["sparsity"]:
        parts.append(f"{row['sparsity']:.0%} of the FFN neurons left out")
    if row["prune_tokens"]:
        parts.append(f"{row['prune_tokens']:.0%} of the tokens skip FFNs")
    if row["keep"] < 1:
        parts.append(
            f"{row['keep']:.0%} of the tokens read, as {row['prefill_draft']} says"
        )
    return ", ".join(parts) or "nothing left out"


def figures(row: dict[str, Any], details: dict[str, Any]) -> str:
    """What was measured of a combination, for a banner."""
    about = details["verified"]
    return (
        f"{row['speedup']:.2f} times as fast by FLOPs at {about.get('prompt_tokens', 0):,} "
        f"tokens, KL {row['kl']:.4f}, facts {row['facts']:.1%}, dense {row['facts_dense']:.1%}"
    )
