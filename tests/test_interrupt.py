"""Ctrl-C while something computes that Python's signal handlers wait for."""

import os
import signal
import subprocess
import sys
import termios
import threading
import types
from typing import Any, Callable

import pytest
from commands import run

from mlx_fastforward.cli import conversation, errors, interrupt
from mlx_fastforward.cli.interrupt import STOPPING, unseen

STOPPED = "mlx_fastforward: stopped.\n"
# C hears of the signal as ever; Python's handler does nothing, as if it never came to its turn.
DEAF = """
import signal, sys, time
from mlx_fastforward.cli import app

def load_model(*args, **kwargs):
    signal.signal(signal.SIGINT, lambda *_: None)
    print("computing", flush=True)
    while True:
        time.sleep(600)

sys.modules["mlx_fastforward.cli.generate"].load_model = load_model
app(["generate", "Hello"])
"""


pytestmark = pytest.mark.usefixtures("as_in_a_terminal")


def press() -> None:
    signal.raise_signal(signal.SIGINT)


class Computing:
    """Ctrl-C while mlx computes: Python's handler hears of it when that ends, here after the words."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch):
        self.told = threading.Event()
        monkeypatch.setattr(interrupt, "PATIENCE", 0.01)
        monkeypatch.setattr(module, "answered", self.answered)

    def answered(self, tell: Callable[[str], None]) -> Any:
        def telling(text: str) -> None:
            tell(text)
            self.told.set()

        return interrupt.answered(telling)

    def __call__(self) -> None:
        handler: Any = signal.signal(signal.SIGINT, lambda *_: None)
        press()
        assert self.told.wait(60)
        self.told.clear()
        signal.signal(signal.SIGINT, handler)
        handler()


def generate(works: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command that is stopped at its work: exit code, stdout and stderr."""
    command = sys.modules["mlx_fastforward.cli.generate"]
    monkeypatch.setattr(command, "load_model", lambda *_, **__: works())
    done = run("generate", "Hello")
    return done.exit_code, done.stdout, done.stderr


def test_what_goes_on_for_a_moment_says_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = generate(Computing(errors, monkeypatch), monkeypatch)
    assert found == (130, "", f"mlx_fastforward: {STOPPING}\n{STOPPED}")


def test_what_stops_by_itself_needs_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "PATIENCE", 60)
    assert generate(press, monkeypatch) == (130, "", STOPPED)


def test_the_next_ctrl_c_is_a_first_one_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In a chat, and where what was stopped is skipped and the command goes on."""
    chat = conversation.Chat(
        types.SimpleNamespace(), "m", tune=False, sampling={"temp": 0.0}
    )
    chat.interactive = True
    compute = Computing(conversation, monkeypatch)
    for _ in range(2):
        chat.guarded(compute)
    assert capsys.readouterr().out == f"({STOPPING})\n\n(stopped)\n" * 2
    with monkeypatch.context() as patch:  # before anything has begun
        patch.setattr(conversation, "answered", lambda _: press())
        chat.guarded(compute)
    assert capsys.readouterr().out == "\n(stopped)\n"
    told: list[str] = []
    with compute.answered(told.append):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                compute()
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
        # a test run in the background may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with child:
        try:
            assert child.stdout and child.stdout.readline() == "computing\n"
            child.send_signal(signal.SIGINT)
            assert child.stderr and child.stderr.readline().endswith(f"{STOPPING}\n")
            child.send_signal(signal.SIGINT)
            assert child.wait(120) == 130
        finally:
            child.kill()
