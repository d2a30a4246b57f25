"""Budgets from measured cost: the optimum, the curves' measurement, and what a file says of them."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from models import FFN, LAYERS, save_random_predictor, tiny, token_ids

from mlx_fastforward.attachment import attach, detach, reading
from mlx_fastforward.bench.studies import zoo
from mlx_fastforward.build import engine_for
from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.errors import ConfigError, PredictorError
from mlx_fastforward.neurons.schedule import (
    Curves,
    first_dense,
    measured,
    neurons_kept,
    step,
)
from mlx_fastforward.predictors.file import (
    JSON_NAME,
    TENSORS_NAME,
    PredictorFile,
    load_predictor,
    update_predictor,
)
from mlx_fastforward.predictors.verified import UNVERIFIED, chosen, resolved
from mlx_fastforward.train import curves as measuring
from mlx_fastforward.train.curves import LEVELS, Meter, trials

COST = st.floats(1e-4, 1)


def convex(slopes: list[float]) -> Curves:
    """Layers whose KL is slope * s^2 at each level."""
    levels = [0.25, 0.5, 0.75]
    return Curves(levels, [[c * s * s for s in levels] for c in slopes], {})


@given(st.lists(COST, min_size=2, max_size=4), st.floats(0.05, 0.85))
def test_measured_budgets_cost_least(slopes: list[float], sparsity: float) -> None:
    """Against all settings in steps of an eighth: none that drops as much is cheaper."""
    found = [1 - b for b in measured(convex(slopes), [8] * len(slopes), sparsity)]
    assert abs(sum(found) - sparsity * len(slopes)) <= 1 / 8 + 1e-9
    price = convex(slopes).total(found)
    for other in itertools.product(range(8), repeat=len(slopes)):
        if sum(other) == round(8 * sum(found)):
            assert price <= convex(slopes).total([n / 8 for n in other]) + 1e-9


def test_measured_budgets_by_hand() -> None:
    """A layer that costs much stays whole; one that costs nothing gives what it may."""
    curves = Curves([0.5, 0.9], [[0.1, 0.9], [0.0, 0.0], [0.01, 0.09]], {})
    assert measured(curves, [1000] * 3, 0.5) == pytest.approx(
        [1, 0.132, 0.38], abs=0.07
    )
    assert measured(curves, [1000] * 3, 0.25)[0] == 1
    wide = measured(Curves([0.5, 0.9], [[0.1, 0.2]] * 2, {}), [1024, 3072], 0.5)
    dropped = sum((1 - b) * w for b, w in zip(wide, (1024, 3072)))
    assert dropped == pytest.approx(
        0.5 * 4096, abs=64
    )  # of all neurons, not of the layers


def test_a_dent_in_a_curve_is_bridged() -> None:
    """Noise may make more sparsity look cheaper: budgets go by the lower hull, never below."""
    curves = Curves([0.3, 0.5, 0.7], [[0.02, 0.01, 0.012], [0.001, 0.002, 0.003]], {})
    budgets = measured(curves, [640, 640], 0.4)
    assert sum(1 - b for b in budgets) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    "layers, sparsity, wanted",
    [
        (7, 0.5, [1] + [1 - 3.5 / 6] * 6),
        (2, 0.5, [0.9, 0.1]),  # the other may drop 90 %
        (1, 0.5, [0.5]),
        (3, 0.95, [0.05] * 3),
    ],
)
def test_the_first_layer_whole(
    layers: int, sparsity: float, wanted: list[float]
) -> None:
    found = first_dense(layers, sparsity)
    assert found == pytest.approx(wanted)
    assert sum(found) == pytest.approx((1 - sparsity) * layers)


def test_many_layers_are_sampled() -> None:
    assert len(trials(7)) == 7 * len(LEVELS)
    asked = trials(27)
    assert [t.layer for t in asked if t.level == measuring.MIDDLE] == list(range(27))
    assert len(asked) < 27 * 2


def kl_by_hand(model: Any, keep: list[Any], engine: Any, ids: mx.array) -> float:
    """KL of the last tokens after a prompt that one layer read sparsely, from plain calls."""
    prompt, logprobs = ids.size - measuring.TOKENS, []
    for sparse in (False, True):
        cache = make_prompt_cache(model)
        if sparse:
            whole = attach(model, engine.config)
            whole.keep = keep
            with reading(model, prompt):
                model(ids[None, : prompt - 1], cache=cache)
            detach(model)
        else:
            model(ids[None, : prompt - 1], cache=cache)
        logits = np.array(model(ids[None, prompt - 1 : -1], cache=cache)[0], np.float64)
        logprobs.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    p, q = logprobs
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_the_meter_measures_one_layer_at_a_time(monkeypatch: Any) -> None:
    monkeypatch.setattr(measuring, "TOKENS", 6)
    model, ids = tiny("llama"), mx.array(token_ids(70))
    meter = Meter(model, None, 8)
    costs = meter.costs(ids)
    assert len(costs) == len(meter.trials) == (LAYERS - 1) * len(LEVELS)
    for trial, cost in list(zip(meter.trials, costs))[:4]:
        engine = meter.engines[trial.level]
        keep = [engine.keep[i] if i == trial.layer else None for i in range(LAYERS)]
        assert keep[trial.layer] is not None
        assert cost == pytest.approx(kl_by_hand(model, keep, engine, ids), rel=0.02)
    twice = meter.curves([costs, [3 * c for c in costs]])
    for trial, cost in zip(meter.trials, costs):
        assert twice.kl[trial.layer][trial.level] == pytest.approx(2 * cost, abs=1e-6)


def test_the_meter_where_layers_have_two_ffns(monkeypatch: Any) -> None:
    monkeypatch.setattr(measuring, "TOKENS", 6)
    model = zoo.tiny("longcat_flash")
    meter = Meter(model, None, 8)
    layers = [ffn.layer for ffn in meter.engines[0].ffns]
    assert layers == sorted(layers * 2)[::2] and layers.count(0) == 2
    assert min(meter.costs(mx.array(token_ids(70)))) > 1e-5


def test_layers_that_were_not_sampled_take_the_mean_shape(monkeypatch: Any) -> None:
    monkeypatch.setattr(measuring, "ALL_LEVELS", 2)
    meter = Meter(tiny("llama"), None, 8)
    means = {t: (t.layer + 1) * LEVELS[t.level] ** 2 for t in meter.trials}
    curves = meter.curves([[means[t] for t in meter.trials]])
    assert len(meter.trials) < 3 * len(LEVELS)
    for layer, row in enumerate(curves.kl):
        wanted = [(layer + 1) * s * s for s in LEVELS]
        assert row == pytest.approx(wanted, abs=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_random_predictor(tiny("llama"), tmp_path / "p")


CURVES = Curves(list(LEVELS), [[0.1, 0.2, 0.4, 0.9], [0.0] * 4, [0.0] * 4], {"n": 1})


def test_curves_of_a_file_make_the_budgets(folder: Path) -> None:
    model = tiny("llama")
    auto = PrefillConfig(0.5, 8)
    before = engine_for(model, auto, load_predictor(folder))
    assert before.schedule == "first-dense" and before.keep[0] is None
    update_predictor(folder, curves=asdict(CURVES))
    predictor = load_predictor(folder)
    assert predictor.curves == CURVES
    engine = engine_for(model, auto, predictor)
    kept = [neurons_kept(b, FFN) for b in measured(CURVES, [FFN] * 3, 0.5)]
    assert engine.schedule == "measured" and engine.keep == [*kept, None]
    assert engine.keep[0] is None
    with pytest.raises(ConfigError, match="schedule measured needs"):
        engine_for(model, replace(auto, schedule="measured"))
    given = engine_for(model, auto, predictor, importances=[1.0] * LAYERS)
    assert given.schedule == "layerwise"  # what the caller hands over counts


@pytest.mark.parametrize(
    "section",
    [
        {"levels": [0.5, 0.3], "kl": [[0.1, 0.2]] * 3},
        {"levels": [0.3, 1.0], "kl": [[0.1, 0.2]] * 3},
        {"levels": [0.3, 0.5], "kl": [[0.1, 0.2]] * 2},
        {"levels": [0.3, 0.5], "kl": [[0.1]] * 3},
        {"levels": [0.3, 0.5], "kl": [[0.1, float("nan")]] * 3},
        {"levels": [0.3, 0.5], "kl": [[0.1, -1]] * 3},
        {"levels": None, "kl": None},
        [],
    ],
)
def test_bad_curves_are_refused(folder: Path, section: Any) -> None:
    update_predictor(folder, curves=section)
    with pytest.raises(PredictorError, match="curves") as e:
        load_predictor(folder)
    assert "\n" not in str(e.value)


def test_a_flipped_bit_is_refused(folder: Path) -> None:
    tensors = folder / TENSORS_NAME
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 4
    tensors.write_bytes(content)
    with pytest.raises(PredictorError, match="checksum"):
        load_predictor(folder)
    info = json.loads((folder / JSON_NAME).read_text())
    del info["sha256"]  # as files had it before there were checksums
    (folder / JSON_NAME).write_text(json.dumps(info))
    assert load_predictor(folder).layers


def row(sparsity: float, kl: float, facts: float, dense: float = 0.9) -> dict[str, Any]:
    return {"sparsity": sparsity, "kl": kl, "facts": facts, "facts_dense": dense}


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([row(0.3, 0.001, 0.9), row(0.5, 0.004, 0.88), row(0.7, 0.02, 0.9)], 0.5),
        ([row(0.5, 0.009, 0.87), row(0.3, 0.001, 0.9)], 0.5),  # in any order
        ([row(0.3, 0.001, 0.86), row(0.5, 0.001, 0.9)], 0.0),  # all below must pass
        ([row(0.3, 0.001, 0.95), row(0.4, 0.0101, 0.95)], 0.3),
        ([row(0.5, 0.001, 0.9), row(0.7, 0.001, 0.9)], 0.7),
        ([{"sparsity": "x"}], 0.5),
        ([], 0.5),
    ],
)
def test_auto_takes_the_largest_that_passes(
    rows: list[dict[str, Any]], wanted: float
) -> None:
    details = {"verified": {"rows": rows}}
    predictor = PredictorFile({}, details=details)  # type: ignore[arg-type]
    sparsity, why = chosen(details)
    assert sparsity == wanted
    known = any("kl" in r for r in rows)
    assert (why == UNVERIFIED) == (not known)
    assert resolved("auto", predictor) == (sparsity, why)
    assert resolved(0.4, predictor) == (0.4, None)
    other = resolved("auto", predictor, {"selector": "probe", "block_size": 8})
    assert other == (min(sparsity, 0.5), "not verified with another selector")
    with pytest.raises(ConfigError, match="auto"):
        resolved("most", predictor)


@pytest.mark.parametrize(
    "questions, found, wanted", [(7, 0.9, 0.5), (25, 0.9, 0.7), (25, 0.7, 0.5)]
)
def test_few_facts_prove_no_more_than_the_usual(
    questions: int, found: float, wanted: float
) -> None:
    """Nor do many that the dense model does not find."""
    table = [row(s, 0.001, found, found) for s in (0.3, 0.5, 0.7)]
    details = {"verified": {"rows": table, "questions": questions}}
    sparsity, why = chosen(details)
    assert sparsity == wanted
    if questions > 7 and found == 0.9:
        known = "90% of planted facts found, dense 90%, KL 0.0010"
        assert why == f"auto, as verified: {known}"


@pytest.mark.parametrize("neurons, wanted", [(8192, 64), (1024, 64), (128, 8), (8, 1)])
def test_steps(neurons: int, wanted: int) -> None:
    assert step(neurons) == wanted
