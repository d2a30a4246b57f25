"""A picture of a real chat, by rich's SVG export: python -m mlx_fastforward.bench.studies.chat_picture FILE.

The bundled model reads its document, answers, and is compared. What is typed is fixed, all else is
what the chat prints.
"""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from rich.console import Console
from rich.text import Text

from ... import demo
from ...cli import chat_commands
from ...cli.conversation import Chat, banner
from ...files import replacing
from ...loading import load
from ...session import Session

WIDTH = 92
TYPED = (f"/file {demo.DOCUMENT}", "", "/compare")  # nothing: the demo's question


class Shown(Console):
    """Records text without the folder that the package lies in."""

    def print(self, *objects: Any, **more: Any) -> None:
        root = f"{demo.MODEL.parents[2]}/"
        shown = [
            Text(o.plain.replace(root, ""), style=o.style) if isinstance(o, Text) else o
            for o in objects
        ]
        super().print(*shown, **more)


def recorded() -> Console:
    """The console of a chat that was held for its picture."""
    model, tokenizer = load(str(demo.MODEL), sparsity="auto")
    sampling = {"temp": 0.0, "top_p": 1.0}
    chat = Chat(Session(model, tokenizer), "demo", False, sampling, max_tokens=40)
    chat.console = Shown(
        record=True,
        width=WIDTH,
        force_terminal=True,
        highlight=False,
        file=io.StringIO(),
    )
    chat.interactive, chat.bar = True, False  # a bar is drawn over and over
    banner(chat)
    question, _ = demo.questions()[0]
    lines = iter([*(line or question for line in TYPED), None])

    def read() -> Optional[str]:
        if (line := next(lines)) is not None:
            chat.console.print(Text(f"› {line}", style="bold cyan"))
        return line

    reader = SimpleNamespace(read=read)
    chat_commands.run(chat, reader)
    return chat.console


def main(file: Path) -> None:
    console = recorded()
    svg = console.export_svg(title="mlx_fastforward chat")
    with replacing(file) as half:
        half.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
