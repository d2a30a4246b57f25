"""A trained readout of early layers: which tokens of a prompt the whole model will look at.

python -m mlx_fastforward.bench.studies.readout collect --folder DATA --prompts 200
python -m mlx_fastforward.bench.studies.readout fit --folder DATA --layer 4
python -m mlx_fastforward.bench.studies.readout facts --folder DATA --layer 4
"""

import math
import random
import time
from pathlib import Path
from typing import Annotated, Any, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import typer
from mlx.utils import tree_map

from ... import demo
from ...attachment import watched, watched_attention
from ...loading import load_stock
from ...scorers import DraftScorer, LayersScorer
from ...session import render
from ...speculative import read_places
from ...tokens.mapping import _spans
from ...tokens.speculative import KeepConfig, importance, kept_places, pooled, weights
from ...train.data import Sequences, open_corpus
from ...train.descent import Descent
from ..eval.tasks import build

QUERIES, WIDE = 8, 32  # of a prompt's end, for attention and for the readout
LAYERS = (1, 2, 3, 4)  # whose outputs are kept
CONFIG = KeepConfig()
app = typer.Typer()


class Asked(Sequences):
    """Prompts that end with a question, and its answer."""

    asked = ("facts", "quotes", "facts")

    def _chat(self, text: str, turns: list[tuple[str, str]]) -> Any:
        question, answer = turns[0]
        ids = render(
            self.tokenizer, [{"role": "user", "content": f"{text}\n\n{question}"}], {}
        )
        said = self.tokenizer.encode(answer, add_special_tokens=False)
        self.answers = said[: CONFIG.look_ahead]
        self.question, self.answer = question, answer
        return ids

    def _prose(self, rng: random.Random, text: str) -> list[int]:
        self.answers = []
        return [0]

    def __getitem__(self, i: int) -> Any:
        i_kind = self.asked[i % len(self.asked)]
        rng = random.Random(f"{self.seed} {i}")
        place = self.passages[i % len(self.passages)]
        text = self.corpus.passage(place, self.length * 6)
        return getattr(self, f"_{i_kind}")(rng, text)


def outcome(net: nn.Module, ids: list[int], prompt: int) -> dict[str, np.ndarray]:
    """Hidden states of early layers, their attention, and what all layers look at in the end."""
    taken: dict[int, tuple[mx.array, mx.array, float]] = {}
    hidden: dict[int, mx.array] = {}

    def attention(i: int, own: Any, q: Any, k: Any, v: Any, **kw: Any) -> mx.array:
        last = q[0, :, prompt - QUERIES :]
        taken[i] = last, k[0, :, :prompt], float(kw["scale"])
        y = own(q, k, v, **kw)
        mx.eval(last, taken[i][1], y)
        return y

    def layer(i: int, own: Any, *args: Any, **kwargs: Any) -> mx.array:
        y = own(*args, **kwargs)
        if i + 1 in LAYERS:
            hidden[i + 1] = y[0, :prompt].astype(mx.float16)
        mx.eval(y, *hidden.values())
        return y

    with watched_attention(net, attention), watched(list(net.layers), layer):
        mx.eval(net(mx.array(ids)[None]))
    early, late = [], []
    places = list(range(prompt - QUERIES, len(ids)))
    for i in sorted(taken):
        w = weights(*taken[i], places)
        late.append(w[:, QUERIES - 1 :])
        if i < max(LAYERS):
            early.append(w[:, :QUERIES].astype(mx.float16))
    found = {f"h{i}": np.array(x) for i, x in hidden.items()}
    found["attention"] = np.array(mx.stack(early))
    found["teacher"] = importance(late, CONFIG.pool)
    return found


@app.command()
def collect(folder: Path, prompts: int = 200, length: int = 1900) -> None:
    net, tokenizer, _ = load_stock(str(demo.MODEL), "float32", "none")
    asked = Asked(open_corpus(None), tokenizer, length, 3)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    for i in range(prompts):
        if (folder / f"{i}.npz").exists():
            continue
        ids = asked[i]
        if not asked.answers or len(ids) > 2000:
            continue
        found = outcome(net, ids + asked.answers, len(ids))
        span = where(tokenizer, ids, asked.question, asked.answer)
        np.savez(folder / "half.npz", ids=ids, span=span, **found)
        (folder / "half.npz").rename(folder / f"{i}.npz")
        mx.clear_cache()
        if i % 10 == 0:
            print(i, len(ids), span, f"{time.time() - start:.0f} s", flush=True)


def where(tokenizer: Any, ids: list[int], question: str, answer: str) -> list[int]:
    """First and one past the last place of what is asked for; [-1, -1]: not found."""
    inner = tokenizer._tokenizer
    text = inner.decode(ids, clean_up_tokenization_spaces=False)
    again, spans = _spans(inner, text)
    wanted = answer
    if question.startswith("What is the"):
        wanted = f"T{question[9:-1]} is {answer}."
    at = text.find(wanted)
    if at < 0 or again != ids:
        return [-1, -1]
    inside = [i for i, (a, b) in enumerate(spans) if a < at + len(wanted) and b > at]
    return [inside[0], inside[-1] + 1]


class Readout(nn.Module):
    """Attention of the prompt's end over hidden states: heads without RoPE, fitted to a teacher."""

    def __init__(self, d: int, heads: int, rank: int):
        super().__init__()
        self.heads, self.rank = heads, rank
        self.q = nn.Linear(d, heads * rank, bias=True)
        self.k = nn.Linear(d, heads * rank, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        """(n, d) -> shares of the importance (n,)."""
        h = mx.fast.rms_norm(hidden, None, 1e-5)
        n = len(h)
        q = self.q(h[-WIDE:]).reshape(-1, self.heads, self.rank).transpose(1, 0, 2)
        k = self.k(h).reshape(n, self.heads, self.rank).transpose(1, 2, 0)
        scores = (q @ k) * self.rank**-0.5
        return mx.softmax(mx.logsumexp(scores.reshape(-1, n), axis=0), axis=-1)


class Heads(nn.Module):
    """Non-negative weights of early heads and queries."""

    def __init__(self, layers: int, heads: int):
        super().__init__()
        self.w = mx.zeros((layers, heads, QUERIES))

    def __call__(self, attention: mx.array) -> mx.array:
        w = mx.softmax(self.w.reshape(-1))
        return w @ attention.reshape(w.size, -1)


def middle(n: int) -> tuple[int, int]:
    return n // 16, n - max(1, n // 8)


def loss(net: nn.Module, x: mx.array, target: mx.array) -> mx.array:
    """Cross-entropy of the pooled shares in the middle."""
    start, stop = middle(len(target))
    p = pooled(net(x), CONFIG.pool)[start:stop]
    return -mx.sum(target[start:stop] * mx.log(p / mx.sum(p) + 1e-9))


def target_of(teacher: np.ndarray, power: float) -> mx.array:
    start, stop = middle(len(teacher))
    t = np.zeros_like(teacher)
    part = teacher[start:stop] ** power
    t[start:stop] = part / part.sum()
    return mx.array(t)


def load(folder: Path, kind: str, power: float) -> list[tuple[mx.array, ...]]:
    rows = []
    for path in sorted(folder.glob("[0-9]*.npz"), key=lambda p: int(p.stem)):
        with np.load(path) as f:
            x = mx.array(f[kind])
            rows.append((int(path.stem), x, f["teacher"], f["span"], f["ids"].size))
    return rows


def hits(scores: np.ndarray, span: Any, share: float) -> Optional[bool]:
    """Whether the answer is kept."""
    start, stop = middle(scores.size)
    if not start <= span[0] < span[1] <= stop:
        return None
    kept = kept_places(scores, 0, KeepConfig(keep=share))
    return bool(np.isin(np.arange(*span), kept).all())


def judge(name: str, score: Any, rows: list) -> str:
    """Answers kept and the teacher's mass kept, held out."""
    said = []
    for share in (0.5, 0.3, 0.2):
        found: dict[str, list] = {"facts": [], "quotes": []}
        mass = []
        for i, x, teacher, span, _ in rows:
            s = score(x, teacher)
            hit = hits(s, span, share)
            if hit is not None:
                found[Asked.asked[i % 3]].append(hit)
            start, stop = middle(s.size)
            inside = kept_places(s, 0, KeepConfig(keep=share))
            inside = inside[(inside >= start) & (inside < stop)]
            mass.append(teacher[inside].sum() / teacher[start:stop].sum())
        counts = ", ".join(f"{k} {sum(v)}/{len(v)}" for k, v in found.items())
        said.append(f"keep {share}: {counts}, mass {np.mean(mass):.3f}")
    return f"{name:28} " + "; ".join(said)


@app.command()
def fit(
    folder: Path,
    kind: str = "h4",
    steps: int = 2000,
    heads: int = 4,
    rank: int = 32,
    power: float = 2.0,
    rate: float = 2e-3,
    out: Optional[Path] = None,
) -> None:
    mx.random.seed(0)
    rows = load(folder, kind, power)
    held = rows[::5]
    fitted = [r for i, r in enumerate(rows) if i % 5]
    if kind == "attention":
        net: nn.Module = Heads(*fitted[0][1].shape[:2])
        rate = 0.05
    else:
        net = Readout(fitted[0][1].shape[1], heads, rank)

    def batch(step: int) -> tuple[mx.array, mx.array]:
        _, x, teacher, _, _ = fitted[random.Random(step).randrange(len(fitted))]
        return x.astype(mx.float32), target_of(teacher, power)

    descent = Descent(net, loss, steps, rate, Path("/nonexistent"))
    start = time.time()
    total = 0.0
    for step in range(steps):
        total += float(descent.once(*batch(step)))
        if step % 250 == 249:
            print(
                step, f"{total / 250:.4f}", f"{time.time() - start:.0f} s", flush=True
            )
            total = 0.0

    def score(x: mx.array, _: Any) -> np.ndarray:
        return np.array(pooled(net(x.astype(mx.float32)), CONFIG.pool))

    print(judge(f"{kind} p{power} h{heads} r{rank}", score, held))
    print(judge("teacher", lambda x, t: t, held))
    if kind == "attention":
        for layers in (1, 2, 4):
            print(
                judge(
                    f"self of today, {layers}",
                    lambda x, t: importance(
                        list(x[:layers].astype(mx.float32)), CONFIG.pool
                    ),
                    held,
                )
            )
    if out:
        net.save_weights(str(out))


class ReadoutScorer(LayersScorer):
    """``self`` with a readout."""

    def __init__(self, model: nn.Module, layers: int, readout: Readout):
        super().__init__(model, layers)
        self.readout = readout

    def score(self, ids: Any, start: int, config: KeepConfig) -> np.ndarray:
        super().score(ids, start, config)
        assert self.hidden is not None
        shares = self.readout(self.hidden[0])
        return np.array(pooled(shares, config.pool))


def compared(
    net: nn.Module, prompt: list[int], answer: list[int], places: Any, cache: Any
) -> bool:
    """Whether the true answer comes, teacher-forced, from a cache of the prompt's ``places``."""
    logits = net(mx.array(prompt[-1:] + answer[:-1])[None], cache=cache)[0]
    return bool(np.array_equal(np.array(mx.argmax(logits, -1)), answer))


def rounded(net: nn.Module, bits: int) -> None:
    """Weights as they are in so many bits, groups of 64, but float: kernels for bits are slow here."""

    def there_and_back(w: mx.array) -> mx.array:
        if bits == 16 or w.ndim != 2:
            return w
        return mx.dequantize(*mx.quantize(w, 64, bits), 64, bits)

    net.update(tree_map(there_and_back, net.parameters()))


@app.command()
def facts(
    questions: int = 24,
    length: int = 1900,
    keep: str = "0.7,0.5,0.3,0.2",
    layers: str = "4",
    readout: Annotated[
        Optional[list[str]], typer.Option(help="LAYER:HEADS:RANK:FILE")
    ] = None,
    draft: Optional[str] = None,
    bits_of_draft: str = "16,8,4",
    seed: int = 0,
) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    net, tokenizer, _ = load_stock(str(demo.MODEL), "float32", "none")
    scorers: dict[str, Any] = {}
    for n in filter(None, layers.split(",")):
        scorers[f"self, {n} layers"] = LayersScorer(net, int(n))
    for text in readout or []:
        layer, heads, rank, file = text.split(":")
        net_r = Readout(net.args.hidden_size, int(heads), int(rank))
        net_r.load_weights(file)
        scorers[f"readout {Path(file).stem}"] = ReadoutScorer(net, int(layer), net_r)
    for bits in filter(None, bits_of_draft.split(",") if draft else []):
        small, _, _ = load_stock(str(draft), "float32", "none")
        rounded(small, int(bits))
        scorers[f"draft, {bits} bits"] = DraftScorer(small, "draft")
    docs = build(tokenizer, ["key-value"], [length], 1 + questions // 3, seed)
    pairs = [(p, q) for d in docs for p, q in zip(d.prompts, d.questions)][:questions]
    right: dict[str, int] = {}
    kept: dict[str, int] = {}
    count = 0
    for prompt, question in pairs:
        answer = tokenizer.encode(question.answers[0], add_special_tokens=False)
        answer += [tokenizer.eos_token_id]
        count += 1
        cache = make_prompt_cache(net)
        net(mx.array(prompt[:-1])[None], cache=cache)
        mx.eval([c.state for c in cache])
        right["dense"] = right.get("dense", 0) + compared(
            net, prompt, answer, None, cache
        )
        span = where(tokenizer, prompt, question.text, question.answers[0])
        for name, scorer in scorers.items():
            scores = scorer.score(prompt, 0, CONFIG)
            for share in map(float, keep.split(",")):
                places = kept_places(scores, 0, KeepConfig(keep=share))
                cache = make_prompt_cache(net)
                part = scorer if isinstance(scorer, LayersScorer) else None
                read_places(net, prompt, places[:-1], cache, scorer=part)
                ok = compared(net, prompt, answer, places, cache)
                key = f"{name}, keep {share}"
                right[key] = right.get(key, 0) + ok
                inside = bool(np.isin(np.arange(*span), places).all())
                kept[key] = kept.get(key, 0) + inside
        mx.clear_cache()
        if count % 6 == 0 or count == len(pairs):
            print(count, {k: (v, kept.get(k)) for k, v in right.items()}, flush=True)


if __name__ == "__main__":
    app()
