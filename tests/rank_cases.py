"""Run in each of several processes: models in parts, and commands. tests/test_ranks.py compares.

FOLDER/plan.json says what. Writes FOLDER/RANK.npz: logits by case, neurons by case and layer; and
FOLDER/RANK.json: (exit code, stdout, stderr) of every command. The last commands are not captured.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np

from mlx_fastforward import ranks
from mlx_fastforward.attachment import attach, detach, seat
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.cli import app
from mlx_fastforward.config import DeviceSettings
from mlx_fastforward.engine import Engine
from mlx_fastforward.loading import take_stage
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
# name: (architecture, bits), dealt out by layers
STAGES = {"qwen2": 0, "qwen2, 4 bits": 4, "qwen3_5": 0, "deepseek_v2": 0}


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
    engine = engine.on(DeviceSettings(strategy=strategy))
    if everything:
        engine.keep = [k and ffn.shape[1] for k, ffn in zip(engine.keep, engine.ffns)]
    detach(model)
    seat(model, engine)
    return engine


def staged(name: str) -> tuple[nn.Module, Engine]:
    """A model that can be dealt out by layers, attached whole."""
    kind, bits = name.partition(",")[0], STAGES[name]
    mx.random.seed(0)  # the zoo leaves some weights as mlx-lm begins them
    model = made(kind, bits) if kind in models.NAMES else zoo.tiny(kind)
    return model, attach(model, models.settings())


def noted(engine: Engine) -> dict[int, np.ndarray]:
    """The neurons (M, K) that each layer will keep, by layer."""
    seen, choose = {}, engine.choose

    def choosing(layer: int, inputs: Any) -> mx.array:
        found = choose(layer, inputs)
        seen[layer] = np.array(found)
        return found

    engine.choose = choosing  # type: ignore
    return seen


def results(plan: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Logits and neurons of all models of the plan."""
    found = {}
    for case in (*plan["cases"], *plan["stages"]):
        seen: dict[int, np.ndarray] = {}
        if case in STAGES:
            model, engine = staged(case)
            take_stage(model)
            seen = noted(engine)
        else:
            model = made(*CASES[case][:2])
            model.shard(ranks.group())
            if CASES[case][2]:
                seen = noted(attached(model, case, folder))
        found[case] = models.prefill(model, IDS)[0]
        found |= {f"{case}/{layer}": kept for layer, kept in seen.items()}
    return found


def said(args: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app(args, "mlx_fastforward", standalone_mode=False)
    return code or 0, out.getvalue(), err.getvalue()


def main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    np.savez(folder / f"{ranks.rank()}.npz", **results(plan, folder))
    commands = [said(args) for args in plan["commands"]]
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(commands))
    *before, last = plan["last"]
    for args in before:
        out, err = sys.stdout, sys.stderr
        app(args, "mlx_fastforward", standalone_mode=False)
        sys.stdout, sys.stderr = out, err
    app(last, "mlx_fastforward")
