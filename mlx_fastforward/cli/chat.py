"""mlx_fastforward chat: the loop, its commands and what they print."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

import typer
from rich.console import Console
from rich.text import Text

from . import options as o
from .errors import one_line_errors
from .first_use import tune_first
from .inputs import (
    check_choice,
    check_lengths,
    length_warning,
    read_text,
    sampling,
    sparsity_of,
    template_config,
)
from .models import load_model
from .outputs import status_line
from .terminal import Lines, prefill_progress, show_compared

HELP = """\
/file PATH   put a document before the next message
/compare     answer the last message sparse and dense, with both TTFTs
/dense       prefill like stock mlx-lm; /sparse switches back
/reset       forget the conversation (also: r)
/help        this list (also: h)
/quit        leave (also: q, Ctrl-D)
Ctrl-C stops an answer. Alt-Enter starts a new line; a paste may have many."""


def chat(
    model: o.Model = None,
    file: o.File = None,
    adapter_path: o.AdapterPath = None,
    trust_remote_code: o.TrustRemoteCode = False,
    sparsity: o.AutoSparsity = "auto",
    prune_tokens: o.PruneTokens = 0.0,
    block_size: o.BlockSize = None,
    no_tune: o.NoTune = False,
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    max_tokens: o.MaxTokens = 256,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    seed: o.Seed = 0,
    system_prompt: o.SystemPrompt = None,
    chat_template_config: o.ChatTemplateConfig = None,
    max_kv_size: o.MaxKvSize = None,
    prefill_step_size: o.PrefillStepSize = 2048,
) -> None:
    """Chat with a model that reads long prompts sparsely.

    Examples:

      mlx_fastforward chat --model mlx-community/Llama-3.2-3B-Instruct-4bit

      mlx_fastforward chat --file report.txt --sparsity 0.4

      echo "Who was Alice?" | mlx_fastforward chat > answer.txt
    """
    with one_line_errors():
        check_lengths(max_tokens, prefill_step_size, block_size)
        check_choice("--selector", selector, o.SELECTORS)
        share = sparsity_of(sparsity)
        template = template_config(chat_template_config)
        document = read_text(file) if file is not None else None
        net, tokenizer = load_model(
            model,
            sparsity=share,
            prune_tokens=prune_tokens,
            block_size=block_size,
            selector=selector,
            predictor=predictor,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
        )
        tune_first(net, block_size, no_tune)
        import mlx.core as mx

        from ..session import Session

        if seed is not None:
            mx.random.seed(seed)
        loop = Chat(
            Session(net, tokenizer, system_prompt, max_kv_size, template),
            document,
            max_tokens=max_tokens,
            sampler=sampling(
                tokenizer,
                temp,
                top_p,
                xtc_probability=xtc_probability,
                xtc_threshold=xtc_threshold,
            ),
            prefill_step_size=prefill_step_size,
        )
        loop.banner(model, file)
        loop.run()


class Chat:
    """One run of the chat. With a pipe at either end it prints answers and nothing else."""

    def __init__(self, session: Any, document: Optional[str], **generation: Any):
        self.session = session
        self.document = document
        self.generation = generation
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=True)
        self.last: Optional[str] = None
        self.failed = False

    @property
    def engine(self) -> Any:
        from ..attachment import engine_of

        engine = engine_of(self.session.model)
        assert engine is not None
        return engine

    def note(self, text: str) -> None:
        """A quiet line, for people only."""
        if self.interactive:
            self.console.print(Text(text, style="dim"))

    def problem(self, text: str) -> None:
        """Something that was asked for did not happen."""
        self.failed = True
        self.say(text)

    def say(self, text: str) -> None:
        if self.interactive:
            self.console.print(Text(text, style="yellow"))
        else:
            print(f"mlx_fastforward: {text}", file=sys.stderr)

    def why_dense(self) -> str:
        if self.engine.device.dense:
            return "dense prefill is the fastest on this device; start with --no-tune"
        if self.engine.chosen is not None:
            return f"{self.engine.chosen}; start with --sparsity 0.5 to try"
        return "this chat was started with --sparsity 0; start it with more"

    def banner(self, model: Optional[str], file: Optional[Path]) -> None:
        if not self.interactive:
            return
        engine = self.engine
        mode = "dense (stock mlx-lm)"
        if engine.device.dense:
            mode += ", the fastest on this device; --no-tune runs sparsely"
        if engine.sparse:
            share, tokens = engine.settings()["sparsity"], engine.block_size
            mode = f"{share:.0%} of FFN neurons dropped per {tokens} tokens"
            mode += f", selector {engine.selector.name}"
            if skip := engine.config.prune_tokens:
                mode += f"; {skip:.0%} of the tokens skip FFNs"
            if engine.share < 1:
                mode += f"; within reach: {engine.share:.0%} of the FFN FLOPs"
        self.console.print(Text("mlx_fastforward chat", style="bold"))
        if model is None:
            from .. import demo

            self.console.print(
                "Demo model, 9.4 M parameters: it finds facts in a text and is good for little "
                "else.\nA real one: --model mlx-community/Llama-3.2-3B-Instruct-4bit"
            )
            if file is None:
                self.note(f"A document to ask it about: /file {demo.DOCUMENT}")
        else:
            self.console.print(Text(f"model    {model}"))
        self.console.print(Text(f"prefill  {mode}"))
        if engine.chosen is not None:
            self.note(f"         {engine.chosen}")
        if engine.predictor is not None:
            self.console.print(Text(f"predictor {engine.predictor}"))
        self.note("/help lists the commands")

    def run(self) -> None:
        """Until the end of the input; in a pipe, a problem on the way makes it a failure."""
        lines = Lines(self.interactive)
        while (line := lines.read()) is not None:
            text = line.strip()
            if text in ("/quit", "/exit", "q"):
                break
            with stopped_by_ctrl_c(self):
                if text and not self.command(text):
                    self.turn(text)
        if self.failed and not self.interactive:
            raise typer.Exit(1)

    def command(self, text: str) -> bool:
        """Run an in-chat command; False if the text is a message."""
        aliases = {"r": "/reset", "h": "/help"}
        name, _, rest = aliases.get(text, text).partition(" ")
        if name == "/help":
            self.console.print(Text(HELP, style="dim" if self.interactive else ""))
        elif name == "/reset":
            self.session.reset()
            self.document = self.last = None
            self.note("Forgot the conversation.")
        elif name in ("/dense", "/sparse"):
            self.switch(name == "/sparse")
        elif name == "/file":
            self.load_document(rest.strip())
        elif name == "/compare":
            self.compare()
        elif name.startswith("/") and name[1:].isalpha() and "\n" not in text:
            self.problem(f"unknown command {name}; /help lists them.")
        else:
            return False
        return True

    def switch(self, sparse: bool) -> None:
        from ..attachment import switch

        if sparse and not self.engine.sparse:
            self.problem(f"{self.why_dense()}.")
            return
        switch(self.session.model, sparse)
        self.session.forget_cache()
        how = "sparse" if sparse else "dense, as stock mlx-lm"
        self.note(f"Prefill is {how} now; the next message reads everything anew.")

    def load_document(self, name: str) -> None:
        from ..errors import FastForwardError

        if not name:
            self.problem("usage: /file PATH")
            return
        try:
            self.document = read_text(typed_path(name))
        except FastForwardError as e:
            self.problem(str(e))
            return
        self.note(
            f"{name}: {len(self.document):,} characters, read with your next message."
        )

    def turn(self, text: str) -> None:
        """Answer one message."""
        from ..errors import FastForwardError

        message = f"{self.document}\n\n{text}" if self.document else text
        try:
            tokens = len(self.session.render(message))
            if warning := length_warning(self.session.model, tokens):
                self.say(warning)
            done = self.stream(self.session.answer, message)
        except typer.Exit:  # a RuntimeError, too
            raise
        except (FastForwardError, ValueError, RuntimeError) as e:  # mlx's own as well
            self.problem(str(e))
            return
        if done:
            self.document, self.last = None, text

    def stream(self, answer: Any, *args: Any) -> Any:
        """Print an answer as it comes; returns its last response, None if nothing was said."""
        last = None
        with prefill_progress(self.interactive, self.console) as (tick, finish):
            responses = answer(*args, prompt_progress_callback=tick, **self.generation)
            with contextlib.closing(responses), stopped_by_ctrl_c(self):
                for last in responses:
                    finish()
                    print(last.text, end="", flush=True)
        print(flush=True)
        if last is not None:
            self.note(status_line(last))
        return last

    def compare(self) -> None:
        """The last message, sparse and dense, each from an empty cache."""
        if self.last is None:
            self.problem("nothing to compare yet: ask something first.")
            return
        if not self.engine.sparse:
            self.problem(f"{self.why_dense()}.")
            return
        self.session.warm_up()
        results = []
        for sparse in (True, False):
            name = "sparse" if sparse else "dense"
            self.console.print(Text(name, style="bold"))
            last = self.stream(self.session.answer_again, sparse)
            if last is None or last.finish_reason is None:
                return
            results.append(last)
        show_compared(self.console, *results)


def typed_path(name: str) -> Path:
    """A path as typed, quoted, or dragged into a terminal, which escapes its spaces."""
    with contextlib.suppress(OSError, ValueError):
        words = shlex.split(name)
        if not Path(name).exists() and len(words) == 1:
            return Path(words[0])
    return Path(name)


@contextlib.contextmanager
def stopped_by_ctrl_c(chat: Chat) -> Iterator[None]:
    """Ctrl-C ends the answer in hand, not the chat."""
    try:
        yield
    except KeyboardInterrupt:
        if not chat.interactive:
            raise typer.Exit(130) from None
        chat.note("\n(stopped)")
