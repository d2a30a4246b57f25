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

LLAMA_1B: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)
LLAMA_8B = LLAMA_1B | dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128
)
QWEN_3_5 = dict(  # three quarters of the layers are linear attention
    model_type="qwen3_5",
    num_hidden_layers=32,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=256,
    full_attention_interval=4,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=0,
)
# By the published configs; what they have in common is in random_model.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA_1B,
    "llama-3.2-3b": LLAMA_1B
    | dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
    ),
    "llama-3.1-8b": LLAMA_8B,
    "smollm2-135m": LLAMA_1B
    | dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "qwen3-4b": LLAMA_8B
    | dict(
        model_type="qwen3",
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
    ),
    "qwen3-0.6b": LLAMA_8B
    | dict(
        model_type="qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
    ),
    "qwen3.5-4b": QWEN_3_5 | dict(hidden_size=2560, intermediate_size=9216),
    "qwen3.5-9b": QWEN_3_5 | dict(hidden_size=4096, intermediate_size=12288),
    "gemma-4-31b": dict(
        model_type="gemma4_text",
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=256,
        global_head_dim=512,
        sliding_window=1024,
        sliding_window_pattern=6,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
    ),
    "ministral-3-3b": dict(
        model_type="ministral3",
        hidden_size=3072,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters=dict(
            rope_theta=1e6,
            type="yarn",
            factor=16.0,
            llama_4_scaling_beta=0.1,
            original_max_position_embeddings=16384,
        ),
    ),
    "glm-4-9b": dict(
        model_type="glm4",
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        partial_rotary_factor=0.5,
        attention_bias=True,
    ),
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
