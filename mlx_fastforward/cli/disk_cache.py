"""Prefixes on disk: the folder that chat and serve are given, and a conversation's way to it."""

from pathlib import Path
from typing import Any, Callable, Optional

from ..errors import ConfigError
from .errors import fail, one_process


def disk_cache(folder: Optional[Path], gb: float, *tell: Callable[[str], None]) -> Any:
    """The folder of --cache-dir, None without one."""
    from ..server.disk import DiskCache

    if not gb > 0:
        raise ConfigError(f"--cache-gb must be above 0, got {gb:g}.")
    if folder is None:
        return None
    one_process("--cache-dir")
    try:
        return DiskCache(folder, int(gb * 1e9), *tell)
    except OSError as e:
        fail(f"--cache-dir {folder}: {e.strerror or e}.")


class Shelf:
    """Where a Session looks for what was read on another day, and puts what it read."""

    def __init__(self, disk: Any):
        self.disk = disk
        self.model: Any = None  # whose marks these are
        self.marks = "", ""

    def find(self, session: Any, ids: list[int], more: int) -> Optional[tuple]:
        """(tokens, cache) that serve more than ``more`` of ``ids``, but not the last one."""
        from ..server.disk import WORTH

        own, dense = self._identities(session)
        while True:
            entry, n = self.disk.nearest({own, dense}, ids[:-1])
            if entry is None or n < more + WORTH:
                return None
            if (cache := self.disk.load(entry)) is not None:
                return entry.tokens.tolist(), cache

    def put(self, session: Any) -> None:
        """Write what a conversation's cache holds, in the background."""
        own, _ = self._identities(session)
        self.disk.save(own, session.cached, session.cache)

    def _identities(self, session: Any) -> tuple[str, str]:
        """What a prefix is that the session reads now, and a dense one, which serves as well."""
        import mlx.core as mx

        from ..attachment import engine_of
        from ..cachefile import fingerprint
        from ..saved import how_read
        from ..server.disk import identity

        model, engine = session.model, engine_of(session.model)
        if model is not self.model:
            weights = [engine.selector, engine.compensator] if engine else []
            layers = [w for part in weights for w in getattr(part, "layers", [])]
            arrays = [a for w in layers for a in vars(w).values()]
            trained = [a for a in arrays if isinstance(a, mx.array)]
            self.marks = fingerprint(model), fingerprint(model, trained)
            self.model = model
        size, how = {"max_kv_size": session.max_kv_size}, how_read(session)
        dense = identity(self.marks[0], size)
        return identity(self.marks[1], size | how) if how else dense, dense
