"""Tokens read in a chat of ten turns whose template strips the thinking from earlier answers.

python -m mlx_fastforward.bench.studies.checkpoints

Caches of linear attention and of sliding windows cannot be trimmed. Tiny random models say words that
are put into their mouths: only counts matter, and they are the same for any size.
"""

from typing import Any, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_tokenizer
from rich.console import Console
from rich.table import Table

from ...attachment import attach
from ...config import PrefillConfig
from ...demo import DOCUMENT, MODEL
from ...session import Session
from . import zoo

MODELS = ("qwen3_5", "gemma3_text")  # linear attention; windows of 24 tokens
TURNS = 10
TEMPLATE = (
    "<|begin|>{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}"
    "{% else %}<|user|>{{ m.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


class Rereading(Session):
    """Without checkpoints."""

    def _places(self, *_: Any, **__: Any) -> list[int]:
        return []


def tokenizer() -> Any:
    found = load_tokenizer(MODEL)
    found.chat_template = TEMPLATE
    return found


def tiny(name: str) -> nn.Module:
    """A small random model with the demo model's vocabulary."""
    model = zoo.tiny(name, vocab_size=4096)
    attach(model, PrefillConfig(sparsity=0.5))
    return model


def script() -> Iterator[tuple[str, str]]:
    """Messages of 40 words, and answers: 50 words of thought and 20 to be read."""
    words = DOCUMENT.read_text().split()
    for start in range(0, 110 * TURNS, 110):
        ends = (start, start + 40, start + 90, start + 110)
        a, b, c = (" ".join(words[i:j]) for i, j in zip(ends, ends[1:]))
        yield a, f"{b}</think>{c}"


def ask(session: Session, text: str, answer: str) -> list[Any]:
    """The responses of one turn in which the model says ``answer``."""
    ids: Sequence[int] = session.tokenizer.encode(answer, add_special_tokens=False)
    ids = [*ids, session.tokenizer.eos_token_id]
    said = iter([*ids, ids[-1]])  # mlx-lm is a token ahead
    sampler = lambda _: mx.array([next(said)])
    return list(session.answer(text, max_tokens=len(ids), sampler=sampler))


def chat(session: Session) -> list[tuple[int, int]]:
    """(tokens of the prompt, those that were read) of every turn."""
    found = []
    for text, answer in script():
        first = ask(session, text, answer)[0]
        found.append((first.cached_tokens + first.prompt_tokens, first.prompt_tokens))
    return found


def main() -> None:
    words = DOCUMENT.read_text().split()
    system = " ".join(words[-150:])
    for name in MODELS:
        model = tiny(name)
        before = chat(Rereading(model, tokenizer(), system))
        after = chat(Session(model, tokenizer(), system))
        table = Table("turn", "prompt", "read before", "read now", title=name)
        for i, ((prompt, whole), (_, read)) in enumerate(zip(before, after), 1):
            table.add_row(*map(str, (i, prompt, whole, read)))
        sums = (sum(read for _, read in turns) for turns in (before, after))
        table.add_row("all", "", *map(str, sums))
        Console().print(table)


if __name__ == "__main__":
    main()
