"""make says in one line that a Python is too old, and makes the venv of another Python anew."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tells its version, and "installs" itself into a venv.
FAKE = """#!/bin/sh
case "$1 $2" in
"-c "*) echo {version};;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
esac
"""


def python(folder: Path, version: str) -> Path:
    file = folder / f"python{version}"
    file.write_text(FAKE.format(version=version))
    file.chmod(0o755)
    return file


def make(venv: Path, python: Path) -> subprocess.CompletedProcess:
    command = ["make", "-s", "-C", ROOT, "venv", f"VENV={venv}", f"PYTHON={python}"]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300
    )


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    for version, said in (
        ("3.9.6", "Python 3.10 or newer is needed"),
        ("2.7.18", "Python 3.10 or newer is needed"),
        ("", "is no Python; name one of 3.10 or newer"),
    ):
        done = make(venv, python(tmp_path, version))
        lines = [x for x in done.stderr.splitlines() if "***" not in x]
        assert done.returncode and len(lines) == 1 and said in lines[0], done.stderr
        assert version in lines[0] and not venv.exists()


def test_a_venv_is_kept_unless_the_python_is_another(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    for version, kept in (("3.10.2", False), ("3.10.2", True), ("3.12.1", False)):
        done = make(venv, python(tmp_path, version))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert (venv / "mark").exists() == kept
        (venv / "mark").touch()
