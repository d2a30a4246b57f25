"""mlx_fastforward train: fit a predictor on this machine."""

import time
from math import ceil, inf
from typing import Annotated, Any, Optional

from rich.console import Console

from ..files import expanded
from . import options as o
from .errors import fail, interruptible, one_line_errors
from .inputs import check_choice
from .lengths import check_lengths_of
from .models import load_model, public_name
from .progress import phases
from .tables import say
from .train_end import DOCUMENTS, conclude, verified

PREDICTORS = ("token-wise", "pooled")
COMPENSATORS = ("low-rank", "mlp", "none")
LEAST = 4096  # tokens


def train(
    model: o.Model = None,
    data: Annotated[
        Optional[list[str]],
        o.opt(
            "Text or JSONL files, folders of them, or a data set of the Hugging Face hub. "
            "Default: bundled prose, and chats made from it."
        ),
    ] = None,
    out: o.PredictorFolder = None,
    tokens: Annotated[
        Optional[int],
        o.opt(
            "Tokens to read. Default: 400,000, fewer if they take more than 16 GB of disk.",
            min=LEAST,
        ),
    ] = None,
    minutes: Annotated[
        float, o.opt("Time for everything, about; 0: no limit.", min=0)
    ] = 0,
    steps: Annotated[int, o.opt("Steps of the predictors, at most.", min=1)] = 4000,
    length: Annotated[
        Optional[int],
        o.opt("Tokens per sequence. Default: 1920, as the model allows.", min=256),
    ] = None,
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
    overwrite: o.Overwrite = False,
    dry_run: Annotated[
        bool, o.opt("Say what it would take, and stop.", "--dry-run")
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Fit predictors and a compensator for a model, on this machine, and measure what they cost.

    Ctrl-C stops; the same command goes on where it was.

    Examples:

      mlx_fastforward train --model mlx-community/Llama-3.2-3B-Instruct-4bit --minutes 20

      mlx_fastforward train --data notes/ --data chats.jsonl --tokens 1000000 --out predictor
    """
    with one_line_errors(), interruptible():
        from ..train.capture import SCORES

        check_choice("--kind", kind, PREDICTORS)
        check_choice("--score", score, SCORES)
        check_choice("--compensator", compensator, COMPENSATORS)
        console = Console(stderr=True, highlight=False)
        with console.status("opening the data and the model"):
            from ..attachment import detach
            from ..bench.eval.verify import tokens_read
            from ..predictors.base import BaseModel
            from ..predictors.file import JSON_NAME
            from ..predictors.search import default_folder
            from ..train.data import Sequences, open_corpus, usual_length
            from ..train.run import WORK, Run
            from ..train.state import Settings

            corpus = open_corpus(data)
            net, tokenizer = load_model(
                model,
                sparsity=0.0,
                predictor="none",
                trust_remote_code=trust_remote_code,
            )
        detach(net)
        check_lengths_of("--length", [length or 0], net)
        length = length or usual_length(net)
        name = public_name(model)
        base = BaseModel.of(net, name)
        out = expanded(out or default_folder(base))
        if out.is_file():
            fail(f"{out} is a file; expected a folder to write to.")
        # of the same command, perhaps
        unfinished = (out / WORK / "state.json").exists() and not restart
        if (out / JSON_NAME).exists() and not (overwrite or unfinished or dry_run):
            fail(
                f"{out} holds a predictor file: --overwrite replaces it, --out puts the new one elsewhere."
            )
        settings = Settings(
            _tokens(tokens, corpus, base, console),
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
        parts = [
            Sequences(corpus, tokenizer, length, settings.seed, held_out)
            for held_out in (False, True)
        ]
        with phases(console) as tick:
            tick("measuring", 0.0, 1.0, "what it takes")
            run = Run(net, name, (parts[0], parts[1]), out, settings, tick, restart)
            new = dry_run or not run.state.tokens
            _announce(run, console, new)
            reads = tokens_read(net, None, DOCUMENTS)
            if dry_run:
                _dry_run(run, console, reads)
                return
            if new and minutes:
                _enough(run, reads * 2 // DOCUMENTS)  # two are read however late
            start = time.perf_counter()
            try:
                report = run()
            except KeyboardInterrupt:
                kept = (out / WORK / "state.json").exists()
                on = f"the same command goes on from {out / WORK}."
                fail(f"stopped; {on if kept else 'nothing was done yet.'}", 130)
            except OSError as e:
                fail(f"{out} cannot be written: {str(e.strerror or e).rstrip('.')}.")
            left = minutes - sum(run.state.seconds.values()) / 60 if minutes else inf
            try:
                found = verified(net, tokenizer, out, left, tick)
            except KeyboardInterrupt:
                how = f"mlx_fastforward eval --save --predictor {out}"
                how += f" --model {model}" if model else ""
                fail(f"stopped; the predictor is made, and not verified: {how}.", 130)
        conclude(report, found, out, model, time.perf_counter() - start)


def _tokens(asked: Optional[int], corpus: Any, base: Any, console: Console) -> int:
    """What is read; refuses where there is next to no text, says where there is little."""
    from ..train import estimate
    from ..train.data import PASSES

    wanted = asked or estimate.default_tokens(base)
    most = corpus.most_tokens
    if most < LEAST:
        fail(
            f"the data holds about {most // PASSES:,} tokens; expected {LEAST // PASSES:,} at "
            "least, better a hundred times as many: name more with --data."
        )
    if most < wanted:
        say(
            f"The data holds about {most // PASSES:,} tokens: each is read about {PASSES} times, "
            f"{most:,} in all instead of {wanted:,}.",
            console,
        )
    return int(min(wanted, most))


def _enough(run: Any, reads: int) -> None:
    """Refuse --minutes in which nothing useful can be made."""
    from ..train import estimate

    least, asked = estimate.least_minutes(run, reads), run.settings.minutes
    if asked < least:
        fail(
            f"--minutes {asked:g} is too little for this model on this machine: "
            f"expected {ceil(least)} at least.",
            2,
        )


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
    say(
        f"Up to {tokens:,} tokens; {disk / 1e9:.2f} GB of disk in {run.out} while it runs, at "
        f"most {memory / 1e9:.2f} GB of memory besides what the model takes to read.",
        console,
    )


def _dry_run(run: Any, console: Console, reads: int) -> None:
    """Time a little of everything, and say how long all would take."""
    from ..train import estimate

    found = estimate.seconds(run, reads)
    parts = ", ".join(f"{phase} {s / 60:.1f}" for phase, s in found.items())
    total = sum(found.values()) / 60
    say(f"About {total:.1f} minutes: {parts}.", console)
    if run.settings.minutes:
        console.print(f"--minutes {run.settings.minutes:g} cuts that short.")
