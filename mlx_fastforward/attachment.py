"""The bridge to mlx-lm, and the only file that swaps classes or names of it.

attach() makes a loaded model prefill sparsely, detach() undoes it, watched() looks on. Only classes
of this model's own modules are swapped: parameters, their paths and the modules stay the same
objects, so LoRA, quantisation, saving and deep copies work as before, and two models of one
architecture do not see each other.
"""

import contextlib
import functools
import inspect
import types
import warnings
from typing import Any, Callable, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn

from .build import engine_for
from .config import DeviceSettings, PrefillConfig
from .engine import Call, Engine, Prompt
from .errors import check_kind
from .model.attention import NAME, Attention, by_queries
from .model.families import layer_attention
from .predictors.file import PredictorFile
from .tuned import as_tuned


class Attached:
    """What an attached model carries, and shares with its FFNs: its engine and what is going on."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.enabled = True
        self.prompt: Optional[Prompt] = None
        self.call: Optional[Call] = None


class _Seat:
    """What a module of an attached model carries: the model's part, and its layer."""

    def __init__(self, attached: Attached, layer: int):
        self.attached = attached
        self.layer = layer


def attach(
    model: nn.Module,
    config: Optional[PrefillConfig] = None,
    *,
    predictor: Optional[PredictorFile] = None,
    importances: Optional[Sequence[float]] = None,
    device: Optional[DeviceSettings] = None,
) -> Engine:
    """Make a loaded mlx-lm model prefill sparsely, in place.

    Args are those of engine_for(); a model that was attached before gets the new settings. Without
    ``device`` and a block size it runs as this device was tuned for it, if it was.

    Raises:
        UnsupportedModel, ConfigError, PredictorError: before anything of the model is touched.
    """
    check_model(model)
    if config is not None:
        wanted = "a PrefillConfig, e.g. PrefillConfig(sparsity=0.5)"
        check_kind("config", config, (PrefillConfig,), wanted)
    if predictor is not None:
        wanted = "a PredictorFile, as load_predictor(folder) returns it"
        check_kind("predictor", predictor, (PredictorFile,), wanted)
    settings = device or DeviceSettings()
    engine = engine_for(model, config, predictor, importances, settings)
    if device is None:
        engine = as_tuned(model, engine)
    if engine.left_dense is not None:
        warnings.warn(f"{engine.left_dense}; they stay dense.")
    detach(model)
    seat(model, engine)
    return engine


def seat(model: nn.Module, engine: Engine) -> None:
    """Put an engine of this model (back) into it, after a detach()."""
    model._fastforward = attached = Attached(engine)
    model.__class__ = _sparse_model(type(model))
    for i, ffn in enumerate(engine.ffns):
        _sit(ffn.mlp, _Seat(attached, i), _sparse_mlp)
    if engine.device.attention_block:
        for i, module in enumerate(layer_attention(model)):
            _sit(module, _Seat(attached, i), _blocked_attention)


def _sit(module: nn.Module, seat: _Seat, subclass: Callable[[type], type]) -> None:
    module._fastforward = seat
    module.__class__ = subclass(type(module))


def check_model(model: nn.Module) -> None:
    wanted = "a model as mlx_lm.load returns it: model, tokenizer = mlx_lm.load(...)"
    check_kind("model", model, (nn.Module,), wanted)


def detach(model: nn.Module) -> None:
    """Give an attached model its own classes back; does nothing to any other model."""
    check_model(model)
    if (engine := engine_of(model)) is None:
        return
    mlps = [ffn.mlp for ffn in engine.ffns]
    for module in [model, *mlps, *layer_attention(model)]:
        if "_fastforward" in module.__dict__:
            module.__class__ = type(module).__bases__[0]
            del module.__dict__["_fastforward"]


def _attached(model: nn.Module) -> Optional[Attached]:
    return model.__dict__.get("_fastforward")


def engine_of(model: nn.Module) -> Optional[Engine]:
    """The engine of an attached model, None for any other."""
    attached = _attached(model)
    return None if attached is None else attached.engine


def is_enabled(model: nn.Module) -> bool:
    """Whether an attached model runs sparsely at present."""
    attached = _attached(model)
    return attached is not None and attached.enabled


@contextlib.contextmanager
def seated(model: nn.Module, engine: Optional[Engine]) -> Iterator[None]:
    """A detached model with an engine in it for a while; None leaves it stock."""
    if engine is not None:
        seat(model, engine)
    try:
        yield
    finally:
        detach(model)


@contextlib.contextmanager
def switched(model: nn.Module, sparse: bool) -> Iterator[None]:
    """Run an attached model sparse, or as stock mlx-lm would."""
    before = is_enabled(model)
    switch(model, sparse)
    try:
        yield
    finally:
        switch(model, before)


def switch(model: nn.Module, sparse: bool) -> None:
    """The same for good; nothing happens to a model that is not attached."""
    if (attached := _attached(model)) is not None:
        attached.enabled = sparse


@contextlib.contextmanager
def reading(model: nn.Module, tokens: int) -> Iterator[Prompt]:
    """The calls in here read one prompt of ``tokens`` tokens, and its FLOPs are counted.

    A call in between that is no part of it, another request's decode step, belongs in a
    ``reading(model, 0)`` of its own.
    The prompt of a model that is not attached counts nothing.
    """
    attached = _attached(model)
    if attached is None:
        yield Prompt(None)
        return
    prompt = attached.engine.prompt(tokens)
    with resumed(model, attached.engine, prompt):
        yield prompt


@contextlib.contextmanager
def resumed(
    model: nn.Module, engine: Engine, prompt: Optional[Prompt]
) -> Iterator[None]:
    """Go on with a prompt of an attached model, under any engine of this model."""
    attached = _attached(model)
    assert attached is not None
    before = attached.engine, attached.prompt
    attached.engine, attached.prompt = engine, prompt
    try:
        yield
    finally:
        attached.engine, attached.prompt = before


@functools.cache
def _sparse_model(base: type) -> type:
    names = list(inspect.signature(base.__call__).parameters)[1:]

    # mlx-lm looks for input_embeddings in the signature
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self._fastforward
        if attached.enabled and not self.training:
            given = dict(zip(names, args)) | kwargs
            tokens = given.get("input_embeddings")
            batch, new = (given[names[0]] if tokens is None else tokens).shape[:2]
            engine, prompt = attached.engine, attached.prompt
            attached.call = engine.begin(prompt, batch, new, given.get("cache"))
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            attached.call = None

    return type(f"Sparse{base.__name__}", (base,), {"__call__": call})


@functools.cache
def _sparse_mlp(base: type) -> type:
    def run(self: Any, x: mx.array) -> mx.array:
        attached, layer = self._fastforward.attached, self._fastforward.layer
        call, shape, d = attached.call, x.shape, x.shape[-1]
        ffn = attached.engine.ffns[layer]
        if call is None or not attached.engine.thins(layer):
            stock = not attached.enabled or self.training
            if stock or x.ndim != 3 or not ffn.unpacks(x.shape[1]):
                return base.__call__(self, x)
            return ffn.finite(x.shape[1], lambda: ffn.activations_and_output(x)[1])
        rows, odd = divmod(x.size // d, call.split.plan.tokens)
        if odd:  # not the tokens of the call
            return base.__call__(self, x)
        x = x.reshape(rows, -1, d)  # experts' modules join rows and tokens
        run = lambda: attached.engine.forward(call, layer, x)
        return ffn.finite(x.shape[1], run).reshape(shape)

    return type(f"Sparse{base.__name__}", (base,), {"__call__": run})


@functools.cache
def _blocked_attention(base: type) -> type:
    """Attention by blocks of queries, during a sparse call."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self._fastforward.attached
        own: Any = base.__call__
        if attached.call is not None:
            rows = attached.engine.device.attention_block
            own = _by_queries(base, rows) or own
        return own(self, *args, **kwargs)

    return type(f"Blocked{base.__name__}", (base,), {"__call__": call})


@functools.cache
def _by_queries(base: type, rows: int) -> Optional[Callable[..., Any]]:
    return with_attention(base, lambda original: by_queries(original, rows))


def with_attention(
    base: type, replacement: Callable[[Attention], Attention]
) -> Optional[Callable[..., Any]]:
    """A class's ``__call__`` with ``replacement(original)`` in its attention function's place.

    Every file of mlx-lm calls attention by the same name: the method is copied with other globals,
    so queries and keys arrive after RoPE and norms, and no other module sees the change. None where
    the method spells attention out (Gemma 2).
    """
    own: Any = base.__call__
    if not isinstance(own, types.FunctionType) or NAME not in own.__code__.co_names:
        return None
    names = {**own.__globals__, NAME: replacement(own.__globals__[NAME])}
    copy = types.FunctionType(
        own.__code__, names, own.__name__, own.__defaults__, own.__closure__
    )
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


@contextlib.contextmanager
def watched(
    modules: Sequence[nn.Module], around: Callable[..., mx.array]
) -> Iterator[None]:
    """Call ``around(i, own, ...)`` in the place of each module's own call.

    An attached module goes on doing what it does.
    """
    classes = [type(m) for m in modules]

    def stand_in(i: int, own: Any) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
            return around(i, functools.partial(own.__call__, self), *args, **kwargs)

        return type(f"Watched{own.__name__}", (own,), {"__call__": call})

    try:
        for i, (module, own) in enumerate(zip(modules, classes)):
            module.__class__ = stand_in(i, own)
        yield
    finally:
        for module, own in zip(modules, classes):
            module.__class__ = own


@contextlib.contextmanager
def watched_attention(
    model: nn.Module, around: Callable[..., mx.array]
) -> Iterator[bool]:
    """Call ``around(layer, original, queries, keys, values, ...)`` where layers call attention.

    Yields whether every layer of this model can be watched.
    """
    modules = layer_attention(model)
    calls = [
        with_attention(
            type(m),
            lambda original, i=i: functools.partial(around, i, original),  # type: ignore
        )
        for i, m in enumerate(modules)
    ]
    if len(modules) != len(model.layers) or None in calls:
        yield False
        return

    def through(i: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        call: Any = calls[i]
        return call(modules[i], *args, **kwargs)

    with watched(modules, through):
        yield True
