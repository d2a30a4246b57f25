"""Arms against the dense model on tiny random models."""

import copy
from dataclasses import replace
from typing import Any

import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from models import prefill

from mlx_fastforward import ConfigError
from mlx_fastforward.attachment import attach, detach, engine_of, reading, switched
from mlx_fastforward.bench.eval import answers, tasks
from mlx_fastforward.bench.eval.arms import Arm
from mlx_fastforward.bench.eval.evaluation import Record, evaluate
from mlx_fastforward.neurons.selectors import Oracle

LENGTH, ANSWER = 256, 6
HALF = Arm("half", models.settings(selector="oracle"))
ZERO = Arm("zero", models.settings(sparsity=0.0))
Documents = dict[str, tasks.Document]


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", vocab=4096)


@pytest.fixture(scope="module")
def documents() -> Documents:
    """One of each task."""
    return {d.task: d for d in build(list(tasks.BUILT))}


@pytest.fixture(scope="module")
def records(model: Any, documents: Documents) -> list[Record]:
    return ask(model, documents.values(), HALF)


def build(names: list[str], tokenizer: Any = None) -> list[tasks.Document]:
    tokenizer = tokenizer or models.demo_tokenizer(ends=True)
    return tasks.build(tokenizer, names, [LENGTH], 1)


def ask(
    model: Any, documents: Any, *arms: Arm, tokenizer: Any = None, **more: Any
) -> list[Record]:
    tokenizer = tokenizer or models.demo_tokenizer(ends=True)
    more["max_tokens"] = ANSWER
    return evaluate(model, tokenizer, list(documents), arms, **more)


def logprobs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    return (np.exp(p) * (p - q)).sum(-1).mean()


def test_kl_is_that_of_the_dense_answer_after_either_prompt(
    model: Any, documents: Documents, records: list[Record]
) -> None:
    """By hand: every whole prompt by itself and its dense answer in plain calls, in float64."""
    tokenizer, d = models.demo_tokenizer(ends=True), documents["key-value"]
    shared = answers.shared_tokens(d.prompts)
    for turn, ids in enumerate(d.prompts):
        answer, _ = models.decode(model, ids, ANSWER)
        ends = [i for i, t in enumerate(answer) if t in tokenizer.eos_token_ids]
        answer = answer[: ends[0] + 1] if ends else answer
        logits, _ = prefill(model, ids + answer[:-1])
        p = logprobs(logits[len(ids) - 1 :])
        attach(model, HALF.config)
        with reading(model, d.length) as prompt:
            _, cache = prefill(model, ids[:shared])
        detach(model)
        logits, _ = prefill(model, ids[shared:] + answer[:-1], cache)
        q = logprobs(logits[len(ids) - shared - 1 :])
        (r,) = [r for r in records if r.document == d.id and r.turn == turn]
        said = mlx_lm.generate(model, tokenizer, ids, max_tokens=ANSWER)
        assert r.dense == said.strip()
        assert r.kl == pytest.approx(mean_kl(p, q), rel=1e-2) and r.kl > 1e-3
        assert r.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
        assert r.tokens == len(ids) and r.length == LENGTH
        skipped = prompt.flops.sparsity * shared / LENGTH
        assert r.ffn_sparsity == pytest.approx(skipped)


def test_perplexity_is_of_the_true_tokens(
    model: Any, documents: Documents, records: list[Record]
) -> None:
    d = documents["continuation"]
    logits, _ = prefill(model, d.prompts[0] + d.following[:-1])
    p = logprobs(logits[LENGTH - 1 :])
    (r,) = [r for r in records if r.task == "continuation"]
    wanted = -p[np.arange(len(d.following)), d.following].mean()
    assert r.nll_dense == pytest.approx(wanted, rel=1e-4)
    assert r.nll_sparse not in (None, r.nll_dense)
    assert r.score_dense is r.score_sparse is r.exact_dense is None


def test_a_chat_keeps_its_answers(
    model: Any, documents: Documents, records: list[Record]
) -> None:
    """Each turn's dense answer is mlx-lm's to the conversation read from the beginning."""
    tokenizer, d = models.demo_tokenizer(ends=True), documents["chat"]
    own = [r for r in records if r.document == d.id]
    assert [r.turn for r in own] == [0, 1, 2]
    messages: list[dict[str, str]] = []
    for i, (question, r) in enumerate(zip(d.questions, own)):
        text = f"{d.text}\n\n{question.text}" if i == 0 else question.text
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        said = mlx_lm.generate(model, tokenizer, ids, max_tokens=ANSWER)
        assert r.dense == said.strip() and r.kl > 0
        messages.append({"role": "assistant", "content": said})
    first, second, third = (r.tokens for r in own)
    assert LENGTH == first < second - 5 < third - 10
    assert len({r.ffn_sparsity for r in own}) == 1


def test_sparse_decoding_goes_token_by_token(
    model: Any, documents: Documents, records: list[Record]
) -> None:
    """By hand: every token of the dense answer in a call of its own, run sparsely."""
    d, (ids,) = documents["quote"], documents["quote"].prompts
    steps = Arm("steps", replace(HALF.config, sparse_decode=True))
    ticks: list[int] = []
    both = ask(model, [d], HALF, steps, tick=ticks.append)
    assert [r.arm for r in both] == ["half", "steps"] and ticks == [LENGTH] * 3
    assert both[0] == next(r for r in records if r.task == "quote")
    answer, p = models.decode(model, ids, ANSWER)
    attach(model, steps.config)
    with reading(model, LENGTH):
        _, cache = prefill(model, ids[:-1])
    with switched(model, sparse=False):
        rows = [prefill(model, ids[-1:], cache)[0][-1]]
    first, own = int(rows[0].argmax()), copy.deepcopy(cache)
    said = [first, *models.continue_from(model, first, ANSWER - 1, own)[0]]
    rows += [prefill(model, [t], cache)[0][-1] for t in answer[:-1]]
    detach(model)
    assert both[1].kl == pytest.approx(mean_kl(p, logprobs(np.stack(rows))), rel=1e-2)
    assert both[1].kl != pytest.approx(both[0].kl, rel=1e-2)
    text = models.demo_tokenizer().decode(said).strip()
    assert both[1].sparse == text != both[0].sparse
    chat = ask(model, [documents["chat"]], steps)
    assert len(chat) == 3 and all(r.kl > 0 for r in chat)


def test_arms_that_cannot_be_are_refused_first_and_failing_ones_leave_no_trace(
    model: Any, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []
    trained = Arm("t", models.settings(selector="trained"))
    for other, said in ((trained, "needs a predictor"), (HALF, "two arms are the sam")):
        with pytest.raises(ConfigError, match=said):
            ask(model, documents.values(), HALF, other, tick=ticks.append)
    monkeypatch.setattr(Oracle, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(model, [documents["needle"]], HALF, tick=ticks.append)
    assert ticks == [LENGTH]  # the dense one
    assert engine_of(model) is None and type(model).__name__ == "Model"


def test_without_a_chat_template(model: Any, tmp_path: Any) -> None:
    models.save_folder(model, tmp_path / "plain", chat_template=False)
    tokenizer = load_tokenizer(tmp_path / "plain")
    docs = build(["needle", "chat"], tokenizer)
    found = ask(model, docs, HALF, tokenizer=tokenizer)
    assert [r.turn for r in found] == [0, 0, 1, 2]
    texts = ["He", "\n He", "\n He\n", " He\nWho?"]
    ended = [answers._ended(tokenizer, text) for text in texts]
    assert ended == [False, False, True, True]
    assert not answers._ended(models.demo_tokenizer(), texts[-1])


def test_a_sliding_window_is_copied_with_the_rest() -> None:
    """Caches that cannot be trimmed: each question still goes on from the same text."""
    model = models.tiny("gemma3_text", vocab=4096)
    found = ask(model, build(["key-value", "chat"]), ZERO, HALF)
    assert {r.kl for r in found if r.arm == "zero"} == {0}
    assert all(r.kl > 0 for r in found if r.arm == "half")
