"""What a user can set, checked once, and what a device was found to do best."""

from dataclasses import dataclass, fields
from typing import Any, Optional

from .errors import ConfigError

SELECTORS = ("auto", "trained", "probe", "first-block", "oracle")
COMPENSATORS = ("auto", "none", "mlp", "low-rank")
SCHEDULES = ("auto", "uniform", "first-dense", "layerwise", "measured")
BLOCK_SIZE = 128
STEP = 2048  # tokens that mlx-lm prefills per call
STRATEGIES = ("chunk", "columns", "stored")


@dataclass(frozen=True)
class DeviceSettings:
    """How a device runs a sparse prefill fastest: found by tuning, never a matter of taste.

    Args:
        block_size: Tokens of a block where the user does not say.
        strategy: How columns of the down projection are taken, see model/gather.py.
        shortest: Prompts of fewer tokens stay dense.
        attention_block: Queries per attention call, see model/attention.py; 0: all of a chunk.
        dense: No sparse prefill is faster than a dense one here.
        unpack: Calls of at least so many tokens dequantise packed FFN weights once and multiply in
            float; 0: never.
        step: Prompt tokens per call of the model, where the user does not say.
        half: Those calls compute FFNs in float16; a layer that overflows goes back to its own dtype.
    """

    block_size: int = BLOCK_SIZE
    strategy: str = "chunk"
    shortest: int = 0
    attention_block: int = 0
    dense: bool = False
    unpack: int = 0
    half: bool = False
    step: int = STEP

    def __post_init__(self) -> None:
        _check_choice("strategy", self.strategy, STRATEGIES)
        least_of = {"block_size": 8, "step": 512}
        least_of |= {"shortest": 0, "attention_block": 0, "unpack": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            _check_number(name, value, int)
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        for name in ("dense", "half"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, got {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class PrefillConfig:
    """Settings of the sparse prefill; raises ConfigError on impossible values.

    Args:
        sparsity: Share of FFN neurons that a sparse block drops, 0 <= s < 1. 0 is stock mlx-lm.
        block_size: Tokens that share one set of neurons, about: blocks are of equal length. None:
            as tuned for the device, else 128.
        selector: "auto" takes the trained predictor if there is one, else "probe".
        compensator: "auto" takes the predictor's if there is one.
        schedule: Neurons per layer: "measured" by what their loss costs, "layerwise" by attention
            (algorithm 1), "first-dense" or "uniform". "auto" is measured where a predictor file
            has what that needs, else first-dense.
        dense_head: Keep the first block (128 tokens at most) of an empty cache dense: attention sinks.
        dense_tail: Keep the end of the prompt dense: 256 tokens, one block where blocks are smaller
            than 128.
        prune_tokens: Share of the tokens between head and tail that skip each FFN but the first
            layer's, 0 <= p < 1. Costs more quality than sparsity for the FLOPs that it saves.
        sparse_decode: Also run single-token steps sparsely (the paper's table 3): to measure what it
            does to answers, slower than dense decoding.
    """

    sparsity: float = 0.5
    block_size: Optional[int] = None
    selector: str = "auto"
    compensator: str = "auto"
    schedule: str = "auto"
    dense_head: bool = True
    dense_tail: bool = True
    sparse_decode: bool = False
    prune_tokens: float = 0.0

    def __post_init__(self) -> None:
        _check_number("sparsity", self.sparsity, float)
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"sparsity must be at least 0 and below 1, got {self.sparsity}; "
                "0.5 drops half of the FFN neurons."
            )
        _check_number("prune_tokens", self.prune_tokens, float)
        if not 0 <= self.prune_tokens < 1:
            raise ConfigError(
                f"prune_tokens must be at least 0 and below 1, got {self.prune_tokens}; "
                "0.25 lets a quarter of the tokens skip the FFN."
            )
        if self.block_size is not None:
            _check_number("block_size", self.block_size, int)
        if self.block_size is not None and self.block_size < 8:
            raise ConfigError(
                f"block_size must be at least 8 tokens, got {self.block_size}; try 128."
            )
        _check_choice("selector", self.selector, SELECTORS)
        _check_choice("compensator", self.compensator, COMPENSATORS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("dense_head", "dense_tail", "sparse_decode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False, got {getattr(self, name)!r}."
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
