"""Prompts with known answers: lengths, facts and their depth, wording, and data of the user's."""

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_fastforward.bench.eval.planted import HARD
from mlx_fastforward.bench.eval.prose import HELD_OUT, MARK
from mlx_fastforward.bench.eval.qa import read_data
from mlx_fastforward.bench.eval.scores import RULES, found
from mlx_fastforward.bench.eval.tasks import (
    BUILT,
    FOLLOWING,
    Document,
    Question,
    build,
    default_lengths,
    render,
)
from mlx_fastforward.errors import ConfigError, FastForwardError

TOKENIZER = models.demo_tokenizer(ends=True)
Documents = dict[str, list[Document]]


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Of every task five of each length."""
    return {task: build(TOKENIZER, [task], [256, 600], 5) for task in BUILT}


def test_prompts_have_exactly_the_length_and_are_as_the_template_makes_them(
    documents: Documents,
) -> None:
    every = [d for task in BUILT for d in documents[task]]
    assert [d.length for d in every] == 5 * ([256] * 5 + [600] * 5)
    assert len({d.id for d in every}) == 50
    for d in every:
        assert max(map(len, d.prompts)) == d.length, d.id
        assert len(d.prompts) == (1 if d.task == "chat" else len(d.questions))
        for question, ids in zip(d.questions, d.prompts):
            said = {"role": "user", "content": f"{d.text}\n\n{question.text}"}
            if d.task != "continuation":
                assert ids == TOKENIZER.apply_chat_template(
                    [said], add_generation_prompt=True
                )


def test_prose_whose_words_change_is_cut_to_the_length_too() -> None:
    """There, steps by the mean length of a token walk in circles."""
    (d,) = build(TOKENIZER, ["needle"], [1900], 1, 118)
    assert len(d.prompts[0]) == 1900


def test_prompts_without_a_template_are_exact_too(tmp_path: Path) -> None:
    models.save_folder(models.tiny("llama"), tmp_path / "base", chat_template=False)
    plain = load_tokenizer(tmp_path / "base")
    for d in build(plain, list(BUILT), [300], 1):
        assert max(map(len, d.prompts)) == 300, d.id
        if d.task == "key-value":
            told = plain.decode(d.prompts[0])
            assert told == f"{d.text}\n\n{d.questions[0].text}\nAnswer:"
    turns = [("user", "Text.\n\nWho?"), ("assistant", "He."), ("user", "Why?")]
    ids = render(plain, [{"role": r, "content": c} for r, c in turns])
    assert plain.decode(ids) == "Text.\n\nWho?\nAnswer: He.\n\nWhy?\nAnswer:"


def test_facts_stand_whole_where_they_should(documents: Documents) -> None:
    prose = " ".join(HELD_OUT.read_text(encoding="utf-8").replace(MARK, " ").split())
    for d in (d for task in ("needle", "key-value", "chat") for d in documents[task]):
        rest = d.text
        for q in d.questions:
            name = q.text.removeprefix(f"What is the {q.kind} of ").removesuffix("?")
            fact = f"The {q.kind} of {name} is {q.answers[0]}."
            assert d.text.split("\n\n").count(fact) == 1
            rest = rest.replace(fact, "")
            at = d.text.index(fact) / (len(d.text) - len(fact))
            slack = 0.25 if d.length == 256 else 0.12  # sentences are long
            slack = 1e-9 if q.depth in (0, 1) else slack
            assert at == pytest.approx(q.depth, abs=slack), (d.id, fact)
        assert " ".join(rest.split()) in prose
        values = [q.answers[0] for q in d.questions]
        assert len(set(values)) == len(values)
        kind = r"\d{4}" if d.questions[0].kind == "secret code" else "[a-z]+"
        assert all(re.fullmatch(kind, v) for v in values)
    counts = {task: {len(d.questions) for d in documents[task]} for task in BUILT}
    assert (counts["needle"], counts["chat"]) == ({1}, {3})
    assert counts["key-value"] <= {3, 4, 5, 6} and len(counts["key-value"]) > 1
    depths = {d.questions[0].depth for d in documents["needle"][:5]}
    assert depths == {0, 0.25, 0.5, 0.75, 1}


def test_quotes_are_sentences_of_the_text(documents: Documents) -> None:
    for d in documents["quote"]:
        assert 1 <= len(d.questions) <= 3
        for q in d.questions:
            begun = q.text.removeprefix("Complete this sentence from the text: ")
            assert 4 <= len(begun.split()) <= 6
            assert f"{begun} {q.answers[0]}" in " ".join(d.text.split())
            assert q.answers[0].rstrip("\"'”’)")[-1] in ".!?" and q.depth is not None


def test_hard_questions_can_be_answered_from_the_text() -> None:
    """By looking for what is asked about, with nothing but the text and the question."""
    made = build(TOKENIZER, list(HARD), [256, 600], 4)
    assert [d.length for d in made] == len(HARD) * ([256] * 4 + [600] * 4)
    for d in made:
        (q,) = d.questions
        lines, asked = d.text.splitlines(), q.text
        codes = dict(re.findall(r"secret code of (\w+) is (\d{4})\.", d.text))
        if d.task == "counting":
            who = re.findall(r"did (\w+) buy", asked)[0]
            wanted = str(sum(f"{who} bought a " in line for line in lines))
            assert q.answers[0] == wanted
        elif d.task == "several":
            wanted = " and ".join(
                codes[n] for n in re.findall("[A-Z][a-z]+", asked)[1:]
            )
        elif d.task == "table":
            who = re.findall(r"row of (\w+)", asked)[0]
            (wanted,) = [line for line in lines if line.startswith(f"| {who} ")]
        elif d.task == "code":
            name = re.findall(r"sets (\w+)", asked)[0]
            (wanted,) = [line for line in lines if line.strip().startswith(name)]
        elif d.task == "tool":
            results = re.findall(r"<tool_response>\n(.*)\n</tool_response>", d.text)
            told = [json.loads(result)["content"] for result in results]
            who = re.findall(r"code of (\w+)\?", asked)[0]
            (line,) = [text for text in told if f" {who} " in text]
            wanted = line.split()[-1]
        else:
            who = re.findall(r"word of (\w+)\?", asked)[0]
            (word,) = re.findall(rf"favourite word of {who} is (\w+)\.", d.text)
            wanted = f'Here: {{"word": "{word}", "code": "{codes[who]}"}}'
        rule = RULES.get(d.task, found)
        assert rule(wanted, q.answers) == 1 and rule("none", q.answers) == 0, d.id
        assert d.task == q.kind and (q.depth is None) != (
            d.task in ("table", "code", "tool")
        )


def test_what_follows_a_continuation_is_the_book(documents: Documents) -> None:
    prose = HELD_OUT.read_text(encoding="utf-8")
    for d in documents["continuation"]:
        assert len(d.following) == FOLLOWING
        assert TOKENIZER.decode(d.prompts[0] + d.following) in prose
        assert d.questions[0].answers == [TOKENIZER.decode(d.following)]


def test_a_continuation_begins_as_the_tokenizer_begins_a_text() -> None:
    class Begins:
        """A tokenizer that puts token 0 before every text."""

        has_chat_template = False
        decode = TOKENIZER.decode

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            return [0] * add_special_tokens + ids

    (d,) = build(Begins(), ["continuation"], [256], 1)
    assert d.prompts[0][0] == 0 and 0 not in d.prompts[0][1:]
    assert len(d.prompts[0]) == 256 and len(d.following) == FOLLOWING
    made = build(TOKENIZER, ["continuation", "needle"], [3000], 2)  # longer than a book
    assert [max(map(len, d.prompts)) for d in made] == [3000] * 4


def test_documents_depend_on_the_seed_alone(documents: Documents) -> None:
    for task in BUILT:
        again, other = (build(TOKENIZER, [task], [256], 5, seed) for seed in (0, 1))
        assert again == documents[task][:5]
        assert not any(a.prompts == b.prompts for a, b in zip(again, other))


def jsonl(path: Path, *lines: Any) -> Path:
    texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_questions_share_a_text_and_long_ones_lose_their_middle(tmp_path: Path) -> None:
    story = "Once there was a fox. " * 12
    path = jsonl(
        tmp_path / "qa.jsonl",
        {"context": story, "question": "Who?", "answers": ["a fox", "the fox"]},
        {"context": story, "input": "When?", "answers": "once"},
        "",
        {"context": "Short.", "question": "How?", "answers": ["short"]},
    )
    one, two = build(TOKENIZER, ["qa"], [700], 9, data=path)
    who = Question("Who?", ["a fox", "the fox"], "qa")
    assert one.questions == [who, Question("When?", ["once"], "qa")]
    assert (one.text, two.text) == (story.strip(), "Short.")
    assert one.length == max(map(len, one.prompts)) < 256
    assert build(TOKENIZER, ["qa"], [700], 1, data=path) == [one]
    text = "BEGIN " + " ".join(f"word{i}" for i in range(999)) + " END"
    line = {"context": text, "question": "Who?", "answers": ["x"]}
    (d,) = build(TOKENIZER, ["qa"], [256, 400], 1, data=jsonl(tmp_path / "a", line))
    assert d.length == len(d.prompts[0]) == 400
    assert d.text.startswith("BEGIN word0 word1") and d.text.endswith("word998 END")
    half = len(d.text) // 2
    assert d.text[:half] == text[:half] and d.text[half:] == text[half - len(d.text) :]


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    good = {"context": "a", "question": "b", "answers": ["c"]}
    lines: list[Any] = ["not json", "[1]", "[" * 100_000, good | {"context": 1}]
    lines += [{k: v for k, v in good.items() if k != missing} for missing in good]
    lines += [good | {"answers": []}, good | {"answers": [1]}]
    for line in lines:
        path = jsonl(tmp_path / "qa.jsonl", good, line)
        with pytest.raises(FastForwardError, match="line 2: expected an object with "):
            read_data(path)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for path, said in (
        (tmp_path / "none.jsonl", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (jsonl(tmp_path / "empty.jsonl"), "is empty"),
        (tmp_path / "latin", "is not UTF-8"),
    ):
        with pytest.raises(FastForwardError, match=said):
            read_data(path)


@pytest.mark.parametrize(
    "task, length, said",
    [
        ("recipes", 256, "tasks must be among continuation, .* got 'recipes'"),
        ("qa", 256, "needs --data"),
        ("needle", 255, "at least 256 tokens, got 255"),
        ("continuation", 99_000, "the text holds 62,848 tokens, 99,"),
    ],
)
def test_lengths_and_what_cannot_be_built(task: str, length: int, said: str) -> None:
    assert default_lengths(2048) == [1024, 1900] and default_lengths(1024) == [876]
    assert default_lengths(None) == default_lengths(131072) == [1024, 2048, 4096]
    with pytest.raises(ConfigError, match=said):
        build(TOKENIZER, [task], [length], 1)
