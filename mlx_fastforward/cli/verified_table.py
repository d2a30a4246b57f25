"""The table of verified sparsities, as train and eval --save print it."""

from typing import Any, Optional

from rich.table import Table

from .tables import say, show


def show_verified(found: dict[str, Any]) -> None:
    """The table, and how it was measured."""
    from ..predictors.verified import MOST_FACTS, MOST_KL

    show(table(found))
    say(
        f"{found['documents']} documents of {found['prompt_tokens']:,} tokens for each column, "
        f"{found['questions']} facts; passes: KL up to {MOST_KL:g}, "
        f"{MOST_FACTS:.0%} of the facts lost at most."
    )


def table(found: dict[str, Any]) -> Table:
    """One row per sparsity: what it costs, and what the FLOPs allow."""
    from ..predictors.verified import passes

    table = Table(
        "sparsity", "KL of prose", "planted facts", "speed by FLOPs", "passes"
    )
    without, combined = found.get("without"), found.get("combined") or []
    for row in [*found["rows"], *([without] if without else []), *combined]:
        facts = f"{row['facts']:.3f}, dense {row['facts_dense']:.3f}"
        facts += _bounds(row["facts_difference_bounds"], "+.3f")
        table.add_row(
            _name(row) + (", no predictor" if row is without else ""),
            f"{row['kl']:.4f}{_bounds(row['kl_bounds'], '.4f')}",
            facts,
            f"{row['speedup']:.2f}x",
            "" if row is without else "yes" if passes(row) else "no",
        )
    return table


def _name(row: dict[str, Any]) -> str:
    """What is left out, shortly."""
    parts = [f"{row['sparsity']:.0%}"] if row["sparsity"] else []
    if row.get("prune_tokens"):
        parts.append(f"tokens {row['prune_tokens']:.0%}")
    if row.get("keep", 1) < 1:
        parts.append(f"keep {row['keep']:.0%} by {row['prefill_draft']}")
    return ", ".join(parts)


def _bounds(bounds: Optional[list[float]], form: str) -> str:
    if bounds is None or bounds[0] == bounds[1]:
        return ""
    return f" ({bounds[0]:{form}} to {bounds[1]:{form}})"
