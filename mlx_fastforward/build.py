"""Settings, a loaded model and perhaps a predictor file make an engine; the model stays as it is."""

from typing import Optional, Sequence

import mlx.nn as nn

from .config import DeviceSettings, PrefillConfig
from .engine import Engine
from .errors import ConfigError
from .model.families import prefilled
from .model.ffn import GatedFFN
from .model.proof import Reach, reach
from .neurons.compensators import Compensator
from .neurons.schedule import first_dense, layerwise, measured, neurons_kept, uniform
from .neurons.selectors import FirstBlock, Oracle, Probe, Selector, Trained
from .predictors.base import BaseModel
from .predictors.file import PredictorFile


def engine_for(
    model: nn.Module,
    config: Optional[PrefillConfig] = None,
    predictor: Optional[PredictorFile] = None,
    importances: Optional[Sequence[float]] = None,
    device: DeviceSettings = DeviceSettings(),
) -> Engine:
    """The engine that attach() gives a model.

    Args:
        model: A model of a supported architecture, attached or not.
        config: Defaults to ``PrefillConfig()``.
        predictor: Trained predictors, compensators and importances for this model.
        importances: s_l per layer for the layerwise schedule; the predictor's are the default.
        device: What tuning found.

    Raises:
        UnsupportedModel, ConfigError, PredictorError.
    """
    found = reach(model)
    if predictor is not None:
        predictor.check(BaseModel.of(model))
    how = (device.strategy, device.unpack, device.half)
    found = found._replace(ffns=[ffn.under(*how) for ffn in found.ffns])
    return _built(found, config or PrefillConfig(), predictor, importances, device)


def with_config(
    engine: Engine, config: PrefillConfig, predictor: Optional[PredictorFile]
) -> Engine:
    """A model's engine under another config.

    Args:
        predictor: The predictor file that the engine was made with.
    """
    found = Reach(engine.ffns, engine.share, engine.left_dense)
    return _built(found, config, predictor, None, engine.device)


def _built(
    found: Reach,
    config: PrefillConfig,
    predictor: Optional[PredictorFile],
    importances: Optional[Sequence[float]],
    device: DeviceSettings,
) -> Engine:
    ffns = found.ffns
    if predictor is not None:
        predictor = predictor.part(*ffns[0].share)
    given = importances is not None
    if importances is None and predictor is not None:
        importances = predictor.importances
    schedule = _schedule(config, predictor, importances, given)
    engine = Engine(
        config,
        ffns,
        _budgets(config, schedule, ffns, predictor, importances),
        _selector(config, predictor),
        _compensator(config, predictor),
        predictor=predictor.source if predictor is not None else None,
        device=device,
        schedule=schedule,
        share=found.share,
        left_dense=found.odd,
        readout=None if predictor is None else predictor.readout,
    )
    engine.drop_unsupported()
    return engine


def _schedule(
    config: PrefillConfig,
    predictor: Optional[PredictorFile],
    importances: Optional[Sequence[float]],
    given: bool,
) -> str:
    """What "auto" means here; raises ConfigError where a schedule lacks what it needs.

    Args:
        given: The importances were handed over, to be used.
    """
    curves = None if predictor is None else predictor.curves
    if config.schedule == "measured" and curves is None:
        raise ConfigError(
            "schedule measured needs a predictor file with curves, as train and eval --save "
            "measure them; use schedule auto, first-dense or uniform."
        )
    if config.schedule == "layerwise" and importances is None:
        raise ConfigError(
            "schedule layerwise needs importances, from a predictor file or from "
            "attach(importances=); use schedule auto, first-dense or uniform."
        )
    if config.schedule != "auto":
        return config.schedule
    if given:
        return "layerwise"
    return "first-dense" if curves is None else "measured"


def _budgets(
    config: PrefillConfig,
    schedule: str,
    ffns: list[GatedFFN],
    predictor: Optional[PredictorFile],
    importances: Optional[Sequence[float]],
) -> list[Optional[int]]:
    """Neurons kept per layer, None for a dense layer. The last layer is always dense."""
    widths = [ffn.shape[1] for ffn in prefilled(ffns)]
    if importances is not None and len(importances) != len(ffns):
        raise ConfigError(
            f"expected one importance per layer ({len(ffns)}), got {len(importances)}."
        )
    if config.sparsity == 0:
        return [None] * len(ffns)
    if schedule == "measured":
        assert predictor is not None and predictor.curves is not None
        budgets = measured(predictor.curves, widths, config.sparsity)
    elif schedule == "layerwise":
        assert importances is not None
        budgets = layerwise(prefilled(importances), config.sparsity)
    else:
        shares = {"uniform": uniform, "first-dense": first_dense}[schedule]
        budgets = shares(len(widths), config.sparsity)
    return [*map(neurons_kept, budgets, widths), None]


def _selector(config: PrefillConfig, predictor: Optional[PredictorFile]) -> Selector:
    name = config.selector
    trained = predictor.layers if predictor is not None else None
    if name == "auto":
        name = "trained" if trained else "probe"
    if name == "trained":
        if not trained:
            raise ConfigError(
                "selector trained needs a predictor file with predictors; "
                "use selector probe, which needs no training."
            )
        return Trained(trained)
    if name == "probe" and config.sparse_decode:
        raise ConfigError(
            "sparse_decode needs the selector trained, first-block or oracle."
        )
    known: dict[str, type[Selector]] = {
        kind.name: kind for kind in (Probe, FirstBlock, Oracle)
    }
    return known[name]()


def _compensator(
    config: PrefillConfig, predictor: Optional[PredictorFile]
) -> Optional[Compensator]:
    compensator = predictor.compensator if predictor is not None else None
    found = compensator.name if compensator is not None else "none"
    if config.compensator not in ("auto", "none", found):
        here = f"this one has {found}" if predictor is not None else "there is none"
        raise ConfigError(
            f"compensator {config.compensator} needs a predictor file that has one, {here}; "
            "use compensator none or auto."
        )
    return None if config.compensator == "none" else compensator
