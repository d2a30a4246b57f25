"""mlx_fastforward demo: the bundled model answers questions about a long document."""

import statistics
from typing import Annotated

from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from . import options as o
from .errors import interruptible, one_line_errors
from .inputs import check_block
from .models import load_model
from .tables import say


def demo(
    sparsity: o.Sparsity = 0.5,
    block_size: Annotated[
        int, o.opt("Tokens that share one set of neurons, about.")
    ] = 128,
    selector: o.Selector = "auto",
) -> None:
    """Ask the bundled model about a long document, sparse and dense side by side."""
    from .. import demo as data

    with one_line_errors(), interruptible():
        check_block(block_size)
        if sparsity == 0:
            raise ConfigError("--sparsity 0 drops nothing; give one above 0.")
        model, tokenizer = load_model(
            None, sparsity=sparsity, block_size=block_size, selector=selector
        )
        from ..session import Session

        console = Console(highlight=False)
        document = data.DOCUMENT.read_text(encoding="utf-8").strip()
        session = Session(model, tokenizer)
        say(
            f"A demonstration: a model of 9.4 M parameters reads {data.DOCUMENT.name} "
            f"({len(document):,} characters) and answers questions about it, with "
            f"{sparsity:.0%} of the FFN neurons dropped and as stock mlx-lm.",
            console,
        )
        session.warm_up()
        ttft: dict[bool, list[float]] = {True: [], False: []}
        skipped = 0.0
        for i, (question, wanted) in enumerate(data.questions()):
            session.reset()
            session.messages.append(
                {"role": "user", "content": f"{document}\n\n{question}"}
            )
            said: dict[bool, str] = {}
            say(f"\n{question} ({wanted})", console, "bold")
            for sparse in (True, False) if i % 2 == 0 else (False, True):
                text = ""
                with console.status(f"reading, {'sparse' if sparse else 'dense'}"):
                    for r in session.answer_again(sparse, max_tokens=40):
                        text += r.text
                ttft[sparse].append(r.ttft)
                said[sparse] = f"{r.ttft:6.2f} s  {text.strip()}"
                skipped = r.ffn_sparsity if sparse else skipped
            for sparse, name in ((True, "sparse"), (False, "dense ")):
                console.print(Text(f"  {name} {said[sparse]}"))
        sparse_s, dense_s = (statistics.median(ttft[k]) for k in (True, False))
        say(
            f"\n{r.prompt_tokens:,} prompt tokens, {skipped:.0%} of their FFN FLOPs skipped. "
            f"Median TTFT: sparse {sparse_s:.2f} s, stock mlx-lm {dense_s:.2f} s, "
            f"{dense_s / sparse_s:.2f}x. A model so small gains little, a larger one more.",
            console,
        )
        print(f"\nAsk it yourself: mlx_fastforward chat --file {data.DOCUMENT}")
        print(f"A real model:    mlx_fastforward chat --model {o.EXAMPLE}")
