"""The command line: ``mlx_fastforward`` and ``python -m mlx_fastforward``."""

import os
import re
import sys
import traceback
from typing import Annotated, Callable, Optional

import typer

from .. import ranks
from ..version import __version__
from .bench import bench
from .bench_report import report
from .catalogue import models
from .chat import chat
from .convert import convert
from .demo import demo
from .doctor import doctor
from .errors import one_process
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .predictors import predictors
from .readout import readout
from .serve import serve
from .train import train
from .tune import tune
from .upload import upload

app = typer.Typer(
    help="A shorter time to first token with mlx-lm: block-wise FFN-sparse prefill.",
    epilog="Start with: mlx_fastforward demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


# what runs under mlx.launch, a part of the model in each process
LAUNCHED = ("bench", "chat", "generate", "serve")


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    # Read when a command imports transformers: it would comment on long prompts otherwise.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ranks.rank() is not None:
        _launched(str(context.invoked_subcommand))


def _launched(command: str) -> None:
    """One process of several: the first speaks for all, the others say only what breaks."""
    if ranks.rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *e: traceback.print_exception(*e, file=sys.__stderr__)
    if command not in LAUNCHED:
        one_process(command)


def paragraphs(command: Callable) -> str:
    """A docstring for --help, which would keep its line ends; examples are one line each."""
    return re.sub(r"(?<=\S)\n *(?=\S)", " ", command.__doc__ or "")


def add(command: Callable, name: Optional[str] = None) -> None:
    app.command(name, help=paragraphs(command))(command)


add(chat)
add(generate)
# its flags are mlx_lm.server's: argparse reads them, --help too
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve)
add(demo)
add(doctor)
add(evaluate, "eval")
add(inspect)
add(tune)
add(train)
add(readout)
add(convert)
add(predictors)
add(models)
add(upload)

# `bench ...` measures, `bench report ...` shows
benches = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")
benches.callback()(bench)
benches.command()(report)
app.add_typer(benches, name="bench")


def main() -> None:
    app(prog_name="mlx_fastforward")
