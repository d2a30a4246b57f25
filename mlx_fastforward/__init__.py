"""mlx-fastforward: a shorter time to first token with mlx-lm, by FFN-sparse prefill."""

from .version import __version__

from .attach import attach, detach
from .config import PrefillConfig
