"""A result of `bench --save`: one self-contained JSON file, as results/schema.json describes it."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, Optional, Sequence

import mlx.nn as nn

from ...engine import Engine
from ...errors import FileProblem
from ...files import expanded
from ...model import linear
from ...model.families import float_dtype
from ...predictors.file import PredictorFile
from ...predictors.verified import combinations
from ...version import __version__
from .ttft import Arm, Row, arm_name

FORMAT, VERSION = "mlx-fastforward bench", 1


def result(
    model: dict[str, Any],
    machine: dict[str, Any],
    thermal: tuple[str, str],
    run: dict[str, Any],
    arms: Sequence[Arm],
    rows: Sequence[Row],
    predictor: Optional[PredictorFile] = None,
) -> dict[str, Any]:
    """The whole file.

    Args:
        model: described() of it.
        machine: As machine.machine() tells.
        thermal: Before the first run and after the last.
        run: Trials, seconds of rest, and whether the arms were tuned.
        arms: As they ran.
        predictor: Its verified table is the quality beside the speed.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine
        | {"thermal_before": thermal[0], "thermal_after": thermal[1]},
        "versions": {
            "mlx_fastforward": __version__,
            "mlx": version("mlx"),
            "mlx_lm": version("mlx-lm"),
            "python": python_version(),
        },
        "model": model,
        "run": run,
        "arms": [_arm(arm) for arm in arms],
        "rows": [asdict(row) for row in rows],
        "quality": quality(predictor),
    }


def described(model: nn.Module, engine: Engine, name: str, random: bool) -> dict:
    """A model in words and sizes; ``name`` is public already."""
    kinds = {linear.stored_as(m) for ffn in engine.ffns for m in ffn.projections()}
    return {
        "name": name,
        "random_weights": random,
        "type": str(getattr(model, "model_type", type(model).__name__)),
        "layers": len(engine.ffns),
        "hidden_size": max(d for d, _ in engine.shapes),
        "ffn_size": max(f for _, f in engine.shapes) * engine.ffns[0].share[1],
        "quantisation": ", ".join(sorted(kinds)),
        "dtype": str(float_dtype(model)).rpartition(".")[2],
    }


def _arm(arm: Arm) -> dict[str, Any]:
    """What ran, with the device's settings; where the predictor file lies is nobody's business."""
    settings = arm.engine.settings()
    settings["predictor"] = arm.engine.predictor is not None
    if arm.reader is not None:
        settings |= arm.reader.settings()
    return settings | {"device": asdict(arm.engine.device)}


LEFT_OUT = ("sparsity", "prune_tokens", "keep", "prefill_draft")


def quality(predictor: Optional[PredictorFile]) -> list[dict[str, Any]]:
    """What was measured of each combination."""
    names = (*LEFT_OUT, "kl", "facts", "facts_dense")
    details = {} if predictor is None else predictor.details
    return [{n: row[n] for n in names} for row in combinations(details)]


def quality_of(
    row: Row, measured: Sequence[dict[str, Any]]
) -> Optional[dict[str, Any]]:
    """What was measured at a row's settings; of neurons it holds for trained predictors only."""
    if row.sparsity and row.selector != "trained":
        return None
    for found in measured:
        same = {"prune_tokens": 0.0, "keep": 1.0, "prefill_draft": ""} | found
        if all(same[name] == getattr(row, name) for name in LEFT_OUT):
            return found
    return None


@dataclass(frozen=True)
class Result:
    """A file that was read, as far as a report needs it."""

    source: str
    created: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    model: dict[str, Any]
    run: dict[str, Any]
    rows: list[Row]
    quality: list[dict[str, Any]]

    @property
    def chip(self) -> str:
        """With the GPU's cores where they are known: one name stands for several."""
        cores = self.machine.get("gpu_cores")
        return (
            f"{self.machine['chip']}, {cores} GPU cores"
            if cores
            else self.machine["chip"]
        )

    @property
    def weights(self) -> str:
        """The model, how it is quantised, and what it computes in."""
        m = self.model
        shape = "shape of " if m["random_weights"] else ""
        return f"{shape}{m['name']}, {m['layers']} layers, {m['quantisation']}, {m['dtype']}"

    def quality_of(self, row: Row) -> Optional[dict[str, Any]]:
        """What eval --save measured at a row's settings."""
        return quality_of(row, self.quality)


def of_the_ideal(row: Row) -> Optional[float]:
    """Saved time as a share of what the ideal saves; None where it saves nothing."""
    if row.ideal_speedup <= 1:
        return None
    return (1 - 1 / row.speedup) / (1 - 1 / row.ideal_speedup)


def cells(r: Row, quality: Optional[dict[str, Any]]) -> dict[str, str]:
    """A row in words, by names that tables choose their columns from."""
    share, q = of_the_ideal(r), quality
    return {
        "context": f"{r.context:,}",
        "arm": arm_name(r),
        "TTFT": _seconds(r.ttft_s, r.ttft_spread_s),
        "stock TTFT": _seconds(r.stock_ttft_s, r.stock_ttft_spread_s),
        "speed-up": f"{r.speedup:.2f}",
        "ideal": f"{r.ideal_speedup:.2f}",
        "of the ideal": "" if share is None else f"{share:.0%}",
        "FFN": f"{r.ffn_share:.0%}",
        "GB": f"{r.peak_memory_gb:.2f}",
        "stock GB": f"{r.stock_peak_memory_gb:.2f}",
        "tok/s": f"{r.decode_tps:.1f}",
        "stock tok/s": f"{r.stock_decode_tps:.1f}",
        "KL": "" if q is None else f"{q['kl']:.4f}",
        "facts": "" if q is None else f"{q['facts']:.2f} of {q['facts_dense']:.2f}",
    }


def _seconds(median: float, spread: Sequence[float]) -> str:
    return f"{median:.2f} s ({spread[0]:.2f}-{spread[1]:.2f})"


def read(path: Path) -> Result:
    """A saved result; raises FileProblem where the file is none, or of another version."""
    try:
        found = json.loads(expanded(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileProblem(
            f"{path} does not exist; expected a file of bench --save."
        ) from None
    except OSError as e:
        raise FileProblem(f"{path} cannot be read: {e.strerror or e}.") from None
    except (ValueError, RecursionError):
        raise FileProblem(
            f"{path} is not JSON; expected a file of bench --save."
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileProblem(
            f"{path} is not a file of bench --save (bench --json is another)."
        )
    if found.get("version") != VERSION:
        raise FileProblem(
            f"{path} is of version {found.get('version')!r}, this reads {VERSION}: "
            "upgrade mlx-fastforward."
        )
    try:
        return _result(path.name, found)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise FileProblem(f"{path} is damaged: {type(e).__name__} {e}.") from None


def _result(source: str, found: dict[str, Any]) -> Result:
    names = [f.name for f in fields(Row) if f.default is MISSING]
    later = [f.name for f in fields(Row) if f.default is not MISSING]
    rows = [
        Row(**{n: r[n] for n in names}, **{n: r[n] for n in later if n in r})
        for r in found["rows"]
    ]
    if not rows or not all(r.ttft_s > 0 and r.stock_ttft_s > 0 for r in rows):
        raise ValueError("no rows with times")
    parts = {n: found[n] for n in ("created", "machine", "versions", "model", "run")}
    return Result(source, rows=rows, quality=list(found["quality"]), **parts)
