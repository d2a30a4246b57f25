"""Random models in the shapes of real ones, for timings: weights do not change them."""

from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3

from ...model.families import float_dtype
from ...neurons.compensators import LowRankCompensator, LowRankWeights
from ...neurons.predictor import PredictorWeights
from ...predictors.base import BaseModel
from ...predictors.file import PredictorFile
from ...train.state import Settings

LLAMA_1B = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)
LLAMA_3B = LLAMA_1B | dict(
    hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
)
LLAMA_8B = LLAMA_1B | dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128
)
QWEN_4B = LLAMA_1B | dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128
)
SHAPES: dict[str, tuple[Any, dict[str, int]]] = {
    "llama-3.2-1b": (llama, LLAMA_1B),
    "llama-3.2-3b": (llama, LLAMA_3B),
    "llama-3.1-8b": (llama, LLAMA_8B),
    "qwen3-4b": (qwen3, QWEN_4B),
}


def random_model(
    name: str, layers: Optional[int], dtype: mx.Dtype, bits: int = 0
) -> nn.Module:
    """A randomly initialised model of a real shape, with a small vocabulary.

    Args:
        layers: Fewer than the real one has, for small machines.
        bits: Quantised as mlx_lm.convert does, in groups of 64; 0 is float.
    """
    module, shape = SHAPES[name]
    shape = shape | {"num_hidden_layers": layers or shape["num_hidden_layers"]}
    args = module.ModelArgs(
        model_type=module.__name__.rpartition(".")[2],
        rms_norm_eps=1e-5,
        vocab_size=4096,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        **shape,
    )
    model: nn.Module = module.Model(args)
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    model.eval()
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
