"""mlx_fastforward eval: does the model still answer right when it reads sparsely?"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import Progress

from ..config import BLOCK_SIZE, ConfigError, PrefillConfig
from . import options as o
from .benchmarks import chosen, run_benchmark
from .common import interruptible, one_line_errors
from .evaluation_tables import announce, show
from .measuring import (
    check_dtype,
    check_files,
    dtype_name,
    numbers,
    public_name,
    stock_model,
    write,
    write_json,
)
from .tuning import tune_once


def evaluate(
    model: o.Model = None,
    adapter: o.Adapter = None,
    selectors: Annotated[
        str, typer.Option(help="auto, trained, probe, first-block, oracle.")
    ] = "auto",
    compensators: Annotated[
        str, typer.Option(help="auto, none, mlp, low-rank.")
    ] = "auto",
    sparsities: Annotated[
        str, typer.Option(help="Shares of FFN neurons dropped.")
    ] = "0.5",
    block_sizes: Annotated[
        Optional[str],
        typer.Option(
            help="Tokens that share one set of neurons, about. Default: as tuned for this "
            "device, as chat runs.",
            show_default=False,
        ),
    ] = None,
    no_tune: o.NoTune = False,
    schedule: o.Schedule = "auto",
    sparse_decode: o.SparseDecode = False,
    tasks: Annotated[
        Optional[str],
        typer.Option(
            help="continuation, needle, key-value, quote, chat, qa. Default: all, qa with --data. "
            "Or LongBench's or MMLU's.",
            show_default=False,
        ),
    ] = None,
    longbench: Annotated[
        bool,
        typer.Option(
            "--longbench",
            help="LongBench instead, through lm-eval (pip install 'mlx-fastforward\\[eval]').",
        ),
    ] = False,
    mmlu: Annotated[
        bool, typer.Option("--mmlu", help="MMLU instead, through lm-eval.")
    ] = False,
    limit: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Prompts per task of LongBench or MMLU. Default: all.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        Optional[str],
        typer.Option(
            help="Prompt tokens. Default: 1024,2048,4096, as the model allows.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Documents per task and length.")
    ] = 8,
    data: Annotated[
        Optional[Path],
        typer.Option(
            help='Your questions, JSONL: {"context", "question", "answers": [...]}. A folder with '
            "the files of LongBench or MMLU; default: from the hub.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Of an answer, at most.")
    ] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other prompts.")] = 0,
    dtype: o.Dtype = None,
    json_file: o.JsonFile = None,
    png: Annotated[Optional[Path], typer.Option(help="Write a picture here.")] = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Compare answers after a sparse prefill with the dense model's, on the same prompts.

    Examples:

      mlx_fastforward eval --model mlx-community/Llama-3.2-3B-Instruct-4bit --json eval.json

      mlx_fastforward eval --sparsities 0.3,0.5 --tasks key-value,chat --lengths 1900 --prompts 32

      mlx_fastforward eval --data questions.jsonl --tasks qa
    """
    with one_line_errors(), interruptible():
        check_files(json_file, png)
        blocks = [BLOCK_SIZE]
        if block_sizes:
            blocks = numbers("--block-sizes", block_sizes, int)
        configs = [
            PrefillConfig(
                sparsity,
                block,
                selector=selector,
                compensator=compensator,
                schedule=schedule,
                sparse_decode=sparse_decode,
            )
            for selector in selectors.split(",")
            for compensator in compensators.split(",")
            for sparsity in numbers("--sparsities", sparsities, float)
            for block in blocks
        ]
        benchmark = chosen(longbench, mmlu, limit, lengths, png)
        asked = [] if benchmark else _tasks(tasks, data)
        sizes = numbers("--lengths", lengths, int) if lengths else None
        check_dtype(dtype)
        net, tokenizer, side = stock_model(model, dtype, adapter, trust_remote_code)
        from ..bench.evaluation import evaluate as run
        from ..bench.summaries import summaries, worst
        from ..bench.tasks import build

        console = Console(stderr=True, highlight=False)
        if not block_sizes and not no_tune:
            configs = [_tuned(net, config, side, console) for config in configs]
        usual = set() if block_sizes else {BLOCK_SIZE}
        arms, shortest = _arms(net, configs, side, usual)
        if benchmark:
            table = run_benchmark(
                benchmark, net, tokenizer, arms, side, tasks, limit, data, console
            )
            write_json(json_file, table | {"environment": _environment(net, model)})
            return
        sizes = _lengths(net, sizes)
        with console.status("choosing prompts"):
            documents = build(tokenizer, asked, sizes, prompts, seed, data)
        announce(console, documents, [a.label for a in arms], shortest)
        start = time.perf_counter()
        with Progress(console=console, disable=not console.is_terminal) as bar:
            total = sum(d.length for d in documents) * (len(arms) + 1)
            task = bar.add_task("asking", total=total)
            records = run(
                net,
                tokenizer,
                documents,
                arms,
                side,
                lambda tokens: bar.advance(task, tokens),
                max_tokens,
            )
        seconds = time.perf_counter() - start
        found, bad = summaries(records), worst(records)
        settings = {
            "adapter": public_name(side.source) if side else "none",
            "tasks": asked,
            "lengths": sizes,
            "prompts": prompts,
            "data": data.name if data else None,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        environment = _environment(net, model)
        show(environment, found, bad)
        report = {
            "environment": environment,
            "settings": settings,
            "seconds": round(seconds, 1),
            "arms": [{"label": a.label, **asdict(a.config)} for a in arms],
            "summaries": [asdict(s) for s in found],
            "worst": [asdict(r) for r in bad],
            "records": [asdict(r) for r in records],
        }
        _write(report, records, found, json_file, png)
        console.print(
            f"{len(records):,} answers compared in {seconds / 60:.1f} minutes."
        )


def _tasks(tasks: Optional[str], data: Optional[Path]) -> list[str]:
    from ..bench.tasks import BUILT, TASKS

    asked = [*BUILT, *(["qa"] if data else [])]
    if tasks is not None:
        asked = list(dict.fromkeys(t.strip() for t in tasks.split(",")))
    for task in asked:
        if task not in TASKS:
            raise ConfigError(
                f"--tasks must be among {', '.join(TASKS)}; got {task!r}."
            )
    if ("qa" in asked) != (data is not None):
        raise ConfigError("--data and the task qa need each other.")
    return asked


def _lengths(net: Any, asked: Optional[list[int]]) -> list[int]:
    """Prompt lengths that leave room for the answers."""
    from ..bench.tasks import ROOM, SHORTEST, default_lengths
    from ..families import context_length

    context = context_length(net)
    if asked is None:
        return default_lengths(context)
    if context and max(asked) + ROOM > context:
        raise ConfigError(
            f"--lengths {max(asked)} is too long: the model's context has {context:,} tokens, "
            f"{ROOM} of them for questions and answers; use at most {context - ROOM}."
        )
    if min(asked) < SHORTEST:
        raise ConfigError(
            f"--lengths must be at least {SHORTEST} tokens, got {min(asked)}."
        )
    return sorted(set(asked))


def _tuned(
    net: Any, config: PrefillConfig, side: Any, console: Console
) -> PrefillConfig:
    """The settings that chat would run with; where dense is faster, those asked for."""
    from ..attachment import attach, detach

    engine = attach(net, config, adapter=side)
    detach(net)
    tune_once(net, engine, console)
    return config if engine.tuned_dense else engine.config


def _arms(
    net: Any, configs: list[PrefillConfig], side: Any, usual: set[int]
) -> tuple[list[Any], int]:
    """Arms named by what they run, and from which length on all of them read sparsely.

    Block sizes are named where there are several, those that are ``usual`` counted.
    """
    from ..attachment import attach, detach
    from ..bench.evaluation import Arm, label, labels_of

    several = len({c.block_size for c in configs} | usual) > 1
    arms, shortest = [], 0
    for config in configs:
        engine = attach(net, config, adapter=side)
        arms.append(Arm(label(engine, several), config))
        shortest = max(shortest, engine.shortest)
    detach(net)
    labels_of(arms)
    return arms, shortest


def _environment(net: Any, model: Optional[str]) -> dict[str, Any]:
    from ..bench.environment import describe

    name = f"{public_name(model)}, {len(net.layers)} layers"
    return describe() | {"model": name, "dtype": dtype_name(net)}


def _write(
    report: dict[str, Any],
    records: Any,
    found: Any,
    json_file: Optional[Path],
    png: Optional[Path],
) -> None:
    from ..bench.evaluation_picture import picture

    env = report["environment"]
    title = f"{env['model']}, {env['dtype']}, {env['device']}, mlx {env['mlx']}"
    write_json(json_file, report)
    write(png, lambda half: picture(half, records, found, title))
