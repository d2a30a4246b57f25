"""The chat's loop, and what a line that begins with a slash does."""

import contextlib
import shlex
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import typer

from ..errors import ConfigError
from .conversation import Chat, banner
from .idle import while_waiting
from .inputs import read_text
from .lengths import check_bytes
from .terminal import Lines

HELP = """\
/file PATH    put a document before the next message; again for more
/drop         forget the documents that wait for it
/continue     go on with an answer that was cut
/again        another answer to the last message
/compare      answer the last message sparse and dense, with both TTFTs
/dense        prefill like stock mlx-lm; /sparse switches back
/system TEXT  another system prompt; alone: none
/temp NUMBER  another sampling temperature; 0 always takes the likeliest token
/save NAME    keep the conversation and what was read
/load NAME    take it up again; alone: which there are
/model NAME   go on with another model, which reads the conversation anew
/reset        forget the conversation (also: r)
/help         this list (also: h)
/quit         leave (also: q, Ctrl-D)
Ctrl-C stops an answer. Alt-Enter starts a new line; a paste may have many."""
ANEW = "The next message reads everything anew."
LEAVE = ("/quit", "/exit", "/q", "q")
SHORT = {"r": "/reset", "h": "/help", "/r": "/reset", "/h": "/help", "/?": "/help"}


def run(chat: Chat, lines: Optional[Any] = None) -> None:
    """Until the end of the input; in a pipe, a problem on the way makes it a failure."""
    lines = lines or Lines(chat.interactive, while_waiting(chat.heal))
    while True:
        chat.tell_pending()
        if (line := lines.read()) is None:
            break
        text = line.strip()
        if text.lower() in LEAVE:
            break
        if text:
            chat.guarded(partial(take, chat, text))
    if chat.failed and not chat.interactive:
        raise typer.Exit(1)


def take(chat: Chat, text: str) -> None:
    if not command(chat, text):
        chat.turn(text)


def command(chat: Chat, text: str) -> bool:
    """Run an in-chat command; False if the text is a message."""
    typed, _, rest = SHORT.get(text.lower(), text).partition(" ")
    if not typed.startswith("/") or not typed[1:].isalpha():
        return False
    if (action := COMMANDS.get(typed[1:].lower())) is None:
        raise ConfigError(f"unknown command {typed}; /help lists them.")
    action(chat, rest.strip())
    return True


def show_help(chat: Chat, _: str) -> None:
    chat.console.print(HELP, style="dim" if chat.interactive else "", markup=False)


def reset(chat: Chat, _: str) -> None:
    chat.session.reset()
    chat.pending = []
    chat.note("Forgot the conversation.")


def switch(chat: Chat, sparse: bool) -> None:
    from ..attachment import is_enabled, switch

    if sparse and not chat.engine.sparse:
        raise ConfigError(f"{chat.why_dense()}.")
    if is_enabled(chat.session.model) == sparse:
        return chat.note(f"Prefill is {'sparse' if sparse else 'dense'} already.")
    switch(chat.session.model, sparse)
    chat.session.forget_cache()
    how = "sparse" if sparse else "dense, as in stock mlx-lm"
    chat.note(f"Prefill is {how}, from now on. {ANEW}")


def add_file(chat: Chat, name: str) -> None:
    if not name:
        raise ConfigError("usage: /file PATH")
    text = read_text(path := typed_path(name))
    check_bytes(chat.session.model, text, chat.force)
    others = [p for p in chat.pending if p[0] != str(path)]  # once is enough
    chat.pending = [*others, (str(path), text)]


def drop(chat: Chat, _: str) -> None:
    if not chat.pending:
        raise ConfigError("no document is waiting for your next message.")
    chat.note(f"Dropped: {', '.join(name for name, _ in chat.pending)}.")
    chat.pending = []


def compare(chat: Chat, _: str) -> None:
    _need_message(chat, "compare")
    if not chat.engine.sparse:
        raise ConfigError(f"{chat.why_dense()}.")
    chat.compare()


def again(chat: Chat, _: str) -> None:
    _need_message(chat, "answer again")
    chat.again()


def _need_message(chat: Chat, what: str) -> None:
    if not chat.session.asked:
        raise ConfigError(f"nothing to {what} yet: ask something first.")


def go_on(chat: Chat, _: str) -> None:
    if not chat.session.cut:
        raise ConfigError("nothing to continue: the last answer was not cut.")
    chat.stream(chat.session.go_on)


def set_system(chat: Chat, text: str) -> None:
    chat.session.set_system(text or None)
    said = "The system prompt is another one." if text else "No system prompt now."
    chat.note(f"{said} {ANEW}" if chat.session.cached else said)


def set_temp(chat: Chat, text: str) -> None:
    try:
        temp = float(text)
    except ValueError:
        temp = -1.0
    if not 0 <= temp < float("inf"):
        now = chat.sampling["temp"]
        raise ConfigError(f"usage: /temp NUMBER, from 0 on; it is {now:g}.")
    chat.sampling["temp"] = temp
    chat.note(f"Sampling temperature {temp:g} from now on.")


def save(chat: Chat, name: str) -> None:
    from .. import saved

    if not name:
        raise ConfigError("usage: /save NAME")
    if not chat.session.asked:
        raise ConfigError("nothing to save yet: ask something first.")
    file = saved.save(chat.session, name, chat.model)
    chat.note(f"Saved in {file}\n/load {name} takes it up again.")


def load(chat: Chat, name: str) -> None:
    from .. import saved

    if not name:
        raise ConfigError(f"usage: /load NAME; {saved.known()}.")
    session = chat.session
    if not saved.load(session, name):
        how = "it was read by another model or with other settings, and is read anew"
    else:
        from ..session import common_prefix

        ids = session.render()
        same = common_prefix(session.cached, ids)  # less after another /system
        how = f"{same:,} of its {len(ids):,} tokens need not be read again"
    turns = sum(m["role"] == "user" for m in session.messages)
    chat.note(f"Loaded {name}, {turns} message{'s' * (turns != 1)}: {how}.")


def take_model(chat: Chat, name: str) -> None:
    if not name:
        raise ConfigError(
            f"usage: /model NAME; it is {chat.model}. mlx_fastforward models lists yours."
        )
    chat.take_model(name)
    banner(chat)


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": show_help,
    "reset": reset,
    "dense": lambda chat, _: switch(chat, False),
    "sparse": lambda chat, _: switch(chat, True),
    "file": add_file,
    "drop": drop,
    "compare": compare,
    "again": again,
    "continue": go_on,
    "system": set_system,
    "temp": set_temp,
    "save": save,
    "load": load,
    "model": take_model,
}


def typed_path(name: str) -> Path:
    """A path as typed, quoted, or dragged into a terminal, which escapes its spaces."""
    with contextlib.suppress(OSError, ValueError):
        words = shlex.split(name)
        if not Path(name).exists() and len(words) == 1:
            return Path(words[0])
    return Path(name)
