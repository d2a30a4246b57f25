"""What a predictor is fitted on: prose and chats, one token sequence per number.

Sequence i depends on the seed and on i alone, so an interrupted run goes on where it was, and a
corpus of any size takes no more memory than a list of places in it. What is fitted on prose alone
loses facts: prose seldom shows names, digits and questions. So half of the sequences are chats made
from the same texts: facts planted in a passage and asked for, sentences to complete.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

import mlx.core as mx
import mlx.nn as nn

from ..errors import FastForwardError
from ..files import expanded
from ..hub import download, looks_like_a_repository
from ..model.families import context_length
from .facts import CODE, NAMES, QUOTE, WORD, WORDS, asked, planted

BUNDLED = Path(__file__).parent / "data" / "calibration.txt"
TEXT = set(".txt .md .rst .py .swift .c .cpp .h .js .ts .go .rs".split())
PIECE = 4096  # bytes between the places where a passage may begin
HELD_SHARE = 20  # one passage in so many is held out
BYTES_PER_TOKEN = 6  # read rather too much than too little
USUAL_BYTES_PER_TOKEN = 4
PASSES = 4  # that a run makes over a text, at most
LENGTH = 1920  # tokens of a sequence, where the model allows


def usual_length(model: nn.Module) -> int:
    """Tokens of a sequence for a model."""
    return min(LENGTH, context_length(model) or LENGTH)


# a text, and questions about it with their answers
Chat = tuple[str, list[tuple[str, str]]]


class DataError(FastForwardError, ValueError):
    """Data that a predictor cannot be fitted on, said in one line."""


@dataclass(frozen=True)
class Place:
    """Where a passage or a line of JSON begins."""

    file: Path
    start: int


class Corpus:
    """Texts and chats, by place.

    Args:
        paths: Text files, JSONL files ({"text": ...} or {"messages": [...]}) or folders of them.
    """

    def __init__(self, paths: list[Path]):
        self.passages: list[Place] = []
        self.lines: list[Place] = []
        self.size = 0  # bytes
        for path in paths:
            for file in _files(path):
                self.size += file.stat().st_size
                if file.suffix == ".jsonl":
                    self.lines += _line_starts(file)
                else:
                    size = file.stat().st_size
                    self.passages += [Place(file, at) for at in range(0, size, PIECE)]
        if not self.passages and not self.lines:
            names = ", ".join(map(str, paths))
            raise DataError(
                f"no text in {names}; expected text files, JSONL, or folders of them."
            )

    @property
    def most_tokens(self) -> int:
        """What a run takes from it, about: every text a few times."""
        return PASSES * self.size // USUAL_BYTES_PER_TOKEN

    def passage(self, place: Place, length: int) -> str:
        """About ``length`` bytes of text from the next paragraph, or sentence, on."""
        raw = _read(place, lambda file: file.read(length + PIECE))
        if b"\0" in raw:
            raise DataError(f"{place.file} is not text.")
        text = raw.decode("utf-8", errors="ignore")
        if place.start:
            _, mark, rest = text.partition("\n\n")
            text = rest if mark else text.partition(" ")[2]
        text = text.partition("<|end of book|>")[0] or text.replace(
            "<|end of book|>", ""
        )
        return text.strip()

    def line(self, place: Place) -> Any:
        """The text or the messages of a line of JSONL; raises DataError."""
        raw = _read(place, lambda file: file.readline())
        try:
            entry = json.loads(raw)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            if isinstance(entry.get("messages"), list):
                return entry["messages"]
            if isinstance(entry.get("text"), str):
                return entry["text"]
        raise DataError(
            f"{place.file}, byte {place.start}: expected an object with text or messages."
        )


def _read(place: Place, part: Callable[[BinaryIO], bytes]) -> bytes:
    """Some bytes of a file; raises DataError."""
    try:
        with place.file.open("rb") as file:
            file.seek(place.start)
            return part(file)
    except OSError as e:
        raise DataError(f"{place.file} cannot be read: {e.strerror or e}.") from e


def _files(path: Path) -> list[Path]:
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as e:
        raise DataError(f"{str(path)[:80]} cannot be read: {e.strerror}.") from e
    if folder:
        known = TEXT | {".jsonl"}
        return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in known)
    if not file:
        raise DataError(
            f"{path} does not exist; expected a text file, JSONL, or a folder."
        )
    return [path]


def _line_starts(file: Path) -> list[Place]:
    places, at = [], 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                if line.strip():
                    places.append(Place(file, at))
                at += len(line)
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror or e}.") from e
    return places


def split(places: list[Place], margin: int) -> tuple[list[Place], list[Place]]:
    """Places to fit on, and places to judge on: one in so many, and none within ``margin`` of it.

    Where there are too few, all serve for both.
    """
    step = HELD_SHARE * max(1, margin)
    held = range(0, len(places), step)
    near = {i + j for i in held for j in range(-margin, max(1, margin))}
    fitted = [p for i, p in enumerate(places) if i not in near]
    return (fitted, [places[i] for i in held]) if fitted else (places, places)


class Sequences:
    """Token sequences of at most ``length`` tokens, by number: ``sequences[i]``.

    Args:
        held_out: The part of the corpus that is not fitted on.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        length: int,
        seed: int = 0,
        held_out: bool = False,
    ):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.corpus = corpus
        margin = length * BYTES_PER_TOKEN // PIECE + 1
        self.passages = list(split(corpus.passages, margin)[held_out])
        self.lines = list(split(corpus.lines, 0)[held_out])
        for places in (self.passages, self.lines):
            random.Random(seed).shuffle(places)
        chats = tokenizer.has_chat_template
        self.kinds = ("prose", "facts", "prose", "quotes", "facts")[: 5 if chats else 1]

    def kind(self, i: int) -> str:
        """prose, facts, quotes, or lines of the user's JSONL."""
        if self.lines and (not self.passages or i % 2):
            return "lines"
        return self.kinds[i % len(self.kinds)]

    def __getitem__(self, i: int) -> mx.array:
        kind = self.kind(i)
        if kind == "lines":
            turn = i // 2 if self.passages else i
            return mx.array(self._line(self.lines[turn % len(self.lines)]))
        rng = random.Random(f"{self.seed} {i}")
        place = self.passages[i % len(self.passages)]
        text = self.corpus.passage(place, self.length * BYTES_PER_TOKEN)
        text, turns = getattr(self, f"_{kind}")(rng, text)
        ids = self._chat(text, turns) if turns else self.tokenizer.encode(text)
        return mx.array(ids[: self.length])

    def _line(self, place: Place) -> list[int]:
        entry = self.corpus.line(place)
        if isinstance(entry, str):
            return self.tokenizer.encode(entry)[: self.length]
        try:
            ids = self.tokenizer.apply_chat_template(entry, return_dict=False)
            return ids[: self.length]
        except Exception as e:  # templates raise what they like
            reason = " ".join(str(e).split())
            raise DataError(
                f"{place.file}, byte {place.start}: the chat template refused it: {reason}"
            ) from e

    def _prose(self, rng: random.Random, text: str) -> Chat:
        return text, []

    def _facts(self, rng: random.Random, text: str) -> Chat:
        """Facts planted among the paragraphs of a text, and asked for."""
        paragraphs = self._paragraphs(text)
        kind = CODE if rng.random() < 0.5 else WORD
        turns = []
        for name in rng.sample(NAMES, rng.randint(3, 6)):
            code = kind == CODE
            value = str(rng.randrange(1000, 10000)) if code else rng.choice(WORDS)
            at = rng.randrange(len(paragraphs) + 1)
            paragraphs.insert(at, planted(kind, name, value))
            turns.append((asked(kind, name), value))
        return "\n\n".join(paragraphs), turns

    def _quotes(self, rng: random.Random, text: str) -> Chat:
        """Sentences of a text to complete; the whole text where it has none."""
        whole, text = text, "\n\n".join(self._paragraphs(text))
        sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", text)]
        sentences = [s for s in sentences if 8 <= len(s) <= 28]
        turns = []
        for words in rng.sample(sentences, min(3, len(sentences))):
            begun = " ".join(words[:5])
            turns.append((f"{QUOTE} {begun}", " ".join(words[5:])))
        return (text, turns) if turns else (whole, turns)

    def _paragraphs(self, text: str) -> list[str]:
        """As much of a text as leaves room for a few questions."""
        ids = self.tokenizer.encode(text)
        room = max(self.length // 2, self.length - 320)
        if len(ids) > room:
            text = text[: len(text) * room // len(ids)]
        return [p for p in text.split("\n\n") if p.strip()] or [text]

    def _chat(self, text: str, turns: list[tuple[str, str]]) -> list[int]:
        messages = []
        for i, (question, answer) in enumerate(turns):
            content = f"{text}\n\n{question}" if i == 0 else question
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
        return self.tokenizer.apply_chat_template(messages, return_dict=False)


def open_corpus(data: Optional[list[str]]) -> Corpus:
    """Named files, folders and data sets of the hub, or the bundled text."""
    return Corpus([_local(d) for d in data] if data else [BUNDLED])


def _local(name: str) -> Path:
    """A path as it is; a data set of the hub is downloaded, its text and JSONL files only."""
    known = Path(name).suffix in TEXT | {".jsonl"}
    if known or not looks_like_a_repository(name):
        return expanded(Path(name))
    patterns = [f"*{suffix}" for suffix in sorted(TEXT | {".jsonl"})]
    return download(name, patterns, "data", repo_type="dataset")
