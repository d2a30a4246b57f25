"""Commands in this process, with pipes at both ends."""

import json
from pathlib import Path
from typing import Any, Optional

from typer.testing import CliRunner, Result

from mlx_fastforward.cli import app


def run(*args: Any, stdin: Optional[str | bytes] = None) -> Result:
    done = CliRunner().invoke(app, list(map(str, args)), stdin, terminal_width=200)
    assert "\x1b" not in done.output and "Traceback" not in done.output
    return done


def good(*args: Any, stdin: Optional[str] = None) -> str:
    """Standard output of a command that must succeed and stay silent on stderr."""
    done = run(*args, stdin=stdin)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return done.stdout


def bad(code: int, *args: Any, stdin: Optional[str | bytes] = None) -> str:
    """The one line on stderr of a command that must fail without a traceback."""
    done = run(*args, stdin=stdin)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return one_line(done.stderr)


def one_line(stderr: str) -> str:
    assert stderr.startswith("mlx_fastforward: ") and stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr[len("mlx_fastforward: ") : -1]


def report(folder: Path, *args: Any) -> tuple[Result, dict[str, Any]]:
    """A command that must succeed, and the JSON file that it writes."""
    file = folder / "report.json"
    done = run(*args, "--json", file)
    assert done.exit_code == 0, done.output
    return done, json.loads(file.read_text(encoding="utf-8"))
