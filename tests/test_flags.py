"""Every flag of mlx_lm.generate and mlx_lm.chat is here and means the same, or docs/flags.md says why not."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import typer

from mlx_fastforward.cli import app

PARSERS = {
    name: importlib.import_module(f"mlx_lm.{name}").setup_arg_parser()
    for name in ("generate", "chat")
}
ABSENT = {
    "--image": "no: text models only",
    "--quantize-activations": "no: such layers would run densely",
}
OTHERWISE = {
    ("generate", "--model"): "yes; default: the demo model",
    ("generate", "--prompt"): "yes; also as an argument, and no default",
    ("generate", "--extra-eos-token"): "yes; once for each token",
    ("generate", "--prefill-step-size"): "yes; default: as tuned",
    ("chat", "--prefill-step-size"): "yes; default: as tuned",
    ("generate", "--verbose"): "yes; default: True in a terminal",
    ("chat", "--model"): "yes; default: the demo model",
}


def theirs(command: str) -> dict[str, argparse.Action]:
    actions = PARSERS[command]._actions
    return {a.option_strings[0]: a for a in actions if a.dest != "help"}


def ours(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    params = group.commands[command].params
    return {name: p for p in params for name in p.opts}


def cell(command: str, flag: str) -> str:
    """What the table says of a flag; what it says is true."""
    if flag not in theirs(command):
        return ""
    if flag in ABSENT:
        assert flag not in ours(command)
        return ABSENT[flag]
    a, b = theirs(command)[flag], ours(command)[flag]
    assert set(a.option_strings) <= set(b.opts)
    assert bool(a.nargs == 0) == bool(b.is_flag)
    same = (a.default or None) == (b.default or None)
    said = OTHERWISE.get((command, flag))
    assert same or said, f"{flag}: {b.default}, theirs {a.default}"
    return said or "yes"


def table() -> str:
    flags = dict.fromkeys([*theirs("generate"), *theirs("chat")])
    rows = ["| flag | mlx_lm.generate | mlx_lm.chat |", "|---|---|---|"]
    for flag in sorted(flags):
        cells = " | ".join(cell(command, flag) for command in PARSERS)
        rows.append(f"| `{flag}` | {cells} |".replace("|  |", "| |"))
    return "\n".join(rows)


def test_the_table_in_the_docs() -> None:
    docs = Path(__file__).parents[1] / "docs" / "flags.md"
    assert table() in docs.read_text(encoding="utf-8"), table()


@pytest.mark.parametrize("flag", ABSENT)
def test_what_is_absent_is_still_mlx_lms(flag: str) -> None:
    assert any(flag in theirs(command) for command in PARSERS)
