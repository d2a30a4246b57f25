"""--speedup: the best combination that was measured for a model and is as fast as that."""

from dataclasses import dataclass, fields
from typing import Any, Callable, Mapping, Optional

import typer

from .. import demo
from ..errors import ConfigError
from .errors import fail
from .inputs import sparsity_of
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


def settled(flags: Mapping[str, Any], typed: Callable[[str], bool]) -> Settings:
    """The flags as they are, or what --speedup chooses in their place; raises ConfigError.

    Args:
        flags: A command's values by name: those of Settings, speedup, model, predictor and
            trust_remote_code.
        typed: Whether the user gave the flag of that name.
    """
    asked = {f.name: flags[f.name] for f in fields(Settings) if f.name != "told"}
    asked["sparsity"] = sparsity_of(asked["sparsity"])
    if (speedup := flags["speedup"]) is None:
        return Settings(**asked)
    for name, flag in CHOSEN.items():
        if typed(name):
            fail(f"{flag} does not go with --speedup, which chooses it.", 2)
    if not speedup > 1:
        raise ConfigError(f"--speedup must be above 1, got {speedup:g}.")
    from ..predictors.verified import figures, named, reaching

    details, draft = _details(flags), asked["prefill_draft"]
    own = [] if draft is None else [public_name(draft)]
    row = reaching(details, speedup, own)
    if row["prefill_draft"] not in own:
        draft = row["prefill_draft"] or None
    threshold = asked["prefill_threshold"]
    if not typed("prefill_threshold"):  # where it was measured it holds
        threshold = min(threshold, details["verified"].get("prompt_tokens", threshold))
    return Settings(
        row["sparsity"],
        row["prune_tokens"],
        row["keep"],
        draft,
        threshold,
        f"--speedup {speedup:g}: {named(row)} ({figures(row, details)})",
    )


def typed_in(context: typer.Context) -> Callable[[str], bool]:
    """Which flags stand on a command's line."""

    def typed(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    return typed


def _details(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of the predictor file that load() would take."""
    from ..predictors.search import named_predictor, predictor_for

    model, predictor = flags["model"], flags["predictor"]
    base, _ = describe_base(model, flags["trust_remote_code"])
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
