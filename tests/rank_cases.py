"""Run in each of several processes: the same prompt through a process's part of tiny models.

    python rank_cases.py FOLDER

Writes FOLDER/RANK.npz: logits by case, neurons by case and layer. tests/test_ranks.py compares.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np

from mlx_fastforward import ranks
from mlx_fastforward.attachment import attach
from mlx_fastforward.engine import Engine
from mlx_fastforward.predictors.file import load_predictor

IDS = models.token_ids(61)
# name: (architecture, bits, selector, compensator, strategy, every neuron kept)
CASES: dict[str, tuple[str, int, str, str, str, bool]] = {
    "dense": ("llama", 0, "", "", "chunk", False),
    "all kept": ("llama", 0, "probe", "none", "chunk", True),
    "all kept, bias": ("llama-bias-sliding", 0, "probe", "none", "columns", True),
    "all kept, 4 bits": ("qwen2", 4, "probe", "none", "chunk", True),
    "probe": ("llama", 0, "probe", "none", "chunk", False),
    "probe, stored": ("qwen3", 0, "probe", "none", "stored", False),
    "first-block": ("qwen2", 0, "first-block", "none", "chunk", False),
    "trained": ("llama", 0, "trained", "low-rank", "chunk", False),
    "trained, 8 bits": ("llama", 8, "trained", "mlp", "columns", False),
}


def made(name: str, bits: int) -> nn.Module:
    """Sizes that two and four processes can share, packed in groups of 32."""
    sizes = dict(num_attention_heads=4, num_key_value_heads=4, intermediate_size=256)
    model = models.tiny(name, hidden_size=128, **sizes)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def attached(model: nn.Module, case: str, folder: Path) -> Engine:
    """The engine of a case; a model that is in parts gets its part."""
    _, _, selector, compensator, strategy, everything = CASES[case]
    side = folder / compensator if selector == "trained" else None
    config = models.settings(selector=selector, compensator=compensator or "none")
    engine = attach(model, config, predictor=side and load_predictor(side))
    from mlx_fastforward.attachment import detach, seat
    from mlx_fastforward.config import DeviceSettings

    engine = engine.on(DeviceSettings(strategy=strategy))
    if everything:
        engine.keep = [k and ffn.shape[1] for k, ffn in zip(engine.keep, engine.ffns)]
    detach(model)
    seat(model, engine)
    return engine


def run(model: nn.Module, case: str, folder: Path) -> tuple[np.ndarray, list[Any]]:
    """Logits of the prompt, and the neurons that each layer kept (M, K)."""
    seen: list[Any] = []
    if CASES[case][2]:
        engine = attached(model, case, folder)
        choose = engine.choose

        def noted(layer: int, inputs: Any) -> mx.array:
            found = choose(layer, inputs)
            seen.append(np.array(found))
            return found

        engine.choose = noted  # type: ignore
    return models.prefill(model, IDS)[0], seen


def main(folder: Path) -> None:
    found = {}
    for case, (name, bits, *_) in CASES.items():
        model = made(name, bits)
        model.shard(ranks.group())
        logits, neurons = run(model, case, folder)
        found[case] = logits
        for layer, kept in enumerate(neurons):
            found[f"{case}/{layer}"] = kept
    np.savez(folder / f"{ranks.rank()}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
