"""--speedup: the best combination that was measured for a model and is as fast as that."""

from dataclasses import dataclass
from typing import Any, Optional

import typer

from .. import demo
from ..errors import ConfigError
from .errors import fail
from .models import describe_base, public_name

CHOSEN = {"sparsity": "--sparsity", "keep": "--keep", "prune_tokens": "--prune-tokens"}


@dataclass(frozen=True)
class Settings:
    """What of a prompt is left out, as the flags of these names say; ``told``: why, if measured."""

    sparsity: float | str
    prune_tokens: float
    keep: float
    prefill_draft: Optional[str]
    prefill_threshold: int
    told: Optional[str] = None


def settled(
    asked: Settings,
    context: typer.Context,
    speedup: Optional[float],
    model: Optional[str],
    predictor: Optional[str],
    trust_remote_code: bool,
) -> Settings:
    """The flags as they are, or what --speedup chooses in their place; raises ConfigError."""
    if speedup is None:
        return asked
    for name, flag in CHOSEN.items():
        if _typed(context, name):
            fail(f"{flag} does not go with --speedup, which chooses it.", 2)
    if not speedup > 1:
        raise ConfigError(f"--speedup must be above 1, got {speedup:g}.")
    from ..predictors.verified import figures, named, reaching

    details, draft = _details(model, predictor, trust_remote_code), asked.prefill_draft
    own = [] if draft is None else [public_name(draft)]
    row = reaching(details, speedup, own)
    if row["prefill_draft"] not in own:
        draft = row["prefill_draft"] or None
    threshold = asked.prefill_threshold
    if not _typed(context, "prefill_threshold"):  # where it was measured it holds
        threshold = min(threshold, details["verified"].get("prompt_tokens", threshold))
    return Settings(
        row["sparsity"],
        row["prune_tokens"],
        row["keep"],
        draft,
        threshold,
        f"--speedup {speedup:g}: {named(row)} ({figures(row, details)})",
    )


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _details(
    model: Optional[str], predictor: Optional[str], trust_remote_code: bool
) -> dict[str, Any]:
    """The JSON of the predictor file that load() would take."""
    from ..predictors.search import named_predictor, predictor_for

    base, _ = describe_base(model, trust_remote_code)
    if predictor is not None:
        found = named_predictor(predictor)
    else:
        found = predictor_for(str(demo.MODEL) if model is None else model, base)
    return {} if found is None else found.details


def explain(net: Any, settings: Settings) -> None:
    """Let the engine say why it runs so."""
    from ..attachment import engine_of

    if settings.told is not None and (engine := engine_of(net)) is not None:
        engine.chosen = settings.told
