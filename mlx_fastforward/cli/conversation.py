"""A chat in a terminal or a pipe: messages in, answers out."""

import contextlib
import sys
from typing import Any, Callable, Optional

import typer
from rich.console import Console
from rich.text import Text

from ..errors import brief
from .first_use import least, tune_first
from .inputs import sampling
from .interrupt import answered, unseen
from .lengths import check_bytes, check_tokens, patiently
from .outputs import broken, prefill_line, status_line
from .tables import warn
from .terminal import prefill_progress, show_compared

UNSENT = ": your message was not sent; arrow up brings it back"


class Chat:
    """One run of the chat. With a pipe at either end it prints answers and nothing else."""

    def __init__(
        self,
        session: Any,
        model: str,
        tune: bool,
        sampling: dict[str, Any],
        force: bool = False,
        loader: Optional[Callable[[str], tuple[Any, Any]]] = None,
        **generation: Any,
    ):
        self.session = session
        self.model = model
        self.tune = self.may_tune = tune
        self.sampling = sampling
        self.force = force
        self.loader = loader
        self.generation = generation
        self.pending: list[tuple[str, str]] = []  # documents for the next message
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.bar = self.interactive  # while a long prompt is read
        self.console = Console(highlight=False, soft_wrap=not self.interactive)
        self.failed = False
        # makes an approximate cache whole, while nobody waits
        self.heal: Optional[Any] = None

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
            warn(text)

    def why_dense(self) -> str:
        if self.engine.device.dense:
            return "dense prefill is the fastest on this device; start with --no-tune"
        if self.engine.chosen is not None:
            return f"{self.engine.chosen}; start with --sparsity 0.5 to try"
        return "this chat was started with --sparsity 0; start it with more"

    def guarded(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong is said, and the chat goes on; Ctrl-C ends what is going on."""
        try:
            with answered(lambda text: self.say(f"({text})")), unseen():
                work()
        except KeyboardInterrupt:
            if not self.interactive:
                raise typer.Exit(130) from None
            self.note("\n(stopped)")
        except typer.Exit:  # a RuntimeError, too
            raise
        except Exception as e:
            self.problem(brief(e))

    def tell_pending(self) -> None:
        """Before a line is typed: what it will bring along."""
        if self.pending:
            names = ", ".join(name for name, _ in self.pending)
            size = sum(len(text) for _, text in self.pending)
            what = "it" if len(self.pending) == 1 else "them"
            size_and_way = f"({size:,} characters; /drop forgets {what})"
            self.note(f"with your next message: {names} {size_and_way}")

    def turn(self, text: str) -> None:
        """Answer one message."""
        message = "\n\n".join([*(document for _, document in self.pending), text])
        ids = self.tokens(message)
        self.tune_for(len(ids))
        last = self.stream(self.session.answer, message, ids)
        if last is not None:
            self.pending = []

    def tokens(self, message: str) -> list[int]:
        """The conversation with a new message; one that is too long is refused.

        A conversation that grew too long goes on, with a warning.
        """
        session = self.session
        check_bytes(session.model, message, self.force)
        ids = patiently(lambda: session.render(message), len(message), self.console)
        check_tokens(session.model, len(ids) - len(session.tokens), self.force)
        if warning := check_tokens(session.model, len(ids), True):
            self.say(warning)
        return ids

    def again(self) -> None:
        """Another answer to the last message; the one before stays if this one never begins."""
        before = list(self.session.messages)
        message, last = self.session.take_back(), None
        if self.sampling["temp"] == 0:
            self.note("Without chance the answer is the same: /temp 0.7 gives another.")
        try:
            unsaid = ": the answer before stays"
            last = self.stream(self.session.answer, message, unsaid=unsaid)
        finally:
            if last is None:
                self.session.messages = before

    def take_model(self, name: str) -> None:
        """Go on with another model; it reads the conversation anew."""
        import mlx.core as mx

        assert self.loader is not None
        model, tokenizer = self.loader(name)  # lazy: two models need not fit
        self.session.take_model(model, tokenizer)
        self.model, self.tune = name, self.may_tune
        mx.clear_cache()
        mx.eval(model.parameters())

    def tune_for(self, tokens: int) -> None:
        """Before the first message that may gain; not again where that was skipped."""
        if self.tune and tokens >= least(self.engine):
            tune_first(self.session.model, tokens)
            self.tune = False

    def stream(
        self,
        answer: Callable[..., Any],
        *args: Any,
        kept: bool = True,
        unsaid: str = UNSENT,
    ) -> Any:
        """Print an answer as it comes; returns its last response, None if nothing was said.

        kept: It is part of the conversation. unsaid: What to tell where it was stopped before it began.
        """
        last, stopped = None, False
        sampler = sampling(self.session.tokenizer, **self.sampling)
        with prefill_progress(self.session.model, self.bar, self.console) as (
            tick,
            finish,
        ):
            responses = answer(
                *args,
                prompt_progress_callback=tick,
                sampler=sampler,
                **self.generation,
            )
            try:
                with contextlib.closing(responses):
                    for last in responses:
                        finish()
                        self.console.out(last.text, end="", highlight=False)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise typer.Exit(130) from None
                stopped = True
        if last is not None:
            self.console.out("")
        if self.session.speculative is not None:
            for note in self.session.speculative.take_notes():
                self.say(note)
        if last is not None:
            self.tell_end(last, stopped, "; /continue goes on" if kept else "")
        elif stopped:
            self.note(f"(stopped while reading{unsaid})")
        return last

    def tell_end(self, last: Any, stopped: bool, more: str) -> None:
        """How an answer ended, what can be done about it, and its figures."""
        if stopped:
            self.note(f"(stopped{more})")
        elif last.finish_reason == "length":
            most = self.generation["max_tokens"]
            self.note(f"(cut at --max-tokens {most}{more})")
        figures = status_line(last, self.why_nothing_skipped(last))
        self.note(broken(figures, self.console.width))

    def why_nothing_skipped(self, last: Any) -> Optional[str]:
        """Of a prompt that was read densely though the chat is sparse."""
        from ..attachment import is_enabled

        if last.ffn_sparsity or not self.engine.sparse:
            return None
        if not is_enabled(self.session.model):
            return "read densely"
        if last.prompt_tokens < self.engine.shortest:
            return f"read densely: shorter than {self.engine.shortest:,} tokens"
        return None

    def compare(self) -> None:
        """The last message, sparse and dense, each from an empty cache."""
        self.session.warm_up()
        results = []
        for name in ("sparse", "dense"):
            self.console.print(Text(name, style="bold"))
            again = self.session.answer_again
            last = self.stream(again, name == "sparse", kept=False, unsaid="")
            if last is None or last.finish_reason is None:
                return
            results.append(last)
        sparse, dense = results
        show_compared(self.console, sparse, dense, self.why_nothing_skipped(sparse))


def banner(chat: Chat) -> None:
    """What runs, and where to begin; for people only."""
    if not chat.interactive:
        return
    from .. import demo

    engine = chat.engine
    chat.console.print(Text("mlx_fastforward chat", style="bold"))
    if chat.model == "demo":
        chat.console.print(
            "Demo model, 9.4 M parameters: it finds facts in a text, and does little else.\n"
            "A real one: --model mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
        if not chat.pending:
            chat.note(f"A document to ask it about: /file {demo.DOCUMENT}")
    else:
        chat.console.print(Text(f"model     {chat.model}"))
    chat.console.print(Text(f"prefill   {prefill_line(engine)}"))
    if (speculative := chat.session.speculative) is not None:
        after = "; the rest follows while you read" if chat.heal is not None else ""
        chat.console.print(Text(f"          {speculative.describe()}{after}"))
    if engine.chosen is not None:
        chat.note(f"          {engine.chosen}")
    if engine.predictor is not None:
        chat.console.print(Text(f"predictor {engine.predictor}"))
    chat.note("/help lists the commands")
