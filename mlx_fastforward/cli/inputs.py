"""What a user typed, checked before anything is loaded: flags, lists, documents, sampling."""

import json
from pathlib import Path
from typing import Any, Callable, Optional

from .. import ranks
from ..config import BLOCK_SIZE, DeviceSettings
from ..errors import ConfigError, FileProblem
from ..files import expanded

FAST = DeviceSettings(unpack=256)
DTYPES = ("float32", "float16", "bfloat16")


def check_choice(flag: str, value: Any, known: tuple) -> None:
    """A flag's value is one of these, or None; raises ConfigError."""
    if value is not None and value not in known:
        names = ", ".join(map(str, known))
        raise ConfigError(f"{flag} must be one of {names}; got {value}.")


def numbers(flag: str, text: str, kind: Any, least: int = 1) -> list[Any]:
    """A list of numbers with commas between them."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{flag} must be numbers with commas between them, got {text!r}."
        ) from None
    if kind is int and min(found) < least:
        raise ConfigError(f"{flag} must be at least {least}, got {text!r}.")
    return found


def sparsity_of(text: str) -> float | str:
    """The value of --sparsity: a number, or auto."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise ConfigError(
            f"--sparsity must be a number from 0 to below 1, or auto; got {text!r}."
        ) from None


def check_block(block_size: Optional[int]) -> None:
    """--block-size alone: a chunk of 2,048 tokens holds the dense head and a block."""
    if block_size is not None and not 8 <= block_size <= 1920:
        raise ConfigError(
            f"--block-size must be 8 to 1,920 tokens, got {block_size}; try 128."
        )


def check_lengths(
    max_tokens: int, prefill_step_size: Optional[int], block_size: Optional[int]
) -> None:
    if max_tokens == 0 or max_tokens < -1:
        raise ConfigError(
            f"--max-tokens must be above 0, or -1 for no limit; got {max_tokens}."
        )
    check_block(block_size)
    size = BLOCK_SIZE if block_size is None else block_size
    least = size + min(size, 128)
    if prefill_step_size is not None and prefill_step_size < least:
        raise ConfigError(
            f"--prefill-step-size ({prefill_step_size}) must hold the dense head and a block: "
            f"--block-size ({size}) plus up to 128."
        )


def device_settings(no_tune: bool, fast: bool = False) -> Optional[DeviceSettings]:
    """The ``device`` of load(): untuned, or what is remembered; --fast is measured before it is used."""
    if fast:
        return FAST
    return DeviceSettings() if no_tune else None


def check_fast(fast: bool, sparsity: float | str) -> None:
    """--fast is for the dense path, in one process; raises ConfigError."""
    if fast and sparsity != 0:
        raise ConfigError(
            "--fast goes with --sparsity 0: a sparse prefill takes the fastest way by itself."
        )
    if fast and ranks.rank() is not None:
        raise ConfigError("--fast runs in one process; start it without mlx.launch.")


def yes_or_no(flag: str, text: str) -> bool:
    """True or False, T or F, as mlx_lm takes them."""
    short = text.lower()[:1]
    if short not in ("t", "f"):
        raise ConfigError(f"{flag} must be True or False, got {text}.")
    return short == "t"


def template_config(text: Optional[str]) -> dict[str, Any]:
    """The object of --chat-template-config."""
    try:
        config = json.loads(text) if text else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f"--chat-template-config must be a JSON object, got {text}.")
    return config


def read_text(path: Path) -> str:
    """A UTF-8 document, or one line that says why not."""
    try:
        if path.is_dir():
            raise FileProblem(f"{path} is a folder; expected a text file.")
        text = expanded(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileProblem(f"{path} does not exist; expected a text file.") from None
    except UnicodeDecodeError:
        raise FileProblem(
            f"{path} is not UTF-8 text; convert it to plain text first."
        ) from None
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        reason = getattr(e, "strerror", None) or e
        raise FileProblem(f"{path} cannot be read: {reason}.") from None
    if not text.strip():
        raise FileProblem(f"{path} is empty.")
    return text.strip()


def decoded(text: bytes) -> str:
    """Standard input as text, whatever the locale; raises FileProblem."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise FileProblem("standard input is not UTF-8 text.") from None


def sampling(
    tokenizer: Any,
    temp: float,
    top_p: float,
    min_p: float = 0.0,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    min_tokens_to_keep: int = 1,
) -> Callable:
    """mlx-lm's sampler for the flags of the commands."""
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(
        temp,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
