"""Speculative prefill on the command line: its flags made into a Speculative."""

from typing import Any, Iterator, Optional

from .. import ranks
from ..errors import ConfigError, LoadProblem
from .errors import fail
from .tables import warn


def keep_config(draft: Optional[str], keep: float, threshold: int) -> Any:
    """What --keep and --prefill-threshold say, None without --prefill-draft; raises ConfigError."""
    from ..tokens.speculative import KeepConfig

    config = KeepConfig(keep=keep, threshold=threshold)
    if draft is None:
        return None
    if draft == "":
        raise ConfigError(
            "--prefill-draft must be a folder, a repository or self, got nothing."
        )
    if ranks.rank() is not None:
        fail("--prefill-draft runs in one process; start it without mlx.launch.", 2)
    return config


def refuse_beside(**flags: Any) -> None:
    """End the command if one of these flags was given."""
    for flag, value in flags.items():
        if value is not None:
            fail(f"{flag} does not go with --prefill-draft.", 2)


def speculative(
    model: Any, tokenizer: Any, draft: Optional[str], config: Any
) -> Optional[Any]:
    """A Speculative, or None without a config; a low --keep is warned of."""
    if config is None or draft is None:
        return None
    from mlx_lm.models.cache import make_prompt_cache

    from ..model.positions import check_compact, ropes_of
    from ..scorers import LayersScorer
    from ..speculative import Speculative

    check_compact(make_prompt_cache(model))
    ropes_of(model)
    scorer = LayersScorer(model) if draft == "self" else _draft(draft, tokenizer)
    reader = Speculative(model, scorer, config)
    if reader.warning is not None:
        warn(reader.warning)
    return reader


def _draft(name: str, tokenizer: Any) -> Any:
    from mlx_lm.utils import load

    from ..hub import problems
    from ..scorers import DraftScorer
    from ..tokens.mapping import Translation
    from .models import checked_name

    with problems(name, LoadProblem):
        model, theirs, *_ = load(checked_name(name))
    if theirs.get_vocab() == tokenizer.get_vocab():
        return DraftScorer(model, name)
    return DraftScorer(model, name, Translation(tokenizer, theirs))


def answers(
    reader: Optional[Any],
    system: Optional[str],
    template: dict[str, Any],
    model: Any,
    tokenizer: Any,
    ids: list[int],
    **kwargs: Any,
) -> Iterator[Any]:
    """generation.stream_generate, by ``reader`` if there is one, which tells what it noted."""
    from ..generation import stream_generate

    if reader is None:
        yield from stream_generate(model, tokenizer, ids, **kwargs)
        return
    from mlx_lm.models.cache import make_prompt_cache

    from ..session import system_tokens

    messages = [{"role": "system", "content": system}] if system else [{"role": "user"}]
    protect = system_tokens(tokenizer, messages, template, ids)
    kwargs.pop("max_kv_size")
    cache = make_prompt_cache(model)
    yield from reader.stream_generate(
        tokenizer, ids, 0, cache, protect=protect, **kwargs
    )
    for note in reader.take_notes():
        warn(note)
