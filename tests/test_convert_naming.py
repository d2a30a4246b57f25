"""What a tensor is: by its name, by the user's map, and whether all of them fit the model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import Checkpoint, CheckpointError, Entry
from mlx_fastforward.convert.naming import Match, Rule, Unknown, match, read_map
from mlx_fastforward.predictors.file import BaseModel

LAYERS, D, F, RANK, H = 3, 8, 32, 4, 5
BASE = BaseModel("tiny", "llama", LAYERS, D, F, "0" * 16)
PREDICTOR = {"query": (D,), "w1": (D, RANK), "w2": (RANK, F)}
COMPENSATOR = {"w1": (D, H), "w2": (H, D)}
Arrays = dict[str, np.ndarray]


def trained(layers: int = LAYERS) -> Arrays:
    """Predictors and compensators under a predictor's own names."""
    rng = np.random.default_rng(0)
    shapes = {f"predictor.{k}": s for k, s in PREDICTOR.items()}
    shapes |= {f"compensator.{k}": s for k, s in COMPENSATOR.items()}
    return {
        f"layers.{i}.{part}": rng.standard_normal(shape).astype(np.float32)
        for i in range(layers)
        for part, shape in shapes.items()
    }


def held(arrays: Arrays) -> Checkpoint:
    """A checkpoint without a file."""
    entries = {
        name: Entry(a.shape, a.dtype.name, lambda a=a: mx.array(a), "c")
        for name, a in arrays.items()
    }
    return Checkpoint("c", "memory", entries)


def planned(
    arrays: Arrays, rules: Optional[list[Rule]] = None, base: BaseModel = BASE
) -> conversion.Plan:
    return conversion.plan(held(arrays), base, rules or [])


def converted(
    arrays: Arrays,
    rules: Optional[list[Rule]] = None,
    dtype: mx.Dtype = mx.float32,
    bits: Optional[int] = None,
    base: BaseModel = BASE,
) -> Arrays:
    steps = conversion.tensors(planned(arrays, rules, base), dtype, bits)
    made = {k: v for _, parts in steps for k, v in parts.items()}
    return {k: np.array(v.astype(mx.float32)) for k, v in made.items()}


def refused(
    arrays: Arrays,
    rules: Optional[list[Rule]] = None,
    dtype: mx.Dtype = mx.float32,
    base: BaseModel = BASE,
) -> str:
    with pytest.raises(CheckpointError) as e:
        converted(arrays, rules, dtype, base=base)
    assert str(e.value).isprintable(), str(e.value)
    return str(e.value)


def same(got: Arrays, expected: Arrays) -> None:
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert np.array_equal(got[name], value), name


# Names


KNOWN = {
    "layers.3.predictor.query": ("predictor.query", 3, False),
    "layers.3.predictor.w1": ("predictor.w1", 3, False),
    "layers.3.predictor.w2.weight": ("predictor.w2", 3, True),
    "layers.12.compensator.w1.weight": ("compensator.w1", 12, True),
    "module.layers.0.predictor.w1": ("predictor.w1", 0, False),
    "_orig_mod.layers.0.predictor.w1": ("predictor.w1", 0, False),
    "module._orig_mod.layers.0.predictor.w1": ("predictor.w1", 0, False),
    "layers.0._orig_mod.predictor.module.w1.weight": ("predictor.w1", 0, True),
    "model.layers.0.predictor.w1": ("predictor.w1", 0, False),
    "model.model.layers.0.mlp.predictor.w1": ("predictor.w1", 0, False),
    "state_dict.transformer.h.7.mlp.predictor.q": ("predictor.query", 7, False),
    "blocks.2.expert_predictor.fc1.weight": ("predictor.w1", 2, True),
    "layer.2.expert_predictor.linear2.weight": ("predictor.w2", 2, True),
    "layers.2.error_compensator.w_c2": ("compensator.w2", 2, False),
    "layers.2.compensator.Wc1": ("compensator.w1", 2, False),
    "Layers.2.Predictor.W1": ("predictor.w1", 2, False),
    "predictors.3.w1": ("predictor.w1", 3, False),
    "model.compensators.3.fc2.weight": ("compensator.w2", 3, True),
    "predictor.3.query": ("predictor.query", 3, False),
    "groups.1.layers.5.predictor.w1": ("predictor.w1", 5, False),
    "layers.1.layers.5.predictor.w1": ("predictor.w1", 5, False),
    "predictor.w1": ("predictor.w1", None, False),
    "model.compensators.w2.weight": ("compensator.w2", None, True),
    "importance": ("importance", None, False),
    "module.importances": ("importance", None, False),
    "layers.4.importance": ("importance", 4, False),
    "model.layers.4.predictor.importance": ("importance", 4, False),
}


@pytest.mark.parametrize("name, found", KNOWN.items())
def test_known_names(name: str, found: tuple[str, Optional[int], bool]) -> None:
    part, layer, linear = found
    assert match(name) == Match(part, layer, None, linear)


NOT_OURS = ["model.layers.3.mlp.down_proj.weight", "lm_head.weight", "", ".", "..."]
NOT_OURS += ["optimizer.state.0.exp_avg", "layers.3.w1", "query", "importance.weight"]


@pytest.mark.parametrize("name", NOT_OURS)
def test_names_of_other_things(name: str) -> None:
    assert match(name) is None


UNKNOWN = ["layers.3.predictor.w1.bias", "layers.3.predictor.w3", "layers.3.predictor"]
UNKNOWN += ["layers.3.compensator.query", "layers.3.predictor.net.w1", "predictor.3"]
UNKNOWN += ["layers.3.predictors.0.w1", "layers.3.predictor.weight", "predictor.w1.0"]
UNKNOWN += ["predictor.layers.3.w1", "layers.3.predictor.w1.weight.weight"]
UNKNOWN += ["layers.3.predictor.w2.scales"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_that_say_too_little(name: str) -> None:
    with pytest.raises(Unknown):
        match(name)


@pytest.mark.parametrize("name", ["layers.².predictor.w1", "predictors.².w1"])
def test_digits_that_are_no_numbers(name: str) -> None:
    with pytest.raises(Unknown):
        match(name)


def test_leading_zeros() -> None:
    found = match("layers.0000000012.predictor.w1")
    assert found is not None and found.layer == 12


@pytest.mark.parametrize("name", ["layers.0.predictor2.w1", "layers.0.predictorx.w1"])
def test_words_that_only_begin_like_a_role(name: str) -> None:
    with pytest.raises(Unknown):
        match(name)


def test_a_number_of_many_digits_takes_no_time() -> None:
    found = match(f"layers.{'9' * 100_000}.predictor.w1")
    assert found is not None and found.layer is not None and found.layer > 10**6


def test_unknown_names_are_refused_and_told() -> None:
    arrays = trained()
    biases = [f"layers.{i}.predictor.w1.bias" for i in range(5)]
    line = refused({**arrays, **{b: np.zeros(RANK) for b in biases}})
    assert f"no known name: '{biases[0]}', '{biases[1]}'" in line
    assert "and 2 more" in line and "without biases" in line and "--map" in line


def test_other_tensors_are_left_out() -> None:
    base = {"model.embed_tokens.weight": np.zeros((9, D)), "step": np.array(3)}
    plan = planned({**trained(), **base})
    assert plan.ignored == list(base)
    same(converted({**trained(), **base}), trained())


@pytest.mark.parametrize("kind", ["predictor", "compensator"])
def test_one_kind_is_enough(kind: str) -> None:
    arrays = {k: v for k, v in trained().items() if f".{kind}." in k}
    assert list(planned(arrays).ranks) == [kind]
    same(converted(arrays), arrays)


def test_neither_predictors_nor_compensators() -> None:
    line = refused({"a\nb": np.ones(1), "importance": np.ones(LAYERS)})
    assert "no predictor or compensator among 2 tensors ('a\\nb', 'importance')" in line
    assert "--list shows all, --map names them" in line


# The user's map


def rules(tmp_path: Path, lines: Any) -> list[Rule]:
    path = tmp_path / "map.json"
    path.write_text(lines if isinstance(lines, str) else json.dumps(lines))
    return read_map(path)


def renamed(arrays: Arrays, old: str, new: str) -> Arrays:
    return {k.replace(old, new): v for k, v in arrays.items()}


def test_a_map_gives_names(tmp_path: Path) -> None:
    other = renamed(renamed(trained(), "layers.", "net/"), "predictor.w", "sel_")
    lines = {
        r"net/(\d+)\.sel_([12])": r"layers.\1.predictor.w\2",
        r"net/(?P<i>\d+)\.(?P<part>.*)": r"layers.\g<i>.\g<part>",
    }
    same(converted(other, rules(tmp_path, lines)), trained())


def test_a_map_fits_whole_names_and_the_first_line_counts(tmp_path: Path) -> None:
    lines = {"layers": None, r"x\.query": "layers.0.predictor.query", r"x\..*": None}
    arrays = renamed(trained(), "layers.0.predictor.query", "x.query")
    arrays["x.other"] = np.ones(1, np.float32)
    read = rules(tmp_path, lines)
    assert planned(arrays, read).ignored == ["x.other"]
    same(converted(arrays, read), trained())
    lines = {r"x\..*": None, r"x\.query": "layers.0.predictor.query"}
    line = refused(arrays, rules(tmp_path, lines))
    assert "predictor.query: expected layers 0 to 2 of tiny, found 2; layer 0" in line


def test_null_leaves_known_and_unknown_names_out(tmp_path: Path) -> None:
    biases = {f"layers.{i}.predictor.w1.bias": np.zeros(RANK) for i in range(LAYERS)}
    read = rules(tmp_path, {r".*\.bias": None, r".*\.compensator\..*": None})
    plan = planned({**trained(), **biases}, read)
    assert list(plan.ranks) == ["predictor"] and len(plan.ignored) == 3 * LAYERS


def test_a_map_for_tensors_that_hold_all_layers(tmp_path: Path) -> None:
    arrays = trained()
    stacked = {
        part: np.stack([arrays[f"layers.{i}.{part}"] for i in range(LAYERS)])
        for part in ("predictor.query", "predictor.w1", "predictor.w2")
    }
    lines = {f"x.{k}": f"layers.*.{k}" for k in stacked}
    lines["s"] = "importance"
    given = {f"x.{k}": v for k, v in stacked.items()}
    given["s"] = np.ones(LAYERS, np.float32)
    expected = {k: v for k, v in arrays.items() if ".predictor." in k}
    expected["importance"] = given["s"]
    same(converted(given, rules(tmp_path, lines)), expected)


@pytest.mark.parametrize("transpose", [True, False])
def test_a_map_says_how_a_square_matrix_lies(transpose: bool, tmp_path: Path) -> None:
    arrays, square = trained(), np.arange(D * D, dtype=np.float32).reshape(D, D)
    for i in range(LAYERS):
        arrays[f"layers.{i}.predictor.w1"] = square
        arrays[f"layers.{i}.predictor.w2"] = np.ones((D, F), np.float32)
    target = {"name": r"layers.\1.predictor.w1", "transpose": transpose}
    read = rules(tmp_path, {r"layers\.(\d+)\.predictor\.w1": target})
    got = converted(arrays, read)["layers.1.predictor.w1"]
    assert np.array_equal(got, square.T if transpose else square)
    assert planned(arrays, read).remarks == []


def test_a_map_that_turns_the_wrong_matrix(tmp_path: Path) -> None:
    target = {"name": r"layers.\1.predictor.w1", "transpose": True}
    read = rules(tmp_path, {r"layers\.(\d+)\.predictor\.w1": target})
    line = refused(trained(), read)
    assert f"expected shape ({RANK}, {D}) by the map, found ({D}, {RANK})" in line


BAD_MAPS = {
    "": "is not JSON",
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
    "[]": "expected an object like",
    "{}": "expected an object like",
    '"x"': "expected an object like",
    '{"a": 3}': "expected a name, null, or",
    '{"a": ["x"]}': "expected a name, null, or",
    '{"a": {}}': "expected a name, null, or",
    '{"a": {"transpose": true}}': "expected a name, null, or",
    '{"a": {"name": "x", "transpose": 1}}': "expected a name, null, or",
    '{"a": {"name": "x", "transposed": true}}': "expected a name, null, or",
    '{"(": "x"}': "missing )",
    '{"[a": null}': "unterminated character set",
    '{"a": "layers.\\\\1.predictor.w1"}': "invalid group reference 1",
    '{"(a)": "layers.\\\\2.predictor.w1"}': "invalid group reference 2",
    '{"a": "\\\\g<n>"}': "unknown group name",
    '{"a": "\\\\q"}': "bad escape",
}


@pytest.mark.parametrize("text", BAD_MAPS, ids=lambda t: t[:40])
def test_bad_maps(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as e:
        rules(tmp_path, text)
    line = str(e.value)
    assert line.isprintable() and line.startswith(f"map {tmp_path / 'map.json'}")
    assert BAD_MAPS[text] in line


def test_a_map_with_too_large_a_repetition(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        rules(tmp_path, {"a{99999999999}": None})


def test_maps_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("no", "No such file"), ("", "directory"), ("binary", "JSON")):
        with pytest.raises(CheckpointError) as e:
            read_map(tmp_path / name)
        assert reason in str(e.value) and str(e.value).isprintable()


TARGETS = ["predictor.w1", "layers.0.predictor.w3", "layers.x.predictor.w1", ""]
TARGETS += ["layers.0", "layers.0.predictor.w1.weight", "layers.-1.predictor.w1"]
TARGETS += ["layers.99999999.predictor.w1", "layers.².predictor.w1", "\x1b[31m"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_map_to_a_name_that_is_none(target: str, tmp_path: Path) -> None:
    arrays = renamed(trained(), "layers.0.predictor.query", "x")
    line = refused(arrays, rules(tmp_path, {"x": target}))
    assert f"the map turns 'x' into {target!r}" in line


def test_a_group_that_matched_nothing(tmp_path: Path) -> None:
    arrays = renamed(trained(), "layers.0.predictor.query", "x")
    line = refused(arrays, rules(tmp_path, {r"x(\d)?": r"layers.\1.predictor.query"}))
    assert "the map turns 'x' into 'layers..predictor.query'" in line


# Layers


def test_missing_and_surplus_layers() -> None:
    arrays = trained()
    gone = {k: v for k, v in arrays.items() if k != "layers.1.predictor.w2"}
    assert refused(gone) == (
        "predictor.w2: expected layers 0 to 2 of tiny, found 2; layer 1 missing."
    )
    part = {k: v for k, v in arrays.items() if ".predictor.w2" not in k}
    assert "found 0; layer 0, 1, 2 missing" in refused(part)
    assert "found 4; layer 3 not in the model" in refused(trained(4))
    shifted = renamed(arrays, "layers.2.", "layers.3.")
    assert "layer 2 missing, layer 3 not in the model" in refused(shifted)
    large = replace(BASE, layers=20)
    assert "layer 3, 4, 5, 6, 7, 8 and others missing" in refused(arrays, base=large)


def test_doubled_layers() -> None:
    """Two names for one place; with copies of a model, say which are meant with --map."""
    arrays = trained()
    twice = {**arrays, "ema.layers.1.predictor.w1": arrays["layers.1.predictor.w1"]}
    assert refused(twice) == (
        "layers.1.predictor.w1 comes twice: from 'layers.1.predictor.w1' and from "
        "'ema.layers.1.predictor.w1'."
    )
    stacked = {**arrays, "predictor.query": np.ones((LAYERS, D), np.float32)}
    assert "layers.0.predictor.query comes twice" in refused(stacked)


# Tensors that hold all layers


def stack(arrays: Arrays) -> Arrays:
    parts = {k.split(".", 2)[2] for k in arrays}
    return {
        part: np.stack([arrays[f"layers.{i}.{part}"] for i in range(LAYERS)])
        for part in sorted(parts)
    }


def test_tensors_of_all_layers() -> None:
    same(converted(stack(trained())), trained())
    turned = {k: v.swapaxes(-1, -2) for k, v in stack(trained()).items() if v.ndim > 2}
    same(converted({**stack(trained()), **turned}), trained())


def test_tensors_of_too_few_or_many_layers() -> None:
    arrays = stack(trained())
    for count in (LAYERS - 1, LAYERS + 1, 0, 20_000):
        wrong = {**arrays, "predictor.query": np.zeros((count, D), np.float32)}
        assert "predictor.query: expected layers 0 to 2" in refused(wrong)
    line = refused({**arrays, "predictor.query": np.zeros(D, np.float32)})
    assert "its name has no layer, so the first axis should be the layers" in line
    scalar = {**arrays, "predictor.query": np.zeros((), np.float32)}
    assert "first axis should be the layers" in refused(scalar)


# Shapes


def test_both_orientations() -> None:
    """Also mixed, and however a Linear's weight is named."""
    arrays = trained()
    turned = {k: v.T for k, v in arrays.items()}
    mixed = {k: (v.T if ".w1" in k else v) for k, v in arrays.items()}
    for given in (turned, mixed, {k: v.T.copy() for k, v in arrays.items()}):
        same(converted(given), arrays)
        same(converted({f"{k}.weight": v for k, v in given.items()}), arrays)
    assert planned(turned).remarks == []


@pytest.mark.parametrize("shape", [(1, D), (D, 1), (1, 1, D), (1, D, 1)])
def test_queries_with_axes_of_one(shape: tuple[int, ...]) -> None:
    arrays = trained()
    key = "layers.1.predictor.query"
    same(converted({**arrays, key: arrays[key].reshape(shape)}), arrays)


MISSHAPEN = {
    "predictor.query": [(), (D + 1,), (1,), (D, D), (2, D), (D // 2, 2), (0,)],
    "predictor.w1": [(D,), (), (D + 1, RANK), (1, D, RANK), (D, 0), (0, D), (F, RANK)],
    "predictor.w2": [(RANK + 1, F), (RANK, F - 1), (F,), (0, F), (RANK, F, 1), (D, F)],
    "compensator.w1": [(D,), (F, H), (D, 0), (1, D, H)],
    "compensator.w2": [(H + 1, D), (H, F), (D,), (H, D + 1), (1, H, D)],
}
CASES = [(part, shape) for part, shapes in MISSHAPEN.items() for shape in shapes]


@pytest.mark.parametrize("part, shape", CASES)
def test_misshapen_tensors(part: str, shape: tuple[int, ...]) -> None:
    """Named with their layer; a wrong w1 may show first at w2."""
    key = f"layers.1.{part}"
    line = refused({**trained(), key: np.ones(shape, np.float32)})
    assert line.startswith("layers.1.") and f"{part.partition('.')[0]}." in line
    assert "expected shape" in line and "found" in line
    if part != "predictor.w1":
        assert f"{key} ({key!r})" in line and f"found {shape}" in line


def test_w1_and_w2_swapped() -> None:
    swapped = renamed(trained(), "predictor.w1", "predictor.x")
    swapped = renamed(swapped, "predictor.w2", "predictor.w1")
    line = refused(renamed(swapped, "predictor.x", "predictor.w2"))
    assert (
        f"layers.0.predictor.w1 ('layers.0.predictor.w1'): expected shape ({D}," in line
    )


def test_predictor_and_compensator_swapped() -> None:
    swapped = renamed(trained(), "predictor.w2", "x")
    swapped = renamed(swapped, "compensator.w2", "predictor.w2")
    assert "layers.0.predictor.w2" in refused(renamed(swapped, "x", "compensator.w2"))


def test_the_checkpoint_of_another_model() -> None:
    for change in ({"hidden_size": D + 8}, {"ffn_size": 2 * F}):
        line = refused(trained(), base=replace(BASE, **change))
        assert "layers.0.predictor." in line and "expected shape" in line


def test_ranks_that_differ_by_layer() -> None:
    arrays = trained()
    for i, (r, h) in enumerate([(1, 2), (7, 3), (9, 11)]):
        arrays[f"layers.{i}.predictor.w1"] = np.full((D, r), i + 0.5, np.float32)
        arrays[f"layers.{i}.predictor.w2"] = np.full((F, r), i + 1.5, np.float32)
        arrays[f"layers.{i}.compensator.w1"] = np.full((h, D), i + 2.5, np.float32)
        arrays[f"layers.{i}.compensator.w2"] = np.full((h, D), i + 3.5, np.float32)
    plan = planned(arrays)
    assert plan.ranks == {"predictor": [1, 7, 9], "compensator": [2, 3, 11]}
    got = converted(arrays)
    assert got["layers.2.predictor.w2"].shape == (9, F)
    assert got["layers.1.compensator.w1"].shape == (D, 3)
    info = conversion.information(plan, held(arrays), "relu", None)
    assert info["predictor"]["rank"] == [1, 7, 9]
    same_rank = conversion.information(planned(trained()), held(arrays), "relu", 8)
    assert same_rank["predictor"] == {
        "kind": "pooled",
        "rank": RANK,
        "quantization": {"bits": 8},
    }


@pytest.mark.parametrize("suffix, turned", [("", False), (".weight", True)])
def test_square_matrices_are_taken_by_their_names(suffix: str, turned: bool) -> None:
    """A Linear stores (out, in), and the user is told what was assumed, once."""
    square = np.arange(D * D, dtype=np.float32).reshape(D, D)
    arrays = trained()
    for i in range(LAYERS):
        for part in ("w1", "w2"):
            del arrays[f"layers.{i}.compensator.{part}"]
            arrays[f"layers.{i}.compensator.{part}{suffix}"] = square + i
    got = converted(arrays)
    for i in range(LAYERS):
        expected = (square + i).T if turned else square + i
        assert np.array_equal(got[f"layers.{i}.compensator.w1"], expected)
        assert np.array_equal(got[f"layers.{i}.compensator.w2"], expected)
    how = "(out, in), as a Linear's" if turned else "(in, out)"
    assert planned(arrays).remarks == [
        f"compensator.{part} is square: taken as {how}; --map says otherwise"
        for part in ("w1", "w2")
    ]


# Importances


VALUES = np.array([1.0, 0.0, 2.5], np.float32)
ALL: dict[str, Arrays] = {
    "one tensor": {"importance": VALUES},
    "plural": {"model.importances": VALUES},
    "float64": {"importance": VALUES.astype(np.float64)},
    "float16": {"importance": VALUES.astype(np.float16)},
    "scalars": {f"layers.{i}.importance": v[None][0] for i, v in enumerate(VALUES)},
    "ones": {f"layers.{i}.importance": v.reshape(1, 1) for i, v in enumerate(VALUES)},
}


@pytest.mark.parametrize("form", ALL)
def test_importances(form: str) -> None:
    given = {k: np.asarray(v) for k, v in ALL[form].items()}
    same(converted({**trained(), **given}), {**trained(), "importance": VALUES})


def test_importances_are_float32_whatever_the_weights_are() -> None:
    """They are three digits apart; 70,000 does not fit float16."""
    arrays = {**trained(), "importance": np.array([70_000, 1, 2], np.float32)}
    assert converted(arrays, dtype=mx.float16)["importance"][0] == 70_000


BAD_IMPORTANCES: dict[str, tuple[Any, str]] = {
    "negative": ([1, -1, 2], "must not be negative"),
    "zero": ([0, 0, 0], "nor all zero"),
    "NaN": ([1, np.nan, 2], "importance holds 1 values that are NaN or infinite"),
    "infinite": ([1, np.inf, 2], "importance holds 1 values that are NaN or infinite"),
    "too few": ([1, 2], "expected one importance per layer, shape (3,), found (2,)"),
    "a matrix": ([[1, 2, 3]], "expected one importance per layer"),
    "a number": (1.0, "expected one importance per layer"),
}


@pytest.mark.parametrize("case", BAD_IMPORTANCES)
def test_bad_importances(case: str) -> None:
    values, message = BAD_IMPORTANCES[case]
    line = refused({**trained(), "importance": np.array(values, np.float32)})
    assert message in line


def test_importances_in_whole_numbers() -> None:
    line = refused({**trained(), "importance": np.array([1, 2, 3])})
    assert "importance (importance) is int64; expected one of float64" in line


def test_importances_of_some_layers_or_twice() -> None:
    one = np.ones((), np.float32)
    part = {f"layers.{i}.importance": one for i in (0, 2)}
    assert "importance: expected layers 0 to 2" in refused({**trained(), **part})
    both = {**part, "importance": VALUES}
    assert "come twice: for all layers and for single" in refused({**trained(), **both})
    wide = {f"layers.{i}.importance": np.ones(2, np.float32) for i in range(LAYERS)}
    line = refused({**trained(), **wide})
    assert "the importance of layer 0 as one number, found shape (2,)" in line


# Values and dtypes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["predictor.query", "predictor.w2", "compensator.w1"])
def test_values_that_are_no_numbers_are_told_with_their_layer(
    part: str, value: float
) -> None:
    arrays = trained()
    key = f"layers.2.{part}"
    arrays[key] = arrays[key].copy()
    arrays[key].flat[3] = arrays[key].flat[0] = value
    line = refused(arrays, dtype=mx.bfloat16)
    assert line.startswith(f"{key} holds 2 values that are NaN or infinite")


def test_nan_in_one_layer_of_a_stack() -> None:
    arrays = stack(trained())
    arrays["predictor.w1"][1, 0, 0] = np.nan
    assert "layers.1.predictor.w1" in refused(arrays)


def test_values_too_large_for_the_dtype() -> None:
    arrays = trained()
    arrays["layers.1.predictor.w2"] = np.full((RANK, F), -1e5, np.float32)
    line = refused(arrays, dtype=mx.float16)
    assert line == (
        "layers.1.predictor.w2 does not fit float16: its largest value is 1e+05; "
        "use another --dtype."
    )
    assert converted(arrays, dtype=mx.float32)


def test_quantised_values_are_finite_too() -> None:
    arrays = trained()
    wide = np.full((RANK, F), 3e38, np.float32)
    wide[:, ::2] *= -1
    arrays["layers.1.predictor.w2"] = wide
    try:
        got = converted(arrays, bits=8)
    except CheckpointError:
        return
    for name in ("scales", "biases"):
        assert np.isfinite(got[f"layers.1.predictor.w2.{name}"]).all()


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool", "complex64"])
def test_dtypes_that_are_no_floats(dtype: str) -> None:
    arrays = trained()
    key = "layers.1.compensator.w2"
    line = refused({**arrays, key: arrays[key].astype(dtype)})
    assert f"{key} ({key}) is {dtype}; expected one of float64, float32" in line


def test_other_tensors_may_have_any_dtype() -> None:
    same(converted({**trained(), "step": np.array([3])}), trained())


@pytest.mark.parametrize("problem", ["NaN", "dtype", "stack", "overflow"])
def test_names_with_control_characters_in_messages(problem: str) -> None:
    arrays, name = trained(), "x\x1b[31m\ny.layers.0.predictor.query"
    query = arrays.pop("layers.0.predictor.query")
    if problem == "stack":
        name = "x\x1b[31m\ny.predictor.query"
    values = {
        "NaN": query * np.nan,
        "dtype": query.astype(int),
        "overflow": query + 1e5,
    }
    arrays[name] = values.get(problem, query)
    refused(arrays, dtype=mx.float16)  # checks that its line is printable


# What the predictor's JSON says


def test_the_activation() -> None:
    """The user's word, then the file beside the checkpoint, then the paper's; told or not."""
    checkpoint = held(trained())
    assert conversion.activation(checkpoint, None) == ("relu", False)
    checkpoint.info = {"compensator": {"activation": "gelu"}}
    assert conversion.activation(checkpoint, None) == ("gelu", True)
    assert conversion.activation(checkpoint, "silu") == ("silu", True)
    for odd in ({"activation": "tanh"}, {"activation": ["relu"]}, "relu", None):
        checkpoint.info = {"compensator": odd}
        assert conversion.activation(checkpoint, None) == ("relu", False)


def test_what_is_taken_over_from_the_file_beside() -> None:
    checkpoint = held(trained())
    checkpoint.info = {"block_size": 64, "calibration": {"k": 1}, "base_model": {}}
    plan = conversion.plan(checkpoint, BASE, [])
    info = conversion.information(plan, checkpoint, "silu", None)
    assert info["block_size"] == 64 and info["calibration"] == {"k": 1}
    assert info["base_model"]["hidden_size"] == D
    assert info["predictor"] == {"kind": "pooled", "rank": RANK}
    assert info["compensator"] == {"kind": "mlp", "rank": H, "activation": "silu"}
    assert info["source"] == {"name": "c", "kind": "memory"}
