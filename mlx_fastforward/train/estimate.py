"""What a run will take: said before it starts."""

import shutil
import time
from pathlib import Path

import mlx.core as mx

from ..errors import PredictorError
from ..predictors.base import BaseModel
from ..predictors.file import MLP
from .capture import capture
from .curves import trials
from .low_rank import SOLVED_AT_ONCE, fit_low_rank
from .reconstruction import marked
from .run import CAPTURE, FIT_TOKENS, PREDICTORS, Run
from .state import HELD_OUT, Settings
from .store import BLOCKS

# Fitted on less, predictors are hardly better than none.
LEAST_TOKENS, LEAST_STEPS = 16_384, 200
DISK = 16e9  # bytes that a run takes unless it is told otherwise
MOST_TOKENS = 400_000
MLP_PASSES = 5


def bytes_per_token(base: BaseModel, block: int) -> float:
    """On disk: every layer's input, and its block's share of the norms, in float16."""
    return 2.0 * (base.layers - 1) * (base.hidden_size + base.widest / block)


def default_tokens(base: BaseModel) -> int:
    return int(min(MOST_TOKENS, DISK / bytes_per_token(base, Settings.block_size)))


def disk(base: BaseModel, settings: Settings) -> float:
    """Bytes on disk while it runs."""
    tokens = settings.tokens + settings.held_out
    return tokens * bytes_per_token(base, settings.block_size)


def tokens_for(free: float, base: BaseModel, settings: Settings) -> int:
    """As many tokens as fit into so many bytes of disk, held-out ones beside them."""
    room = int(0.9 * free / bytes_per_token(base, settings.block_size))
    return max(room - HELD_OUT * settings.length, room * 10 // 11)


def free_disk(folder: Path) -> float:
    """Bytes free where a folder is, or will be."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free


def memory(base: BaseModel, settings: Settings) -> float:
    """Bytes of memory besides what the model takes to read, at most: the largest phase."""
    layers, d, f = base.layers - 1, base.hidden_size, base.widest
    r, k, n = settings.rank, settings.compensator_rank + 1, settings.length
    rows = layers * BLOCKS
    tokens = rows * settings.block_size
    capturing = 2 * n * layers * d * 2 + 4 * n * f * 4
    weights = layers * (d * r + 2 * r * f + f)
    predicting = 4 * (4 * weights + tokens * (2 * d + 3 * r) + 10 * rows * f)
    solving = 3 * SOLVED_AT_ONCE * k * k * 8
    compensating = 4 * (3 * f * k * k + d * f + 4 * n * f) + solving
    return float(max(capturing, predicting, compensating))


def seconds(run: Run, verifying: int = 0) -> dict[str, float]:
    """Time of each phase without --minutes, from one sequence, a few steps and one layer.

    Args:
        verifying: Prompt tokens that are read for the table at the end.
    """
    settings, layers = run.settings, len(run.ffns)
    some = (run.sequences[i] for i in range(100))
    ids = next((x for x in some if x.size >= settings.block_size), None)
    if ids is None:
        raise PredictorError("the first hundred sequences fill no block of tokens.")
    capture(run.model, ids[:256], settings.block_size, "plain")  # first calls compile
    start = time.perf_counter()
    x, _ = capture(run.model, ids, settings.block_size, settings.score)
    per_token = (time.perf_counter() - start) / ids.size
    found = {
        "capture": per_token * (settings.tokens + settings.held_out),
        "predictors": run.step_seconds() * settings.steps,
    }
    if settings.compensator != "none":
        start = time.perf_counter()
        first = x[0].astype(mx.float32)
        kept = marked(mx.random.normal((len(first), run.base.widths[0])), 1)
        fit_low_rank(run.ffns[0], lambda: [(first, kept)], settings.compensator_rank)
        # an mlp sees about as many tokens as the closed form, several times
        passes = MLP_PASSES if settings.compensator == MLP else 1
        share = passes * min(FIT_TOKENS, settings.tokens) / ids.size
        found["compensators"] = (time.perf_counter() - start) * share * layers
    start = time.perf_counter()
    mx.eval(run.model(ids[None]))
    pass_per_token = (time.perf_counter() - start) / ids.size
    # a trial of a curve runs what lies behind its layer: half of the model
    found["curves"] = pass_per_token * settings.held_out * len(trials(layers)) / 2
    found["judgement"] = 5 * per_token * settings.held_out
    found["verifying"] = pass_per_token * verifying
    return found


def least_minutes(run: Run, verifying: int) -> float:
    """The least --minutes that make sense for a run."""
    settings = run.settings
    most = seconds(run, verifying)
    parts = {
        "capture": min(1.0, LEAST_TOKENS / settings.tokens),
        "predictors": min(1.0, LEAST_STEPS / settings.steps),
        "compensators": min(1.0, LEAST_TOKENS / settings.tokens),
        "curves": settings.length / settings.held_out,
        "judgement": min(1.0, 2 * settings.length / settings.held_out),
        "verifying": 1.0,
    }
    least = {phase: s * min(1.0, parts[phase]) for phase, s in most.items()}
    shares = {"capture": CAPTURE, "predictors": PREDICTORS}
    slowest = max(least[phase] / share for phase, share in shares.items())
    return max(sum(least.values()), slowest) / 60
