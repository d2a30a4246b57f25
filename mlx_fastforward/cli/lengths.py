"""Prompts that are too long for the model, told before anything waits for them."""

import contextlib
import threading
from typing import Any, Callable, Optional, TypeVar

from rich.console import Console

from ..errors import ConfigError, FileProblem

Found = TypeVar("Found")

# Most bytes that a token stands for: text has 3 to 5, code with wide indents some more.
BYTES = 16
LONG_TEXT = 300_000  # characters, which take a second or so to tokenise
ADVICE = "use a shorter document or another --model; --force tries all the same"


def check_bytes(model: Any, text: str, force: bool) -> None:
    """Refuse a text that cannot fit, without tokenising it; raises FileProblem."""
    limit = _limit(model)
    least = len(text.encode("utf-8")) // BYTES
    if limit and least > limit and not force:
        raise FileProblem(
            f"{len(text):,} characters are more than {least:,} tokens, but the model was made for "
            f"{limit:,}: {ADVICE}."
        )


def check_tokens(model: Any, tokens: int, force: bool) -> Optional[str]:
    """Refuse a prompt that is too long; with ``force`` what to say of it. Raises FileProblem."""
    limit = _limit(model)
    if not limit or tokens <= limit:
        return None
    text = f"{tokens:,} tokens, but the model was made for {limit:,}: "
    if not force:
        raise FileProblem(f"{text}{ADVICE}.")
    return f"{text}expect a poor answer."


def check_lengths_of(flag: str, lengths: list[int], model: Any, more: int = 0) -> None:
    """Prompt lengths that a command was asked for, with ``more`` tokens after them."""
    limit = _limit(model)
    for n in lengths:
        if limit and n + more > limit:
            raise ConfigError(
                f"{flag}: {n:,} tokens are too many, the model was made for {limit:,}."
            )


def _limit(model: Any) -> Optional[int]:
    from ..model.families import context_length

    return context_length(model)


def patiently(work: Callable[[], Found], size: int, console: Console) -> Found:
    """The result of tokenising so many characters; a long text in a thread, which Ctrl-C leaves.

    The tokenizer is one call that nothing interrupts.
    """
    if size < LONG_TEXT:
        return work()
    found: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    told = f"counting the tokens of {size:,} characters"
    shown = console.status(told) if console.is_terminal else contextlib.nullcontext()
    with shown:
        while thread.is_alive():
            thread.join(0.1)
    if failed:
        raise failed[0]
    return found[0]
