"""What commands print and the files they write, whole or not at all."""

import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Optional

from .. import ranks
from ..errors import ConfigError
from ..files import replacing
from .errors import fail


def status_line(r: Any, why: Optional[str] = None) -> str:
    """One quiet line about an answer. r: Response; why: nothing was skipped."""
    skipped = why or f"{r.ffn_sparsity:.0%} of the prompt's FFN skipped"
    if r.read_tokens is not None:
        share = (
            f"{r.read_tokens:,} of them read ({r.read_tokens / r.prompt_tokens:.0%})"
        )
        skipped = f"{share} · {skipped}" if r.ffn_sparsity else share
    reused = f" (+{r.cached_tokens:,} cached)" if r.cached_tokens else ""
    tokens = "token" if r.prompt_tokens == 1 else "tokens"
    return (
        f"{r.prompt_tokens:,} prompt {tokens}{reused} · TTFT {r.ttft:.2f} s · "
        f"{skipped} · {r.generation_tokens:,} tokens at "
        f"{r.generation_tps:.1f} tok/s · peak {r.peak_memory:.2f} GB"
    )


def prefill_line(engine: Any) -> str:
    """What a long prompt gets, for banners."""
    if not engine.sparse:
        line = "dense (stock mlx-lm)"
        if engine.device.unpack:
            half = engine.device.half
            line = f"dense, {'FFNs in float16' if half else 'packed weights dequantised first'}"
        if engine.device.dense and engine.config.sparsity:
            line += ", the fastest on this device; --no-tune runs sparsely"
        return line
    line = f"{engine.settings()['sparsity']:.0%} of FFN neurons dropped per "
    line += f"{engine.block_size} tokens, selector {engine.selector.name}"
    if skip := engine.config.prune_tokens:
        line += f"; {skip:.0%} of the tokens skip FFNs"
    if engine.share < 1:
        line += f"; within reach: {engine.share:.0%} of the FFN FLOPs"
    return line


def broken(line: str, width: int) -> str:
    """A line of figures with dots between them, broken only there."""
    lines: list[str] = []
    for part in line.split(" · "):
        if lines and len(longer := f"{lines[-1]} · {part}") <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)


def check_files(json_file: Optional[Path], png: Optional[Path]) -> None:
    """Better before the measuring than after it."""
    if png and png.suffix.lower() != ".png":
        raise ConfigError(f"--png must be a file ending in .png, got {png}.")
    for file in (json_file, png):
        if file is None:
            continue
        if file.is_dir():
            fail(f"{file} cannot be written: it is a folder.")
        if not file.absolute().parent.is_dir():
            fail(f"{file} cannot be written: no such folder.")
        try:
            tempfile.TemporaryFile(dir=file.absolute().parent).close()
        except OSError as e:
            fail(f"{file} cannot be written: {e.strerror or e}.")


def picture_title(env: dict[str, Any]) -> str:
    """What was measured, and on what."""
    return f"{env['model']}, {env['dtype']}, {env['device']}, mlx {env['mlx']}"


def write_json(file: Optional[Path], report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write(file, lambda half: half.write_text(text, encoding="utf-8"))


def write(file: Optional[Path], action: Callable[[Path], Any]) -> None:
    """Let ``action`` write a file, whole or not at all; None writes nothing."""
    if file is None or ranks.rank():
        return
    try:
        with replacing(file) as half:
            action(half)
    except OSError as e:
        fail(f"{file} cannot be written: {e.strerror or e}.")
