"""The bridge to mlx-lm: attach() makes a loaded model prefill sparsely, detach() undoes it.

Only classes are swapped: parameters, their paths and the modules stay the same objects, so LoRA,
quantisation, saving and deep copies work as before.
"""

import contextlib
import functools
from typing import Any, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn

from .adapter import Adapter, BaseModel
from .attention import attention_module, by_queries, replaced
from .compensators import Compensator
from .config import ConfigError, PrefillConfig
from .engine import Engine
from .families import family_of, layer_mlps
from .ffn import GatedFFN
from .schedule import layerwise, neurons_kept, uniform
from .selectors import FirstBlock, Oracle, Probe, Selector, Trained


class _Seat:
    """What an attached FFN module carries: its engine and its place in it."""

    def __init__(self, engine: Engine, layer: int):
        self.engine = engine
        self.layer = layer


def attach(
    model: nn.Module,
    config: Optional[PrefillConfig] = None,
    *,
    adapter: Optional[Adapter] = None,
    importances: Optional[Sequence[float]] = None,
) -> Engine:
    """Make a loaded mlx-lm model prefill sparsely, in place.

    Args:
        model: A model of a supported architecture; attached before, it gets the new settings.
        config: Defaults to ``PrefillConfig()``.
        adapter: Trained predictors, compensators and importances for this model.
        importances: s_l per layer for the layerwise schedule; the adapter's are the default.

    Raises:
        UnsupportedModel, ConfigError, AdapterError: before anything of the model is touched.
    """
    config = config or PrefillConfig()
    family = family_of(model)
    ffns = [GatedFFN(mlp, family, config.strategy) for mlp in layer_mlps(model, family)]
    if adapter is not None:
        adapter.check(BaseModel.of(model))
    engine = Engine(
        config,
        ffns,
        _budgets(config, ffns, adapter, importances),
        _selector(config, adapter),
        _compensator(config, adapter),
        adapter=adapter.source if adapter is not None else None,
    )
    engine.drop_unsupported()
    detach(model)
    seat(model, engine)
    return engine


def seat(model: nn.Module, engine: Engine) -> None:
    """Put an engine made by attach() (back) into its model after a detach()."""
    for i, ffn in enumerate(engine.ffns):
        ffn.mlp._fastforward = _Seat(engine, i)
        ffn.mlp.__class__ = _sparse_mlp(type(ffn.mlp))
    model._fastforward = engine
    model.__class__ = _sparse_model(type(model))


def detach(model: nn.Module) -> None:
    """Give an attached model its own classes back; does nothing to any other model."""
    engine = engine_of(model)
    if engine is None:
        return
    for module in [model, *(ffn.mlp for ffn in engine.ffns)]:
        module.__class__ = type(module).__bases__[0]
        del module.__dict__["_fastforward"]


def engine_of(model: nn.Module) -> Optional[Engine]:
    """The engine of an attached model, None for any other."""
    return model.__dict__.get("_fastforward")


@functools.cache
def _sparse_model(base: type) -> type:
    @functools.wraps(
        base.__call__
    )  # mlx-lm looks for input_embeddings in the signature
    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any):
        engine = self._fastforward
        tokens = kwargs.get("input_embeddings")
        if tokens is None:
            tokens = args[0] if args and args[0] is not None else inputs
        batch, new = tokens.shape[:2]
        engine.call = engine.begin(batch, new, cache, self.training)
        try:
            with _attention(self, engine):
                return base.__call__(self, inputs, cache, *args, **kwargs)
        finally:
            engine.call = None

    return type(f"Sparse{base.__name__}", (base,), {"__call__": call})


def _attention(model: nn.Module, engine: Engine) -> Any:
    """Attention by blocks of queries, during a sparse call that wants it."""
    rows = engine.config.attention_block
    if engine.call is None or not rows:
        return contextlib.nullcontext()
    return replaced(attention_module(model), lambda whole: by_queries(whole, rows))


@functools.cache
def _sparse_mlp(base: type) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        seat = self._fastforward
        engine = seat.engine
        if engine.call is None or engine.keep[seat.layer] is None:
            return base.__call__(self, x)
        return engine.forward(seat.layer, x)

    return type(f"Sparse{base.__name__}", (base,), {"__call__": call})


def _budgets(
    config: PrefillConfig,
    ffns: list[GatedFFN],
    adapter: Optional[Adapter],
    importances: Optional[Sequence[float]],
) -> list[Optional[int]]:
    """Neurons kept per layer, None for a dense layer. The last layer is always dense."""
    layers, neurons = len(ffns) - 1, ffns[0].shape[1]
    if importances is None and adapter is not None:
        importances = adapter.importances
    if config.schedule == "layerwise" and importances is None:
        raise ConfigError(
            "schedule layerwise needs importances, from an adapter or from attach(importances=); "
            "use schedule uniform or auto."
        )
    if config.sparsity == 0:
        return [None] * len(ffns)
    if importances is None or config.schedule == "uniform":
        budgets = uniform(layers, config.sparsity)
    elif len(importances) != len(ffns):
        raise ConfigError(
            f"expected one importance per layer ({len(ffns)}), got {len(importances)}."
        )
    else:
        budgets = layerwise(importances[:-1], config.sparsity)
    keep = neurons_kept(budgets, neurons)
    return [None if k == neurons else k for k in keep] + [None]


def _selector(config: PrefillConfig, adapter: Optional[Adapter]) -> Selector:
    name = config.selector
    predictors = adapter.predictors if adapter is not None else None
    if name == "auto":
        name = "trained" if predictors else "probe"
    if name == "trained":
        if not predictors:
            raise ConfigError(
                "selector trained needs an adapter with predictors; "
                "use selector probe, which needs no training."
            )
        return Trained(predictors)
    if name == "first-block":
        return FirstBlock(config.score)
    if name == "oracle":
        return Oracle(config.score)
    if config.sparse_decode:
        raise ConfigError(
            "sparse_decode needs the selector trained, first-block or oracle."
        )
    return Probe(config.score, config.probe_every)


def _compensator(
    config: PrefillConfig, adapter: Optional[Adapter]
) -> Optional[Compensator]:
    compensator = adapter.compensator if adapter is not None else None
    found = compensator.name if compensator is not None else "none"
    if config.compensator not in ("auto", "none", found):
        here = f"this one has {found}" if adapter is not None else "there is none"
        raise ConfigError(
            f"compensator {config.compensator} needs an adapter that has one, {here}; "
            "use compensator none or auto."
        )
    return None if config.compensator == "none" else compensator
