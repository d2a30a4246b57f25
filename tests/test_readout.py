"""The readout of early layers: its equation, its place in the file, how it is fitted, who uses it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import numpy as np
import predictor_files as files
import pytest
import reference
from commands import bad, run
from models import tiny, token_ids

from mlx_fastforward import PrefillConfig, attach
from mlx_fastforward.predictors.base import BaseModel
from mlx_fastforward.predictors.file import PredictorFile, add_readout, load_predictor
from mlx_fastforward.scorers import DraftScorer, LayersScorer
from mlx_fastforward.tokens.readout import ASKING, Readout
from mlx_fastforward.tokens.speculative import KeepConfig, pooled
from mlx_fastforward.train import readout as training
from mlx_fastforward.train.data import Corpus, DataError, open_corpus
from mlx_fastforward.train.readout import Questions, fit, observed


def random_readout(d: int, layer: int = 2, heads: int = 2, rank: int = 4) -> Readout:
    rng, width = np.random.default_rng(0), heads * rank
    query, key = (mx.array(rng.normal(size=(d, width)).astype("f4")) for _ in range(2))
    return Readout(
        layer, heads, query, mx.array(rng.normal(size=width).astype("f4")), key
    )


def test_shares_are_a_softmax_over_all_heads_and_questions() -> None:
    readout, n, d = random_readout(16), 60, 16
    hidden = np.random.default_rng(1).normal(size=(n, d))
    h = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
    query, bias, key = map(
        reference.float64, (readout.query, readout.bias, readout.key)
    )
    wanted = np.zeros(n)
    for head in (slice(0, 4), slice(4, 8)):
        q, k = h[-ASKING:] @ query[:, head] + bias[head], h @ key[:, head]
        wanted += np.exp(q @ k.T / 2).sum(0)
    found = readout(reference.float32(hidden))
    assert reference.distance(found, wanted / wanted.sum()) < 1e-5


def test_a_file_holds_one(tmp_path: Path) -> None:
    folder, readout = files.save(tmp_path), random_readout(files.D)
    before = files.held(load_predictor(folder))
    for kept in (0.1, 0.2):  # the second takes the first one's place
        add_readout(folder, readout, kept=kept)
    file = load_predictor(folder)
    assert file.details["readout"] == {"layer": 2, "heads": 2, "rank": 4, "kept": 0.2}
    for name, w in before.items():
        assert mx.array_equal(files.held(file)[name], w)
    for found in (file.readout, file.astype(mx.float32).readout):
        assert found is not None and (found.layer, found.heads) == (2, 2)
        for name in ("query", "bias", "key"):
            wanted = getattr(readout, name).astype(mx.float16)
            assert mx.array_equal(getattr(found, name), wanted)
    assert any(w is file.readout.key for w in file.arrays())  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"layer": files.LAYERS}, {"rank": 3}, {"heads": 0}])
def test_a_bad_one_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    add_readout(files.save(tmp_path), random_readout(files.D))
    files.edit(tmp_path, "readout", **wrong)
    assert "readout." in files.refusal(tmp_path)


def test_self_scores_by_it() -> None:
    model, ids = tiny("llama"), token_ids(90)
    config = KeepConfig(keep=0.5, threshold=1, pool=5)
    d = BaseModel.of(model).hidden_size
    readout = random_readout(d, layer=1)
    hidden = model.model.layers[0](model.model.embed_tokens(mx.array([ids])), "causal")
    wanted = np.array(pooled(readout(hidden[0, 40:]), 5))
    side = PredictorFile(BaseModel.of(model), readout=readout)
    attach(model, PrefillConfig(0.5, selector="probe"), predictor=side)
    scorer = LayersScorer(model)
    assert scorer.layers == 1
    scorer.score(ids[:40], 0, config)
    assert np.allclose(scorer.score(ids, 40, config), wanted, atol=1e-5)
    assert LayersScorer(model, 2).readout is None  # another layer's was asked for


def test_the_teacher_is_the_published_score_of_the_model_itself() -> None:
    model, ids = tiny("llama"), token_ids(100)
    answer = models.decode(model, ids, 8)[0]
    row = observed(model, ids, list(answer), 2)
    wanted = DraftScorer(model, "itself").score(ids, 0, KeepConfig())
    assert np.allclose(np.array(row["teacher"]), wanted, atol=1e-5)
    wanted = LayersScorer(model, 2).score(ids, 0, KeepConfig())
    assert np.allclose(np.array(row["early"]), wanted, atol=1e-5)
    states = model.model.embed_tokens(mx.array([ids]))
    for layer in model.model.layers[:2]:
        states = layer(states, "causal")
    assert models.distance(row["hidden"][None], states) < 1e-2  # float16


def test_questions_stand_at_the_end_of_texts_that_answer_them() -> None:
    tokenizer = models.demo_tokenizer()
    made = Questions(open_corpus(None), tokenizer, 512)
    for i in range(6):
        pair = made.question(i)
        assert pair is not None
        text, answer = tokenizer.decode(pair[0]), tokenizer.decode(pair[1])
        document, _, asked = text.rpartition("\n\n")
        assert text.endswith("<|assistant|>") and len(pair[0]) <= 512
        assert answer in " ".join(document.split()) and answer not in asked


def test_a_fit_finds_what_attention_does_not(tmp_path: Path) -> None:
    """What is wanted carries a mark, and so does another token, the opposite one."""
    rng, n, d, rows = np.random.default_rng(0), 640, 16, []
    mark = rng.normal(size=4) * 8
    for i in range(40):
        hidden, teacher = rng.normal(size=(n, d)), rng.uniform(size=n) * 1e-3
        at, other = rng.integers(60, 270), rng.integers(290, 500)
        if i % 2:
            at, other = other, at
        hidden[at, :4], hidden[other, :4] = mark, -mark
        teacher[at - 6 : at + 7] = 1
        row = {"hidden": hidden, "teacher": teacher, "early": rng.uniform(size=n)}
        rows.append(tmp_path / f"{i}.safetensors")
        tensors = {k: mx.array(x.astype("f4")) for k, x in row.items()}
        mx.save_safetensors(str(rows[-1]), tensors)
    _, worth = fit(rows, 2, 250, 0, lambda *_: None)
    assert worth["readout"] > 0.8 * worth["best"] > 1.5 * worth["attention"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a file where there is none, replaces no trained one, keeps nothing that is no better."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    model = tiny("llama", vocab=4096, max_position_embeddings=512)
    folder = models.save_folder(model, tmp_path / "model")
    flags: list[Any] = ["readout", "--model", folder, "--prompts", 10, "--steps", 2]
    worth = {"readout": 0.5, "attention": 0.2, "best": 0.6}
    monkeypatch.setattr(training, "worth", lambda *_: worth)
    done = run(*flags, "--layers", 1)
    assert done.exit_code == 0 and "50% by the readout, 20%" in done.output, done.output
    (made,) = (tmp_path / "home").rglob("fastforward.json")
    file = load_predictor(made.parent)
    assert file.readout is not None and file.readout.layer == 1
    assert file.details["readout"]["kept"] == worth
    monkeypatch.setattr(training, "worth", lambda *_: worth | {"readout": 0.1})
    before = made.read_text()
    assert run(*flags).exit_code == 1 and made.read_text() == before
    monkeypatch.setattr(training, "worth", lambda *_: worth)
    files.save(made.parent)  # trained weights that nobody named are not written over
    before = made.read_text()
    bad(1, *flags, "--predictor", "none")
    assert made.read_text() == before
    text = tmp_path / "short.txt"
    text.write_text("Too little. " * 500)
    assert bad(2, *flags, "--layers", 4).startswith("between 1 and 3")
    with pytest.raises(DataError, match="10 at least"):
        few = Questions(Corpus([text]), models.demo_tokenizer(), 16)
        training.observe(model, few, 10, 1, tmp_path, lambda *_: None)
