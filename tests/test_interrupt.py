"""Ctrl-C while something computes that Python's signal handlers wait for."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from typing import Any, Iterator

import pytest
from commands import run

from mlx_fastforward.cli import conversation
from mlx_fastforward.cli.interrupt import STOPPING, answered

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


def test_the_next_ctrl_c_is_a_first_one_again(capsys: pytest.CaptureFixture) -> None:
    """In a chat, and where what was stopped is skipped and the command goes on."""
    chat = conversation.Chat(
        types.SimpleNamespace(), "m", tune=False, sampling={"temp": 0.0}
    )
    chat.interactive = True
    for _ in range(2):
        press_in(0.1)
        with chat.problems_told():
            compute(0.6)
    assert capsys.readouterr().out == f"({STOPPING})\n\n(stopped)\n" * 2
    told: list[str] = []
    with answered(told.append):
        for _ in range(2):
            press_in(0.1)
            with pytest.raises(KeyboardInterrupt):
                compute(0.6)
    assert told == [STOPPING] * 2


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
