"""What mlx-lm's architectures are made of. The only file that knows their names."""

from dataclasses import dataclass
from typing import Any, Callable, Sequence, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as mlx_lm_swiglu

from ..errors import UnsupportedModel

Item = TypeVar("Item")
Combine = Callable[[mx.array, mx.array], mx.array]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return mlx_lm_swiglu(gate, up)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * up


@dataclass(frozen=True)
class Family:
    """Attribute names of one architecture and how gate and up become the activation Z.

    With ``fused``, one projection named ``gate_up`` holds the gate's rows, then the up's.
    """

    examples: str
    combine: Combine = swiglu
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False
    gate_up: str = "gate_up_proj"
    mlp: str = "mlp"
    norm: str = "input_layernorm"


# Keys are module names in mlx_lm.models: mlx-lm maps several model types to one module.
FAMILIES = {
    "llama": Family("Llama 3.x, Mistral"),
    "qwen2": Family("Qwen 2, Qwen 2.5"),
    "qwen3": Family("Qwen 3 dense"),
    "gemma2": Family("Gemma 2", combine=geglu),
    "gemma3": Family("Gemma 3, multimodal checkpoints", combine=geglu),
    "gemma3_text": Family("Gemma 3, text", combine=geglu),
    "phi3": Family("Phi 3, Phi 4", fused=True),
}


def family_of(model: nn.Module) -> Family:
    """Look a loaded mlx-lm model up in the table; raises UnsupportedModel."""
    for cls in type(model).__mro__:
        package, _, name = cls.__module__.rpartition(".")
        if package == "mlx_lm.models" and name in FAMILIES:
            return FAMILIES[name]
    found = getattr(model, "model_type", None) or type(model).__name__
    supported = "; ".join(f"{k} ({f.examples})" for k, f in FAMILIES.items())
    raise UnsupportedModel(
        f"model type {found!r} is not supported; supported are: {supported}."
    )


def layer_mlps(model: nn.Module) -> list[nn.Module]:
    """The FFN module of every layer, in order; raises UnsupportedModel."""
    family = family_of(model)
    return [getattr(layer, family.mlp) for layer in model.layers]


def layer_attention(model: nn.Module) -> list[nn.Module]:
    """The attention module of every layer that has one by the usual name."""
    found = [getattr(layer, "self_attn", None) for layer in model.layers]
    return [module for module in found if module is not None]


def prefilled(layers: Sequence[Item]) -> Sequence[Item]:
    """The layers whose FFN a prefill runs: all but the last.

    mlx-lm evaluates only the KV caches after a chunk, and nothing of the last layer's FFN is in them.
    """
    return layers[:-1]


def layer_norm_weights(model: nn.Module) -> list[mx.array]:
    """The first norm of every layer: float in every quantisation of a model."""
    family = family_of(model)
    return [getattr(layer, family.norm).weight for layer in model.layers]


def float_dtype(model: nn.Module) -> mx.Dtype:
    """What a model computes in, whatever its weights are packed in."""
    dtype: mx.Dtype = layer_norm_weights(model)[0].dtype
    return dtype


@dataclass(frozen=True)
class Heads:
    """Sizes of a model's attention."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, model: nn.Module, hidden: int) -> "Heads":
        """Of a loaded model, multimodal or not."""
        text: Any = getattr(model, "language_model", model)
        args = text.args
        queries = args.num_attention_heads
        keys = getattr(args, "num_key_value_heads", None) or queries
        return cls(queries, keys, getattr(args, "head_dim", None) or hidden // queries)


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model was made for, where its config says so."""
    args: Any = getattr(model, "args", None)
    length = getattr(args, "max_position_embeddings", None)
    if length is None and isinstance(text := getattr(args, "text_config", None), dict):
        length = text.get("max_position_embeddings")
    return length if isinstance(length, int) else None
