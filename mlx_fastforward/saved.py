"""Conversations in files, with what was read of them."""

import json
from pathlib import Path
from typing import Any

from .attachment import engine_of, is_enabled
from .cachefile import fingerprint, read_cache, write_cache
from .errors import FileProblem
from .model.caches import counted
from .model.positions import is_whole
from .predictors.search import home
from .session import Session

KEY = "conversation"


def folder() -> Path:
    return home().parent / "conversations"


def names() -> list[str]:
    """Of the saved conversations."""
    return sorted(p.stem for p in folder().glob("[!.]*.safetensors"))


def known() -> str:
    """The same in words."""
    if not (found := names()):
        return "none is saved: /save NAME keeps one"
    return f"saved: {', '.join(found)}"


def path_of(name: str) -> Path:
    """Where a conversation of this name is kept; raises FileProblem."""
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise FileProblem(
            f"a name of letters, digits, - and _ is expected, got {name!r}."
        )
    return folder() / f"{name}.safetensors"


def how_read(session: Session) -> dict[str, Any]:
    """The settings that a prompt cache depends on; nothing where it is stock mlx-lm's."""
    engine = engine_of(session.model)
    if engine is None or not engine.sparse or not is_enabled(session.model):
        return {}
    left = ("strategy", "shortest", "attention_block", "unpack", "half")
    return {k: v for k, v in engine.settings().items() if k not in left}


def save(session: Session, name: str, model: str) -> Path:
    """Write a conversation and its prompt cache; returns the file."""
    noted = {
        "messages": session.messages,
        "system_prompt": session.system_prompt,
        "cached": session.cached if is_whole(session.cache) else [],
        "tokens": session.tokens,
        "finished": session.finished,
        "settings": how_read(session),
        "model": fingerprint(session.model),
    }
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # for you alone
    whole = session.cached and is_whole(session.cache)
    cache = session.cache if whole else []
    write_cache(path, cache, {"model": model, KEY: json.dumps(noted)})
    return path


def load(session: Session, name: str) -> bool:
    """Take up a saved conversation; whether its prompt cache serves, too.

    It does for the same model under the same settings, or where it was read densely. Raises
    FileProblem, and leaves the session as it was then.
    """
    path = path_of(name)
    if not path.is_file():
        raise FileProblem(f"there is no conversation {name}; {known()}.")
    cache, metadata = read_cache(path)
    try:
        noted = json.loads(metadata[KEY])
        messages = [
            {k: str(m[k]) for k in ("role", "content")} for m in noted["messages"]
        ]
        cached, tokens = (list(map(int, noted[k])) for k in ("cached", "tokens"))
        system, settings = noted["system_prompt"], noted["settings"]
        finished, mark = bool(noted["finished"]), noted.get("model")
    except (KeyError, TypeError, ValueError):
        raise FileProblem(f"{path} is no conversation of chat.") from None
    same = mark == fingerprint(session.model)
    lengths = set(counted(cache)) == {len(cached)}
    session.reset()
    session.messages, session.system_prompt = messages, system
    session.finished = finished
    session.tokens = tokens if same else []
    fits = lengths and len(cache) == len(session.cache)
    if not same or not fits or settings not in ({}, how_read(session)):
        return False
    session.cache, session.cached = cache, cached
    return True
