"""What is compared: settings under a name."""

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import mlx.nn as nn

from ...build import engine_for
from ...config import DeviceSettings, PrefillConfig
from ...engine import Engine
from ...errors import ConfigError
from ...predictors.file import PredictorFile
from ...speculative import Speculative


@dataclass(frozen=True)
class Arm:
    """Settings under a name; without any it is the dense model.

    The settings alone say what of a predictor file is used: selector probe, compensator none and
    schedule uniform use nothing of it. With a reader the model reads only a part of each prompt.
    """

    label: str
    config: Optional[PrefillConfig]
    device: DeviceSettings = DeviceSettings()
    reader: Optional[Speculative] = None

    def engine(
        self, model: nn.Module, predictor: Optional[PredictorFile]
    ) -> Optional[Engine]:
        """What reads the prompts; raises ConfigError and PredictorError."""
        if self.config is None:
            return None
        return engine_for(model, self.config, predictor, device=self.device)

    @property
    def left_out(self) -> dict[str, Any]:
        """What it leaves out of a prompt, by the names of the flags."""
        config, reader = self.config or PrefillConfig(sparsity=0.0), self.reader
        return {
            "sparsity": config.sparsity,
            "prune_tokens": config.prune_tokens,
            "keep": 1.0 if reader is None else reader.config.keep,
            "prefill_draft": "" if reader is None else reader.scorer.name,
        }


DENSE = Arm("dense", None)


def labels_of(arms: Sequence[Arm]) -> list[str]:
    """Their labels; raises ConfigError where they do not tell the arms apart."""
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two arms are the same: {', '.join(labels)}; drop one.")
    return labels


def label(
    engine: Engine, block: bool = False, reader: Optional[Speculative] = None
) -> str:
    """What runs, whatever was asked for; with ``block`` the block size too."""
    parts, share = [engine.selector.name], engine.config.prune_tokens
    if engine.compensator is not None:
        parts += ["+", engine.compensator.name]
    parts.append(f"{100 * engine.config.sparsity:g}%")
    if not engine.config.sparsity and (share or reader is not None):
        parts = []
    if share:
        parts.append(f"tokens {100 * share:g}%")
    if reader is not None:
        parts.append(f"keep {100 * reader.config.keep:g}% by {reader.scorer.name}")
    if block:
        parts.append(f"block {engine.block_size}")
    return " ".join(parts)
