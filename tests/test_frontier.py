"""All methods together: arms that read a part, the frontier, what is kept of it, and --speedup."""

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
from commands import bad, report, run
from serving import Server
from test_eval import ANSWER, LENGTH, ask, build, logprobs, mean_kl
from test_eval_scores import record

from mlx_fastforward import load_predictor
from mlx_fastforward.bench.eval import verify
from mlx_fastforward.bench.eval.arms import Arm
from mlx_fastforward.bench.eval.frontier import frontier
from mlx_fastforward.bench.flops import cost
from mlx_fastforward.bench.studies import frontier as both
from mlx_fastforward.build import engine_for
from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.errors import ConfigError, FastForwardError
from mlx_fastforward.predictors.file import JSON_NAME
from mlx_fastforward.predictors.verified import reaching
from mlx_fastforward.scorers import DraftScorer, LayersScorer
from mlx_fastforward.speculative import Speculative, read_places
from mlx_fastforward.tokens.speculative import KeepConfig
from mlx_fastforward.train import curves

KEEP = KeepConfig(keep=0.5, threshold=LENGTH // 2, chunk=16)


def part(model: Any, config: PrefillConfig, draft: Any) -> Arm:
    return Arm("part", config, reader=Speculative(model, draft, KEEP))


def small() -> DraftScorer:
    return DraftScorer(models.tiny("llama", vocab=4096, num_hidden_layers=1), "small")


def test_each_question_reads_the_part_that_its_draft_chose() -> None:
    """By hand: the draft's places for every whole prompt, the rest of them never read."""
    model, draft = models.tiny("llama", vocab=4096), small()
    (d,) = build(["key-value"])
    arm = part(model, models.settings(sparsity=0.0), draft)
    for turn, r in enumerate(ask(model, [d], arm)):
        ids = d.prompts[turn]
        places = Speculative(model, small(), KEEP).choose(ids, 0)
        assert places is not None and 0.3 * LENGTH < places.size < 0.6 * LENGTH
        cache = models.make_prompt_cache(model)
        read_places(model, ids, places[:-1], cache)
        said = models.continue_from(model, ids[-1], ANSWER, cache)[0]
        assert models.demo_tokenizer().decode(said).strip().startswith(r.sparse)
        assert r.tokens == len(ids) and r.kl > 1e-3
        if turn == 0:
            first = places.size / len(ids)
        assert r.read == pytest.approx(first)
        engine = engine_for(model, arm.config)
        wanted = cost(model, engine, LENGTH, draft, round(first * LENGTH))
        assert 1 / r.flops == pytest.approx(wanted.speedup)
        assert r.ffn_sparsity == pytest.approx(1 - first, abs=0.01)


def test_what_follows_is_read_over_the_part_alone() -> None:
    """KL by hand: a cache of the chosen places, then the true tokens in one call."""
    model, draft = models.tiny("llama", vocab=4096), small()
    (d,) = build(["continuation"])
    (ids,) = d.prompts
    (r,) = ask(model, [d], part(model, models.settings(sparsity=0.0), draft))
    places = Speculative(model, small(), KEEP).choose(ids, 0)
    cache = models.make_prompt_cache(model)
    assert places is not None
    read_places(model, ids, places[:-1], cache)
    said = ids[-1:] + d.following[:-1]
    p = logprobs(models.prefill(model, ids + d.following[:-1])[0][LENGTH - 1 :])
    q = logprobs(models.prefill(model, said, cache)[0])
    assert r.kl == pytest.approx(mean_kl(p, q), rel=1e-3) and r.kl > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_chat_that_is_read_in_part_and_a_draft_that_fails(kind: str) -> None:
    """Nothing heals in it; its follow-ups are read whole."""
    model = models.tiny(kind, vocab=4096)
    (d,) = build(["chat"])
    for scorer in (small(), LayersScorer(model, 2)):
        found = ask(model, [d], part(model, models.settings(), scorer))
        assert [r.turn for r in found] == [0, 1, 2] and all(r.kl > 0 for r in found)
        assert {r.read for r in found} == {found[0].read} and found[0].read < 0.6
    broken = small()
    broken.score = lambda *a: 1 / 0  # type: ignore
    for task in ("chat", "needle"):
        with pytest.raises(FastForwardError, match="the draft small failed"):
            ask(model, build([task]), part(model, models.settings(), broken))


def test_points_of_the_frontier() -> None:
    """Prose alone makes the KL; the best are those that nobody beats in all."""
    arms = [Arm(name, PrefillConfig(0.5)) for name in "abcd"]
    more: dict[str, tuple[float, float, float]] = {
        "a": (0.5, 0.02, 1),  # FLOPs, KL, facts
        "b": (0.6, 0.03, 1),  # slower than a, and worse
        "c": (0.8, 0.01, 1),
        "d": (0.5, 0.03, 0),
    }
    records = []
    for arm, (flops, kl, facts) in more.items():
        prose = dict(task="continuation", document=f"p{arm}", kl=kl)
        asked = dict(task="key-value", document=f"k{arm}", kl=9.0, score_dense=1)
        for part in (prose, asked | dict(score_sparse=facts)):
            records.append(record(arm=arm, flops=flops, **part))
    points = frontier(records, {a.label: a.left_out for a in arms})
    assert [p.arm for p in points] == ["c", "b", "a", "d"]
    assert [p.best for p in points] == [True, False, True, False]
    assert (points[2].kl, points[2].facts, points[2].speedup) == (0.02, 1, 2)
    assert points[2].quotes is None and points[2].keep == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frontier")
    draft = models.tiny("llama", vocab=4096, num_hidden_layers=1)
    models.save_folder(draft, path / "small")
    model = models.tiny("llama", vocab=4096)
    return models.save_folder(model, path / "m", max_position_embeddings=700)


def test_all_methods_in_one_run(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing left out, tokens that skip, a part read by two scorers, and both together."""
    args = ["eval", "--model", folder, "--lengths", 256, "--prompts", 1, "-m", 4]
    args += ["--block-sizes", 8, "--tasks", "continuation,needle,quote"]
    args += ["--sparsities", "0,0.5", "--prefill-draft", f"{folder.parent}/small,self"]
    done, found = report(
        tmp_path, *args, "--keep", "1,0.5", "--png", tmp_path / "a.png"
    )
    names = ["probe 0%", "keep 50% by small", "keep 50% by self"]
    names += ["probe 50%", "probe 50% keep 50% by small", "probe 50% keep 50% by self"]
    assert [a["label"] for a in found["arms"]] == names
    whole = [r for r in found["records"] if r["arm"] == "probe 0%"]
    assert all(r["kl"] == 0 and r["dense"] == r["sparse"] for r in whole)
    points = {p["arm"]: p for p in found["frontier"]}
    assert points["probe 0%"]["speedup"] == 1
    assert [p["speedup"] for p in found["frontier"]] == sorted(
        p["speedup"] for p in points.values()
    )
    assert points[names[4]]["speedup"] > max(points[n]["speedup"] for n in names[:4:2])
    assert (
        points[names[1]]["prefill_draft"] == "small" and points[names[1]]["keep"] == 0.5
    )
    assert "What each arm costs" in done.stdout and (tmp_path / "a.png").is_file()
    assert str(folder.parent) not in json.dumps(found)
    other = tmp_path / "other.json"
    found["settings"]["seed"] = 1  # as if these were other documents
    other.write_text(json.dumps(found), encoding="utf-8")
    both.main([tmp_path / "report.json", other, other], tmp_path / "b.png")
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(names[1])]
    assert f"{points[names[1]]['speedup']:.2f}" in lines[-1]
    assert (tmp_path / "b.png").is_file() and "all equal" in lines[-1]


def measured(**more: Any) -> dict[str, Any]:
    usual = {"sparsity": 0.5, "kl": 0.002, "facts": 0.9, "facts_dense": 0.9}
    return usual | {"speedup": 1.3} | more


TABLE = {
    "rows": [measured(), measured(sparsity=0.7, kl=0.006, facts=0.85, speedup=1.5)],
    "combined": [
        measured(keep=0.5, prefill_draft="self", kl=0.04, facts=0.6, speedup=1.9),
        measured(keep=0.5, prefill_draft="small", kl=0.009, facts=0.89, speedup=2.1),
        measured(keep=0.3, prefill_draft="me/small", kl=0.02, facts=0.8, speedup=3.0),
        {"sparsity": "x"},
    ],
    "prompt_tokens": 600,
}


@pytest.mark.parametrize(
    "speedup, drafts, wanted",
    [
        (1.2, [], 0.002),
        (1.4, [], 0.006),  # the most facts; the draft is in a folder that nobody named
        (1.4, ["small"], 0.009),
        (1.6, [], 0.02),  # a repository; the first layers find less
        (2, ["other"], None),
        (2, ["small"], 0.009),
        (2.2, ["me/small"], 0.02),
        (9, [], None),
    ],
)
def test_the_best_that_is_fast_enough(
    speedup: float, drafts: list[str], wanted: float | None
) -> None:
    details = {"verified": TABLE}
    if wanted is None:
        most = "3.00" if not drafts else "1.90"
        said = f"^nothing that was measured for this model is .* as self says is {most}"
        with pytest.raises(ConfigError, match=said.replace("self", ".*")):
            reaching(details, speedup, drafts)
    else:
        assert reaching(details, speedup, drafts)["kl"] == wanted
    with pytest.raises(ConfigError, match="needs combinations that were measured"):
        reaching({}, speedup)


def test_save_and_speedup(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What eval --save measures of combinations is what --speedup takes, and says."""
    monkeypatch.setenv("MLX_FASTFORWARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(curves, "SEQUENCES", 1)
    monkeypatch.setattr(verify, "SPARSITIES", (0.5,))
    draft, model = folder.parent / "small", ["--model", folder, "--no-tune"]
    ask = ["generate", "word " * 600, *model, "--json", "-m", 2, "--speedup"]
    assert bad(2, *ask, 1.5).startswith("--speedup needs combinations that were meas")
    args = ["eval", "--save", *model, "--prompts", 1, "--sparsities", "0,0.5"]
    done = run(*args, "--prefill-draft", draft, "--keep", "1,0.4")
    assert done.exit_code == 0, done.output
    (home,) = (tmp_path / "home" / "predictors").iterdir()
    table = load_predictor(home).details["verified"]
    assert [(r["sparsity"], r["keep"]) for r in table["combined"]] == [
        (0, 0.4),
        (0.5, 0.4),
    ]
    assert "50%, keep 40% by small" in done.stdout
    assert str(folder.parent) not in (home / JSON_NAME).read_text()
    fast = table["combined"][0]["speedup"] - 0.001
    assert bad(2, *ask, fast).startswith("nothing that was measured for this model is ")
    said = run(*ask, fast, "--prefill-draft", draft)
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert found["read_tokens"] < 0.5 * found["prompt_tokens"]
    told = found["settings"]["chosen"]
    wanted = (
        r"--speedup [\d.]+: .*40% of the tokens read, as small says \([\d.]+ times "
    )
    assert re.match(
        wanted + r"as fast by FLOPs at 5\d\d tokens, KL [\d.]+, facts ", told
    )
    assert bad(2, *ask, 0.5).startswith("--speedup must be above 1, got 0.5.")
    for flag in ("--sparsity", "--keep", "--prune-tokens"):
        line = bad(2, *ask, 1.1, flag, 0.5)
        assert line == f"{flag} does not go with --speedup, which chooses it."
    served = Server(folder, "--speedup", str(fast), "--prefill-draft", str(draft))
    assert served.stop()[0] == 0
    assert f"({told})" in served.banner and "of prompts from 5" in served.banner
    alone = bad(2, "serve", *model, "--speedup", 1.1, "--keep", 0.4)
    assert alone == "--keep does not go with --speedup, which chooses it."
    chat = run("chat", *model, "--speedup", 1.1, "--keep", 0.5, stdin="Hi")
    assert chat.exit_code == 2 and "does not go with --speedup" in chat.stderr
