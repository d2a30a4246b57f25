"""mlx_fastforward doctor: what is installed, what this machine offers, what runs for a model and why."""

import warnings
from typing import Annotated, Any, Iterator, Optional

from rich.console import Console

from ..errors import UnsupportedModel
from . import options as o
from .errors import interruptible, one_line_errors
from .inputs import sparsity_of
from .models import checked_name, load_model, public_name
from .tables import labelled

Line = tuple[str, str]  # what, and what is so


def doctor(
    model: o.Model = None,
    sparsity: o.AutoSparsity = "auto",
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    tokens: Annotated[int, o.opt("Prompt length to reckon memory for.", min=1)] = 8192,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Show versions, device, memory, tuned choice and predictor, and what is off and why.

    Nothing is downloaded and no weights are read: paste it into an issue.

    Examples:

      mlx_fastforward doctor --model mlx-community/Llama-3.2-3B-Instruct-4bit
    """
    with one_line_errors(), interruptible():
        share, name = sparsity_of(sparsity), checked_name(model)
        console = Console(highlight=False)
        for label, said in [*_system(), *_own()]:
            labelled(label, said, console)
        if (place := _place(name)) is None:
            labelled(
                "model", f"{name}: not on this machine; chat downloads it", console
            )
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                net, _ = load_model(
                    model and place,
                    lazy=True,
                    sparsity=share,
                    selector=selector,
                    predictor=predictor,
                    trust_remote_code=trust_remote_code,
                )
            except UnsupportedModel as e:
                labelled("model", f"{public_name(model)}: off, {e}", console)
                return
        for label, said in _model(net, public_name(model), tokens):
            labelled(label, said, console)
        for w in caught:
            labelled("note", str(w.message), console)


def _place(name: str) -> Optional[str]:
    """Where a model can be opened without a download; None where it cannot."""
    from .. import hub

    if not hub.looks_like_a_repository(name):
        return name
    folder = hub.cached_folder(name, ["config.json", "*.safetensors"])
    if folder is None or not any(folder.glob("*.safetensors")):
        return None
    return str(folder)


def _system() -> Iterator[Line]:
    import platform
    from importlib.metadata import version

    import mlx.core as mx

    from ..bench import machine
    from ..version import __version__

    yield "versions", (
        f"mlx-fastforward {__version__}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, "
        f"Python {platform.python_version()}"
    )
    m = machine.machine()
    gpu = f", {m['gpu_cores']} GPU cores" if m["gpu_cores"] else ""
    yield "device", (
        f"{m['chip']}{gpu}, {m['cores']} cores, {m['memory_gb']:g} GB, {m['os']}"
    )
    if m["backend"] == "cpu":
        yield "gpu", f"off: mlx has none here and computes on the CPU, BLAS {m['blas']}"
    else:
        yield "gpu", m["backend"]
    yield "power", f"{m['power']}, thermal state {machine.thermal()}"
    yield "wired limit", _wired()
    backends = [b for b in ("ring", "jaccl", "mpi") if mx.distributed.is_available(b)]
    yield "several", (
        f"mlx.launch can use {', '.join(backends)}" if backends else "off: no backend"
    )


def _wired() -> str:
    """mlx-lm wires a model's memory while it generates, as far as macOS allows."""
    import platform

    import mlx.core as mx

    limit = mx.device_info().get("max_recommended_working_set_size")
    if not mx.metal.is_available() or not isinstance(limit, int):
        return "off: only Metal has one"
    if int(platform.mac_ver()[0].partition(".")[0] or 0) < 15:
        return "off: needs macOS 15"
    return f"{limit / 1e9:.1f} GB; sudo sysctl iogpu.wired_limit_mb=N raises it"


def _own() -> Iterator[Line]:
    """What earlier commands left."""
    from .. import tuned
    from ..predictors.search import home, own_folders

    yield "kept", (
        f"tuned choices in {tuned.file()}, {len(own_folders())} predictor files in {home()}"
    )


def _model(net: Any, name: str, tokens: int) -> Iterator[Line]:
    from ..attachment import engine_of
    from ..bench.speed.result import described

    engine = engine_of(net)
    assert engine is not None
    d = described(net, engine, name, False)
    yield "model", (
        f"{name}: {d['type']}, {d['layers']} layers, hidden {d['hidden_size']:,}, FFN "
        f"{d['ffn_size']:,}, {d['quantisation']}, {d['dtype']}"
    )
    yield "memory", _memory(net, engine, tokens)
    yield "predictor", _predictor(engine)
    device, said = _tuned(net, engine)
    yield "tuned", said
    yield "prefill", _prefill(engine.on(device))


def _memory(net: Any, engine: Any, tokens: int) -> str:
    """Weights, KV cache and what sparse prefill adds, against what there is."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..bench.machine import memory_gb
    from ..model.families import float_dtype, kv_bytes

    size, (d, f) = float_dtype(net).size, max(engine.shapes)
    arrays: Any = tree_flatten(net.parameters())
    weights = sum(a.nbytes for _, a in arrays)
    kv = kv_bytes(net, d, tokens)
    more = 2 * d * f * size if engine.sparse else 0  # gather.py: two float copies
    need = (weights + kv + more) / 1e9
    limit = mx.device_info().get("max_recommended_working_set_size")
    have = limit / 1e9 if isinstance(limit, int) else memory_gb()
    verdict = "fits" if need < 0.9 * have else "TOO LARGE, or close to it"
    return (
        f"weights {_gb(weights)}, KV cache of {tokens:,} tokens {_gb(kv)}, gathered "
        f"{_gb(more)}; {verdict}: {have:.1f} GB"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _predictor(engine: Any) -> str:
    if engine.predictor is None:
        return (
            f"none found; selector {engine.selector.name} needs none. Better: "
            "mlx_fastforward train"
        )
    s = engine.settings()
    return (
        f"{engine.predictor}; selector {s['selector']}, compensator {s['compensator']}"
    )


def _tuned(net: Any, engine: Any) -> tuple[Any, str]:
    """This device's settings for the engine, and where they come from."""
    from .. import tuned
    from .first_use import multiplied, worth_tuning

    device = tuned.remembered(tuned.key(engine, tuned.heads_of(net, engine)))
    if not any(engine.keep):
        return engine.device, "not needed: nothing runs sparsely"
    if device is None and not worth_tuning(engine):
        return engine.device, "not needed: the FFNs are too small to gain by it"
    if device is None:
        return engine.device, "not yet: the first chat, generate or tune measures it"
    unpacked = f"; {multiplied(device)}" if device.unpack else ""
    if device.dense:
        return (
            device,
            "dense: nothing was faster on this device; --no-tune runs sparsely"
            + unpacked,
        )
    queries = device.attention_block
    return device, (
        f"blocks of {device.block_size} tokens, {device.strategy}, attention "
        + (f"by {queries} queries" if queries else "whole")
        + unpacked
    )


def _prefill(engine: Any) -> str:
    """What a long prompt gets, and what stays dense."""
    why = f" ({engine.chosen})" if engine.chosen else ""
    if engine.device.dense:
        whose = "stock mlx-lm"
        if engine.device.unpack:
            whose = "float16" if engine.device.half else "dequantised"
        return f"{whose}: dense is the fastest here"
    if not engine.sparse:
        return f"stock mlx-lm: sparsity {engine.config.sparsity:g}{why}"
    dense = [i for i, keep in enumerate(engine.keep) if keep is None]
    return (
        f"{engine.config.sparsity:.0%} of FFN neurons dropped{why}, budgets "
        f"{engine.schedule}; dense: prompts below {engine.shortest:,} tokens, the first "
        f"{engine.edge} and last {engine.tail} tokens, decoding, layers "
        f"{', '.join(map(str, dense))}"
    )
