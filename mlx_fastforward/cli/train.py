"""mlx_fastforward train: fit a predictor on this machine."""

import time
from pathlib import Path
from typing import Annotated, Any, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import expanded
from . import options as o
from .errors import fail, interruptible, one_line_errors
from .inputs import check_choice
from .models import load_model, public_name

PREDICTORS = ("token-wise", "pooled")
SCORES = ("relative", "weighted", "plain")
COMPENSATORS = ("low-rank", "mlp", "none")


def train(
    model: o.Model = None,
    data: Annotated[
        Optional[list[str]],
        o.opt(
            "Text or JSONL files, folders of them, or a data set of the Hugging Face hub. "
            "Default: bundled prose, and chats made from it."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        o.opt(
            "Folder of the predictor. Default: your predictors' folder, where chat looks."
        ),
    ] = None,
    tokens: Annotated[
        Optional[int],
        o.opt(
            "Tokens to read. Default: 400,000, fewer if they take more than 16 GB of disk.",
            min=4096,
        ),
    ] = None,
    minutes: Annotated[
        float, o.opt("Time for everything, about; 0: no limit.", min=0)
    ] = 0,
    steps: Annotated[int, o.opt("Steps of the predictors, at most.", min=1)] = 4000,
    length: Annotated[int, o.opt("Tokens per sequence.", min=256)] = 1920,
    kind: Annotated[
        str, o.opt("token-wise, or pooled as in the paper.")
    ] = "token-wise",
    score: Annotated[
        str, o.opt("Which neurons count as the best: relative, weighted, plain.")
    ] = "relative",
    rank: Annotated[
        int, o.opt("Of the predictors; 0: hidden size / 8, at most 256.", min=0)
    ] = 0,
    compensator: Annotated[
        str, o.opt("low-rank, mlp as in the paper, or none.")
    ] = "low-rank",
    compensator_rank: Annotated[
        int, o.opt("Or hidden units of an mlp; 0: hidden size / 8, at most 64.", min=0)
    ] = 0,
    sequential: Annotated[
        bool,
        o.opt(
            "Take the second half of the tokens as they arrive below sparse layers.",
            "--sequential",
        ),
    ] = False,
    seed: o.Seed = 0,
    restart: Annotated[bool, o.opt("Forget an unfinished run.", "--restart")] = False,
    overwrite: Annotated[
        bool, o.opt("Replace a predictor that is there.", "--overwrite")
    ] = False,
    dry_run: Annotated[
        bool, o.opt("Say what it would take, and stop.", "--dry-run")
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Fit predictors and a compensator for a model, on this machine.

    Ctrl-C stops; the same command goes on where it was.

    Examples:

      mlx_fastforward train --model mlx-community/Llama-3.2-3B-Instruct-4bit --minutes 20

      mlx_fastforward train --data notes/ --data chats.jsonl --tokens 1000000 --out predictor
    """
    with one_line_errors(), interruptible():
        check_choice("--kind", kind, PREDICTORS)
        check_choice("--score", score, SCORES)
        check_choice("--compensator", compensator, COMPENSATORS)
        from ..attachment import detach
        from ..predictors.base import BaseModel
        from ..predictors.file import JSON_NAME
        from ..predictors.search import default_folder
        from ..train import estimate
        from ..train.data import Sequences, open_corpus
        from ..train.run import WORK, Run
        from ..train.state import Settings, forget

        corpus = open_corpus(data)
        net, tokenizer = load_model(
            model, sparsity=0.0, predictor="none", trust_remote_code=trust_remote_code
        )
        detach(net)
        name = public_name(model)
        base = BaseModel.of(net, name)
        out = expanded(out or default_folder(base))
        # of the same command, perhaps
        unfinished = (out / WORK / "state.json").exists() and not restart
        if (out / JSON_NAME).exists() and not (overwrite or unfinished or dry_run):
            fail(
                f"{out} holds a predictor file: --overwrite replaces it, --out puts the new one elsewhere."
            )
        settings = Settings(
            tokens or estimate.default_tokens(base),
            length,
            minutes,
            steps,
            kind=kind,
            score=score,
            rank=rank,
            compensator=compensator,
            compensator_rank=compensator_rank,
            sequential=sequential,
            seed=seed or 0,
            data=", ".join(data) if data else "bundled",
        )
        console = Console(stderr=True, highlight=False)
        if restart and not dry_run:
            forget(out / WORK)
        parts = [
            Sequences(corpus, tokenizer, length, settings.seed, held_out)
            for held_out in (False, True)
        ]
        with _progress(console) as tick:
            run = Run(net, name, (parts[0], parts[1]), out, settings, tick)
            _announce(run, console, new=dry_run or not run.state.tokens)
            if dry_run:
                _dry_run(run, console)
                return
            start = time.perf_counter()
            try:
                report = run()
            except KeyboardInterrupt:
                fail(f"stopped; the same command goes on from {out / WORK}.", 130)
            except OSError as e:
                fail(f"{out} cannot be written: {str(e.strerror or e).rstrip('.')}.")
        _conclude(report, out, time.perf_counter() - start)


def _announce(run: Any, console: Console, new: bool) -> None:
    """What it takes; refuses where the disk is too small."""
    from ..train import estimate

    tokens = run.settings.tokens
    disk = estimate.disk(run.base, run.settings)
    memory = estimate.memory(run.base, run.settings)
    free = estimate.free_disk(run.out)
    if new and disk > 0.95 * free:
        fitting = estimate.tokens_for(free, run.base, run.settings)
        fail(
            f"{tokens:,} tokens take {disk / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free "
            f"for {run.out}; "
            + (f"try --tokens {fitting}." if fitting >= 4096 else "free some.")
        )
    console.print(
        f"Up to {tokens:,} tokens; {disk / 1e9:.2f} GB of disk in {run.out} while it runs, at "
        f"most {memory / 1e9:.2f} GB of memory besides what the model takes to read.",
        soft_wrap=True,
    )


def _dry_run(run: Any, console: Console) -> None:
    """Time a little of everything, and say how long all would take."""
    from ..train import estimate

    found = estimate.seconds(run)
    parts = ", ".join(f"{phase} {s / 60:.1f}" for phase, s in found.items())
    console.print(f"About {sum(found.values()) / 60:.1f} minutes: {parts}.")
    if run.settings.minutes:
        console.print(f"--minutes {run.settings.minutes:g} cuts that short.")


def _progress(console: Console) -> Any:
    import contextlib

    @contextlib.contextmanager
    def shown() -> Any:
        bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[details]}"),
            console=console,
            disable=not console.is_terminal,
        )
        tasks: dict[str, Any] = {}

        def tick(phase: str, done: float, total: float, details: str) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, details=details)
            bar.update(tasks[phase], completed=done, total=total, details=details)

        with bar:
            yield tick

    return shown()


def _conclude(report: dict[str, Any], out: Path, seconds: float) -> None:
    found = report["calibration"]
    recall = sum(found["recall"]) / len(found["recall"])
    print(f"{found['tokens']:,} tokens, {seconds / 60:.1f} minutes. On held-out text:")
    print(f"recall of the best half of the neurons: {recall:.1%}")
    if removed := found["error_removed"]:
        share = sum(removed) / len(removed)
        print(f"error removed by the compensator, mean of the layers: {share:.0%}")
    for arm, row in (found["from_dense"] or {}).items():
        print(f"at 50 %, {arm}: KL {row['kl']:.4f}, top-1 agreement {row['top1']:.1%}")
    print(f"predictor: {out} (with report.json and report.png)")
