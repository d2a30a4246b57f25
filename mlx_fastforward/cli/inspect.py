"""mlx_fastforward inspect: what sparse prefill does inside a model, on a text."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Optional

from rich.console import Console
from rich.table import Table

from .. import demo
from ..config import BLOCK_SIZE, PrefillConfig
from ..errors import ConfigError
from . import options as o
from .errors import interruptible, one_line_errors
from .inputs import DTYPES, check_choice, numbers, read_text
from .models import dtype_name, public_name, stock_model
from .outputs import check_files, write, write_json
from .progress import progress
from .tables import say, show, warn

HEADS = "layer,importance,kept,by importance,recall,FFN error,compensated,stream error"
HEADS += ",overlap,oracle's"


def inspect(
    model: o.Model = None,
    file: Annotated[
        Optional[Path], o.opt("The text to read. Default: the demo's document.")
    ] = None,
    sparsity: o.Sparsity = 0.5,
    block_size: Annotated[
        int, o.opt("Tokens that share one set of neurons, about.", panel=o.SPARSE)
    ] = BLOCK_SIZE,
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    compensator: o.Compensator = "auto",
    schedule: Annotated[
        str,
        o.opt(
            "Neurons per layer: auto, uniform, layerwise; without a predictor's importances "
            "layerwise measures them on the text.",
            panel=o.SPARSE,
        ),
    ] = "auto",
    layers: Annotated[
        Optional[str],
        o.opt(
            "Layers whose neurons are drawn, e.g. 0,3,6. Default: the first, middle and "
            "last sparse one."
        ),
    ] = None,
    dtype: o.Dtype = None,
    png: Annotated[Path, o.opt("Write the picture here.")] = Path("inspect.png"),
    json_file: o.JsonFile = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Show which neurons each block of a text keeps, and what dropping the others costs, by layer.

    The text is read densely and sparsely side by side. Errors are relative, over the tokens of the
    sparse blocks.

    Examples:

      mlx_fastforward inspect

      mlx_fastforward inspect --model mlx-community/Llama-3.2-3B-Instruct-4bit --file report.txt

      mlx_fastforward inspect --selector probe --sparsity 0.4 --layers 0,1,2 --json inspect.json
    """
    with one_line_errors(), interruptible():
        config = PrefillConfig(
            sparsity,
            block_size,
            selector=selector,
            compensator=compensator,
            schedule=schedule,
        )
        if not sparsity:
            raise ConfigError("--sparsity 0 drops nothing; give one above 0.")
        check_choice("--dtype", dtype, DTYPES)
        check_files(json_file, png)
        text = read_text(file or demo.DOCUMENT)
        net, tokenizer, side = stock_model(model, dtype, predictor, trust_remote_code)
        chosen = _numbers(layers, len(net.layers)) if layers else None
        ids = _ids(net, tokenizer, text)
        engine, weights = _engine(net, config, side, ids)
        shown = chosen or _first_middle_last(engine.keep)
        found = _measure(net, ids, engine, weights)
        settings = _settings(net, engine, model, side, weights, found)
        _print(found, settings)
        _write(found, shown, settings, png, json_file)
        print(f"picture: {png}")


def _ids(net: Any, tokenizer: Any, text: str) -> Any:
    """The text's tokens, as many as the model was made for."""
    from ..generation import encode_prompt
    from ..model.families import context_length

    ids, limit = encode_prompt(tokenizer, text), context_length(net)
    if limit and ids.size > limit:
        warn(
            f"the text has {ids.size:,} tokens, the model was made for "
            f"{limit:,}: only those are read."
        )
        ids = ids[:limit]
    return ids


def _engine(net: Any, config: PrefillConfig, side: Any, ids: Any) -> tuple[Any, Any]:
    """The engine of a detached model, and importances: the predictor's, else the text's."""
    from ..bench.inspect.inspection import check_length, measured_importances
    from ..build import engine_for

    engine = engine_for(net, replace(config, schedule="auto"), side)
    check_length(engine, ids.size)
    weights = side.importances if side is not None else None
    if weights is None:
        with Console(stderr=True).status("measuring importances"):
            weights = measured_importances(net, ids, engine.edge)
        if weights is None and config.schedule == "layerwise":
            raise ConfigError(
                "importances of this model cannot be measured: its attention is not mlx-lm's "
                "usual one; use --schedule uniform."
            )
    if config.schedule != "auto":
        engine = engine_for(net, config, side, weights)
    return engine, weights


def _numbers(text: str, layers: int) -> list[int]:
    """The numbers of --layers, of a model with so many layers."""
    found = sorted(set(numbers("--layers", text, int, 0)))
    for n in found:
        if not 0 <= n < layers - 1:
            raise ConfigError(
                f"--layers: expected 0 to {layers - 2}, got {n}; the last layer never runs sparsely."
            )
    return found


def _first_middle_last(keep: list[Optional[int]]) -> list[int]:
    """Of the sparse layers."""
    sparse = [i for i, k in enumerate(keep) if k is not None]
    return sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]})


def _measure(net: Any, ids: Any, engine: Any, weights: Any) -> Any:
    from ..bench.inspect import inspection

    total = inspection.steps(engine, ids.size)
    with progress(Console(stderr=True), "reading", total, transient=True) as tick:
        return inspection.inspect(net, ids, engine, weights, tick)


def _settings(
    net: Any, engine: Any, model: Optional[str], side: Any, weights: Any, found: Any
) -> dict[str, Any]:
    """What the figures are about."""
    own = side is not None and side.importances is not None
    source = "the predictor's" if own else "this text's"
    return {
        "model": public_name(model),
        "dtype": dtype_name(net),
        **engine.settings(),
        "predictor": public_name(engine.predictor) if engine.predictor else "none",
        "importances": source if weights is not None else "none",
        "tokens": found.tokens,
        "blocks": found.blocks,
        "ffn_flops_skipped": round(found.ffn_sparsity, 4),
    }


def _print(found: Any, settings: dict[str, Any]) -> None:
    say(", ".join(f"{k} {v}" for k, v in settings.items()))
    show(_table(found.layers))
    for name, kind in ((settings["selector"], "selector"), ("oracle", "oracle")):
        say(_words(name, [getattr(x, kind) for x in found.layers], found.blocks))
    shares = [x.kept / x.neurons for x in found.layers]
    chance = sum(p / (2 - p) for p in shares) / len(shares)
    say(
        "Overlap: of the neurons that either of two blocks keeps, the share that both keep; "
        f"{chance:.1%} by chance."
    )


def _table(layers: Any) -> Table:
    """What happened in each layer that ran sparsely."""
    table = Table()
    for head in HEADS.split(","):
        table.add_column(head, justify="right")
    for x in layers:
        table.add_row(
            str(x.layer),
            "-" if x.importance is None else f"{x.importance:.3f}",
            f"{x.kept:,}",
            "-" if x.by_importance is None else f"{x.by_importance:,}",
            _share(x.recall),
            _share(x.error),
            _share(x.error_compensated),
            _share(x.stream_error),
            _share(x.selector.neighbours),
            _share(x.oracle.neighbours),
        )
    return table


def _words(name: str, overlaps: list[Any], blocks: int) -> str:
    """Flocking in a sentence, mean of the layers."""

    def mean(key: str) -> str:
        values = [getattr(x, key) for x in overlaps]
        return "-" if None in values else f"{sum(values) / len(values):.1%}"

    return (
        f"{name}: {mean('in_all')} of the neurons are kept by all {blocks} blocks, "
        f"{mean('in_one')} by one only; neighbouring blocks overlap by {mean('neighbours')}, "
        f"any two by {mean('pairs')}."
    )


def _share(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.1%}"


def _write(
    found: Any,
    shown: list[int],
    settings: dict[str, Any],
    png: Path,
    json_file: Optional[Path],
) -> None:
    from ..bench.environment import describe
    from ..bench.inspect.picture import picture

    s = settings
    title = (
        f"{s['model']}, {s['dtype']}, {s['tokens']:,} tokens in {s['blocks']} sparse blocks; "
        f"{s['selector']}, compensator {s['compensator']}, sparsity {s['sparsity']:.0%}"
    )
    write(png, lambda half: picture(half, found, shown, s["selector"], title))
    layers = [asdict(x) for x in found.layers]
    write_json(json_file, {"environment": describe(), "settings": s, "layers": layers})
