"""What tuning found on this device, remembered from one process to the next."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn

from . import ranks
from .config import DeviceSettings
from .engine import Engine
from .files import write_text
from .model import linear
from .model.families import Heads
from .predictors.search import home
from .tokens.flops import dense_ffn, overhead
from .tokens.plan import Plan
from .tokens.split import TokenSplit
from .version import __version__


def as_tuned(model: nn.Module, engine: Engine) -> Engine:
    """A model's engine under an earlier choice for this device; as it is without one."""
    given = engine.config.block_size is not None
    if given or not any(engine.keep) or ranks.several():  # files may differ there
        return engine
    device = remembered(key(engine, heads_of(model, engine)))
    return engine if device is None else engine.on(device)


def heads_of(model: nn.Module, engine: Engine) -> Heads:
    """Of an engine's model."""
    return Heads.of(model, max(engine.shapes)[0])


def key(engine: Engine, heads: Heads) -> str:
    """What a choice depends on: device, system, versions, shapes, quantisation, settings."""
    layer = sparse_layer(engine)
    ffn = engine.ffns[layer]
    settings = engine.settings()
    parts = [
        device_name(),
        f"{platform.system()} {platform.release()}",
        f"mlx {version('mlx')}",
        __version__,
        "x".join(map(str, ffn.shape)),
        f"{heads.queries}/{heads.keys} heads of {heads.size}",
        " ".join(sorted({linear.stored_as(m) for m in ffn.projections()})),
        str(linear.dtype(ffn.down)).removeprefix("mlx.core."),
        f"{engine.config.sparsity:g}",
        settings["selector"],
        settings["compensator"],
        f"{_overhead(engine, layer):.3f}",
    ]
    return ", ".join(parts)


def _overhead(engine: Engine, layer: int) -> float:
    """FLOPs of selection and compensation, of the dense FFN's: tells ranks apart."""
    plan = Plan(head=128, blocks=1, block_size=128, tail=128)
    split, (d, f) = TokenSplit(plan, engine.selector.probe_every), engine.shapes[layer]
    parts = (f // 2, engine.selector, engine.compensator)
    return overhead(split, layer, d, f, *parts) / dense_ffn(128, d, f)


def sparse_layer(engine: Engine) -> int:
    """One that runs sparsely, from the middle; the first if none does."""
    layers = [i for i, keep in enumerate(engine.keep) if keep]
    return layers[len(layers) // 2] if layers else 0


def device_name() -> str:
    """Name of the default device."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU {platform.machine()}"


def file() -> Path:
    return home().parent / "tuned.json"


def _known() -> dict[str, Any]:
    try:
        known = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remembered(key: str) -> Optional[DeviceSettings]:
    """An earlier choice, or None; a damaged file is none."""
    try:
        return DeviceSettings(**_known()[key])
    except (KeyError, TypeError, ValueError):
        return None


def remember(key: str, device: DeviceSettings) -> None:
    """Keep a choice; a folder that cannot be written to is no reason to stop."""
    known = _known() | {key: asdict(device)}
    try:
        write_text(file(), json.dumps(known, indent=2) + "\n")
    except OSError:
        pass
