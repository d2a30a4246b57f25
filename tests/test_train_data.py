"""What predictors are fitted on: places in files, and sequences that depend on their number alone."""

import itertools
import json
import random
import re
import string
from pathlib import Path
from typing import Any, Iterator

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        self.numbers: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.numbers.setdefault(w, len(self.numbers)) for w in text.split()]

    def apply_chat_template(self, messages: list[Any], return_dict: bool) -> list[int]:
        assert not return_dict
        if messages[0]["role"] not in ("user", "assistant"):
            raise ValueError("turns must be\n\nof users")
        turns = (f"<{m['role']}> {m['content']}" for m in messages)
        return self.encode(" ".join(turns) + " <end>")

    def words(self, ids: Any) -> list[str]:
        known = list(self.numbers)
        return [known[i] for i in ids.tolist()]

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


def test_files_and_folders_are_cut_into_places(tmp_path: Path, bundled: Corpus) -> None:
    """Of folders the texts and the lines, of what is named everything."""
    a = write(tmp_path / "b" / "a.md", b"x" * (2 * PIECE + 1))
    z = write(tmp_path / "z.txt", PROSE)
    text = '{"text": "a"}\n\n  \n{"text": "ü"}\n'  # blank lines are none
    lines = write(tmp_path / "b" / "deep" / "c.jsonl", text)
    photo = write(tmp_path / "b" / "photo.jpg", PROSE)
    corpus = Corpus([tmp_path])
    places = [Place(a, at) for at in (0, PIECE, 2 * PIECE)]
    assert corpus.passages == [*places, Place(z, 0)]
    assert corpus.lines == [Place(lines, 0), Place(lines, 18)]
    assert [corpus.line(p) for p in corpus.lines] == ["a", "ü"]
    named = open_corpus([str(z), str(lines), str(photo)])
    assert named.passages == [Place(z, 0), Place(photo, 0)]
    assert named.lines == corpus.lines
    assert {p.file for p in bundled.passages} == {BUNDLED}


def test_a_passage_begins_with_a_paragraph_or_else_a_word(tmp_path: Path) -> None:
    text = unique_words(5000)
    corpus = Corpus([write(tmp_path / "a.txt", text)])
    starts = {p[:4] for p in text.split("\n\n")}
    for place in corpus.passages[1:-2]:
        passage = corpus.passage(place, 3000)
        assert passage[:4] in starts
        assert place.start < text.index(passage[:4]) <= place.start + 252
        assert 3000 < len(passage) <= 3000 + PIECE
    endless = " ".join(f"<{i}>" for i in range(5000))
    corpus = Corpus([write(tmp_path / "b.txt", endless)])
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
    """And does not begin with the mark."""
    for ones in (100, 900):
        text = "One. " * ones + "\n\n<|end of book|>\n\n" + "Two. " * 2000
        corpus = Corpus([write(tmp_path / "a.txt", text)])
        first, second = (corpus.passage(p, 4000).split() for p in corpus.passages[:2])
        assert set(first) == {"One."} and {w[:3] for w in second} == {"Two"}
        assert ones > 100 or len(first) == ones


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
        assert not set(range(h - margin, h + margin)) & set(fitted)
    assert len(fitted) >= 0.85 * n or n < 10 * max(1, margin)


@pytest.mark.parametrize("length", [256, 1920])
def test_held_out_text_is_not_fitted_on(length: int, tmp_path: Path) -> None:
    """Words of five bytes with their space, as tokens are; a tiny corpus serves for both."""
    corpus = Corpus([write(tmp_path / "a.txt", unique_words(130_000))])
    tokenizer = Words(chats=False)
    seen: list[set[str]] = []
    for held_out in (False, True):
        part = Sequences(corpus, tokenizer, length, 0, held_out)
        ids = (part[i] for i in range(len(part.passages)))
        seen.append({word for s in ids for word in tokenizer.words(s)})
    assert len(seen[0]) > 80 * min(length, 700) and len(seen[1]) > 0.8 * length
    assert not seen[0] & seen[1]
    corpus = Corpus([write(tmp_path / "a.txt", PROSE)])
    for held_out in (False, True):
        part = Sequences(corpus, tokenizer, LENGTH, 0, held_out)
        assert tokenizer.words(part[0]) == PROSE.split()


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sequence_depends_on_seed_and_number_alone(
    held_out: bool, bundled: Corpus, tmp_path: Path
) -> None:
    """Neither on the order in which they are asked for, nor on others of the corpus."""
    tokenizer = models.demo_tokenizer()
    one = Sequences(bundled, tokenizer, LENGTH, 3, held_out)
    wanted = [one[i].tolist() for i in range(12)]
    assert len({tuple(ids) for ids in wanted}) == 12
    random.seed(5)
    Sequences(bundled, tokenizer, LENGTH, 3, not held_out)
    assert [one[i].tolist() for i in range(12)] == wanted
    again = Sequences(open_corpus(None), tokenizer, LENGTH, 3, held_out)
    for i in random.sample(range(12), 12):
        assert again[i].tolist() == wanted[i] and again.kind(i) == one.kind(i)
    single = Corpus([write(tmp_path / "a.txt", PROSE * 9)])  # place, the same text
    for corpus in (bundled, single):
        a, b = (Sequences(corpus, Words(), LENGTH, seed, held_out) for seed in (3, 4))
        assert a[1].tolist() != b[1].tolist() and a[1].tolist() != a[4].tolist()


@pytest.mark.parametrize("length", [256, 300, 1920])
def test_no_sequence_is_too_long_or_empty(length: int, bundled: Corpus) -> None:
    part = Sequences(bundled, models.demo_tokenizer(), length)
    lengths = [len(part[i]) for i in range(20)]
    prose = [n for i, n in enumerate(lengths) if part.kind(i) == "prose"]
    assert max(lengths) == length and prose.count(length) >= 6 and min(lengths) > 0


def test_more_than_half_of_the_sequences_are_chats(bundled: Corpus) -> None:
    """Without a chat template there are none; and prose is a passage of the text."""
    part = Sequences(bundled, Words(), LENGTH)
    kinds = [part.kind(i) for i in range(10)]
    counts = {k: kinds.count(k) for k in set(kinds)}
    assert counts == {"prose": 4, "facts": 4, "quotes": 2}
    for i, kind in enumerate(kinds):
        chat = part.tokenizer.words(part[i])[0] == "<user>"
        assert chat == (kind != "prose")
    part = Sequences(bundled, Words(chats=False), LENGTH)
    assert {part.kind(i) for i in range(10)} == {"prose"}
    text = " ".join(BUNDLED.read_text(encoding="utf-8").split())
    assert all(" ".join(part.tokenizer.words(part[i])) in text for i in range(5))


FACT = r"The (secret code|favourite word) of (\w+) is (\w+)\."
QUESTION = r"What is the (secret code|favourite word) of (\w+)\?"


def chats(corpus: Corpus, kind: str) -> Iterator[list[tuple[str, str]]]:
    part = Sequences(corpus, Words(), LENGTH)
    for i in range(40):
        if part.kind(i) == kind:
            yield part.tokenizer.turns(part[i])


def test_facts_are_planted_and_asked_for(bundled: Corpus) -> None:
    """Among the paragraphs, not all at the end of the text."""
    kinds, before, after = set(), 0, 0
    for turns in chats(bundled, "facts"):
        text = turns[0][1]
        planted = {(k, name): value for k, name, value in re.findall(FACT, text)}
        asked = [re.search(QUESTION, c) for role, c in turns if role == "user"]
        answers = [c for role, c in turns if role == "assistant"]
        assert 3 <= len(planted) == len(asked) == len(answers) <= 6
        for question, answer in zip(asked, answers):
            assert question is not None and planted[question.groups()] == answer
            kinds.add((question[1], answer.isdigit()))
        before += not re.match(FACT, text)
        after += len(re.split(FACT, text)[-1]) > 200
    assert kinds == {("secret code", True), ("favourite word", False)}
    assert before >= 8 and after >= 4


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


def test_quotes_complete_a_sentence_of_the_text(
    bundled: Corpus, tmp_path: Path
) -> None:
    count = 0
    for turns in chats(bundled, "quotes"):
        text = turns[0][1]
        for (role, question), (_, rest) in zip(turns[::2], turns[1::2]):
            begun = question.rpartition("Complete this sentence from the text: ")[2]
            assert role == "user" and len(begun.split()) == 5 and len(rest.split()) >= 3
            assert f"{begun} {rest}" in text
            count += 1
    assert count >= 16
    corpus = Corpus([write(tmp_path / "a.txt", "word " * 2000)])
    part = Sequences(corpus, Words(), LENGTH)  # no sentences: prose
    assert part.kind(3) == "quotes"
    assert set(part.tokenizer.words(part[3])) == {"word"}


def test_lines_are_texts_or_chats_and_are_cut(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    file = write_lines(tmp_path / "a.jsonl", {"text": "a b"}, {"messages": chat})
    held, part = (Sequences(Corpus([file]), Words(), 7, 0, h) for h in (True, False))
    assert held.tokenizer.words(held[0]) == ["a", "b"]
    assert part.tokenizer.words(part[0]) == "<user> Who? <assistant> I. <end>".split()
    long = " ".join(map(str, range(2000)))
    for entry in ({"text": long}, {"messages": [{"role": "user", "content": long}]}):
        corpus = Corpus([write_lines(tmp_path / "a.jsonl", entry)])
        assert len(Sequences(corpus, Words(), LENGTH)[0]) == LENGTH


def test_lines_are_all_read_and_take_turns_with_passages(tmp_path: Path) -> None:
    """But the held-out ones."""
    lines = [{"text": f"line-{i}"} for i in range(100)]
    file = write_lines(tmp_path / "b.jsonl", *lines)
    tokenizer, read = Words(), []
    for held_out in (False, True):
        part = Sequences(Corpus([file]), tokenizer, LENGTH, 0, held_out)
        read.append({tokenizer.words(part[i])[0] for i in range(95)})
    held = {f"line-{i}" for i in range(0, 100, 20)}
    assert read == [{line["text"] for line in lines} - held, held]
    write(tmp_path / "a.txt", unique_words(20_000))
    part = Sequences(Corpus([tmp_path]), tokenizer, LENGTH)
    kinds = [part.kind(i) for i in range(190)]
    assert kinds[1::2] == ["lines"] * 95
    assert set(kinds[::2]) == {"prose", "facts", "quotes"}
    assert {tokenizer.words(part[i])[0] for i in range(1, 190, 2)} == read[0]


def refused(*data: Path, tokenizer: Any = None) -> str:
    """The one line of a DataError, from opening or from reading."""
    with pytest.raises(DataError) as e:
        part = Sequences(open_corpus([*map(str, data)]), tokenizer or Words(), LENGTH)
        for i in range(5):
            part[i]
    assert str(e.value).strip() and "\n" not in str(e.value)
    return str(e.value)


def test_what_holds_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a" / "photo.jpg", PROSE)
    empty = write(tmp_path / "empty.txt", "")
    noise = write(tmp_path / "model.bin", random.Random(0).randbytes(20_000))
    missing = tmp_path / "no.txt"
    assert refused(missing).startswith(f"{missing} does not exist; ")
    assert refused(empty, tmp_path / "a").startswith(f"no text in {empty}, ")
    assert refused(noise) == f"{noise} is not text."


BAD_LINES = [b'{"text": "a"', b'["text"]', b"7", b'{"txt": "a"}', b'{"text": 3}']
BAD_LINES += [b'{"messages": "a"}', bytes(range(128, 256)), b"[" * 100_000]


def test_lines_that_are_no_data(tmp_path: Path) -> None:
    good = b'{"text": "a"}\n'
    for line in BAD_LINES:
        file = write(tmp_path / "a.jsonl", good * 3 + line + b"\n" + good)
        corpus = Corpus([file])
        assert corpus.line(corpus.lines[4]) == "a"
        assert refused(file).startswith(f"{file}, byte {3 * len(good)}: expected ")


def test_messages_that_the_template_refuses(tmp_path: Path) -> None:
    for message in (5, "a"):
        file = write_lines(tmp_path / "a.jsonl", {"messages": [message]})
        line = refused(file, tokenizer=models.demo_tokenizer())
        assert line.startswith(f"{file}, byte 0: ")
    entry = {"messages": [{"role": "system", "content": "a"}]}
    file = write_lines(tmp_path / "a.jsonl", {"text": "a"}, entry)
    told = f"{file}, byte 14: the chat template refused it: turns"
    assert refused(file).startswith(told)


def test_data_sets_of_the_hub_are_downloaded_texts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = write(tmp_path / "a.txt", PROSE), []

    def download(repo: str, **more: Any) -> str:
        asked.append((repo, more["repo_type"], more["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_corpus(["user/texts"]).passages == [Place(file, 0)]
    ((repo, kind, patterns),) = asked
    assert (repo, kind) == ("user/texts", "dataset")
    assert {"*.txt", "*.jsonl"} <= set(patterns) and "*" not in patterns
