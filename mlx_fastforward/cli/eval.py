"""mlx_fastforward eval: does the model still answer right when it reads sparsely?"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

from rich.console import Console

from ..config import PrefillConfig
from ..errors import ConfigError
from . import options as o
from .errors import interruptible, one_line_errors
from .eval_lm import chosen, run_benchmark
from .eval_save import save_verified
from .eval_tables import announce, show
from .first_use import tuned
from .inputs import DTYPES, check_choice, numbers
from .models import dtype_name, public_name, stock_model
from .outputs import check_files, picture_title, write, write_json
from .part_read import keep_configs, readers, scorer_of
from .progress import progress

SHORT = 128  # tokens; shorter prompts, follow-up questions, are read whole


def evaluate(
    model: o.Model = None,
    predictor: o.Predictor = None,
    selectors: o.Selectors = "auto",
    compensators: Annotated[str, o.opt("auto, none, mlp, low-rank.")] = "auto",
    sparsities: o.Sparsities = "0.5",
    prune_tokens: o.PruneShares = "0",
    prefill_draft: o.Drafts = None,
    keep: o.KeepShares = None,
    block_sizes: Annotated[
        Optional[str],
        o.opt(
            "Tokens that share one set of neurons, about. Default: as tuned for this "
            "device, as chat runs."
        ),
    ] = None,
    no_tune: o.NoTune = False,
    schedule: o.Schedule = "auto",
    sparse_decode: o.SparseDecode = False,
    tasks: Annotated[
        Optional[str],
        o.opt(
            "continuation, needle, key-value, quote, chat: the default; qa with --data; hard ones: "
            "counting, several, table, code, tool, json. Or LongBench's or MMLU's."
        ),
    ] = None,
    longbench: Annotated[
        bool,
        o.opt(
            "LongBench instead, through lm-eval (pip install 'mlx-fastforward\\[eval]').",
            "--longbench",
        ),
    ] = False,
    mmlu: Annotated[bool, o.opt("MMLU instead, through lm-eval.", "--mmlu")] = False,
    limit: Annotated[
        Optional[int],
        o.opt("Prompts per task of LongBench or MMLU. Default: all.", min=1),
    ] = None,
    lengths: Annotated[
        Optional[str],
        o.opt("Prompt tokens. Default: 1024,2048,4096, as the model allows."),
    ] = None,
    prompts: Annotated[int, o.opt("Documents per task and length.", min=1)] = 8,
    data: Annotated[
        Optional[Path],
        o.opt(
            'Your questions, JSONL: {"context", "question", "answers": [...]}. A folder with '
            "the files of LongBench or MMLU; default: from the hub."
        ),
    ] = None,
    max_tokens: Annotated[
        int, o.opt("Of an answer, at most.", "--max-tokens", "-m", min=1)
    ] = 40,
    save: Annotated[
        bool,
        o.opt(
            "Measure what each layer and a few sparsities cost, and keep it with the predictor "
            "file: chat's --sparsity auto goes by it.",
            "--save",
        ),
    ] = False,
    seed: Annotated[int, o.opt("Other seeds, other prompts.", min=0)] = 0,
    dtype: o.Dtype = None,
    json_file: o.JsonFile = None,
    png: o.PngFile = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Compare answers after a sparse prefill with the dense model's, on the same prompts.

    Examples:

      mlx_fastforward eval --model mlx-community/Llama-3.2-3B-Instruct-4bit --json eval.json

      mlx_fastforward eval --sparsities 0.3,0.5 --tasks key-value,chat --lengths 1900 --prompts 32

      mlx_fastforward eval --sparsities 0,0.5 --prune-tokens 0.1,0.25

      mlx_fastforward eval --sparsities 0,0.5 --prefill-draft words,DRAFT --keep 1,0.5,0.3 --png all.png

      mlx_fastforward eval --data questions.jsonl --tasks qa
    """
    with one_line_errors(), interruptible():
        check_files(json_file, png)
        blocks: list[Optional[int]] = [None]
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
                prune_tokens=share,
            )
            for selector in selectors.split(",")
            for compensator in compensators.split(",")
            for sparsity in numbers("--sparsities", sparsities, float)
            for share in numbers("--prune-tokens", prune_tokens, float)
            for block in blocks
        ]
        benchmark = chosen(longbench, mmlu, limit, lengths, png, prefill_draft)
        keeps = keep_configs(prefill_draft, keep, SHORT)
        if prefill_draft is not None and sparse_decode:
            raise ConfigError("--sparse-decode does not go with --prefill-draft.")
        asked = [] if benchmark else _tasks(tasks, data)
        sizes = numbers("--lengths", lengths, int) if lengths else None
        check_choice("--dtype", dtype, DTYPES)
        net, tokenizer, side = stock_model(model, dtype, predictor, trust_remote_code)
        load = partial(
            scorer_of, model=net, tokenizer=tokenizer, side=side, dtype=dtype
        )
        parts = readers(net, prefill_draft, keeps, load)
        if save:
            more = [(c, r) for c in configs for r in parts if c.prune_tokens or r]
            save_verified(net, tokenizer, side, model, prompts, no_tune, more)
            return
        from ..bench.eval.arms import arms_of
        from ..bench.eval.evaluation import evaluate as run
        from ..bench.eval.frontier import frontier
        from ..bench.eval.picture import picture
        from ..bench.eval.summaries import summaries, worst
        from ..bench.eval.tasks import build

        console = Console(stderr=True, highlight=False)
        tune = None if no_tune else lambda engine: tuned(net, engine, console)
        arms = arms_of(net, configs, side, parts, tune)
        if benchmark:
            table = run_benchmark(
                benchmark, net, tokenizer, arms, side, tasks, limit, data, console
            )
            write_json(json_file, table | {"environment": _environment(net, model)})
            return
        sizes = _lengths(net, sizes)
        with console.status("choosing prompts"):
            documents = build(tokenizer, asked, sizes, prompts, seed, data)
        engines: list[Any] = [arm.engine(net, side) for arm in arms]
        shortest = max(engine.shortest for engine in engines)
        announce(console, documents, [a.label for a in arms], shortest)
        start = time.perf_counter()
        total = sum(d.length for d in documents) * (len(arms) + 1)
        with progress(console, "asking", total) as tick:
            records = run(net, tokenizer, documents, arms, side, tick, max_tokens)
        seconds = time.perf_counter() - start
        found, bad = summaries(records), worst(records)
        points = frontier(records, {arm.label: arm.left_out for arm in arms})
        settings = {
            "predictor": public_name(side.source) if side else "none",
            "tasks": asked,
            "lengths": sizes,
            "prompts": prompts,
            "data": data.name if data else None,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        environment = _environment(net, model)
        show(environment, found, bad, points)
        report = {
            "environment": environment,
            "settings": settings,
            "seconds": round(seconds, 1),
            "arms": [arm.settings(engine) for arm, engine in zip(arms, engines)],
            "frontier": [asdict(p) for p in points],
            "summaries": [asdict(s) for s in found],
            "worst": [asdict(r) for r in bad],
            "records": [asdict(r) for r in records],
        }
        write_json(json_file, report)
        title = picture_title(environment)
        write(png, lambda half: picture(half, records, found, points, title))
        console.print(
            f"{len(records):,} answers compared in {seconds / 60:.1f} minutes."
        )


def _tasks(tasks: Optional[str], data: Optional[Path]) -> list[str]:
    from ..bench.eval.tasks import BUILT, TASKS

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
    from ..bench.eval.tasks import ROOM, SHORTEST, default_lengths
    from ..model.families import context_length

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


def _environment(net: Any, model: Optional[str]) -> dict[str, Any]:
    from ..bench.environment import describe

    name = f"{public_name(model)}, {len(net.layers)} layers"
    return describe() | {"model": name, "dtype": dtype_name(net)}
