"""Ctrl-C is answered at once, though work ends only where Python comes to its turn again.

Python's signal handlers run between its bytecodes: not while mlx computes a layer. What C writes to the
wakeup file descriptor meanwhile, a thread reads.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from typing import Callable, Iterator, NoReturn

PATIENCE = 0.2  # seconds: what stops by itself within them needs no words
STOPPING = "stopping; Ctrl-C again ends the program at once"
REACHED = b"\0"  # in the pipe: Python's handler ran


@contextlib.contextmanager
def answered(tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever; ``tell`` hears, in a thread, where that takes a moment.

    Once it was told, another Ctrl-C ends the process. Outside the main thread, and where SIGINT is
    ignored, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before in (None, signal.SIG_IGN):
        yield
        return
    out, into = os.pipe()
    os.set_blocking(into, False)

    def reached(*_: object) -> NoReturn:
        os.write(into, REACHED)
        raise KeyboardInterrupt

    watcher = threading.Thread(target=_watch, args=(out, tell), daemon=True)
    signal.signal(signal.SIGINT, reached)
    descriptor = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, before)
        os.close(into)
        watcher.join()
        os.close(out)


def _watch(out: int, tell: Callable[[str], None]) -> None:
    """Until the pipe ends: a signal that Python's handler does not hear of soon is told of."""
    pressed = told = False
    while True:
        patience = PATIENCE if pressed and not told else None
        if not select.select([out], [], [], patience)[0]:
            told = True
            tell(STOPPING)
        elif not (byte := os.read(out, 1)):
            return
        elif byte == REACHED:
            pressed = told = False
        elif byte[0] == signal.SIGINT:
            if told:
                _end()
            pressed = True


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Keys that are pressed meanwhile wait for the next line, and do not show between the words of an answer."""
    _echo(False)
    try:
        yield
    finally:
        _echo(True)


def _echo(on: bool) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        return
    import termios

    settings = termios.tcgetattr(sys.stdin)
    local = settings[3] & ~termios.ECHO
    settings[3] = local | (termios.ECHO if on else 0)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)


def _end() -> NoReturn:
    """Leave without another word; a progress bar may have hidden the cursor."""
    _echo(True)
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        print("\x1b[?25h", file=sys.__stderr__, flush=True)
    os._exit(130)
