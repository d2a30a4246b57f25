"""From what was typed to the tokens of a prompt."""

import sys
from pathlib import Path
from typing import Any, Optional

from .. import ranks
from .errors import fail
from .inputs import decoded, read_text

QUERY = "<query>"
STDIN = Path("-")


def asked_text(prompt: Optional[str], option: Optional[str], files: list[Path]) -> str:
    """The documents and the question, of an argument, an option or standard input."""
    if prompt is not None and option is not None:
        fail("give the prompt once: as argument or with --prompt.", 2)
    asked = prompt if prompt is not None else option
    if (asked == "-" or STDIN in files) and ranks.rank() is not None:
        fail("mlx.launch never ends standard input; name a --file in place of '-'.", 2)
    if (asked == "-") + files.count(STDIN) > 1:
        fail("standard input can be read once: as the prompt or as a --file.", 2)
    piped = asked is None and not files and not sys.stdin.isatty()
    if asked == "-" or piped:
        asked = _piped()
    documents = [_piped() if file == STDIN else read_text(file) for file in files]
    text = "\n\n".join(t for t in (*documents, asked) if t and t.strip())
    if not text:
        fail("no prompt: give it as an argument, '-' for standard input, or --file.", 2)
    return text


def _piped() -> str:
    return decoded(sys.stdin.buffer.read()).strip()


def prompt_tokens(
    tokenizer: Any,
    text: str,
    system: Optional[str],
    prefill: Optional[str],
    raw: bool,
    template: dict[str, Any],
    cached: bool,
) -> list[int]:
    """Token ids of a prompt, by the chat template unless ``raw``.

    Args:
        prefill: How the answer begins.
        cached: A prompt cache holds what stands before the text, by mlx-lm's rule.
    """
    from ..generation import encode_prompt
    from ..session import render, rendered_text

    if raw or not tokenizer.has_chat_template:
        return [int(i) for i in encode_prompt(tokenizer, text)]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    if not cached:
        return render(tokenizer, messages, template)
    whole = rendered_text(tokenizer, messages, template)
    for message in messages:
        if message["role"] == "user":
            message["content"] = QUERY
    before = rendered_text(tokenizer, messages, template).index(QUERY)
    return list(tokenizer.encode(whole[before:], add_special_tokens=False))


def add_stops(tokenizer: Any, tokens: list[str]) -> None:
    """More tokens that end an answer, as text or number."""
    for token in tokens:
        found = token if token.isdigit() else tokenizer.convert_tokens_to_ids(token)
        unknown = found is None or found == getattr(tokenizer, "unk_token_id", None)
        if unknown or int(found) >= len(tokenizer):
            fail(f"--extra-eos-token: the tokenizer has no token {token!r}.", 2)
        tokenizer.add_eos_token(token)
