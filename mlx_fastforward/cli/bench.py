"""mlx_fastforward bench: TTFT of stock mlx-lm against sparse prefill, on this device."""

from dataclasses import asdict, replace
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer
from rich.console import Console
from rich.table import Table

from .. import ranks
from ..config import STRATEGIES, DeviceSettings, PrefillConfig
from ..errors import ConfigError
from . import options as o
from .errors import interruptible, one_line_errors
from .first_use import tuned
from .inputs import DTYPES, FAST, check_choice, check_fast, numbers
from .lengths import check_lengths_of
from .models import dtype_name, public_name, stock_model
from .outputs import check_files, picture_title, write, write_json
from .part_read import keep_configs, readers, scorer_of
from .progress import progress
from .tables import say, show

COLUMNS = (  # of the table, by the names of cells()
    "context,arm,TTFT,stock TTFT,speed-up,ideal,FFN,GB,stock GB,tok/s,stock tok/s,KL,facts"
).split(",")
HEADS = {"speed-up": "times as fast", "ideal": "by FLOPs", "FFN": "FFN of stock"}


def bench(
    context: typer.Context,
    model: o.Model = None,
    random: Annotated[
        Optional[str],
        o.opt(
            "Random weights in the shape of llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, "
            "qwen3-4b, qwen3.5-4b, qwen3.5-9b, gemma-4-31b, ministral-3-3b, glm-4-9b, "
            "smollm2-135m or qwen3-0.6b, with predictors of random weights: for timings they "
            "do. A --prefill-draft may then be such a shape, too."
        ),
    ] = None,
    layers: Annotated[
        Optional[int], o.opt("Fewer layers, with --random.", min=2)
    ] = None,
    q_bits: Annotated[int, o.opt("Quantised weights with --random; 0: float.")] = 0,
    dtype: Annotated[
        Optional[str],
        o.opt(
            "float32, float16 or bfloat16. Default: the model's own; --random: bfloat16 on "
            "a GPU, else float32."
        ),
    ] = None,
    contexts: Annotated[
        Optional[str],
        o.opt("Prompt tokens. Default: 512,1024,2048,4096, as the model allows."),
    ] = None,
    sparsities: o.Sparsities = "0.5",
    prune_tokens: o.PruneShares = "0",
    prefill_draft: o.Drafts = None,
    keep: o.KeepShares = None,
    block_sizes: Annotated[Optional[str], o.opt("Default: the tuned one.")] = None,
    selectors: o.Selectors = "auto",
    strategies: Annotated[
        Optional[str], o.opt("chunk, columns, stored. Default: the tuned one.")
    ] = None,
    attention_blocks: Annotated[
        Optional[str],
        o.opt(
            "Queries per attention call, 0 for all as mlx-lm does. Default: as tuned."
        ),
    ] = None,
    predictor: o.Predictor = None,
    compensator: o.Compensator = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    pipeline: o.Pipeline = False,
    no_tune: o.NoTune = False,
    fast: Annotated[
        bool,
        o.opt(
            "One more arm: dense, FFN weights dequantised first or in float16 where that is faster.",
            "--fast",
        ),
    ] = False,
    num_trials: Annotated[
        int, o.opt("Runs of each arm.", "--num-trials", "-n", min=1)
    ] = 5,
    delay: Annotated[float, o.opt("Seconds of rest before each run.", min=0)] = 0,
    json_file: o.JsonFile = None,
    save: Annotated[
        Optional[Path],
        o.opt(
            "Write a result to share here: machine, model and figures, see results/."
        ),
    ] = None,
    png: o.PngFile = None,
) -> None:
    """Measure the time to first token, sparse against stock mlx-lm, interleaved.

    Examples:

      mlx_fastforward bench --model mlx-community/Llama-3.2-3B-Instruct-4bit --json bench.json

      mlx_fastforward bench --random llama-3.2-1b --layers 8 --contexts 2048,4096

      mlx_fastforward bench --random llama-3.2-1b --sparsities 0,0.5 --prefill-draft smollm2-135m --keep 1,0.5

      mlx_fastforward bench report results/*.json --html report.html
    """
    if context.invoked_subcommand is not None:  # bench report
        return
    with one_line_errors(), interruptible():
        from ..bench.environment import describe
        from ..bench.machine import machine, thermal
        from ..bench.speed import result, ttft
        from ..bench.speed.picture import picture
        from ..loading import take_stage
        from ..model.families import mixers
        from ..scorers import DraftScorer

        check_files(json_file, png)
        check_files(save, None)
        check_fast(fast, 0)
        keeps = keep_configs(prefill_draft, keep, 1)
        sizes = numbers("--contexts", contexts, int) if contexts else None
        stages = pipeline and ranks.several()
        net, tokenizer, side = _model(
            model, random, layers, q_bits, dtype, predictor, trust_remote_code, stages
        )
        if sizes:
            check_lengths_of("--contexts", sizes, net, ttft.ROOM)
        configs = [
            PrefillConfig(s, selector=name, compensator=compensator, prune_tokens=share)
            for name in selectors.split(",")
            for s in numbers("--sparsities", sparsities, float)
            for share in numbers("--prune-tokens", prune_tokens, float)
        ]
        blocks = numbers("--block-sizes", block_sizes, int, 8) if block_sizes else []
        ways = strategies.split(",") if strategies else []
        queries = []
        if attention_blocks:
            queries = numbers("--attention-blocks", attention_blocks, int, 0)
        console = Console(stderr=True)
        draft = partial(
            _draft,
            net,
            tokenizer,
            side,
            random=random,
            layers=layers,
            q_bits=q_bits,
            dtype=dtype,
        )
        parts = readers(net, prefill_draft, keeps, draft)
        by_hand = no_tune or blocks or ways
        tune = (lambda e: e) if by_hand else (lambda e: e.on(tuned(net, e, console)))
        engines = _engines(net, side, configs, blocks, ways, queries, tune)
        runs = [ttft.Arm(e, r) for e in engines for r in parts]
        if keeps:  # of lists put together, the arm that leaves nothing out is stock
            runs = [a for a in runs if not a.stock] or runs
        if fast:
            runs.append(ttft.Arm(_fast(net, None if no_tune else console)))
        sizes, whole = sizes or ttft.default_contexts(net), mixers(net)
        name = random or public_name(model)
        named = f"{name}, {len(net.layers)} layers"
        if stages:
            take_stage(net)
        processes = ranks.group().size() if ranks.several() else 1
        before = thermal()
        total, each = len(sizes) * num_trials * (len(runs) + 1), (num_trials, delay)
        with progress(console, "timing", total) as tick:
            rows = ttft.benchmark(net, tokenizer, runs, sizes, *each, tick, whole)
        settings = {
            "model": named + (f", {q_bits} bits" if q_bits else ""),
            "dtype": dtype_name(net),
            "trials": num_trials,
        }
        if processes > 1:
            settings["processes"] = f"{processes} by layers" if stages else processes
        for scorer in dict.fromkeys(a.reader.scorer for a in runs if a.reader):
            if isinstance(scorer, DraftScorer):
                settings[f"draft {scorer.name}"] = f"{len(scorer.model.layers)} layers"
        environment = describe() | settings
        measured = [result.quality_of(r, result.quality(side)) for r in rows]
        say(", ".join(f"{k} {v}" for k, v in environment.items()))
        show(_table(rows, measured))
        report = {"environment": environment, "rows": [asdict(r) for r in rows]}
        write_json(json_file, report)
        title = picture_title(environment)
        write(png, lambda half: picture(half, rows, title, measured))
        if save is not None:
            run = {"trials": num_trials, "delay_s": delay, "tuned": not by_hand}
            run |= {"processes": processes, "pipeline": stages}
            about = result.described(net, runs[0].engine, name, random is not None)
            heat = before, thermal()
            found = result.result(about, machine(), heat, run, runs, rows, side)
            write_json(save, found)


def _model(
    model: Optional[str],
    random: Optional[str],
    layers: Optional[int],
    q_bits: int,
    dtype: Optional[str],
    predictor: Optional[str],
    trust_remote_code: bool,
    stages: bool,
) -> tuple[Any, Any, Any]:
    """The model, stock, its tokenizer and its predictor; whole, on disk, where layers are dealt out."""
    import mlx.core as mx
    from mlx_lm.utils import load_tokenizer

    from .. import demo
    from ..bench.speed import shapes
    from ..loading import check_cut, check_stages

    if q_bits not in (0, 2, 3, 4, 5, 6, 8):
        raise ConfigError(f"--q-bits must be 2, 3, 4, 5, 6 or 8, or 0; got {q_bits}.")
    if random is not None and model is not None:
        raise ConfigError("give --model or --random, not both.")
    check_choice("--dtype", dtype, DTYPES)
    if random is None:
        if layers or q_bits:
            raise ConfigError("--layers and --q-bits go with --random.")
        return stock_model(model, dtype, predictor, trust_remote_code, stages)
    if random not in shapes.SHAPES:
        known = ", ".join(shapes.SHAPES)
        raise ConfigError(f"--random must be one of {known}; got {random}.")
    if ranks.several():
        mx.random.seed(0)  # what the processes share must be the same
    usual = "bfloat16" if mx.default_device() == mx.gpu else "float32"
    kind = getattr(mx, dtype or usual)
    several = ranks.several()
    net = shapes.random_model(random, layers, kind, q_bits, lazy=several)
    if stages:
        check_stages(net)
    elif several:
        check_cut(net)
        net.shard(ranks.group())
        mx.eval(net.parameters())
    return net, load_tokenizer(demo.MODEL), shapes.random_predictor(net)


def _draft(
    net: Any,
    tokenizer: Any,
    side: Any,
    name: str,
    random: Optional[str],
    layers: Optional[int],
    q_bits: int,
    dtype: Optional[str],
) -> Any:
    """A scorer; beside random weights of some layers a draft of random weights, as many of its own."""
    import mlx.core as mx

    from ..bench.speed import shapes
    from ..scorers import DraftScorer

    if random is None or name not in shapes.SHAPES:
        return scorer_of(name, net, tokenizer, side, dtype)
    share = len(net.layers) / shapes.SHAPES[random]["num_hidden_layers"]
    own = shapes.SHAPES[name]["num_hidden_layers"]
    count = max(2, round(share * own)) if layers else None
    kind = getattr(mx, dtype_name(net))
    return DraftScorer(shapes.random_model(name, count, kind, q_bits), name)


def _fast(net: Any, console: Optional[Console]) -> Any:
    """The engine that skips nothing, and dequantises first where that is faster."""
    from ..build import engine_for

    engine = engine_for(net, PrefillConfig(0.0), device=FAST)
    return engine if console is None else engine.on(tuned(net, engine, console))


def _engines(
    net: Any,
    side: Any,
    configs: list[PrefillConfig],
    blocks: list[int],
    ways: list[str],
    queries: list[int],
    tune: Callable[[Any], Any],
) -> list[Any]:
    """All settings under every block size, strategy and attention block that was asked for."""
    from ..build import engine_for

    found: list[Any] = []
    sizes: list[Optional[int]] = [*blocks] or [None]
    for config, block, way in product(configs, sizes, ways or STRATEGIES[:1]):
        config, device = replace(config, block_size=block), DeviceSettings(strategy=way)
        engine = tune(engine_for(net, config, side, device=device))
        devices = [replace(engine.device, attention_block=n) for n in queries]
        found += [engine.on(device) for device in devices] or [engine]
    return found


def _table(rows: Any, measured: Any = ()) -> Table:
    """Sparse against stock mlx-lm; what eval --save measured of some, beside it."""
    from ..bench.speed.result import cells

    columns = COLUMNS if any(measured) else COLUMNS[:-2]
    table = Table(*(HEADS.get(name, name) for name in columns))
    for row, quality in zip_longest(rows, measured):
        found = cells(row, quality)
        table.add_row(*(found[name] for name in columns))
    return table
