"""Files as people name them, and writing whole or not at all."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Callable, Iterator

from .errors import FastForwardError, FileProblem


def expanded(path: Path) -> Path:
    """``path`` with ~ as the user's home; an unknown user is a FastForwardError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise FastForwardError(f"{path}: no such user; write the folder out.") from None


def read_text(path: Path) -> str:
    """A UTF-8 file, or one line that says why not; raises FileProblem."""
    try:
        return expanded(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileProblem(f"{path} is not UTF-8 text.") from None
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        reason = getattr(e, "strerror", None) or e
        raise FileProblem(f"{path} cannot be read: {reason}.") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it takes the file's place when all is written."""
    half = path.with_name(f".writing-{path.name}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write(half)`` fill a file that then takes the place of ``path``; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as half:
        write(half)


def write_text(path: Path, text: str) -> None:
    """UTF-8, whole or not at all."""
    replace(path, lambda half: half.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Checksum of a file; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()
