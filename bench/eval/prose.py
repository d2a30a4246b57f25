"""The bundled held-out prose: passages of it, and filler of any length around planted facts."""

import bisect
import random
import re
from pathlib import Path
from typing import Any, Callable, Iterable

import mlx.core as mx

from ...errors import ConfigError

DATA = Path(__file__).parent / "data"
HELD_OUT = DATA / "heldout.txt"
MARK = "<|end of book|>"


def books(text: str) -> list[str]:
    """The texts between the marks."""
    return [b for b in text.split(MARK) if b.strip()]


def passages(
    text: str, tokenizer: Any, count: int, tokens: int, offset: int = 0
) -> list[mx.array]:
    """``count`` stretches of ``tokens`` tokens, evenly spaced over the text.

    Within one book where books are long enough; else books follow one another. Stretches overlap
    where the text is too short for that many.

    Args:
        offset: Tokens left out at the beginning, to get others.

    Raises:
        ConfigError: the whole text is shorter than one stretch.
    """
    ids = [_encode(tokenizer, b) for b in books(text)]
    found = [s for b in ids for s in _stretches(b[offset % tokens :], tokens)]
    if len(found) < count:
        whole = [i for b in ids for i in b]
        room = len(whole) - tokens
        if room < 0:
            raise ConfigError(
                f"the text holds {len(whole):,} tokens, {tokens:,} were asked for; "
                "use shorter prompts."
            )
        starts = [(offset + i * room // count) % (room + 1) for i in range(count)]
        found = [whole[s : s + tokens] for s in starts]
    step = len(found) / count
    return [mx.array(found[int(i * step)]) for i in range(count)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _stretches(ids: list[int], tokens: int) -> Iterable[list[int]]:
    return (ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens))


def filler(rng: random.Random, characters: int) -> str:
    """Prose of some length from a random paragraph on, over the end of the text if need be."""
    text = HELD_OUT.read_text(encoding="utf-8")
    paragraphs = [p.strip() for b in books(text) for p in b.split("\n\n") if p.strip()]
    at, size, taken = rng.randrange(len(paragraphs)), 0, []
    while size < characters:
        taken.append(paragraphs[at % len(paragraphs)])
        size += len(taken[-1]) + 2
        at += 1
    return "\n\n".join(taken)[:characters]


def sentence_ends(text: str) -> list[int]:
    """Where a sentence may be put in: after sentences and paragraphs."""
    return [m.end() for m in re.finditer(r"""[.!?]["'”’)]*(?=\s)|\n\n""", text)]


def fit(
    make: Callable[[int, int], str],
    count: Callable[[str], int],
    length: int,
    prose: str,
) -> str:
    """A text of exactly ``length`` tokens; the nearest below where no cut gives that.

    Args:
        make: make(n, drop) is the document with n characters of ``prose`` but the first ``drop``.
        count: Tokens of its prompt.

    Raises:
        ConfigError: not even a little prose fits.
    """
    tokens = lambda n: count(make(n, 0))
    for search in (_by_slope, _by_halves):  # the first may walk in circles
        n = search(tokens, length, len(prose))
        if text := _nearest(make, count, length, prose, n):
            return text
    raise ConfigError(f"{length} tokens do not hold the questions; use longer prompts.")


def _by_slope(tokens: Callable[[int], int], length: int, most: int) -> int:
    """Characters that give about ``length`` tokens, if all have about as many tokens."""
    n = min(most, 4 * length)
    for _ in range(20):
        got = tokens(n)
        if got == length:
            break
        step = round((length - got) * n / max(1, got))
        n = min(max(1, n + (step or (1 if got < length else -1))), most)
    return n


def _by_halves(tokens: Callable[[int], int], length: int, most: int) -> int:
    """The same whatever the characters are."""
    return bisect.bisect_left(range(1, most), length, key=tokens) + 1


def _nearest(
    make: Callable[[int, int], str],
    count: Callable[[str], int],
    length: int,
    prose: str,
    n: int,
) -> str:
    """A text of about ``n`` characters and ``length`` tokens, or the nearest below; "" for none."""
    best, most = "", 0
    near = range(max(1, n - 30), min(len(prose), n + 30) + 1)
    near_first = sorted(near, key=lambda c: (not _between_words(prose, c), abs(c - n)))
    # a cut may skip over ``length``: one begun elsewhere will not
    for drop in range(12):
        for cut in near_first:
            got = count(text := make(cut, drop))
            if got == length:
                return text
            if most < got < length:
                best, most = text, got
    return best


def _between_words(text: str, at: int) -> bool:
    return at >= len(text) or text[at].isspace()
