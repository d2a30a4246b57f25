"""Which model a predictor file is for: sizes, and a mark that all its quantisations share."""

import hashlib
from dataclasses import dataclass
from typing import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.families import layer_norm_weights
from ..model.proof import reach


@dataclass(frozen=True)
class BaseModel:
    """The model that a predictor is for. Name and type are for people, the rest is compared."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    ffn_size: int | list[int]  # one for all layers, or one per layer
    fingerprint: str

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> "BaseModel":
        """Describe a loaded model, lazily loaded or not; raises UnsupportedModel."""
        ffns = reach(model).ffns
        shapes = [ffn.shape for ffn in ffns]
        widths = [ffn.shape[1] * ffn.share[1] for ffn in ffns]  # of all processes
        same = widths[0] if len(set(widths)) == 1 else widths
        kind = str(getattr(model, "model_type", type(model).__name__))
        mark = fingerprint(layer_norm_weights(model))
        return cls(name, kind, len(shapes), shapes[0][0], same, mark)

    @property
    def widths(self) -> list[int]:
        """Neurons of every layer."""
        size = self.ffn_size
        return size if isinstance(size, list) else [size] * self.layers

    @property
    def widest(self) -> int:
        """Neurons of the widest layer."""
        return max(self.widths)

    def sizes(self) -> str:
        """Layers and widths in words."""
        least, most = min(self.widths), max(self.widths)
        ffn = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        return f"{self.layers} layers, hidden {self.hidden_size:,}, FFN {ffn}"


def fingerprint(norms: Sequence[mx.array]) -> str:
    """A hash of a model's norm weights, the same for every quantisation of the model.

    Norms stay float when a model is quantised; they are rounded to bf16, so all copies (fp32,
    fp16, bf16) of a model published in bf16 agree.
    """
    digest = hashlib.sha256()
    for i in sorted({0, len(norms) // 2, len(norms) - 1}):
        w = norms[i].astype(mx.bfloat16).astype(mx.float32)
        digest.update(np.array(w).tobytes())
    return digest.hexdigest()[:16]
