"""Prompt caches that survive a restart: written in the background, checked when they are read.

An entry is two files: mlx-lm's prompt cache, and a JSON that is written after it and says what it is.
"""

import hashlib
import json
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
)

from ..errors import brief
from ..files import expanded, replacing, sha256, write_text
from ..version import __version__

FORMAT = 1
OURS = ".prefix"  # in the names: no other file of the folder is touched
OLDEST = 30 * 86400  # seconds without use
WORTH = 256  # tokens: fewer are read again in no time
VERSIONS = {
    "format": FORMAT,
    "mlx": version("mlx"),
    "mlx_lm": version("mlx-lm"),
    "mlx_fastforward": __version__,
}


def identity(mark: str, settings: dict[str, Any]) -> str:
    """What a prefix must share with a request to serve it: model, versions, settings."""
    text = json.dumps([mark, VERSIONS, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Entry:
    """One prefix on disk. trimmable: its beginning can be used alone."""

    path: Path  # of the JSON
    identity: str
    tokens: np.ndarray
    trimmable: bool
    sha256: str
    bytes: int
    used: float

    @property
    def tensors(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def reach(self, tokens: np.ndarray) -> int:
        """How many of these tokens it can serve."""
        n = min(len(tokens), len(self.tokens))
        other = np.flatnonzero(self.tokens[:n] != tokens[:n])
        common = int(other[0]) if len(other) else n
        return common if self.trimmable or common == len(self.tokens) else 0


class DiskCache:
    """A folder of prefixes; the generation thread asks and adds, another thread writes.

    Args:
        folder: Made if it is not there.
        most_bytes: The least recently used are deleted beyond that, and all after 30 days.
        tell: Says what is damaged, or could not be written.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        tell: Callable[[str], None] = logging.warning,
    ):
        self.tell = tell
        self.folder = expanded(folder)
        # prompts are private
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.most_bytes = most_bytes
        self.lock = threading.Lock()
        self.entries: dict[Path, Entry] = {}
        for half in self.folder.glob(f".writing-*{OURS}*"):
            half.unlink(missing_ok=True)
        for path in self.folder.glob(f"*{OURS}.json"):
            self._add(path)
        self._evict()
        self.jobs: queue.Queue = queue.Queue(maxsize=4)
        threading.Thread(target=self._write_all, daemon=True).start()

    # The generation thread

    def nearest(self, wanted: Iterable[str], tokens: list[int]) -> tuple[Any, int]:
        """The entry of one of these identities that serves most of the tokens, and how many."""
        wanted, ids, best, most = set(wanted), np.array(tokens, np.int64), None, 0
        with self.lock:
            for entry in self.entries.values():
                if entry.identity in wanted and (n := entry.reach(ids)) > most:
                    best, most = entry, n
        return best, most

    def load(self, entry: Entry) -> Optional[list[Any]]:
        """The entry's prompt cache; None where it is damaged, which is said, and it is deleted."""
        try:
            if sha256(entry.tensors) != entry.sha256:
                raise ValueError("the checksum is wrong")
            cache = load_prompt_cache(str(entry.tensors))
            mx.eval([c.state for c in cache])
            os.utime(entry.path)
            entry.used = time.time()
            return cache
        except Exception as e:  # whatever a damaged file does to its reader
            self.tell(
                f"{entry.tensors.name} in the prompt cache is damaged: {brief(e)}"
            )
            self._delete(entry)
            return None

    def save(self, mark: str, tokens: list[int], cache: list[Any]) -> None:
        """Write a prefix in the background, unless most of it is there or the disk is too slow."""
        if self.jobs.full() or len(tokens) - self.nearest([mark], tokens)[1] < WORTH:
            return
        # evaluated here: the arrays belong to this thread
        own = [type(c).from_state(tree_map(_contiguous, c.state)) for c in cache]
        mx.eval([c.state for c in own])
        self.jobs.put_nowait((mark, list(tokens), own))

    # The other thread

    def _write_all(self) -> None:
        while True:
            job = self.jobs.get()
            try:
                self._write(*job)
            except Exception as e:  # a full disk must not end the writing for good
                self.tell(f"a prompt cache could not be written: {brief(e)}")
            finally:
                self.jobs.task_done()

    def _write(self, mark: str, tokens: list[int], cache: list[Any]) -> None:
        name = hashlib.sha256(f"{mark} {tokens}".encode()).hexdigest()[:32]
        path = self.folder / f"{name}{OURS}.json"
        with replacing(path.with_suffix(".safetensors")) as half:
            save_prompt_cache(str(half), cache)
            info = {
                **VERSIONS,
                "identity": mark,
                "trimmable": can_trim_prompt_cache(cache),
                "sha256": sha256(half),
                "bytes": half.stat().st_size,
                "tokens": tokens,
            }
        write_text(path, json.dumps(info))
        self._add(path)
        self._supersede(path)
        self._evict()

    def _supersede(self, path: Path) -> None:
        """Delete the beginnings of a new entry: it serves what they did."""
        new = self.entries[path]
        for entry in list(self.entries.values()):
            if entry is new or entry.identity != new.identity or not new.trimmable:
                continue
            if new.reach(entry.tokens) == len(entry.tokens):
                self._delete(entry)

    def _add(self, path: Path) -> None:
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            entry = Entry(
                path,
                str(info["identity"]),
                np.array(info["tokens"], np.int64),
                bool(info["trimmable"]),
                str(info["sha256"]),
                int(info["bytes"]),
                path.stat().st_mtime,
            )
            if entry.tensors.stat().st_size != entry.bytes:
                raise ValueError("its size is wrong")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            self.tell(f"{path.name} in the prompt cache is damaged: {brief(e)}")
            path.unlink(missing_ok=True)
            path.with_suffix(".safetensors").unlink(missing_ok=True)
            return
        with self.lock:
            self.entries[path] = entry

    def _evict(self) -> None:
        """Delete what is too old, then the least recently used until the rest fits."""
        total, now = 0, time.time()
        for entry in sorted(list(self.entries.values()), key=lambda e: -e.used):
            total += entry.bytes
            if total > self.most_bytes or now - entry.used > OLDEST:
                self._delete(entry)

    def _delete(self, entry: Entry) -> None:
        with self.lock:
            self.entries.pop(entry.path, None)
        entry.path.unlink(missing_ok=True)
        entry.tensors.unlink(missing_ok=True)


def _contiguous(value: Any) -> Any:
    return mx.contiguous(value) if isinstance(value, mx.array) else value
