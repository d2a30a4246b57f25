"""Documents with questions whose answers are known, for any tokenizer, deterministic by seed.

Prompts have exactly the length asked for, chat template counted: the prose around planted facts is
cut to fit, the facts never. Wording and facts are those that the demo model was trained on.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

from ...errors import ConfigError
from ...generation import encode_prompt
from ...session import render as render_template
from ...train.facts import QUOTE
from .planted import HARD, Question, single
from .prose import HELD_OUT, filler, fit, passages, sentence_ends
from .qa import Asked, read_data

BUILT = ("continuation", "needle", "key-value", "quote", "chat")
TASKS = (*BUILT, *HARD, "qa")
FOLLOWING = 64  # true tokens after a continuation's prompt
ROOM = 148  # tokens of the context that are left for answers and follow-up questions
SHORTEST = 256  # a shorter prompt does not hold the facts and the question
TEMPLATE = {"enable_thinking": False}  # thoughts would not end within --max-tokens


@dataclass(frozen=True)
class Document:
    """A text that is read once, and the questions about it.

    Args:
        length: Tokens of the longest prompt.
        prompts: Token ids of each question's whole prompt; of a chat only the first one's.
        following: The true tokens after a continuation's prompt.
    """

    id: str
    task: str
    length: int
    text: str
    questions: list[Question]
    prompts: list[list[int]]
    following: list[int] = field(default_factory=list)


def build(
    tokenizer: Any,
    tasks: list[str],
    lengths: list[int],
    count: int,
    seed: int = 0,
    data: Optional[Path] = None,
) -> list[Document]:
    """``count`` documents per task and prompt length; of qa, the first ``count`` of ``data``.

    Raises:
        ConfigError: an unknown task, qa without data, lengths that cannot be.
        FastForwardError: data that cannot be read.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"tasks must be among {', '.join(TASKS)}; got {task!r}.")
    if "qa" in tasks and data is None:
        raise ConfigError("the task qa needs --data, a JSONL file with questions.")
    if min(lengths) < SHORTEST:
        raise ConfigError(
            f"prompts must have at least {SHORTEST} tokens, got {min(lengths)}."
        )
    own = read_data(data)[:count] if data is not None else []
    made: list[Document] = []
    for task in tasks:
        if task == "qa":
            made += _qa(tokenizer, max(lengths), own)
            continue
        for length in lengths:
            if task == "continuation":
                made += _continuations(tokenizer, length, count, seed)
                continue
            for i in range(count):
                rng = random.Random(f"{seed} {task} {length} {i}")
                maker = _quote if task == "quote" else _planted
                made.append(maker(tokenizer, task, length, i, rng))
    return made


def default_lengths(context: Optional[int]) -> list[int]:
    """1024, 2048 and 4096, as a context of so many tokens allows."""
    most = (context or 4096 + ROOM) - ROOM
    return sorted({min(n, most) for n in (1024, 2048, 4096)})


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the answer; plain text without a chat template."""
    if tokenizer.has_chat_template:
        return render_template(tokenizer, messages, TEMPLATE)
    parts = (
        f"{m['content']}\nAnswer:" if m["role"] == "user" else f" {m['content']}\n\n"
        for m in messages
    )
    ids: Any = encode_prompt(tokenizer, "".join(parts)).tolist()
    return ids


def first_message(text: str, question: str) -> dict[str, str]:
    """The document and the first question, as a user pastes them."""
    return {"role": "user", "content": f"{text}\n\n{question}"}


def plant(text: str, facts: list[tuple[float, str]]) -> str:
    """Put (depth, sentence) facts between the sentences nearest to their depths."""
    places = [0, *sentence_ends(text), len(text)]
    whole = len(text)
    for depth, fact in sorted(facts, reverse=True):
        at = min(places, key=lambda place: abs(place - depth * whole))
        text = f"{text[:at].rstrip()}\n\n{fact}\n\n{text[at:].lstrip()}"
    return text.strip()


def _planted(
    tokenizer: Any, task: str, length: int, i: int, rng: random.Random
) -> Document:
    """Prose with facts in it, and the questions about them."""
    if task in HARD:
        facts, questions = HARD[task](rng)
    else:
        facts, questions = single(task, i, rng)
    prose = filler(rng, 8 * length)
    first = questions[:1] if task == "chat" else questions
    text = fit(
        lambda n, drop: plant(prose[drop:n].strip(), facts),
        lambda text: _longest(tokenizer, text, first),
        length,
        prose,
    )
    return _document(tokenizer, task, length, i, text, questions)


def _quote(
    tokenizer: Any, task: str, length: int, i: int, rng: random.Random
) -> Document:
    """Up to three sentences of the text to complete."""

    def cut(prose: str, questions: list[Question]) -> str:
        return fit(
            lambda n, drop: prose[drop:n].strip(),
            lambda text: _longest(tokenizer, text, questions),
            length,
            prose,
        )

    found: list[str] = []
    while not found:
        prose = filler(rng, 8 * length)
        # The true questions are longer than this one: they take the end of the text.
        text = cut(prose, [Question(QUOTE, [], "")])
        found = _sentences(text[: max(len(text) - 300, len(text) // 2)])
    questions = []
    for sentence in rng.sample(found, min(3, len(found))):
        words, k = sentence.split(), rng.randint(4, 6)
        begun, rest = " ".join(words[:k]), " ".join(words[k:])
        depth = round(text.index(sentence) / len(text), 3)
        question = f"{QUOTE} {begun}"
        questions.append(Question(question, [rest], "quote", depth))
    return _document(tokenizer, task, length, i, cut(prose, questions), questions)


def _sentences(text: str) -> list[str]:
    """Sentences of 8 to 28 words whose beginning stands only once in the text."""
    parts = [s for p in text.split("\n\n") for s in re.split(r"(?<=[.!?])\s+", p)]
    found = [s for s in parts[1:-1] if 8 <= len(s.split()) <= 28]  # ends may be cut
    found = [s for s in found if s.rstrip("\"'”’)")[-1:] in ".!?"]  # no heading
    return [s for s in found if text.count(" ".join(s.split()[:4])) == 1]


def _continuations(
    tokenizer: Any, length: int, count: int, seed: int
) -> list[Document]:
    """Prose without a template, and the tokens that follow in the book."""
    bare = len(tokenizer.encode("a", add_special_tokens=False))
    begin = list(tokenizer.encode("a"))[:-bare]  # attention sinks, where they are usual
    size = length - len(begin)
    prose, made = HELD_OUT.read_text(encoding="utf-8"), []
    stretches = passages(prose, tokenizer, count, size + FOLLOWING, 997 * seed)
    for i, stretch in enumerate(stretches):
        ids: Any = stretch.tolist()
        text, following = tokenizer.decode(ids[:size]), ids[size:]
        name = f"... {' '.join(text[-40:].split())}"
        question = Question(name, [tokenizer.decode(following)], "prose", None)
        key, prompt = f"continuation-{length}-{i}", begin + ids[:size]
        made.append(
            Document(key, "continuation", length, text, [question], [prompt], following)
        )
    return made


def _qa(tokenizer: Any, most: int, data: Sequence[Asked]) -> Iterator[Document]:
    """The user's documents; the middle of one that is too long is cut out, as LongBench does."""
    for i, (context, asked) in enumerate(data):
        text, questions = context, [Question(q, answers, "qa") for q, answers in asked]
        if _longest(tokenizer, text, questions) > most:
            text = fit(
                lambda n, drop: context[: n // 2 - drop] + context[n // 2 - n :],
                lambda text: _longest(tokenizer, text, questions),
                most,
                context,
            )
        prompts = _prompts(tokenizer, text, questions)
        length = max(map(len, prompts))
        yield Document(f"qa-{i}", "qa", length, text, questions, prompts)


def _longest(tokenizer: Any, text: str, questions: list[Question]) -> int:
    """Tokens of the longest prompt; the question decides which one that is."""
    longest = max(questions, key=lambda q: len(tokenizer.encode(q.text)))
    return len(render(tokenizer, [first_message(text, longest.text)]))


def _prompts(tokenizer: Any, text: str, questions: list[Question]) -> list[list[int]]:
    return [render(tokenizer, [first_message(text, q.text)]) for q in questions]


def _document(
    tokenizer: Any, task: str, length: int, i: int, text: str, questions: list[Question]
) -> Document:
    prompts = _prompts(tokenizer, text, questions[:1] if task == "chat" else questions)
    return Document(f"{task}-{length}-{i}", task, length, text, questions, prompts)
