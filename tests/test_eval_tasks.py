"""Prompts with known answers: lengths, facts and their depth, wording, and data of the user's."""

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlx_fastforward.bench.eval.prose import HELD_OUT
from mlx_fastforward.bench.eval.tasks import (
    BUILT,
    FOLLOWING,
    Document,
    build,
    default_lengths,
    plant,
    render,
)
from mlx_fastforward.errors import ConfigError, FastForwardError

PLANTED = ("needle", "key-value", "chat")
LENGTHS = [256, 600]
STORY = "Once there was a fox. " * 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.demo_tokenizer(ends=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo tokenizer without its chat template."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    models.save_folder(models.tiny("llama"), folder, chat_template=False)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[Document]:
    return build(tokenizer, list(BUILT), LENGTHS, 5)


def of(documents: list[Document], *tasks: str) -> list[Document]:
    return [d for d in documents if d.task in tasks]


def test_as_many_documents_as_asked_for(documents: list[Document]) -> None:
    for task in BUILT:
        lengths = [d.length for d in of(documents, task)]
        assert lengths == [256] * 5 + [600] * 5
    assert len({d.id for d in documents}) == len(documents)


def test_the_longest_prompt_has_exactly_the_length(documents: list[Document]) -> None:
    for d in documents:
        assert max(map(len, d.prompts)) == d.length, d.id
        assert len(d.prompts) == (1 if d.task == "chat" else len(d.questions))


def test_prompts_without_a_template_are_exact_too(plain: Any) -> None:
    for d in build(plain, list(BUILT), [300], 2):
        assert max(map(len, d.prompts)) == 300, d.id
        if d.task == "key-value":
            told = plain.decode(d.prompts[0])
            assert told == f"{d.text}\n\n{d.questions[0].text}\nAnswer:"


def test_a_prompt_is_what_the_template_makes_of_text_and_question(
    documents: list[Document], tokenizer: Any
) -> None:
    for d in of(documents, "needle", "quote"):
        for question, ids in zip(d.questions, d.prompts):
            content = f"{d.text}\n\n{question.text}"
            wanted = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            assert ids == list(wanted)


def test_a_conversation_without_a_template(plain: Any) -> None:
    turns = [("user", "Text.\n\nWho?"), ("assistant", "He."), ("user", "Why?")]
    ids = render(plain, [{"role": r, "content": c} for r, c in turns])
    assert plain.decode(ids) == "Text.\n\nWho?\nAnswer: He.\n\nWhy?\nAnswer:"


def test_facts_stand_whole_where_they_should(documents: list[Document]) -> None:
    for d in of(documents, *PLANTED):
        for q in d.questions:
            name = q.text.removeprefix(f"What is the {q.kind} of ").removesuffix("?")
            fact = f"The {q.kind} of {name} is {q.answers[0]}."
            assert d.text.split("\n\n").count(fact) == 1
            assert q.depth is not None
            at = d.text.index(fact) / (len(d.text) - len(fact))
            slack = 0.25 if d.length == 256 else 0.12  # sentences are long
            assert at == pytest.approx(q.depth, abs=slack), (d.id, fact)
        values = [q.answers[0] for q in d.questions]
        assert len(set(values)) == len(values)
        kind = r"\d{4}" if d.questions[0].kind == "secret code" else "[a-z]+"
        assert all(re.fullmatch(kind, v) for v in values)


def test_how_many_facts(documents: list[Document]) -> None:
    assert {len(d.questions) for d in of(documents, "needle")} == {1}
    assert {len(d.questions) for d in of(documents, "chat")} == {3}
    several = {len(d.questions) for d in of(documents, "key-value")}
    assert several <= {3, 4, 5, 6} and len(several) > 1


def test_needles_go_through_the_depths(documents: list[Document]) -> None:
    depths = [d.questions[0].depth for d in of(documents, "needle")]
    assert sorted(depths[:5]) == [0, 0.25, 0.5, 0.75, 1]  # type: ignore[type-var]
    first, last = (
        next(d for d in of(documents, "needle") if d.questions[0].depth == depth)
        for depth in (0, 1)
    )
    assert first.text.startswith("The ") and last.text.endswith(".")
    assert last.text.split("\n\n")[-1].startswith(f"The {last.questions[0].kind}")


def test_quotes_are_sentences_of_the_text(documents: list[Document]) -> None:
    for d in of(documents, "quote"):
        assert 1 <= len(d.questions) <= 3
        for q in d.questions:
            begun = q.text.removeprefix("Complete this sentence from the text: ")
            assert 4 <= len(begun.split()) <= 6
            assert f"{begun} {q.answers[0]}" in " ".join(d.text.split())
            assert q.answers[0].rstrip("\"'”’)")[-1] in ".!?" and q.depth is not None


def test_what_follows_a_continuation_is_the_book(
    documents: list[Document], tokenizer: Any
) -> None:
    prose = HELD_OUT.read_text(encoding="utf-8")
    for d in of(documents, "continuation"):
        assert len(d.following) == FOLLOWING
        assert tokenizer.decode(d.prompts[0] + d.following) in prose
        assert d.questions[0].answers == [tokenizer.decode(d.following)]


def test_a_continuation_begins_as_the_tokenizer_begins_a_text(tokenizer: Any) -> None:
    class Begins:
        """A tokenizer that puts token 0 before every text."""

        has_chat_template = False
        decode = tokenizer.decode

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            return [0] * add_special_tokens + ids

    (d,) = build(Begins(), ["continuation"], [256], 1)
    assert d.prompts[0][0] == 0 and 0 not in d.prompts[0][1:]
    assert len(d.prompts[0]) == 256 and len(d.following) == FOLLOWING


def test_prompts_longer_than_a_book_go_on_in_the_next(tokenizer: Any) -> None:
    made = build(tokenizer, ["continuation", "needle"], [3000], 2)
    assert [max(map(len, d.prompts)) for d in made] == [3000] * 4
    with pytest.raises(ConfigError, match="the text holds 62,848 tokens, 99,"):
        build(tokenizer, ["continuation"], [99_000], 1)


def test_documents_depend_on_the_seed_alone(
    documents: list[Document], tokenizer: Any
) -> None:
    again = build(tokenizer, list(BUILT), LENGTHS[:1], 5)
    assert again == [d for d in documents if d.length == LENGTHS[0]]
    other = build(tokenizer, list(BUILT), LENGTHS[:1], 5, seed=1)
    assert not any(a.prompts == b.prompts for a, b in zip(again, other))


@given(
    st.lists(st.sampled_from(["It was so. ", "Why?\n\n", "And "]), max_size=20),
    st.lists(st.floats(0, 1), max_size=4),
)
def test_planting_changes_nothing_but_spaces(parts: list[str], depths: list) -> None:
    text = "".join(parts).strip()
    facts = [(depth, f"Fact {i} holds.") for i, depth in enumerate(depths)]
    made = plant(text, facts)
    for _, fact in facts:
        assert made.split("\n\n").count(fact) == 1
        made = "\n\n".join(p for p in made.split("\n\n") if p != fact)
    assert made.split() == text.split()


@pytest.mark.parametrize(
    "context, wanted",
    [
        (2048, [1024, 1900]),
        (None, [1024, 2048, 4096]),
        (131072, [1024, 2048, 4096]),
        (4096, [1024, 2048, 3948]),
        (1024, [876]),
    ],
)
def test_default_lengths_leave_room(context: Any, wanted: list[int]) -> None:
    assert default_lengths(context) == wanted


def jsonl(path: Path, *lines: Any) -> Path:
    texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_questions_about_one_text_share_it(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(
        tmp_path / "qa.jsonl",
        {"context": STORY, "question": "Who?", "answers": ["a fox", "the fox"]},
        {"context": STORY, "input": "When?", "answers": "once"},
        "",
        {"context": "Short.", "question": "How?", "answers": ["short"]},
    )
    one, two = build(tokenizer, ["qa"], [700], 9, data=path)
    asked = [(q.text, q.answers, q.kind, q.depth) for q in one.questions]
    wanted = [
        ("Who?", ["a fox", "the fox"], "qa", None),
        ("When?", ["once"], "qa", None),
    ]
    assert asked == wanted and one.text == STORY.strip()
    assert one.length == max(map(len, one.prompts)) < 256
    assert two.text == "Short."
    assert build(tokenizer, ["qa"], [700], 1, data=path) == [one]


def test_a_text_that_is_too_long_loses_its_middle(
    tmp_path: Path, tokenizer: Any
) -> None:
    text = "BEGIN " + " ".join(f"word{i}" for i in range(999)) + " END"
    line = {"context": text, "question": "Who?", "answers": ["x"]}
    (d,) = build(tokenizer, ["qa"], [256, 400], 1, data=jsonl(tmp_path / "a", line))
    assert d.length == len(d.prompts[0]) == 400
    assert d.text.startswith("BEGIN word0 word1") and d.text.endswith("word998 END")
    half = len(d.text) // 2
    assert d.text[:half] == text[:half] and d.text[half:] == text[half - len(d.text) :]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        {"context": "a", "question": "b"},
        {"context": "a", "answers": ["b"]},
        {"context": 1, "question": "b", "answers": ["c"]},
        {"context": "a", "question": "b", "answers": []},
        {"context": "a", "question": "b", "answers": [1]},
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: Any) -> None:
    good = {"context": "a", "question": "b", "answers": ["c"]}
    path = jsonl(tmp_path / "qa.jsonl", good, line)
    with pytest.raises(FastForwardError, match="line 2: expected an object with "):
        build(tokenizer, ["qa"], [256], 9, data=path)


def test_data_that_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    for path, said in (
        (tmp_path / "none.jsonl", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (jsonl(tmp_path / "empty.jsonl"), "is empty"),
    ):
        with pytest.raises(FastForwardError, match=said):
            build(tokenizer, ["qa"], [256], 1, data=path)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(FastForwardError, match="is not UTF-8"):
        build(tokenizer, ["qa"], [256], 1, data=tmp_path / "latin")


def test_what_cannot_be_built(tokenizer: Any) -> None:
    for args, said in (
        ((["recipes"], [256]), "tasks must be among continuation, .* got 'recipes'"),
        ((["qa"], [256]), "needs --data"),
        ((["needle"], [255]), "at least 256 tokens, got 255"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(tokenizer, *args, 1)
