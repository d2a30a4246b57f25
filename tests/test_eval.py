"""Arms against the dense model on tiny random models, and what summaries make of it."""

import copy
import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import models
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_fastforward import ConfigError, PrefillConfig, attachment
from mlx_fastforward.attachment import attach, detach, engine_of
from mlx_fastforward.bench.eval import tasks
from mlx_fastforward.bench.eval.answers import shared_tokens
from mlx_fastforward.bench.eval.evaluation import Arm, Record, evaluate, label
from mlx_fastforward.bench.eval.summaries import summaries, worst
from mlx_fastforward.neurons.selectors import Oracle
from mlx_fastforward.predictors.file import load_predictor

LENGTH, ANSWER = 256, 6
HALF = Arm("half", models.settings(selector="oracle"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.tiny("llama", vocab=4096)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.demo_tokenizer(ends=True)


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[tasks.Document]:
    return tasks.build(tokenizer, list(tasks.BUILT), [LENGTH], 1)


@pytest.fixture(scope="module")
def records(model: Any, tokenizer: Any, documents: Any) -> list[Record]:
    return ask(model, tokenizer, documents, HALF)


def ask(model: Any, tokenizer: Any, documents: Any, *arms: Arm, **more: Any) -> Any:
    return evaluate(model, tokenizer, documents, arms, max_tokens=ANSWER, **more)


def logprobs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def one(documents: list[tasks.Document], task: str) -> tasks.Document:
    return next(d for d in documents if d.task == task)


def test_sparsity_zero_changes_nothing(
    model: Any, tokenizer: Any, documents: Any
) -> None:
    found = ask(model, tokenizer, documents, Arm("zero", models.settings(sparsity=0.0)))
    assert len(found) == sum(len(d.questions) for d in documents)
    for r in found:
        assert (r.kl, r.top1, r.ffn_sparsity) == (0, 1, 0)
        assert (r.dense, r.score_dense, r.exact_dense, r.nll_dense) == (
            r.sparse,
            r.score_sparse,
            r.exact_sparse,
            r.nll_sparse,
        )


def test_a_selector_that_picks_the_worst_neurons_shows(
    model: Any,
    tokenizer: Any,
    documents: Any,
    records: list[Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Worst(Oracle):
        def __call__(self, *args: Any) -> mx.array:
            return -super().__call__(*args)

    monkeypatch.setattr(attachment, "Oracle", Worst)
    broken = ask(model, tokenizer, documents, HALF)
    (bad,), (good,) = (
        [s.kl for s in summaries(rs) if s.task == "all"] for rs in (broken, records)
    )
    assert bad > 2 * good > 0
    assert {r.dense for r in broken} == {r.dense for r in records}


def test_kl_is_that_of_the_dense_answer_after_either_prompt(
    model: Any, documents: Any, tokenizer: Any, records: list[Record]
) -> None:
    """By hand: the whole prompt and the dense answer in plain calls, in float64."""
    d = one(documents, "key-value")
    shared = shared_tokens(d.prompts)
    engine = attach(model, HALF.config)
    for turn, ids in enumerate(d.prompts):
        detach(model)
        answer, _ = models.decode(model, ids, ANSWER)
        ends = [i for i, t in enumerate(answer) if t in tokenizer.eos_token_ids]
        answer = answer[: ends[0] + 1] if ends else answer
        logits, _ = models.prefill(model, ids + answer[:-1])
        p = logprobs(logits[len(ids) - 1 :])
        attachment.seat(model, engine)
        with engine.prompt(d.length) as tally:
            _, cache = models.prefill(model, ids[:shared])
        engine.enabled = False
        logits, _ = models.prefill(model, ids[shared:] + answer[:-1], cache)
        engine.enabled = True
        q = logprobs(logits[len(ids) - shared - 1 :])
        r = next(r for r in records if r.document == d.id and r.turn == turn)
        wanted = (np.exp(p) * (p - q)).sum(-1).mean()
        assert r.kl == pytest.approx(wanted, rel=1e-2) and wanted > 1e-3
        assert r.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
        assert r.tokens == len(ids) and r.length == LENGTH
        assert r.ffn_sparsity == pytest.approx(tally.sparsity * shared / LENGTH)
    detach(model)


def test_perplexity_is_of_the_true_tokens(
    model: Any, documents: Any, records: list[Record]
) -> None:
    d = one(documents, "continuation")
    logits, _ = models.prefill(model, d.prompts[0] + d.following[:-1])
    p = logprobs(logits[LENGTH - 1 :])
    (r,) = [r for r in records if r.task == "continuation"]
    wanted = -p[np.arange(len(d.following)), d.following].mean()
    assert r.nll_dense == pytest.approx(wanted, rel=1e-4)
    assert r.nll_sparse not in (None, r.nll_dense)
    assert r.score_dense is r.score_sparse is r.exact_dense is None


def test_every_question_is_asked_by_itself(
    model: Any, tokenizer: Any, documents: Any, records: list[Record]
) -> None:
    """Dense answers are mlx-lm's own to each prompt, whatever was asked before."""
    for d in documents:
        if d.task == "chat":
            continue
        for turn, ids in enumerate(d.prompts):
            said = mlx_lm.generate(model, tokenizer, ids, max_tokens=ANSWER)
            r = next(r for r in records if r.document == d.id and r.turn == turn)
            assert r.dense == said.strip()


def test_a_chat_keeps_its_answers(
    model: Any, tokenizer: Any, documents: Any, records: list[Record]
) -> None:
    """Each turn's dense answer is mlx-lm's to the conversation read from the beginning."""
    d = one(documents, "chat")
    own = [r for r in records if r.document == d.id]
    assert [r.turn for r in own] == [0, 1, 2]
    messages, tokens = [], []
    for i, (question, r) in enumerate(zip(d.questions, own)):
        text = f"{d.text}\n\n{question.text}" if i == 0 else question.text
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        said = mlx_lm.generate(model, tokenizer, ids, max_tokens=ANSWER)
        assert r.dense == said.strip()
        messages.append({"role": "assistant", "content": said})
        tokens.append(len(ids))
    assert tokens[0] == LENGTH and own[0].tokens == LENGTH
    assert own[1].tokens > LENGTH + 5 and own[2].tokens > own[1].tokens + 5
    assert all(r.kl > 0 for r in own) and len({r.ffn_sparsity for r in own}) == 1


def test_sparse_decoding_goes_token_by_token(
    model: Any, tokenizer: Any, documents: Any, records: list[Record]
) -> None:
    """By hand: every token of the dense answer in a call of its own, with the engine on."""
    d = one(documents, "needle")
    arm = Arm("steps", replace(HALF.config, sparse_decode=True))
    both = ask(model, tokenizer, [d], HALF, arm)
    assert [r.arm for r in both] == ["half", "steps"]
    assert both[0] == next(r for r in records if r.task == "needle")
    ids = d.prompts[0]
    answer, p = models.decode(model, ids, ANSWER)
    engine = attach(model, arm.config)
    with engine.prompt(LENGTH):
        _, cache = models.prefill(model, ids[:-1])
    engine.enabled = False
    rows = [models.prefill(model, ids[-1:], cache)[0][-1]]
    engine.enabled = True
    rows += [models.prefill(model, [t], cache)[0][-1] for t in answer[:-1]]
    detach(model)
    q = logprobs(np.stack(rows))
    wanted = (np.exp(p) * (p - q)).sum(-1).mean()
    assert both[1].kl == pytest.approx(wanted, rel=1e-2)
    assert both[1].kl != pytest.approx(both[0].kl, rel=1e-2)
    chat = ask(model, tokenizer, [one(documents, "chat")], arm)
    assert len(chat) == 3 and all(r.kl > 0 for r in chat)


def test_arms_take_turns_and_the_model_comes_back_stock(
    model: Any, tokenizer: Any, documents: Any, records: list[Record]
) -> None:
    ticks: list[int] = []
    docs = [one(documents, "needle"), one(documents, "quote")]
    arms = [HALF, Arm("more", models.settings(sparsity=0.75, selector="oracle"))]
    found = ask(model, tokenizer, docs, *arms, tick=ticks.append)
    assert ticks == [LENGTH] * 6
    assert engine_of(model) is None and type(model).__name__ == "Model"
    assert [r for r in found if r.arm == "half"] == [
        r for r in records if r.task in ("needle", "quote")
    ]
    assert {r.arm for r in found} == {"half", "more"}


def test_what_an_arm_uses_of_the_adapter(
    model: Any, tokenizer: Any, documents: Any, tmp_path: Any
) -> None:
    """Everything that "auto" finds; nothing with probe, no compensator and a uniform schedule."""
    path = models.save_random_predictor(model, tmp_path / "a", compensator="mlp")
    predictor = load_predictor(path)
    docs = [one(documents, "needle")]
    bare = models.settings(selector="probe", compensator="none", schedule="uniform")
    without = ask(model, tokenizer, docs, Arm("bare", bare))
    with_it = ask(
        model,
        tokenizer,
        docs,
        Arm("bare", bare),
        Arm("auto", models.settings()),
        predictor=predictor,
    )
    assert with_it[0] == without[0] and with_it[1].kl != with_it[0].kl
    names = []
    for config in (bare, models.settings(), models.settings(compensator="none")):
        names.append(label(attach(model, config, predictor=predictor)))
    assert names == ["probe 50%", "trained + mlp 50%", "trained 50%"]
    config = PrefillConfig(0.375, 8, selector="oracle")
    assert label(attach(model, config), block=True) == "oracle 37.5% block 8"
    detach(model)


def test_arms_that_cannot_be_are_refused_first(
    model: Any, tokenizer: Any, documents: Any
) -> None:
    ticks: list[int] = []
    trained = Arm("t", models.settings(selector="trained"))
    with pytest.raises(ConfigError, match="needs a predictor"):
        ask(model, tokenizer, documents, HALF, trained, tick=ticks.append)
    with pytest.raises(ConfigError, match="two arms are the same: half, half"):
        ask(model, tokenizer, documents, HALF, HALF, tick=ticks.append)
    assert not ticks and engine_of(model) is None


def test_a_failing_arm_leaves_the_model_stock(
    model: Any, tokenizer: Any, documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Oracle, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(model, tokenizer, documents, HALF)
    assert engine_of(model) is None


def test_without_a_chat_template(model: Any, tmp_path: Any) -> None:
    models.save_folder(models.tiny("llama"), tmp_path / "plain", chat_template=False)
    tokenizer = load_tokenizer(tmp_path / "plain")
    docs = tasks.build(tokenizer, list(tasks.BUILT), [LENGTH], 1)
    found = ask(model, tokenizer, docs, HALF)
    assert {r.task for r in found} == set(tasks.BUILT)
    assert not any("\n" in r.dense + r.sparse for r in found)
    assert [r.turn for r in found if r.task == "chat"] == [0, 1, 2]


def test_a_sliding_window_is_copied_with_the_rest(tokenizer: Any) -> None:
    """Caches that cannot be trimmed: each question still goes on from the same text."""
    model = models.tiny("gemma3_text", vocab=4096)
    docs = tasks.build(tokenizer, ["needle", "chat"], [LENGTH], 1)
    zero = ask(model, tokenizer, docs, Arm("zero", models.settings(sparsity=0.0)))
    assert {r.kl for r in zero} == {0}
    assert all(r.kl > 0 for r in ask(model, tokenizer, docs, HALF))


def record(**more: Any) -> Record:
    rest = dict.fromkeys(("name", "kind", "expected", "dense", "sparse"), "")
    numbers = {
        "turn": 0,
        "length": 9,
        "tokens": 9,
        "depth": None,
        "kl": 0.0,
        "top1": 1.0,
    }
    base: Any = {"arm": "a", "task": "t", "document": "d", "ffn_sparsity": 0.0}
    return Record(**{**rest, **numbers, **base, **more})


def test_a_summary_by_hand() -> None:
    rows = [
        record(document="x", kl=1.0, top1=0.5, score_dense=1, score_sparse=0.5,
               exact_dense=1, exact_sparse=0, ffn_sparsity=0.2),
        record(document="x", kl=2.0, top1=1.0, score_dense=1, score_sparse=1,
               exact_dense=1, exact_sparse=1, ffn_sparsity=0.2),
        record(document="y", kl=6.0, top1=0.0, score_dense=0, score_sparse=0.3,
               exact_dense=0, exact_sparse=0, ffn_sparsity=0.5),
        record(task="c", document="z", kl=0.5, nll_dense=1.0, nll_sparse=1.5),
        record(task="c", document="w", kl=0.7, nll_dense=2.0, nll_sparse=2.0),
    ]  # fmt: skip
    t, c, whole = summaries(rows)
    assert [s.task for s in (t, c, whole)] == ["t", "c", "all"]
    assert (t.n, t.documents, whole.n, whole.documents) == (3, 2, 5, 4)
    assert (t.scored, c.scored, whole.scored) == (3, 0, 3)
    assert (t.kl, t.top1) == (3.0, 0.5) and t.kl_bounds == (1.5, 6.0)
    assert t.score_dense == pytest.approx(2 / 3)
    assert t.score_sparse == pytest.approx(0.6)
    assert t.score_difference == pytest.approx(-0.2 / 3)
    assert t.score_difference_bounds == pytest.approx((-0.25, 0.3))
    assert (t.exact_dense, t.exact_sparse) == pytest.approx((2 / 3, 1 / 3))
    assert t.ffn_sparsity == pytest.approx(0.35)  # of documents, not of questions
    assert t.perplexity_dense is t.nll_difference_bounds is None
    e = math.exp
    assert c.perplexity_dense == pytest.approx(e(1.5))
    assert c.perplexity_sparse == pytest.approx(e(1.75))
    assert c.perplexity_difference == pytest.approx(e(1.75) - e(1.5))
    assert c.perplexity_difference_bounds == pytest.approx((0, e(1.5) - e(1)))
    assert (c.nll_difference, c.score_dense) == (0.25, None)
    assert c.nll_difference_bounds == (0, 0.5)
    assert whole.score_sparse == t.score_sparse and whole.kl == pytest.approx(2.04)


def test_one_document_has_no_interval() -> None:
    rows = [
        record(score_dense=1, score_sparse=0),
        record(score_dense=0, score_sparse=0),
    ]
    (s,) = summaries(rows)
    assert s.score_difference == -0.5
    assert s.score_difference_bounds is s.kl_bounds is s.top1_bounds is None


def test_arms_are_summed_up_one_by_one_and_the_first_shows_its_worst() -> None:
    rows = [record(arm=a, name=f"{a}{k}", kl=k) for k in (1.0, 5.0, 3.0) for a in "ba"]
    assert [(s.arm, s.kl) for s in summaries(rows)] == [("b", 3.0), ("a", 3.0)]
    assert [r.name for r in worst(rows, 2)] == ["b5.0", "b3.0"]
    assert copy.copy(rows) == rows
