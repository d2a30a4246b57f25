"""What a tensor is: by its name, by the user's map, and whether all of them fit the model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import BASE, LAYERS, RANK, D, F, H, converted, refused, same

from mlx_fastforward.convert import conversion
from mlx_fastforward.convert.files import CheckpointError
from mlx_fastforward.convert.naming import Match, Rule, Unknown, match, read_map

PARTS = ["predictor.query", "predictor.w1", "predictor.w2"]
PARTS += ["compensator.w1", "compensator.w2"]
Arrays = checkpoints.Arrays


def trained() -> Arrays:
    """Predictors and compensators under a predictor file's own names."""
    arrays = checkpoints.wanted(checkpoints.trained())
    del arrays["importance"]
    return arrays


def planned(arrays: Arrays, rules: Optional[list[Rule]] = None) -> conversion.Plan:
    return conversion.plan(checkpoints.opened(arrays), BASE, rules or [])


KNOWN = {
    "layers.3.predictor.query": ("predictor.query", 3, False),
    "layers.3.predictor.w2.weight": ("predictor.w2", 3, True),
    "layers.0000000012.compensator.w1.weight": ("compensator.w1", 12, True),
    f"layers.{'9' * 100_000}.predictor.w1": ("predictor.w1", 999_999_999, False),
    "module._orig_mod.layers.0.predictor.w1": ("predictor.w1", 0, False),
    "layers.0._orig_mod.predictor.module.w1.weight": ("predictor.w1", 0, True),
    "model.model.layers.0.mlp.predictor.w1": ("predictor.w1", 0, False),
    "state_dict.transformer.h.7.mlp.predictor.q": ("predictor.query", 7, False),
    "blocks.2.expert_predictor.fc1.weight": ("predictor.w1", 2, True),
    "layer.2.expert_predictor.linear2.weight": ("predictor.w2", 2, True),
    "layers.2.error_compensator.w_c2": ("compensator.w2", 2, False),
    "Layers.2.Compensator.Wc1": ("compensator.w1", 2, False),
    "predictors.3.w1": ("predictor.w1", 3, False),
    "model.compensators.3.fc2.weight": ("compensator.w2", 3, True),
    "layers.1.layers.5.predictor.w1": ("predictor.w1", 5, False),
    "predictor.w1": ("predictor.w1", None, False),
    "model.compensators.w2.weight": ("compensator.w2", None, True),
    "module.importances": ("importance", None, False),
    "model.layers.4.predictor.importance": ("importance", 4, False),
}
NOT_OURS = ["model.layers.3.mlp.down_proj.weight", "lm_head.weight", "", ".", "..."]
NOT_OURS += ["optimizer.state.0.exp_avg", "layers.3.w1", "query", "importance.weight"]
UNKNOWN = ["layers.3.predictor.w1.bias", "layers.3.predictor.w3", "layers.3.predictor"]
UNKNOWN += ["layers.3.compensator.query", "layers.3.predictor.net.w1", "predictor.3"]
UNKNOWN += ["layers.3.predictors.0.w1", "layers.3.predictor.weight", "predictor.w1.0"]
UNKNOWN += ["predictor.layers.3.w1", "layers.3.predictor.w1.weight.weight"]
UNKNOWN += ["layers.3.predictor.w2.scales", "net.3.predictor.w1", "net.3.importance"]
UNKNOWN += ["layers.².predictor.w1", "predictors.².w1"]  # digits that are no numbers
UNKNOWN += ["layers.0.predictor2.w1", "layers.0.predictorx.w1"]


def test_names() -> None:
    """Known ones, those of other things, and those that say too little."""
    for name, (part, layer, linear) in KNOWN.items():
        assert match(name) == Match(part, layer, None, linear), name[:99]
    assert [match(name) for name in NOT_OURS] == [None] * len(NOT_OURS)
    for name in UNKNOWN:
        with pytest.raises(Unknown):
            match(name)


def test_unknown_names_are_refused_and_other_tensors_left_out() -> None:
    """One kind, predictors or compensators, is enough."""
    biases = [f"layers.{i}.predictor.w1.bias" for i in range(5)]
    line = refused({**trained(), **{b: np.zeros(RANK) for b in biases}})
    assert f"no known name: '{biases[0]}', '{biases[1]}'" in line
    assert "and 2 more" in line and "without biases" in line and "--map" in line
    others = {"a\nb": np.zeros((9, D)), "importance": np.ones(LAYERS, np.float32)}
    line = refused(others)
    assert "no predictor or compensator among 2 tensors ('a\\nb', 'importance')" in line
    assert "--list shows all, --map names them" in line
    for kind in ("predictor", "compensator"):
        arrays = {k: v for k, v in trained().items() if f".{kind}." in k}
        plan = planned({**arrays, **others})
        assert list(plan.ranks) == [kind] and plan.ignored == ["a\nb"]
        same(converted({**arrays, "step": np.array(3)}), arrays)


def rules(tmp_path: Path, lines: Any) -> list[Rule]:
    path = tmp_path / "map.json"
    path.write_text(lines if isinstance(lines, str) else json.dumps(lines))
    return read_map(path)


def renamed(arrays: Arrays, old: str, new: str) -> Arrays:
    return {k.replace(old, new): v for k, v in arrays.items()}


def test_a_map_names_whole_names_and_its_first_line_counts(tmp_path: Path) -> None:
    other = renamed(renamed(trained(), "layers.", "net/"), "predictor.w", "sel_")
    extra = {"net/0.sel_1.bias": np.ones(1), "layers.0.predictor.b": np.ones(1)}
    lines = {
        "net": r"layers.0.predictor.query",
        r".*\.(bias|b)": None,
        r"net/(\d+)\.sel_([12])": r"layers.\1.predictor.w\2",
        r"net/(?P<i>\d+)\.(?P<part>.*)": r"layers.\g<i>.\g<part>",
    }
    read = rules(tmp_path, lines)
    assert planned({**other, **extra}, read).ignored == list(extra)
    same(converted({**other, **extra}, read), trained())
    line = refused(trained(), rules(tmp_path, {".*query": None, **lines}))
    assert "predictor.query: expected layers 0 to 2 of tiny, found 0" in line


SQUARE = np.arange(D * D, dtype=np.float32).reshape(D, D)


def squares(suffix: str) -> Arrays:
    """Compensators as wide as the model."""
    arrays = trained()
    for name in [k for k in arrays if "compensator" in k]:
        del arrays[name]
        arrays[name + suffix] = SQUARE
    return arrays


@pytest.mark.parametrize("suffix, turned", [("", False), (".weight", True)])
def test_square_matrices_are_taken_by_their_names(suffix: str, turned: bool) -> None:
    """A Linear stores (out, in), and the user is told what was assumed, once."""
    got = converted(squares(suffix))
    for name in (k for k in got if "compensator" in k):
        assert np.array_equal(got[name], SQUARE.T if turned else SQUARE)
    how = "(out, in), as a Linear's" if turned else "(in, out)"
    assert planned(squares(suffix)).remarks == [
        f"compensator.{part} is square: taken as {how}; --map says otherwise"
        for part in ("w1", "w2")
    ]


def test_a_map_says_how_a_matrix_lies(tmp_path: Path) -> None:
    """Of a square one it is believed."""
    for transpose in (True, False):
        target = {"name": r"layers.\1", "transpose": transpose}
        read = rules(tmp_path, {r"layers\.(.*compensator\.w.)": target})
        plan = planned(squares(""), read)
        assert plan.remarks == []
        got = converted(squares(""), read)["layers.1.compensator.w2"]
        assert np.array_equal(got, SQUARE.T if transpose else SQUARE)
    turned = {k: v.T for k, v in trained().items()}
    assert f"shape ({D}, {H}) by the map, found ({H}, {D})" in refused(turned, read)


BAD_MAPS = {
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
    "[]": "expected an object like",
    "{}": "expected an object like",
    '{"a": 3}': "expected a name, null, or",
    '{"a": {}}': "expected a name, null, or",
    '{"a": {"name": "x", "transpose": 1}}': "expected a name, null, or",
    '{"a": {"name": "x", "transposed": true}}': "expected a name, null, or",
    '{"(": "x"}': "missing )",
    '{"a": "layers.\\\\1.predictor.w1"}': "invalid group reference 1",
    '{"a": "\\\\g<n>"}': "unknown group name",
    '{"a": "\\\\q"}': "bad escape",
    '{"a{99999999999}": null}': "a{99999999999}",
}


def test_bad_maps(tmp_path: Path) -> None:
    for text, message in BAD_MAPS.items():
        with pytest.raises(CheckpointError) as e:
            rules(tmp_path, text)
        line = str(e.value)
        assert line.isprintable() and line.startswith(f"map {tmp_path / 'map.json'}")
        assert message in line
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("no", "No such file"), ("", "directory"), ("binary", "JSON")):
        with pytest.raises(CheckpointError, match=reason) as e:
            read_map(tmp_path / name)
        assert str(e.value).isprintable()


TARGETS = ["predictor.w1", "layers.0.predictor.w3", "layers.x.predictor.w1", ""]
TARGETS += ["layers.0", "layers.0.predictor.w1.weight", "layers.-1.predictor.w1"]
TARGETS += ["layers.99999999.predictor.w1", "layers.².predictor.w1", "\x1b[31m"]


def test_a_map_to_a_name_that_is_none(tmp_path: Path) -> None:
    arrays = renamed(trained(), "layers.0.predictor.query", "x")
    for target in TARGETS:
        line = refused(arrays, rules(tmp_path, {"x": target}))
        assert f"the map turns 'x' into {target!r}" in line
    line = refused(arrays, rules(tmp_path, {r"x(\d)?": r"layers.\1.predictor.query"}))
    assert "the map turns 'x' into 'layers..predictor.query'" in line


def test_missing_surplus_and_doubled_layers() -> None:
    arrays = trained()
    gone = {k: v for k, v in arrays.items() if k != "layers.1.predictor.w2"}
    told = "predictor.w2: expected layers 0 to 2 of tiny, found 2; layer 1 missing."
    assert refused(gone) == told
    part = {k: v for k, v in arrays.items() if ".predictor.w2" not in k}
    assert "found 0; layer 0, 1, 2 missing" in refused(part)
    shifted = renamed(arrays, "layers.2.", "layers.3.")
    assert "found 4; layer 3 not in the model" in refused({**arrays, **shifted})
    assert "layer 2 missing, layer 3 not in the model" in refused(shifted)
    large = replace(BASE, layers=20)
    assert "layer 3, 4, 5, 6, 7, 8 and others missing" in refused(arrays, base=large)
    twice = {**arrays, "ema.layers.1.predictor.w1": arrays["layers.1.predictor.w1"]}
    assert refused(twice) == (
        "layers.1.predictor.w1 comes twice: from 'layers.1.predictor.w1' and from "
        "'ema.layers.1.predictor.w1'."
    )
    stacked = {**arrays, "predictor.query": np.ones((LAYERS, D), np.float32)}
    assert "layers.0.predictor.query comes twice" in refused(stacked)


def stack(arrays: Arrays) -> Arrays:
    """One tensor of each part, for all layers."""
    return {
        part: np.stack([arrays[f"layers.{i}.{part}"] for i in range(LAYERS)])
        for part in PARTS
    }


def test_tensors_of_all_layers(tmp_path: Path) -> None:
    """Either way round, and under the user's names."""
    stacked = {**stack(trained()), "importance": np.ones(LAYERS, np.float32)}
    wanted = {**trained(), "importance": stacked["importance"]}
    same(converted(stacked), wanted)
    turned = {k: v.swapaxes(-1, -2) for k, v in stacked.items() if v.ndim > 2}
    same(converted({**stacked, **turned}), wanted)
    lines = {f"x.{k}": f"layers.*.{k}" for k in PARTS} | {"x.importance": "importance"}
    given = {f"x.{k}": v for k, v in stacked.items()}
    same(converted(given, rules(tmp_path, lines)), wanted)
    for count in (LAYERS - 1, LAYERS + 1, 0, 20_000):
        wrong = {**stacked, "predictor.query": np.zeros((count, D), np.float32)}
        assert "predictor.query: expected layers 0 to 2" in refused(wrong)
    for shape in ((D,), ()):
        line = refused({**stacked, "predictor.query": np.zeros(shape, np.float32)})
        assert "its name has no layer, so the first axis should be the layers" in line


def test_both_orientations() -> None:
    """Also mixed, and however a Linear's weight is named; a query may have axes of one."""
    arrays = trained()
    turned = {k: v.T for k, v in arrays.items()}
    mixed = {k: (v.T if ".w1" in k else v) for k, v in arrays.items()}
    for given in (turned, mixed):
        same(converted(given), arrays)
        same(converted({f"{k}.weight": v for k, v in given.items()}), arrays)
    assert planned(turned).remarks == []
    key = "layers.1.predictor.query"
    for shape in ((1, D), (D, 1), (1, D, 1)):
        same(converted({**arrays, key: arrays[key].reshape(shape)}), arrays)


MISSHAPEN = {
    "predictor.query": [(), (D + 1,), (1,), (D, D), (2, D), (D // 2, 2), (0,)],
    "predictor.w1": [(D,), (), (D + 1, RANK), (1, D, RANK), (D, 0), (0, D), (F, RANK)],
    "predictor.w2": [(RANK + 1, F), (RANK, F - 1), (F,), (0, F), (RANK, F, 1), (D, F)],
    "compensator.w1": [(D,), (F, H), (D, 0), (1, D, H)],
    "compensator.w2": [(H + 1, D), (H, F), (D,), (H, D + 1), (1, H, D)],
}


def test_misshapen_tensors() -> None:
    """Named with their layer; a wrong w1 may show first at w2."""
    for part, shape in ((p, s) for p, shapes in MISSHAPEN.items() for s in shapes):
        key = f"layers.1.{part}"
        line = refused({**trained(), key: np.ones(shape, np.float32)})
        assert line.startswith("layers.1.") and f"{part.partition('.')[0]}." in line
        assert "expected shape" in line and "found" in line
        if part != "predictor.w1":
            assert f"{key} ({key!r})" in line and f"found {shape}" in line


def test_ranks_and_widths_that_differ_by_layer() -> None:
    arrays, widths = trained(), [F, 3 * F, F]
    for i, (r, h, f) in enumerate(zip([1, 7, 9], [2, 3, 11], widths)):
        arrays[f"layers.{i}.predictor.w1"] = np.full((D, r), i + 0.5, np.float32)
        arrays[f"layers.{i}.predictor.w2"] = np.full((r, f), i + 1.5, np.float32)
        arrays[f"layers.{i}.compensator.w1"] = np.full((D, h), i + 2.5, np.float32)
        arrays[f"layers.{i}.compensator.w2"] = np.full((h, D), i + 3.5, np.float32)
    base = replace(BASE, ffn_size=widths)
    same(converted(arrays, base=base), arrays)
    same(converted({k: v.T for k, v in arrays.items()}, base=base), arrays)
    checkpoint = checkpoints.opened(arrays)
    plan = conversion.plan(checkpoint, base, [])
    info = conversion.information(plan, checkpoint, "relu", None)
    assert info["predictor"]["rank"] == [1, 7, 9]
    assert info["compensator"]["rank"] == [2, 3, 11]
    assert "layers.1.predictor.w2" in refused(arrays)


VALUES = np.array([1.0, 0.0, 70_000], np.float32)
ALL: list[Arrays] = [
    {"importance": VALUES},
    {f"layers.{i}.importance": v[None][0] for i, v in enumerate(VALUES)},
    {f"layers.{i}.importance": v.reshape(1, 1) for i, v in enumerate(VALUES)},
]
SOME = {f"layers.{i}.importance": np.ones((), np.float32) for i in (0, 2)}
WIDE = {f"layers.{i}.importance": np.ones(2, np.float32) for i in range(LAYERS)}
BAD_IMPORTANCES: dict[str, Any] = {
    "must not be negative": [1.0, -1.0, 2.0],
    "nor all zero": [0.0, 0.0, 0.0],
    "importance holds 1 values that are NaN or infinite": [1, np.nan, 2],
    "expected one importance per layer, shape (3,), found (2,)": [1.0, 2.0],
    "expected one importance per layer, shape (3,), found (1, 3)": [[1, 2, 3.0]],
    "expected one importance per layer, shape (3,), found ()": 1.0,
    "importance (importance) is int64; expected one": [1, 2, 3],
    "importance: expected layers 0 to 2": SOME,
    "come twice: for all layers and for": {**SOME, "importance": VALUES},
    "the importance of layer 0 as one number, found shape (2,)": WIDE,
}


def test_importances() -> None:
    """They stay float32 whatever the weights are: 70,000 does not fit float16."""
    for form in ALL:
        given = {k: np.asarray(v) for k, v in form.items()}
        got = converted({**trained(), **given}, dtype="float16")
        assert np.array_equal(got["importance"], VALUES)
    for message, bad in BAD_IMPORTANCES.items():
        given = bad if isinstance(bad, dict) else {"importance": np.array(bad)}
        assert message in refused({**trained(), **given})


def test_values_that_are_no_numbers_are_told_with_their_layer() -> None:
    """And names with control characters are printable."""
    for value in (np.nan, np.inf, -np.inf):
        for part in ("predictor.query", "compensator.w1"):
            arrays, key = trained(), f"layers.2.{part}"
            arrays[key] = arrays[key].copy()
            arrays[key].flat[3] = arrays[key].flat[0] = value
            line = refused(arrays, dtype="bfloat16")
            assert line.startswith(f"{key} holds 2 values that are NaN or infinite")
            assert key in refused(stack(arrays))
            assert "31m" in refused({**arrays, "x\x1b[31m\n." + key: arrays.pop(key)})


def test_values_too_large_for_the_dtype() -> None:
    arrays, key = trained(), "layers.1.predictor.w2"
    arrays[key] = np.full((RANK, F), -1e5, np.float32)
    line = refused(arrays, dtype="float16")
    told = "does not fit float16: its largest value is 1e+05; use another --dtype."
    assert line == f"{key} {told}"
    same(converted(arrays), arrays)
    arrays[key] = 3e38 * np.resize([-1, 1], (RANK, F)).astype(np.float32)
    with pytest.raises(CheckpointError, match=rf"{key} in 8 bits"):  # their range
        list(conversion.tensors(planned(arrays), mx.float32, 8))


def test_what_the_json_says() -> None:
    """Of the activation the user's word, then the file beside the checkpoint, else the paper's."""
    checkpoint = checkpoints.opened(trained())
    assert conversion.activation(checkpoint, None) == ("relu", False)
    checkpoint.info = {"compensator": {"activation": "gelu"}}
    assert conversion.activation(checkpoint, None) == ("gelu", True)
    assert conversion.activation(checkpoint, "silu") == ("silu", True)
    for odd in ({"activation": "tanh"}, {"activation": ["relu"]}, "relu", None):
        checkpoint.info = {"compensator": odd}
        assert conversion.activation(checkpoint, None) == ("relu", False)
    checkpoint.info = {"block_size": 64, "calibration": {"k": 1}, "base_model": {}}
    plan = conversion.plan(checkpoint, BASE, [])
    info = conversion.information(plan, checkpoint, "silu", 8)
    assert info["block_size"] == 64 and info["calibration"] == {"k": 1}
    assert info["base_model"]["hidden_size"] == D
    bits = {"quantization": {"bits": 8}}
    assert info["predictor"] == {"kind": "pooled", "rank": RANK, **bits}
    assert info["compensator"] == {"kind": "mlp", "rank": H, "activation": "silu"}
    assert info["source"] == {"name": "c", "kind": "memory"}
