"""mlx_fastforward convert: a trained checkpoint becomes a predictor."""

import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..errors import ConfigError, printable
from ..files import expanded
from . import options as o
from .errors import fail, interruptible, one_line_errors
from .inputs import DTYPES, check_choice
from .models import describe_base
from .tables import print_plain


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Trained weights: .safetensors, .pt, .pth, .bin or .npz file, a folder of "
            "them, or a Hugging Face repository.",
            show_default=False,
        ),
    ],
    model: o.Model = None,
    out: o.PredictorFolder = None,
    map_file: Annotated[
        Optional[Path],
        o.opt(
            'Names of another layout, JSON: {"REGEX": "layers.\\\\1.predictor.w1"}.',
            "--map",
        ),
    ] = None,
    list_only: Annotated[
        bool, o.opt("Print the tensors and what they match; write nothing.", "--list")
    ] = False,
    dtype: o.Dtype = None,
    quantize: Annotated[
        Optional[int],
        o.opt("Bits for the predictor's large matrix: 8 or 4.", "--quantize", "-q"),
    ] = None,
    activation: Annotated[
        Optional[str],
        o.opt(
            "The compensator's activation: relu, silu or gelu. Default: what the "
            "checkpoint's fastforward.json says, else relu."
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Convert trained predictors and compensators into a predictor.

    Everything is checked against the model before anything is written. A predictor, such as train
    writes it, may be converted once more, to other bits or another dtype.

    Examples:

      mlx_fastforward convert checkpoint.pt --model mlx-community/Llama-3.2-3B-Instruct-4bit

      mlx_fastforward convert checkpoint.safetensors --list

      mlx_fastforward convert my-predictor --quantize 4 --out smaller

      mlx_fastforward convert folder --map names.json --dtype float16 --quantize 8 --out predictor
    """
    with one_line_errors(), interruptible():
        from ..convert.naming import read_map
        from ..convert.repack import is_finished
        from ..neurons.compensators import ACTIVATIONS
        from ..neurons.predictor import QUANTIZATION_BITS
        from ..predictors.search import default_folder

        check_choice("--dtype", dtype, DTYPES)
        check_choice("--quantize", quantize, QUANTIZATION_BITS)
        check_choice("--activation", activation, tuple(ACTIVATIONS))
        own = expanded(Path(checkpoint))
        finished = is_finished(own) and not map_file
        if finished and (activation or list_only):
            flag = "--activation" if activation else "--list"
            raise ConfigError(
                f"{flag} is for checkpoints; this is a predictor already."
            )
        rules = read_map(map_file) if map_file else []
        source = None if finished else _open(checkpoint)
        if list_only:
            _list(source, rules)
            return
        base, own_dtype = describe_base(model, trust_remote_code)
        out = _target(out or default_folder(base), overwrite)
        if source is None:
            _repack(own, base, out, dtype, quantize)
        else:
            kind = dtype or own_dtype
            _convert(source, rules, base, out, kind, quantize, activation)


def _open(checkpoint: str) -> Any:
    from ..convert.files import EXPECTED, KINDS, open_checkpoint
    from ..hub import download, looks_like_a_repository

    suffixes = [s for kind in KINDS.values() for s in kind]
    if Path(checkpoint).suffix in suffixes or not looks_like_a_repository(checkpoint):
        return open_checkpoint(Path(checkpoint))
    for kind in KINDS.values():  # one kind only: many repositories hold two
        patterns = ["*.json", *("*" + s for s in kind)]
        folder = download(checkpoint, patterns, "checkpoint")
        if any(p.suffix in kind for p in folder.glob("*")):
            opened = open_checkpoint(folder)
            opened.name = checkpoint
            return opened
    fail(f"{checkpoint} holds no weights; expected {EXPECTED}.")


def _list(source: Any, rules: list) -> None:
    """Every tensor, and what its name was taken for."""
    from ..convert.conversion import lay_out

    layout = lay_out(source, rules)
    table = Table("tensor", "shape", "dtype", "taken as")
    for name, entry in source.entries.items():
        taken = layout.matched.get(name, "(ignored)")
        if name in layout.unknown:
            taken = "unknown: name it with --map, or leave it out with null"
        table.add_row(printable(name), str(list(entry.shape)), entry.dtype, taken)
    print_plain(table, Console(highlight=False))


def _convert(
    source: Any,
    rules: list,
    base: Any,
    out: Path,
    dtype: str,
    bits: Optional[int],
    activation: Optional[str],
) -> None:
    from ..convert import conversion
    from ..convert.files import describe

    start = time.perf_counter()
    plan = conversion.plan(source, base, rules)
    _check_bits(bits, plan)
    act, told = conversion.activation(source, activation)
    steps = conversion.tensors(plan, conversion.DTYPES[dtype], bits)
    total = len(plan.sources) + bool(plan.importance)
    console = Console(stderr=True)
    tensors = {}
    quiet = not console.is_terminal
    for _, made in track(
        steps, "converting", total, console=console, transient=True, disable=quiet
    ):
        tensors.update(made)
    info = conversion.information(plan, source, act, bits)
    _save(out, info, tensors)
    size = sum(t.nbytes for t in tensors.values())
    rows = {
        "checkpoint": describe(source),
        "ignored": _ignored(plan.ignored),
        "model": f"{base.name}: {base.model_type}, {base.sizes()}",
        "predictor": _summary("predictor", plan, act, told, bits),
        "compensator": _summary("compensator", plan, act, told, bits),
        "importances": "one per layer" if plan.importance else "none",
        "note": "; ".join(plan.remarks),
        "written": f"{out} ({dtype}, {size / 1e6:,.1f} MB, {time.perf_counter() - start:.1f} s)",
    }
    for key, value in rows.items():
        if value:
            print(f"{key:<12} {printable(value)}")


def _repack(
    source: Path,
    base: Any,
    out: Path,
    dtype: Optional[str],
    bits: Optional[int],
) -> None:
    """A predictor once more, in another dtype or with other bits."""
    from ..convert import conversion
    from ..convert.repack import repacked

    kind = conversion.DTYPES[dtype] if dtype else None
    found, info, tensors = repacked(source, kind, bits)
    found.check(base)
    if bits and not found.layers:
        fail("--quantize is for predictors, and this file has none.", 2)
    before = sum(w.nbytes for w in found.arrays())
    _save(out, info, tensors)
    after = sum(t.nbytes for t in tensors.values())
    print(f"{out}: {after / 1e6:,.1f} MB, before {before / 1e6:,.1f} MB")
    if found.details.get("verified"):
        print("What was verified is left out: eval --save measures it anew.")


def _target(out: Path, overwrite: bool) -> Path:
    """A folder that may be written to."""
    from ..predictors.file import JSON_NAME

    out = expanded(out)
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; expected a folder to write to.")
    if (out / JSON_NAME).exists() and not overwrite:
        fail(
            f"{out} holds a predictor: --overwrite replaces it, --out puts the new one elsewhere."
        )
    return out


def _save(out: Path, info: dict[str, Any], tensors: dict[str, Any]) -> None:
    from ..predictors.file import save_predictor

    try:
        save_predictor(out, info, tensors)
    except (OSError, RuntimeError) as e:
        reason = str(getattr(e, "strerror", None) or e).rstrip(".")
        fail(f"{out} cannot be written: {reason}.")


def _ignored(names: list[str]) -> str:
    """Tensors that were left out: the base model's, an optimizer's."""
    if not names:
        return ""
    dots = ", ..." if len(names) > 3 else ""
    return f"{len(names)} other tensors ({', '.join(names[:3])}{dots})"


def _check_bits(bits: Optional[int], plan: Any) -> None:
    from ..neurons.predictor import group_size

    if bits and "predictor" not in plan.ranks:
        fail("--quantize is for predictors, and the checkpoint has none.", 2)
    odd = [f for f in plan.base.widths if not group_size(f)]
    if bits and odd:
        fail(f"--quantize needs a multiple of 32 neurons, the model has {odd[0]}.", 2)


def _summary(kind: str, plan: Any, act: str, told: bool, bits: Optional[int]) -> str:
    ranks = plan.ranks.get(kind)
    if not ranks:
        return "none"
    low, high = min(ranks), max(ranks)
    text = (
        f"rank {low}"
        if low == high
        else f"ranks {low} to {high}, not the same in all layers"
    )
    sources = [s for n, s in plan.sources.items() if f".{kind}.w" in n]
    turned = sum(s.transpose for s in sources)
    text += f", {turned} of {len(sources)} matrices transposed"
    if kind == "compensator":
        text += f", {act}" + (
            "" if told else " (the checkpoint does not say: see --activation)"
        )
    elif bits:
        text += f", w2 in {bits} bits"
    return text
