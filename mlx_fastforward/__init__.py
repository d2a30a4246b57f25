"""mlx-fastforward: a shorter time to first token with mlx-lm, by FFN-sparse prefill."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapter import Adapter, AdapterError, load_adapter, save_adapter
    from .attachment import attach, detach
    from .config import ConfigError, FastForwardError, PrefillConfig
    from .families import UnsupportedModel
    from .generation import Response, stream_generate
    from .loading import load

# Loaded on first use: importing mlx-lm takes seconds that --help should not wait for.
_HOME = {
    "Adapter": "adapter",
    "AdapterError": "adapter",
    "ConfigError": "config",
    "FastForwardError": "config",
    "PrefillConfig": "config",
    "Response": "generation",
    "UnsupportedModel": "families",
    "attach": "attachment",
    "detach": "attachment",
    "load": "loading",
    "load_adapter": "adapter",
    "save_adapter": "adapter",
    "stream_generate": "generation",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # over the submodule of the same name
    return value
