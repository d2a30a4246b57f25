"""What mlx-lm's models are made of. The only file that knows the names of their parts.

Models are not told apart by name: FFNs are found by their projections, and then proven (proof.py).
"""

import math
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Optional, Sequence, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from . import linear
from .caches import parts

Item = TypeVar("Item")


class Layout(NamedTuple):
    """Names of an FFN's projections: gate and up, or both in one, or one without a gate; down."""

    inputs: tuple[str, ...]
    down: str


# The first that fits counts: gated ones stand before gateless ones.
LAYOUTS = [
    Layout(("gate_proj", "up_proj"), "down_proj"),
    Layout(("gate_up_proj",), "down_proj"),
    Layout(("w1", "w3"), "w2"),
    Layout(("w1", "v1"), "w2"),
    Layout(("w2", "w1"), "c_proj"),
    Layout(("c_fc_0", "c_fc_1"), "c_proj"),
    Layout(("mlp_gate", "mlp_linear"), "mlp_resid"),
    Layout(("input_linear",), "output_linear"),
    Layout(("proj_1",), "proj_2"),
    Layout(("up_proj",), "down_proj"),
    Layout(("c_fc",), "c_proj"),
    Layout(("fc1",), "fc2"),
    Layout(("fc_in",), "fc_out"),
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),
]
TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "k")


class Found(NamedTuple):
    """An FFN in a layer. experts: how many run per token; 0 where all tokens share one FFN."""

    layer: int
    module: nn.Module
    layout: Layout
    experts: int = 0


def model_type(model: nn.Module) -> str:
    """What the model's config calls it."""
    return str(getattr(model, "model_type", None) or type(model).__name__)


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that a prefill runs, the last of them up to its cache.

    mlx-lm evaluates only the caches after a chunk: what lies behind the last one is not run, such as
    the upper layers of Gemma 4, which read the caches of others.
    """
    layers = list(getattr(model, "layers", []))
    mixers = [i for i, x in enumerate(layers) if not _is_ffn_alone(x)]
    if not mixers:
        return []
    if len(mixers) == len(layers):
        return layers[: len(make_prompt_cache(model))]
    return layers[: mixers[-1] + 2]


def _is_ffn_alone(layer: Any) -> bool:
    """Layers without attention: Nemotron-H's FFNs have their own, Nemotron-NAS drops some."""
    if getattr(layer, "self_attn", layer) is None:
        return True
    return getattr(layer, "block_type", None) in ("-", "E")


def found_ffns(model: nn.Module) -> list[Found]:
    """Everything in a model's layers that looks like an FFN, in order."""
    return [f for i, x in enumerate(layers_of(model)) for f in _walk(x, i, ())]


def _walk(module: Any, layer: int, above: tuple[nn.Module, ...]) -> Iterator[Found]:
    """FFNs at or below a module. above: the modules around it, outermost first."""
    if isinstance(module, list):
        for child in module:
            yield from _walk(child, layer, above)
    if not isinstance(module, nn.Module):
        return
    if (layout := layout_of(module)) is not None:
        routed = linear.is_routed(module[layout.down])
        yield Found(layer, module, layout, _experts(above) if routed else 0)
        return
    for name, child in module.children().items():
        within = (*above, module)
        if isinstance(child, list) and name == "experts":  # one FFN each: some run
            for f in _walk(child[0], layer, within):
                yield f._replace(experts=_experts(within))
        else:
            yield from _walk(child, layer, within)


def layout_of(module: nn.Module) -> Optional[Layout]:
    """The names of a module's projections, or None where it is no FFN."""
    for layout in LAYOUTS:
        if all(
            isinstance(module.get(n), nn.Module) for n in (*layout.inputs, layout.down)
        ):
            return layout
    return None


def _experts(above: tuple[nn.Module, ...]) -> int:
    """Experts that run per token, as the routing module or its router has them."""
    for module in reversed(above):
        parts = [module, *module.children().values()]
        kept = [getattr(p, n, None) for p in parts for n in ("args", "config")]
        for holder in (*parts, *kept):
            for name in TOP_K:
                if isinstance(found := getattr(holder, name, None), int):
                    return found
    return 1


class Mixer(NamedTuple):
    """What a layer has besides its FFNs: weights, and whether it looks back at every token."""

    weights: int
    attends: bool


def mixers(model: nn.Module) -> list[Mixer]:
    """Of every layer that a prefill runs; linear attention does not look back."""
    layers, cache = layers_of(model), make_prompt_cache(model)
    counts = [sum(map(_weights, _matrices(x))) for x in layers]
    for f in found_ffns(model):
        counts[f.layer] -= sum(map(_weights, _matrices(f.module)))
    known = len(cache) == len(layers)
    looks = [any(hasattr(p, "offset") for p in parts([c])) for c in cache]
    return [Mixer(n, not known or looks[i]) for i, n in enumerate(counts)]


def _matrices(module: nn.Module) -> list[nn.Module]:
    """Projections at or below a module."""
    return [m for m in module.modules() if linear.is_matrix(m)]


def _weights(matrix: nn.Module) -> int:
    return math.prod(linear.shape(matrix))


def layer_attention(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer that has one by the usual name; LongCat's have two."""
    found = [getattr(layer, "self_attn", None) for layer in model.layers]
    every = [x for own in found for x in (own if isinstance(own, list) else [own])]
    return [module for module in every if module is not None]


def prefilled(layers: Sequence[Item]) -> Sequence[Item]:
    """The FFNs that a prefill runs: all but the last.

    mlx-lm evaluates only the caches after a chunk, and nothing of the last FFN is in them.
    """
    return layers[:-1]


def layer_norm_weights(model: nn.Module) -> list[mx.array]:
    """The first norm of every layer: float in every quantisation of a model.

    A model whose norms have no weights gives a zero.
    """
    norms = [w for layer in model.layers if (w := _norm(layer)) is not None]
    return norms or [mx.zeros(1)]


def _norm(layer: nn.Module) -> Optional[mx.array]:
    children: dict[str, Any] = layer.children()
    named = sorted(children, key=lambda n: n != "input_layernorm")
    for child in (children[n] for n in named if isinstance(children[n], nn.Module)):
        weight = child.get("weight")
        if weight is not None and weight.ndim == 1:
            return weight
    return None


def float_dtype(model: nn.Module) -> mx.Dtype:
    """What a model computes in, whatever its weights are packed in."""
    dtype: mx.Dtype = layer_norm_weights(model)[0].dtype
    return dtype


def _config(model: nn.Module) -> Any:
    """The settings of a model's text part, as its module keeps them, or as a dict."""
    text: Any = getattr(model, "language_model", model)
    args = getattr(text, "args", None) or getattr(text, "config", None)
    inner = getattr(args, "text_config", None)
    return args if inner is None else inner


def _setting(args: Any, *names: str) -> Optional[int]:
    """The first of these that is a whole number, or the most common of a list of them."""
    for name in names:
        found = args.get(name) if isinstance(args, dict) else getattr(args, name, None)
        if isinstance(found, list) and found:
            found = max(set(found), key=found.count)
        if isinstance(found, int) and found > 0:
            return found
    return None


@dataclass(frozen=True)
class Heads:
    """Sizes of a model's attention."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, model: nn.Module, hidden: int) -> "Heads":
        """Of a loaded model, multimodal or not; a guess where its config has other names."""
        args = _config(model)
        names = "num_attention_heads", "n_heads", "n_head", "num_heads"
        queries = _setting(args, *names) or max(1, hidden // 128)
        keys = _setting(args, "num_key_value_heads", "num_kv_heads") or queries
        return cls(queries, keys, _setting(args, "head_dim") or hidden // queries)


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model was made for, where its config says so."""
    args: Any = getattr(model, "args", None)
    length = _setting(args, "max_position_embeddings")
    return length or _setting(_config(model), "max_position_embeddings")


def kv_bytes(model: nn.Module, hidden: int, tokens: int) -> int:
    """Of keys and values: windows hold no more than theirs, linear attention holds none."""
    heads = Heads.of(model, hidden)
    held = [c for c in parts(make_prompt_cache(model)) if hasattr(c, "keys")]
    rows = sum(min(tokens, getattr(c, "max_size", tokens)) for c in held)
    return rows * 2 * heads.keys * heads.size * float_dtype(model).size
