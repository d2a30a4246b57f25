"""Does sparse prefill keep the answers? Every arm against the dense model on the same prompts.

The prompt is read sparsely, everything after it runs dense (but see PrefillConfig.sparse_decode):
what differs is what the sparse prompt left in the KV cache. Batch 1, greedy.
"""

from dataclasses import dataclass, replace
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit

from ...attachment import seated
from ...continuation import divergence
from ...engine import Engine
from ...errors import ConfigError
from ...predictors.file import PredictorFile
from ..flops import cost
from . import scores
from .answers import Reply, reply
from .arms import Arm, labels_of
from .tasks import Document


@dataclass(frozen=True)
class Record:
    """One question under one arm.

    Args:
        turn: Which question of its document, from 0; in a chat, which turn.
        tokens: Of the prompt, all turns before it included.
        kl: KL(dense || sparse), nats per token, mean over the dense answer, or over the true tokens
            of a continuation.
        top1: Share of these tokens where both would say the same next.
        nll_dense, nll_sparse: Nats per true token of a continuation.
        score_dense, score_sparse: 0 to 1, by the task's rule (scores.RULES).
        exact_dense, exact_sparse: 1 where the whole answer is right.
        ffn_sparsity: Share of the FFN FLOPs of the document's first prompt that was skipped.
        read: Share of its tokens that the model read.
        flops: Share of the stock prefill's FLOPs that ran, those of a draft too.
    """

    arm: str
    task: str
    document: str
    name: str
    kind: str
    turn: int
    length: int
    tokens: int
    depth: Optional[float]
    kl: float
    top1: float
    expected: str
    dense: str
    sparse: str
    ffn_sparsity: float
    read: float
    flops: float
    nll_dense: Optional[float] = None
    nll_sparse: Optional[float] = None
    score_dense: Optional[float] = None
    score_sparse: Optional[float] = None
    exact_dense: Optional[float] = None
    exact_sparse: Optional[float] = None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    arms: Sequence[Arm],
    predictor: Optional[PredictorFile] = None,
    tick: Callable[[int], None] = lambda tokens: None,
    max_tokens: int = 40,
) -> list[Record]:
    """Ask every question densely and under every arm, none of them dense.

    The model is detached, before and after.

    Args:
        predictor: Needed by trained arms.
        tick: Told the prompt tokens of each pass that is done, dense and arms.
        max_tokens: Of an answer.

    Raises:
        ConfigError, PredictorError: before anything is computed.
    """
    labels_of(arms)
    engines = []
    for arm in arms:
        if (engine := arm.engine(model, predictor)) is None:
            raise ConfigError(
                f"arm {arm.label} is dense: every arm is compared with that."
            )
        engines.append(engine)
    steps = {e.config.sparse_decode for e in engines}
    records: list[Record] = []
    with wired_limit(model):
        for document in documents:
            dense = reply(model, tokenizer, document, None, steps, max_tokens)
            tick(document.length)
            targets = [r.target for r in dense]
            for arm, engine in zip(arms, engines):
                step = {engine.config.sparse_decode}
                parts = tokenizer, document, targets, step, max_tokens, arm.reader
                with seated(model, engine):
                    sparse = reply(model, *parts)
                tick(document.length)
                flops = _flops(model, engine, arm, document.length, sparse)
                for turn, (d, s) in enumerate(zip(dense, sparse)):
                    records.append(_record(arm.label, document, turn, d, s, flops))
            mx.clear_cache()
    return records


def _flops(
    model: nn.Module, engine: Engine, arm: Arm, tokens: int, replies: list[Reply]
) -> tuple[float, float]:
    """Shares of the FFN FLOPs skipped and of all FLOPs run, of a document's prompt."""
    if arm.reader is None or replies[0].read == 1:
        return replies[0].skipped, 1 / cost(model, engine, tokens).speedup
    scorer, read = arm.reader.scorer, round(replies[0].read * tokens)
    found = cost(model, engine, tokens, scorer, read)
    return found.ffn.sparsity, 1 / found.speedup


def _record(
    label: str,
    document: Document,
    turn: int,
    dense: Reply,
    sparse: Reply,
    flops: tuple[float, float],
) -> Record:
    (step,) = sparse.logprobs
    p, q = dense.logprobs[step], sparse.logprobs[step]
    kl, top1 = divergence(p, q)
    question, texts = document.questions[turn], (dense.text, sparse.text)
    record = Record(
        arm=label,
        task=document.task,
        document=document.id,
        name=question.text,
        kind=question.kind,
        turn=turn,
        length=document.length,
        tokens=sparse.tokens,
        depth=question.depth,
        kl=kl,
        top1=top1,
        expected=" | ".join(question.answers),
        dense=dense.text,
        sparse=sparse.text,
        ffn_sparsity=flops[0],
        read=sparse.read,
        flops=flops[1],
    )
    if document.following:
        nll = [_nll(x, document.following) for x in (p, q)]
        return replace(record, nll_dense=nll[0], nll_sparse=nll[1])
    rule = scores.RULES.get(document.task, scores.found)
    score = [rule(t, question.answers) for t in texts]
    exact = [scores.exact(t, question.answers) for t in texts]
    if document.task in ("several", "json"):
        exact = [float(s == 1) for s in score]
    return replace(
        record,
        score_dense=score[0],
        score_sparse=score[1],
        exact_dense=exact[0],
        exact_sparse=exact[1],
    )


def _nll(logprobs: mx.array, tokens: list[int]) -> float:
    picked = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=1)
    return -float(mx.mean(picked))
