"""What predictors are fitted on: places in files, and sequences that depend on their number alone."""

import itertools
import json
import random
import re
import string
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Iterator

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import Handler, Hub, environment

from mlx_fastforward.errors import FastForwardError
from mlx_fastforward.train.data import (
    BUNDLED,
    PIECE,
    Corpus,
    DataError,
    Place,
    Sequences,
    open_corpus,
    split,
)

LENGTH = 512
PROSE = "It was a dark and stormy night; the rain fell in torrents on the roofs.\n\n"


class Words:
    """A tokenizer whose tokens are words, and the turns of a chat."""

    def __init__(self, chats: bool = True):
        self.has_chat_template = chats
        self.known: list[str] = []
        self.numbers: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.number(word) for word in text.split()]

    def number(self, word: str) -> int:
        if word not in self.numbers:
            self.numbers[word] = len(self.known)
            self.known.append(word)
        return self.numbers[word]

    def apply_chat_template(
        self, messages: list[dict[str, str]], return_dict: bool = True
    ) -> list[int]:
        assert not return_dict
        if messages and messages[0]["role"] not in ("user", "assistant"):
            raise ValueError("turns must be\n\nof users")
        return self.encode(
            " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <end>"
        )

    def words(self, ids: Any) -> list[str]:
        return [self.known[i] for i in ids.tolist()]

    def turns(self, ids: Any) -> list[tuple[str, str]]:
        """(role, content) of a chat; the content with single spaces."""
        text = " ".join(self.words(ids))
        parts = re.split(r" ?<(user|assistant|end)> ?", text)[1:]
        return [(r, c) for r, c in zip(parts[::2], parts[1::2]) if r != "end"]


def unique_words(n: int) -> str:
    """Words of four letters that never come twice, in paragraphs of fifty, in order."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = ["".join(w) for w in itertools.islice(letters, n)]
    return "\n\n".join(" ".join(words[i : i + 50]) for i in range(0, n, 50))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, *entries: Any) -> Path:
    return write(path, "".join(json.dumps(e) + "\n" for e in entries))


@pytest.fixture(scope="module")
def bundled() -> Corpus:
    return open_corpus(None)


def refused(error: BaseException) -> str:
    """The one line of a DataError."""
    assert isinstance(error, DataError) and isinstance(error, FastForwardError)
    assert str(error).strip() and "\n" not in str(error)
    return str(error)


# Places


def test_a_file_is_cut_into_places(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"x" * (2 * PIECE + 1))
    corpus = Corpus([file])
    assert corpus.passages == [Place(file, at) for at in (0, PIECE, 2 * PIECE)]
    assert corpus.lines == []


def test_folders_are_searched_for_texts(tmp_path: Path) -> None:
    a = write(tmp_path / "b" / "a.md", PROSE)
    b = write(tmp_path / "z.txt", PROSE)
    lines = write_lines(tmp_path / "b" / "deep" / "c.jsonl", {"text": PROSE})
    write(tmp_path / "b" / "photo.jpg", PROSE)
    corpus = Corpus([tmp_path])
    assert corpus.passages == [Place(a, 0), Place(b, 0)]
    assert corpus.lines == [Place(lines, 0)]


def test_a_named_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    file = write(tmp_path / "notes.tex", PROSE)
    assert Corpus([file]).passages == [Place(file, 0)]


def test_several_data(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", PROSE), write(tmp_path / "b.txt", PROSE)
    lines = write_lines(tmp_path / "c.jsonl", {"text": PROSE})
    corpus = open_corpus([str(b), str(lines), str(a)])
    assert corpus.passages == [Place(b, 0), Place(a, 0)]
    assert corpus.lines == [Place(lines, 0)]


def test_blank_lines_are_no_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n  \n{"text": "ü"}\n')
    corpus = Corpus([file])
    assert [p.start for p in corpus.lines] == [0, 18]
    assert [corpus.line(p) for p in corpus.lines] == ["a", "ü"]


def test_the_bundled_text_is_the_default(bundled: Corpus) -> None:
    assert {p.file for p in bundled.passages} == {BUNDLED}
    assert len(bundled.passages) > 200


def test_a_large_corpus_takes_little_memory(tmp_path: Path) -> None:
    size = 64_000_000
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(64):
            file.write(b"a b c d " * 125_000)
    long = json.dumps({"text": "x" * 1_000_000}) + "\n"
    write(tmp_path / "b.jsonl", long * 16)
    tracemalloc.start()
    try:
        corpus = Corpus([tmp_path])
        corpus.passage(corpus.passages[99], 10_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus.passages) == size // PIECE and len(corpus.lines) == 16
    assert peak < 8_000_000


# Passages


def test_a_passage_begins_with_a_paragraph(tmp_path: Path) -> None:
    text = unique_words(5000)
    corpus = Corpus([write(tmp_path / "a.txt", text)])
    starts = {p[:4] for p in text.split("\n\n")}
    for place in corpus.passages[1:-2]:
        passage = corpus.passage(place, 3000)
        assert passage[:4] in starts
        assert place.start < text.index(passage[:4]) <= place.start + 252
        assert 3000 < len(passage) <= 3000 + PIECE


def test_a_passage_of_an_endless_paragraph_begins_with_a_word(tmp_path: Path) -> None:
    text = " ".join(f"<{i}>" for i in range(5000))
    corpus = Corpus([write(tmp_path / "a.txt", text)])
    for place in corpus.passages[:-1]:
        assert re.fullmatch(r"<\d+>", corpus.passage(place, 3000).split()[0])


LETTERS = st.text("aé€😀 \n", max_size=40)


@given(pieces=st.lists(LETTERS, min_size=1, max_size=8), length=st.integers(0, 9000))
def test_passages_are_parts_of_the_text(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], length: int
) -> None:
    """Whatever letter a place or an end falls into."""
    text = "".join(piece * (17 * i + 40) for i, piece in enumerate(pieces)) + "a"
    file = write(tmp_path_factory.getbasetemp() / "letters.txt", text)
    corpus = Corpus([file])
    for place in corpus.passages:
        passage = corpus.passage(place, length)
        assert passage in text and len(passage.encode()) <= length + PIECE


def test_a_passage_ends_with_its_book(tmp_path: Path) -> None:
    text = "One. " * 100 + "<|end of book|>\n\n" + "Two. " * 2000
    corpus = Corpus([write(tmp_path / "a.txt", text)])
    assert corpus.passage(corpus.passages[0], 4000).split() == ["One."] * 100
    assert set(corpus.passage(corpus.passages[1], 4000).split()) == {"Two."}


def test_a_passage_does_not_begin_with_the_mark(tmp_path: Path) -> None:
    text = "One. " * 900 + "\n\n<|end of book|>\n\n" + "Two. " * 900
    corpus = Corpus([write(tmp_path / "a.txt", text)])
    assert set(corpus.passage(corpus.passages[1], 4000).split()) == {"Two."}


# Held-out places


@given(n=st.integers(0, 3000), margin=st.integers(0, 40))
def test_held_out_places_are_apart(n: int, margin: int) -> None:
    """A held passage reaches over less than ``margin`` places after it, a fitted one over as many."""
    places = [Place(Path("a"), i) for i in range(n)]
    fitted, held = ([p.start for p in part] for part in split(places, margin))
    if fitted == held:
        assert fitted == list(range(n)) and n <= max(1, margin)
        return
    assert held and fitted == sorted(fitted) and not set(fitted) & set(held)
    for h in held:
        near = range(h - margin, h + margin)
        assert not set(near) & set(fitted)
    assert len(fitted) >= 0.85 * n or n < 10 * margin


@pytest.mark.parametrize("length", [256, 700, 1920, 4096])
def test_held_out_text_is_not_fitted_on(length: int, tmp_path: Path) -> None:
    """Words of five bytes with their space, as long as tokens of English are."""
    corpus = Corpus([write(tmp_path / "a.txt", unique_words(130_000))])
    tokenizer = Words(chats=False)
    seen: list[set[str]] = []
    for held_out in (False, True):
        part = Sequences(corpus, tokenizer, length, 0, held_out)
        ids = (part[i] for i in range(len(part.passages)))
        seen.append({word for s in ids for word in tokenizer.words(s)})
    assert len(seen[0]) > 80 * min(length, 700) and len(seen[1]) > 0.8 * length
    assert not seen[0] & seen[1]


def test_held_out_lines_are_not_fitted_on(tmp_path: Path) -> None:
    entries = [{"text": f"line-{i}"} for i in range(100)]
    corpus = Corpus([write_lines(tmp_path / "a.jsonl", *entries)])
    tokenizer = Words()
    seen = []
    for held_out in (False, True):
        part = Sequences(corpus, tokenizer, LENGTH, 0, held_out)
        seen.append({tokenizer.words(part[i])[0] for i in range(200)})
    assert seen[1] == {f"line-{i}" for i in range(0, 100, 20)}
    assert seen[0] == {e["text"] for e in entries} - seen[1]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_tiny_corpus_serves_for_both(held_out: bool, tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path / "a.txt", PROSE)])
    part = Sequences(corpus, Words(), LENGTH, 0, held_out)
    assert part.tokenizer.words(part[0]) == PROSE.split()


# Sequences


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sequence_depends_on_its_number_alone(
    held_out: bool, bundled: Corpus
) -> None:
    tokenizer = models.demo_tokenizer()
    one = Sequences(bundled, tokenizer, LENGTH, 3, held_out)
    wanted = [one[i].tolist() for i in range(12)]
    random.seed(5)
    order = random.sample(range(12), 12)
    again = Sequences(open_corpus(None), tokenizer, LENGTH, 3, held_out)
    for i in order:
        assert again[i].tolist() == wanted[i]
        assert one.kind(i) == again.kind(i)
    assert len({tuple(ids) for ids in wanted}) == 12


def test_a_seed_makes_other_sequences(bundled: Corpus) -> None:
    a, b = (Sequences(bundled, Words(), LENGTH, seed) for seed in (0, 1))
    assert all(a[i].tolist() != b[i].tolist() for i in range(5))


def test_the_held_out_ones_do_not_disturb_the_others(tmp_path: Path) -> None:
    text = unique_words(500)
    files = [write(tmp_path / f"{i}.txt", text[5 * i :]) for i in range(6)]
    corpus, tokenizer = Corpus(files), Words()
    fitted = Sequences(corpus, tokenizer, 4096)
    before = [fitted[i].tolist() for i in range(6)]
    Sequences(corpus, tokenizer, 4096, held_out=True)
    assert [fitted[i].tolist() for i in range(6)] == before


@pytest.mark.parametrize("length", [256, 300, 512, 1920])
def test_no_sequence_is_too_long(length: int, bundled: Corpus) -> None:
    part = Sequences(bundled, models.demo_tokenizer(), length)
    lengths = [len(part[i]) for i in range(20)]
    prose = [n for i, n in enumerate(lengths) if part.kind(i) == "prose"]
    assert max(lengths) == length and prose.count(length) >= 6


@pytest.mark.parametrize("length", [256, 320, 400])
def test_no_sequence_is_empty(length: int, bundled: Corpus) -> None:
    part = Sequences(bundled, models.demo_tokenizer(), length)
    assert all(len(part[i]) > 0 for i in range(20))


def test_more_than_half_of_the_sequences_are_chats(bundled: Corpus) -> None:
    part = Sequences(bundled, Words(), LENGTH)
    kinds = [part.kind(i) for i in range(10)]
    counts = {k: kinds.count(k) for k in set(kinds)}
    assert counts == {"prose": 4, "facts": 4, "quotes": 2}
    for i, kind in enumerate(kinds):
        chat = part.tokenizer.words(part[i])[0] == "<user>"
        assert chat == (kind != "prose")


def test_without_a_chat_template_all_is_prose(bundled: Corpus) -> None:
    part = Sequences(bundled, Words(chats=False), LENGTH)
    assert {part.kind(i) for i in range(10)} == {"prose"}
    assert "<user>" not in part.tokenizer.words(part[1])


def test_prose_is_a_passage_of_the_text(bundled: Corpus) -> None:
    tokenizer = Words(chats=False)
    part = Sequences(bundled, tokenizer, LENGTH)
    text = " ".join(BUNDLED.read_text(encoding="utf-8").split())
    for i in range(5):
        assert " ".join(tokenizer.words(part[i])) in text


FACT = r"The (secret code|favourite word) of (\w+) is (\w+)\."
QUESTION = r"What is the (secret code|favourite word) of (\w+)\?"


def chats(part: Sequences, kind: str, n: int = 40) -> Iterator[list[tuple[str, str]]]:
    for i in range(n):
        if part.kind(i) == kind:
            yield part.tokenizer.turns(part[i])


def test_facts_are_planted_and_asked_for(bundled: Corpus) -> None:
    kinds = set()
    for turns in chats(Sequences(bundled, Words(), LENGTH), "facts"):
        text = turns[0][1]
        planted = {(k, name): value for k, name, value in re.findall(FACT, text)}
        asked = [re.search(QUESTION, c) for role, c in turns if role == "user"]
        answers = [c for role, c in turns if role == "assistant"]
        assert 3 <= len(planted) == len(asked) == len(answers) <= 6
        for question, answer in zip(asked, answers):
            assert question is not None and planted[question.groups()] == answer
            kinds.add((question[1], answer.isdigit()))
    assert kinds == {("secret code", True), ("favourite word", False)}


def test_facts_are_asked_for_with_a_real_tokenizer(bundled: Corpus) -> None:
    """Nothing is cut off: the last answer ends with the turn's end."""
    tokenizer = models.demo_tokenizer()
    part = Sequences(bundled, tokenizer, LENGTH)
    for i in (i for i in range(40) if part.kind(i) == "facts"):
        text = tokenizer.decode(part[i].tolist())
        facts = re.findall(FACT, text)
        assert len(facts) >= 3 and text.endswith("<|end|>")
        for kind, name, value in facts:
            said = f"What is the {kind} of {name}?<|end|><|assistant|>{value}<|end|>"
            assert said in text


def test_facts_lie_in_the_text(bundled: Corpus) -> None:
    """Not all at its end: passages are longer than their facts, and facts are among them."""
    before, after = 0, 0
    for turns in chats(Sequences(bundled, Words(), LENGTH), "facts"):
        first = turns[0][1]
        before += re.search(FACT, first).start() > 0  # type: ignore[union-attr]
        after += len(re.split(FACT, first)[-1]) > 200
    assert before >= 8 and after >= 4


def test_quotes_complete_a_sentence_of_the_text(bundled: Corpus) -> None:
    count = 0
    for turns in chats(Sequences(bundled, Words(), LENGTH), "quotes"):
        text = turns[0][1]
        for (role, question), (_, rest) in zip(turns[::2], turns[1::2]):
            begun = question.rpartition("Complete this sentence from the text: ")[2]
            assert role == "user" and len(begun.split()) == 5 and len(rest.split()) >= 3
            assert text.count(f"{begun} {rest}") >= 1
            count += 1
    assert count >= 16


def test_a_text_without_sentences_is_prose(tmp_path: Path) -> None:
    corpus = Corpus([write(tmp_path / "a.txt", "word " * 2000)])
    part = Sequences(corpus, Words(), LENGTH)
    assert part.kind(3) == "quotes"
    assert set(part.tokenizer.words(part[3])) == {"word"}


# Lines of JSON


def test_lines_are_texts_or_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    file = write_lines(tmp_path / "a.jsonl", {"text": "a b"}, {"messages": chat})
    part = Sequences(Corpus([file]), Words(), LENGTH, held_out=True)
    assert part.tokenizer.words(part[0]) == ["a", "b"]
    part = Sequences(Corpus([file]), Words(), LENGTH)
    assert part.tokenizer.words(part[0]) == "<user> Who? <assistant> I. <end>".split()


def test_lines_are_cut(tmp_path: Path) -> None:
    long = " ".join(map(str, range(2000)))
    chat = [{"role": "user", "content": long}]
    for entry in ({"text": long}, {"messages": chat}):
        corpus = Corpus([write_lines(tmp_path / "a.jsonl", entry)])
        assert len(Sequences(corpus, Words(), LENGTH)[0]) == LENGTH


def test_lines_and_passages_take_turns(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", unique_words(20_000))
    lines = [{"text": f"line-{i}"} for i in range(21)]
    write_lines(tmp_path / "b.jsonl", *lines)
    part = Sequences(Corpus([tmp_path]), Words(), LENGTH)
    kinds = [part.kind(i) for i in range(40)]
    assert kinds[1::2] == ["lines"] * 20 and "lines" not in kinds[::2]
    assert set(kinds[::2]) == {"prose", "facts", "quotes"}
    read = {part.tokenizer.words(part[i])[0] for i in range(1, 40, 2)}
    assert read == {f"line-{i}" for i in range(1, 20)}


def test_lines_alone_are_all_read(tmp_path: Path) -> None:
    lines = [{"text": f"line-{i}"} for i in range(20)]
    part = Sequences(
        Corpus([write_lines(tmp_path / "a.jsonl", *lines)]), Words(), LENGTH
    )
    read = {part.tokenizer.words(part[i])[0] for i in range(19)}
    assert read == {f"line-{i}" for i in range(1, 20)}


# What is no data


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        open_corpus([str(tmp_path / "no.txt")])
    assert refused(e.value).startswith(f"{tmp_path / 'no.txt'} does not exist; ")


def test_folders_and_files_without_text(tmp_path: Path) -> None:
    write(tmp_path / "a" / "photo.jpg", PROSE)
    write(tmp_path / "empty.txt", "")
    for path in (tmp_path / "a", tmp_path / "empty.txt"):
        with pytest.raises(DataError) as e:
            Corpus([path])
        assert refused(e.value).startswith(f"no text in {path}; ")


BAD_LINES = {
    "cut off": b'{"text": "a"',
    "a list": b'["text"]',
    "a number": b"7",
    "other keys": b'{"txt": "a"}',
    "text is a number": b'{"text": 3}',
    "messages are a text": b'{"messages": "a"}',
    "binary": bytes(range(128, 256)),
    # BUG: json raises a RecursionError.
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_lines_that_are_no_data(what: str, tmp_path: Path) -> None:
    good = b'{"text": "a"}\n'
    file = write(tmp_path / "a.jsonl", good * 3 + BAD_LINES[what] + b"\n" + good)
    corpus = Corpus([file])
    assert corpus.line(corpus.lines[4]) == "a"
    with pytest.raises(DataError) as e:
        corpus.line(corpus.lines[3])
    assert refused(e.value).startswith(f"{file}, byte {3 * len(good)}: expected ")


def test_binary_files_are_no_text(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(20_000)
    file = write(tmp_path / "model.bin", noise)
    with pytest.raises(DataError) as e:
        part = Sequences(Corpus([file]), Words(), LENGTH)
        for i in range(5):
            part[i]
    assert str(file) in refused(e.value)


@pytest.mark.parametrize("message", [5, None, "a"])
def test_messages_that_the_template_cannot_render(message: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"messages": [message]})
    part = Sequences(Corpus([file]), models.demo_tokenizer(), LENGTH)
    with pytest.raises(DataError) as e:
        part[0]
    assert refused(e.value).startswith(f"{file}, byte 0: ")


def test_messages_that_the_template_refuses(tmp_path: Path) -> None:
    entry = {"messages": [{"role": "system", "content": "a"}]}
    file = write_lines(tmp_path / "a.jsonl", {"text": "a"}, entry)
    part = Sequences(Corpus([file]), Words(), LENGTH)
    with pytest.raises(DataError) as e:
        part[0]
    line = refused(e.value)
    assert line.startswith(f"{file}, byte 14: the chat template refused it: turns")


# Data sets of the hub


class DataSets(Handler):
    """The loopback hub, whose repositories are data sets."""

    def do_GET(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/")
        self.path = self.path.removeprefix("/datasets")
        super().do_GET()

    do_HEAD = do_GET


OPEN = """
import sys
from mlx_fastforward.train.data import open_corpus
for name in sys.argv[1:]:
    try:
        print([p.file.read_text() for p in open_corpus([name]).passages])
    except Exception as e:
        print(type(e).__name__, e)
"""


def test_data_sets_are_downloaded_once_and_texts_only(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "a.txt", PROSE)
    write(folder / "photo.png", b"\x89PNG")
    hub = Hub({"user/texts": folder}, tmp_path)
    hub.RequestHandlerClass = DataSets
    names = ["user/texts", "user/texts", "user/unknown"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *names],
            capture_output=True,
            env=environment(hub, tmp_path),
            text=True,
            timeout=120,
        )
    finally:
        hub.stop()
    assert done.returncode == 0, done.stderr
    first, again, unknown = done.stdout.splitlines()
    assert first == again == repr([PROSE])
    assert unknown.startswith(
        "PredictorError data 'user/unknown' is not a local folder"
    )
    files = [p for p in hub.asked if "/resolve/" in p and p.endswith("/a.txt")]
    assert 1 <= len(files) <= 2 and not any("photo" in p for p in hub.asked)
