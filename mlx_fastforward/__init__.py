"""mlx-fastforward: a shorter time to first token with mlx-lm, by FFN-sparse prefill."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .attachment import attach, detach
    from .config import DeviceSettings, PrefillConfig
    from .errors import ConfigError, FastForwardError, PredictorError, UnsupportedModel
    from .generation import Response, stream_generate
    from .loading import load
    from .predictors.file import PredictorFile, load_predictor, save_predictor
    from .tuning import tune

# Loaded on first use: importing mlx-lm takes seconds that --help should not wait for.
_HOME = {
    "ConfigError": "errors",
    "DeviceSettings": "config",
    "FastForwardError": "errors",
    "PredictorError": "errors",
    "PredictorFile": "predictors.file",
    "PrefillConfig": "config",
    "Response": "generation",
    "UnsupportedModel": "errors",
    "attach": "attachment",
    "detach": "attachment",
    "load": "loading",
    "load_predictor": "predictors.file",
    "save_predictor": "predictors.file",
    "stream_generate": "generation",
    "tune": "tuning",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # over the submodule of the same name
    return value
