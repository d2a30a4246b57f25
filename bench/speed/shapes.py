"""Random models in the shapes of real ones, for timings: weights do not change them."""

import importlib
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn

from ...errors import ConfigError
from ...model.families import float_dtype
from ...neurons.compensators import LowRankCompensator, LowRankWeights
from ...neurons.predictor import PredictorWeights
from ...predictors.base import BaseModel
from ...predictors.file import PredictorFile
from ...train.state import Settings

Shape = dict[str, Any]


def _shape(
    model_type: str, layers: int, d: int, f: int, heads: int, keys: int, size: int
) -> Shape:
    """Settings by the names of mlx-lm's model files.

    Args:
        d, f: Width of the model and of its FFNs.
        heads, keys, size: Attention heads, those of keys and values, and the width of one.
    """
    return dict(
        model_type=model_type,
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=f,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
    )


QWEN_3_5 = dict(  # three quarters of the layers are linear attention
    full_attention_interval=4,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=0,
)
GEMMA_4 = dict(
    global_head_dim=512,
    sliding_window=1024,
    sliding_window_pattern=6,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
)
YARN = dict(
    rope_theta=1e6,
    type="yarn",
    factor=16.0,
    llama_4_scaling_beta=0.1,
    original_max_position_embeddings=16384,
)
GLM_4 = dict(partial_rotary_factor=0.5, attention_bias=True)
# By the published configs; what they have in common is in random_model.
SHAPES: dict[str, Shape] = {
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, 64),
    "llama-3.2-3b": _shape("llama", 28, 3072, 8192, 24, 8, 128),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, 128),
    "smollm2-135m": _shape("llama", 30, 576, 1536, 9, 3, 64),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, 32, 8, 128),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 3072, 16, 8, 128),
    "qwen3.5-4b": _shape("qwen3_5", 32, 2560, 9216, 16, 4, 256) | QWEN_3_5,
    "qwen3.5-9b": _shape("qwen3_5", 32, 4096, 12288, 16, 4, 256) | QWEN_3_5,
    "gemma-4-31b": _shape("gemma4_text", 60, 5376, 21504, 32, 16, 256) | GEMMA_4,
    "ministral-3-3b": _shape("ministral3", 26, 3072, 9216, 32, 8, 128)
    | dict(rope_parameters=YARN),
    "glm-4-9b": _shape("glm4", 40, 4096, 13696, 32, 2, 128) | GLM_4,
}


def random_model(
    name: str,
    layers: Optional[int],
    dtype: mx.Dtype,
    bits: int = 0,
    lazy: bool = False,
) -> nn.Module:
    """A randomly initialised model of a real shape, with a small vocabulary.

    Args:
        layers: Fewer than the real one has, for small machines.
        bits: Quantised as mlx_lm.convert does, in groups of 64; 0 is float.
        lazy: Without making the weights: for who only counts them.
    """
    shape = dict(
        rms_norm_eps=1e-5,
        vocab_size=4096,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    shape |= SHAPES[name]
    least = shape.get("full_attention_interval", 2)
    if layers is not None and layers < least:
        raise ConfigError(f"{name} needs at least {least} layers; got {layers}.")
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    module = importlib.import_module(f"mlx_lm.models.{shape['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(shape))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


def random_predictor(model: nn.Module) -> PredictorFile:
    """Predictors and a low-rank compensator of the sizes that `train` makes by default."""
    base = BaseModel.of(model, "random")
    d = base.hidden_size
    sizes, dtype = Settings().with_ranks(d), float_dtype(model)
    r, k = sizes.rank, sizes.compensator_rank + 1

    def random(*shape: int) -> mx.array:
        return (mx.random.normal(shape) * 0.02).astype(dtype)

    predictors, compensators = [], []
    for f in base.widths:
        w = PredictorWeights(None, random(d, r), random(2 * r, f), bias=random(f))
        predictors.append(w)
        parts = random(d), random(d, k - 1), random(f, k)
        compensators.append(LowRankWeights(*parts))
    compensator = LowRankCompensator(compensators)
    return PredictorFile(base, predictors, compensator, None, {}, "random")
