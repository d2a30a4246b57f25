"""Ctrl-C while something computes that Python's signal handlers wait for."""

import os
import signal
import subprocess
import sys
import termios
import threading
import time
import types
from typing import Any, Iterator, NoReturn

import pytest
from commands import run

from mlx_fastforward.cli import conversation
from mlx_fastforward.cli.interrupt import STOPPING, answered, unseen

STOPPED = "mlx_fastforward: stopped.\n"
DEAF = """
import signal, sys, time
from mlx_fastforward.cli import app

def load_model(*args, **kwargs):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    print("computing", flush=True)
    time.sleep(60)

sys.modules["mlx_fastforward.cli.generate"].load_model = load_model
app(["generate", "Hello"])
"""


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A test run in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def press_in(seconds: float) -> None:
    """Ctrl-C, a little later."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def press() -> NoReturn:
    raise KeyboardInterrupt


def compute(seconds: float) -> None:
    """As mlx does: for this thread's Python there is no signal until it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        time.sleep(seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@pytest.mark.parametrize(
    "works, told", [(compute, f"mlx_fastforward: {STOPPING}\n"), (time.sleep, "")]
)
def test_what_goes_on_for_a_moment_says_stopping(
    works: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_: Any, **__: Any) -> None:
        press_in(0.1)
        works(0.8)

    monkeypatch.setattr(
        sys.modules["mlx_fastforward.cli.generate"], "load_model", load_model
    )
    done = run("generate", "Hello")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", told + STOPPED)


def test_the_next_ctrl_c_is_a_first_one_again(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chat, and where what was stopped is skipped and the command goes on."""
    chat = conversation.Chat(
        types.SimpleNamespace(), "m", tune=False, sampling={"temp": 0.0}
    )
    chat.interactive = True

    def work() -> None:
        press_in(0.1)
        compute(0.6)

    for _ in range(2):
        chat.guarded(work)
    assert capsys.readouterr().out == f"({STOPPING})\n\n(stopped)\n" * 2
    with monkeypatch.context() as patch:  # before anything has begun
        patch.setattr(conversation, "answered", lambda _: press())
        chat.guarded(work)
    assert capsys.readouterr().out == "\n(stopped)\n"
    told: list[str] = []
    with answered(told.append):
        for _ in range(2):
            press_in(0.1)
            with pytest.raises(KeyboardInterrupt):
                compute(0.6)
    assert told == [STOPPING] * 2


def test_keys_pressed_meanwhile_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for the next line, and Ctrl-C still works."""
    ours, theirs = os.openpty()
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)

        def shows() -> bool:
            local = termios.tcgetattr(terminal)[3]
            assert local & termios.ISIG and local & termios.ICANON
            return bool(local & termios.ECHO)

        with pytest.raises(KeyboardInterrupt), unseen():
            assert not shows()
            os.write(ours, b"next\n")
            raise KeyboardInterrupt
        assert shows() and terminal.readline() == "next\n"
    os.close(ours)


def test_a_second_one_ends_a_process_that_does_not_stop() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DEAF],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout and child.stdout.readline() == "computing\n"
        time.sleep(0.2)
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stderr and child.stderr.readline().endswith(f"{STOPPING}\n")
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130 and time.monotonic() - start < 1
