"""What a run was asked for and how far it is, in a folder from which it goes on."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx

from ..errors import PredictorError
from ..files import replace, write_text
from ..predictors.file import LOW_RANK, TOKENWISE
from ..predictors.tensors import write_tensors
from .data import LENGTH

HELD_OUT = 10  # sequences to judge on


@dataclass(frozen=True)
class Settings:
    """What a run does; a run that goes on must be asked for the same.

    Args:
        tokens: Tokens to capture, at most.
        length: Tokens per sequence.
        minutes: Time for everything, about; 0 is no limit.
        steps: Steps of the predictors' training; with ``minutes`` at most.
        score: Which neurons of a block are the best ones: see capture.block_norms.
        rank: Of the predictors; 0 is hidden size / 8, at most 256.
        kind: Of the predictors, token-wise or pooled.
        compensator: low-rank, mlp or none.
        compensator_rank: Directions of x, or hidden units; 0 is hidden size / 8, at most 64.
        sequential: The second half of the data is captured below sparse layers.
    """

    tokens: int = 400_000
    length: int = LENGTH
    minutes: float = 0.0
    steps: int = 4000
    block_size: int = 128
    kind: str = TOKENWISE
    score: str = "relative"
    rank: int = 0
    compensator: str = LOW_RANK
    compensator_rank: int = 0
    sequential: bool = False
    seed: int = 0
    data: str = "bundled"

    @property
    def held_out(self) -> int:
        """Tokens to judge on, besides the others."""
        return min(HELD_OUT * self.length, max(1, self.tokens // 10))

    def with_ranks(self, hidden_size: int) -> "Settings":
        """The same with ranks of a number."""
        asked = asdict(self)
        asked["rank"] = self.rank or min(256, max(8, hidden_size // 8))
        most = min(64, max(4, hidden_size // 8))
        asked["compensator_rank"] = min(self.compensator_rank or most, hidden_size)
        return Settings(**asked)


@dataclass
class State:
    """Where a run is."""

    folder: Path
    asked: dict[str, Any]
    captured: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    enough: list[str] = field(default_factory=list)
    error_left: dict[str, list[float]] = field(default_factory=dict)
    importance: Optional[list[float]] = None
    costs: list[list[float]] = field(default_factory=list)  # of the curves' trials
    measured: int = 0  # sequences that the curves were tried on
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = time.perf_counter()

    @classmethod
    def resumed(cls, folder: Path, asked: dict[str, Any]) -> "State":
        """The state in a folder, or a new one; PredictorError if it was asked for something else."""
        file = folder / "state.json"
        try:
            state = cls(folder, **json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            forget(folder)  # what is left of another run
            return cls(folder, asked)
        except NotADirectoryError:
            raise PredictorError(
                f"{folder.parent} is a file; expected a folder for the predictor."
            ) from None
        except (OSError, ValueError, TypeError) as e:
            raise PredictorError(
                f"{file} cannot be read ({e}); delete {folder}."
            ) from e
        if state.asked != asked:
            keys = [k for k in asked if state.asked.get(k) != asked[k]]
            raise PredictorError(
                f"{folder} holds an unfinished run with other settings ({', '.join(keys)}); "
                "repeat them, or start anew with --restart."
            )
        return state

    def save(self, phase: str) -> None:
        """Write it down; the time since the last save was spent in this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._mark
        self._mark = now
        content = asdict(self)
        del content["folder"]
        write_text(self.folder / "state.json", json.dumps(content))


def forget(folder: Path) -> None:
    """Delete a run; killed on the way, what is left is no run."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def save_tensors(
    path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] = {}
) -> None:
    """All or nothing; OSError where they cannot be written."""
    replace(path, lambda half: write_tensors(half, tensors, metadata))
