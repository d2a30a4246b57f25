"""Speculative prefill on the command line: its flags made into a Speculative."""

from typing import Any, Callable, Iterator, Optional

from ..errors import ConfigError, LoadProblem
from .errors import fail, one_process
from .inputs import numbers
from .models import public_name
from .tables import warn


def keep_config(draft: Optional[str], keep: float, threshold: int) -> Any:
    """What --keep and --prefill-threshold say, None without --prefill-draft; raises ConfigError."""
    from ..tokens.speculative import KeepConfig

    config = KeepConfig(keep=keep, threshold=threshold)
    if draft is None:
        return None
    if draft == "":
        raise ConfigError(
            "--prefill-draft must be a folder, a repository, words or self, got nothing."
        )
    one_process("--prefill-draft")
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
    from ..speculative import Speculative

    _check(model)
    reader = Speculative(model, scorer_of(draft, model, tokenizer), config)
    if reader.warning is not None:
        warn(reader.warning)
    return reader


def keep_configs(
    drafts: Optional[str], keeps: Optional[str], threshold: int
) -> list[Any]:
    """What a list of --keep says, for commands that measure; none without a draft."""
    if drafts is None and keeps is not None:
        raise ConfigError("--keep needs --prefill-draft: who says what is read?")
    shares = numbers("--keep", keeps or "0.5", float)
    found = [
        keep_config(d, share, threshold) for share in shares for d in _names(drafts)
    ]
    return list(dict.fromkeys(found))


def readers(
    model: Any, drafts: Optional[str], configs: list[Any], load: Callable[[str], Any]
) -> list[Optional[Any]]:
    """A Speculative for each draft and each share below 1; None: all is read.

    Args:
        load: Makes a scorer of a draft's name.
    """
    from ..speculative import Speculative

    parts = [c for c in configs if c.keep < 1]
    found: list[Optional[Any]] = (
        [None] if not parts or len(parts) < len(configs) else []
    )
    for name in _names(drafts) if parts else []:
        _check(model)
        scorer = load(name)
        scorer.name = public_name(name)  # figures are shared, paths are not
        found += [Speculative(model, scorer, c) for c in parts]
    return found


def _names(drafts: Optional[str]) -> list[str]:
    return [] if drafts is None else [name.strip() for name in drafts.split(",")]


def scorer_of(
    name: str,
    model: Any,
    tokenizer: Any,
    side: Optional[Any] = None,
    dtype: Optional[str] = None,
) -> Any:
    """Who says which tokens matter: a draft, the question's words, or the model's first layers, with a
    fitted readout if the predictor file ``side`` has one.
    """
    from ..scorers import LayersScorer, WordsScorer

    if name == "words":
        return WordsScorer()
    if name == "self":
        return LayersScorer(model, readout=None if side is None else side.readout)
    scorer = _draft(name, tokenizer)
    if dtype is not None:
        import mlx.core as mx

        scorer.model.set_dtype(getattr(mx, dtype))
    return scorer


def _check(model: Any) -> None:
    """Refuse a model that cannot leave tokens out."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..model.positions import check_compact, ropes_of

    check_compact(make_prompt_cache(model))
    ropes_of(model)


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
