"""Recall of fitted predictors, and the KL of what they lead to, on text that was held out."""

from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..build import engine_for
from ..config import PrefillConfig
from ..continuation import continuation, divergence
from ..neurons.predictor import PredictorWeights
from ..predictors.file import PredictorFile
from .reconstruction import hits

TOKENS = 64  # compared after each prompt
SHORTEST = 512  # shorter prompts are hardly sparse
ARMS = {
    "oracle": ("oracle", "none"),
    "predictor": ("trained", "none"),
    "predictor and compensator": ("trained", "auto"),
}


def recall(
    predictors: Sequence[PredictorWeights], captured: list[tuple[Any, Any]]
) -> list[float]:
    """Share of the truly best half of the neurons that the predictors pick, per layer.

    Args:
        predictors: One per captured layer.
        captured: (x (layers, blocks, N, d), norms (layers, blocks, f)) per sequence, as of capture().
    """
    sums, blocks = mx.zeros((len(predictors),)), 0
    for x, norms in captured:
        found = []
        for layer, weights in enumerate(predictors):
            scores = weights(mx.array(x[layer]).astype(mx.float32))
            f = scores.shape[-1]
            truth = mx.array(norms[layer, :, :f]).astype(mx.float32)
            found.append(mx.sum(hits(scores, truth, f // 2)))
        sums, blocks = sums + mx.stack(found), blocks + x.shape[1]
        mx.eval(sums)
    shares: Any = (sums / max(1, blocks)).tolist()
    return shares


def drift(
    model: nn.Module,
    predictor: PredictorFile,
    sequences: Sequence[tuple[str, mx.array]],
    sparsity: float,
    block_size: int,
    tick: Callable[[int], None],
    late: Callable[[], bool],
) -> Optional[dict[str, Any]]:
    """KL and top-1 agreement with the dense model on the last tokens of (kind, ids) sequences.

    Per arm: "kl", "top1", and "kl_by_kind". None if no sequence is long enough. It stops early,
    after two sequences at least, once ``late()``.
    """
    long = [(kind, ids) for kind, ids in sequences if ids.size >= SHORTEST + TOKENS]
    arms = {a: c for a, c in ARMS.items() if c[1] == "none" or predictor.compensator}
    found: dict[str, list[tuple[str, float, float]]] = {arm: [] for arm in arms}
    for done, (kind, ids) in enumerate(long):
        if done >= 2 and late():
            break
        dense = continuation(model, ids, ids.size - TOKENS, None)
        for arm, (selector, compensator) in arms.items():
            config = PrefillConfig(
                sparsity, block_size, selector=selector, compensator=compensator
            )
            engine = engine_for(model, config, predictor)
            sparse = continuation(model, ids, ids.size - TOKENS, engine)
            found[arm].append((kind, *divergence(dense, sparse)))
        tick(done + 1)
    return {arm: _means(rows) for arm, rows in found.items()} if long else None


def _means(rows: list[tuple[str, float, float]]) -> dict[str, Any]:
    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 5)

    kinds = sorted({kind for kind, _, _ in rows})
    return {
        "kl": mean([kl for _, kl, _ in rows]),
        "top1": mean([top1 for _, _, top1 in rows]),
        "kl_by_kind": {
            k: mean([kl for kind, kl, _ in rows if kind == k]) for k in kinds
        },
        "prompts": len(rows),
    }
