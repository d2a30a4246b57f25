"""What a command prints and returns when it cannot go on: one line, 2 for usage, 1 for failure."""

import contextlib
import errno
import os
import sys
from typing import Iterator, NoReturn

import typer

from .. import ranks
from ..errors import ConfigError, FastForwardError, printable
from .interrupt import answered
from .tables import warn


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one line to stderr and leave; 2 is for wrong usage, 1 for failure."""
    said = printable(message)
    if not (rank := ranks.rank()):
        warn(said)
    elif code == 1:  # wrong usage is the same everywhere
        said = f"mlx_fastforward: {said} (rank {rank})"
        print(said, file=sys.__stderr__, flush=True)
    raise typer.Exit(code)


def one_process(what: str) -> None:
    """End the command under mlx.launch: several processes cannot do this alike."""
    if ranks.rank() is not None:
        fail(f"{what} runs in one process; start it without mlx.launch.", 2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors a user can act on into one line, without a traceback."""
    try:
        yield
    except ConfigError as e:
        fail(str(e), 2)
    except FastForwardError as e:
        fail(str(e))
    except OSError as e:  # a full disk; a reader that went away is typer's
        if e.errno in (None, errno.EPIPE):
            raise
        fail(f"{e.filename}: {e.strerror}." if e.filename else f"{e.strerror}.")
    except RuntimeError as e:
        if ranks.rank() is None or not ranks.is_lost_peer(e):
            raise
        _leave_the_dead()


def _leave_the_dead() -> NoReturn:
    """End without mlx's clean-up: its threads wait for the process that is gone, or abort."""
    try:
        fail("another process of mlx.launch has ended, and this one with it.")
    finally:
        for stream in (sys.stdout, sys.stderr, sys.__stderr__):
            if stream is not None:
                stream.flush()
        os._exit(1)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C leaves quietly, with the shell's code for it."""
    try:
        with answered(warn):
            yield
    except KeyboardInterrupt:
        warn("stopped.")
        raise typer.Exit(130) from None
