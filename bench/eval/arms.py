"""What is compared: settings under a name."""

from dataclasses import asdict, dataclass
from typing import Any, Callable, Optional, Sequence

import mlx.nn as nn

from ...build import engine_for
from ...config import BLOCK_SIZE, DeviceSettings, PrefillConfig
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

    def settings(self, engine: Engine) -> dict[str, Any]:
        """What was asked for and what runs, for reports."""
        asked = {} if self.config is None else asdict(self.config)
        reading = {} if self.reader is None else self.reader.settings()
        return {"label": self.label, **asked, **engine.settings(), **reading}


DENSE = Arm("dense", None)


def labels_of(arms: Sequence[Arm]) -> list[str]:
    """Their labels; raises ConfigError where they do not tell the arms apart."""
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two arms are the same: {', '.join(labels)}; drop one.")
    return labels


def arms_of(
    model: nn.Module,
    configs: Sequence[PrefillConfig],
    predictor: Optional[PredictorFile],
    readers: Sequence[Optional[Speculative]] = (None,),
    tune: Optional[Callable[[Engine], DeviceSettings]] = None,
) -> list[Arm]:
    """Every setting with every reader, named by what runs; raises ConfigError for two of a name.

    Block sizes are named where they are not all the usual one.

    Args:
        tune: Tells this device's settings for an engine, for configs without a block size. Where
            dense is fastest the settings that were asked for are measured.
    """
    engines = []
    for config in configs:
        engine = engine_for(model, config, predictor)
        if config.block_size is None and tune is not None:
            device = tune(engine)
            engine = engine if device.dense else engine.on(device)
        engines.append(engine)
    asked = any(config.block_size for config in configs)
    usual = set() if asked else {BLOCK_SIZE}
    several = len({e.block_size for e in engines} | usual) > 1
    arms = [
        Arm(label(e, several, r), e.config, e.device, r)
        for e in engines
        for r in readers
    ]
    labels_of(arms)
    return arms


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
