"""What a user can set, checked once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SELECTORS = ("auto", "trained", "probe", "first-block", "oracle")
COMPENSATORS = ("auto", "none", "mlp", "low-rank")
SCHEDULES = ("auto", "uniform", "layerwise")
SCORES = ("weighted", "griffin")
BLOCK_SIZE = 128
STRATEGIES = ("chunk", "columns", "stored")


class FastForwardError(Exception):
    """A failure that the user can act on; its text is one line."""


class ConfigError(FastForwardError, ValueError):
    """A setting that cannot work, said in one line."""


def printable(text: str) -> str:
    """One line without the letters that drive a terminal: names from files may hold any."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def expanded(path: Path) -> Path:
    """``path`` with ~ as the user's home; an unknown user is a FastForwardError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise FastForwardError(f"{path}: no such user; write the folder out.") from None


@dataclass(frozen=True)
class PrefillConfig:
    """Settings of the sparse prefill; raises ConfigError on impossible values.

    Args:
        sparsity: Share of FFN neurons that a sparse block drops, 0 <= s < 1. 0 is stock mlx-lm.
        block_size: Tokens that share one set of neurons, about: blocks are of equal length.
        selector: "auto" takes the adapter's trained predictor if there is one, else "probe".
        compensator: "auto" takes the adapter's if there is one.
        schedule: "auto" is layerwise (algorithm 1) where importances are known, else uniform.
        score: Neuron score over a block: "weighted" is the activation norm times the norm of the
            neuron's down column, "griffin" the norm of row-normalised activations.
        dense_head: Keep the first block (128 tokens at most) of an empty cache dense: attention sinks.
        dense_tail: Keep the end of the prompt dense: 256 tokens, one block where blocks are smaller
            than 128.
        sparse_decode: Also run single-token steps sparsely (the paper's table 3): to measure what it
            does to answers, slower than dense decoding.
        probe_every: The probe selector runs every so-manieth token densely.
        strategy: How columns of the down projection are taken, see down.py.
        shortest: Prompts of fewer tokens stay dense.
        attention_block: Queries per attention call, see attention.py; 0: all of a chunk.
    """

    sparsity: float = 0.5
    block_size: int = BLOCK_SIZE
    selector: str = "auto"
    compensator: str = "auto"
    schedule: str = "auto"
    score: str = "weighted"
    dense_head: bool = True
    dense_tail: bool = True
    sparse_decode: bool = False
    probe_every: int = 8
    strategy: str = "chunk"
    shortest: int = 0
    attention_block: int = 0

    def __post_init__(self) -> None:
        _check_number("sparsity", self.sparsity, float)
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity must be at least 0 and below 1, got {self.sparsity}; "
                "0.5 drops half of the FFN neurons."
            )
        _check_number("block_size", self.block_size, int)
        if self.block_size < 8:
            raise ConfigError(
                f"block_size must be at least 8 tokens, got {self.block_size}; try 128."
            )
        _check_choice("selector", self.selector, SELECTORS)
        _check_choice("compensator", self.compensator, COMPENSATORS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("score", self.score, SCORES)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_number("shortest", self.shortest, int)
        _check_number("attention_block", self.attention_block, int)
        if self.attention_block < 0:
            raise ConfigError(
                f"attention_block must be 0 or more queries, got {self.attention_block}."
            )
        for name in ("dense_head", "dense_tail", "sparse_decode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, got {getattr(self, name)!r}."
                )
        _check_number("probe_every", self.probe_every, int)
        if self.probe_every < 2 or self.block_size % self.probe_every:
            raise ConfigError(
                f"probe_every must be at least 2 and divide block_size ({self.block_size}), "
                f"got {self.probe_every}."
            )
        if self.sparse_decode and self.selector == "probe":
            raise ConfigError(
                "sparse_decode needs the selector trained, first-block or oracle: "
                "a probe of a single token is the dense layer itself."
            )

    @classmethod
    def from_kwargs(cls, **settings: Any) -> "PrefillConfig":
        """Build a config from keyword arguments; an unknown name is a ConfigError."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"unknown setting {name!r}; known ones: {', '.join(known)}."
                )
        return cls(**settings)


def _check_number(name: str, value: Any, kind: type) -> None:
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        noun = "a number" if kind is float else "a whole number"
        raise ConfigError(f"{name} must be {noun}, got {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
