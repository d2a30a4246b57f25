"""What the commands share: one-line errors, loading, reading files, the sampler."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Optional

import typer

from .. import demo
from ..config import ConfigError, FastForwardError, printable


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one line to stderr and leave; 2 is for wrong usage, 1 for failure."""
    print(f"mlx_fastforward: {printable(message)}", file=sys.stderr)
    raise typer.Exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors a user can act on into one line, without a traceback."""
    try:
        yield
    except ConfigError as e:
        fail(str(e), 2)
    except FastForwardError as e:
        fail(str(e))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C leaves quietly, with the shell's code for it."""
    try:
        yield
    except KeyboardInterrupt:
        print("mlx_fastforward: stopped.", file=sys.stderr)
        raise typer.Exit(130) from None


def check_choice(flag: str, value: Any, known: tuple) -> None:
    """A flag's value is one of these, or None; raises ConfigError."""
    if value is not None and value not in known:
        names = ", ".join(map(str, known))
        raise ConfigError(f"{flag} must be one of {names}; got {value}.")


def check_lengths(max_tokens: int, prefill_step_size: int, block_size: int) -> None:
    if max_tokens == 0 or max_tokens < -1:
        raise ConfigError(
            f"--max-tokens must be above 0, or -1 for no limit; got {max_tokens}."
        )
    if prefill_step_size < block_size + min(block_size, 128):
        raise ConfigError(
            f"--prefill-step-size ({prefill_step_size}) must hold the dense head and a block: "
            f"--block-size ({block_size}) plus up to 128."
        )


def template_config(text: Optional[str]) -> dict[str, Any]:
    """The object of --chat-template-config."""
    try:
        config = json.loads(text) if text else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f"--chat-template-config must be a JSON object, got {text}.")
    return config


def length_warning(model: Any, tokens: int) -> Optional[str]:
    """What to say of a prompt that is longer than the model was made for."""
    from ..families import context_length

    limit = context_length(model)
    if not limit or tokens <= limit:
        return None
    return (
        f"{tokens:,} tokens, but the model was made for {limit:,}: expect a poor answer; "
        "use a shorter document or another --model."
    )


def read_text(path: Path) -> str:
    """A UTF-8 document, or one line that says why not."""
    try:
        if path.is_dir():
            raise FileProblem(f"{path} is a folder; expected a text file.")
        text = path.expanduser().read_text(encoding="utf-8")
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


class FileProblem(FastForwardError):
    """A document that cannot be used."""


class LoadProblem(FastForwardError):
    """A model that cannot be loaded."""


def decoded(text: bytes) -> str:
    """Standard input as text, whatever the locale; raises FileProblem."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise FileProblem("standard input is not UTF-8 text.") from None


def checked_name(name: Optional[str]) -> str:
    """A --model that may name one; None is the demo model."""
    if name == "":
        raise ConfigError("--model must be a folder or repository name, got nothing.")
    name = str(demo.MODEL) if name is None else name
    path = Path(name)
    if path.is_file():
        raise LoadProblem(f"{name} is a file; expected a model folder or repository.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LoadProblem(f"{name} holds no config.json; expected a model folder.")
    return name


def load_model(name: Optional[str], **kwargs: Any) -> tuple[Any, Any]:
    """ff.load with its many errors told in one line. ``name`` None is the demo model."""
    from ..loading import load

    name = checked_name(name)
    trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    with load_problems(name):
        return load(name, tokenizer_config=trust, **kwargs)


def describe_base(name: Optional[str], trust_remote_code: bool) -> tuple[Any, str]:
    """The base model of an adapter, and its float dtype by name; its weights are not read."""
    from mlx_lm.utils import _download, load_model

    from ..adapter import BaseModel
    from ..families import family_of, layer_norm_weights

    shown = "demo model" if name is None else name
    name = checked_name(name)
    with load_problems(name):
        folder = _download(name)
        model, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
        dtype = layer_norm_weights(model, family_of(model))[0].dtype
        if Path(shown).exists():
            shown = Path(shown).resolve().name
        return BaseModel.of(model, shown), str(dtype).removeprefix("mlx.core.")


@contextlib.contextmanager
def load_problems(name: str) -> Iterator[None]:
    """Tell what went wrong with a folder or repository in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except FastForwardError:
        raise
    except HFValidationError:
        raise LoadProblem(
            f"{name} is neither a local folder nor a repository name like "
            "mlx-community/Llama-3.2-3B-Instruct-4bit."
        ) from None
    except GatedRepoError:
        raise LoadProblem(
            f"{name} is gated: accept its terms on its page, then run hf auth login."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise LoadProblem(
            f"{name} was not found: not a local folder, and no such repository "
            "(or it is private: hf auth login)."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise _offline(name) from None
    except HfHubHTTPError as e:
        raise LoadProblem(f"{name}: the hub answered {_brief(e)}") from None
    except Exception as e:
        if is_connection_error(e):
            raise _offline(name) from None
        raise LoadProblem(f"{name} cannot be loaded: {_brief(e)}") from e


def is_connection_error(e: Exception) -> bool:
    """Whether the network failed below huggingface_hub."""
    library = type(e).__module__.partition(".")[0]
    return isinstance(e, ConnectionError) or library in ("httpx", "httpx2", "httpcore")


def _offline(name: str) -> LoadProblem:
    return LoadProblem(
        f"{name} is not in the local cache and the hub cannot be reached; "
        "connect once to download it, or pass a local folder."
    )


def _brief(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text[:300] or type(e).__name__


def sampling(
    tokenizer: Any,
    temp: float,
    top_p: float,
    min_p: float = 0.0,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
) -> Callable:
    """mlx-lm's sampler for the flags of the commands."""
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(
        temp,
        top_p,
        min_p,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def status_line(r: Any) -> str:
    """One quiet line about an answer. r: Response."""
    reused = f" (+{r.cached_tokens:,} cached)" if r.cached_tokens else ""
    return (
        f"{r.prompt_tokens:,} prompt tokens{reused} · TTFT {r.ttft:.2f} s · "
        f"{r.generation_tps:.1f} tok/s · {r.ffn_sparsity:.0%} of the prompt's FFN skipped"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it takes the file's place when all is written."""
    half = path.with_name(f".half-{path.name}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
