import dataclasses
from typing import Any

import pytest

from mlx_fastforward.config import DeviceSettings, PrefillConfig
from mlx_fastforward.errors import ConfigError, FastForwardError

CHOICES = {
    "selector": "auto, trained, probe, first-block, oracle",
    "compensator": "auto, none, mlp, low-rank",
    "schedule": "auto, uniform, first-dense",
    "strategy": "chunk, columns, stored",
}
WHOLE = "a whole number"
BAD: dict[tuple[str, str], list[Any]] = {
    ("sparsity", "at least 0 and below 1"): [-0.01, 1, 50, float("nan")],
    ("sparsity", "a number"): ["0.5", None, True],
    ("prune_tokens", "at least 0 and below 1"): [-0.01, 1, float("nan")],
    ("prune_tokens", "a number"): ["0.5", None, True],
    ("block_size", "at least 8"): [7, -128],
    ("block_size", WHOLE): [128.0, "128", True],
    ("shortest", WHOLE): [2.5],
    ("attention_block", WHOLE): [2.5, True],
    ("attention_block", "at least 0"): [-1],
    ("unpack", "at least 0"): [-1],
    ("step", "at least 512"): [511],
    **{(n, "True or False"): [1, None] for n in ("dense_head", "dense_tail", "half")},
    ("sparse_decode", "True or False"): ["yes"],
    **{(name, text): ["Auto", "two\nlines", 3] for name, text in CHOICES.items()},
}


def of(name: str, value: Any) -> Any:
    device = name in (
        "shortest",
        "attention_block",
        "strategy",
        "unpack",
        "half",
        "step",
    )
    return (DeviceSettings if device else PrefillConfig)(**{name: value})


@pytest.mark.parametrize("kind", [ConfigError, FastForwardError, ValueError])
@pytest.mark.parametrize("name, expected", BAD)
def test_impossible_values_are_named_in_one_line(
    name: str, expected: str, kind: type[Exception]
) -> None:
    for value in BAD[name, expected]:
        with pytest.raises(kind) as e:
            of(name, value)
        text = str(e.value)
        assert text.startswith(name) and expected in text and "\n" not in text
        assert f"got {value!r}" in text


def test_sparse_decode_takes_every_selector_but_the_probe() -> None:
    for name in ("auto", "trained", "first-block", "oracle"):
        assert PrefillConfig(sparse_decode=True, selector=name).selector == name
    with pytest.raises(ConfigError, match="trained, first-block or oracle"):
        PrefillConfig(sparse_decode=True, selector="probe")


@pytest.mark.parametrize("name", ["sparsty", "__class__", "two\nlines"])
def test_an_unknown_setting_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as e:
        PrefillConfig.from_kwargs(**{name: 1})
    known = ", ".join(f.name for f in dataclasses.fields(PrefillConfig))
    assert str(e.value) == f"unknown setting {name!r}; known ones: {known}."


def test_what_is_set_is_kept_and_cannot_change() -> None:
    extremes = {"sparsity": 1 - 1e-12, "block_size": 8, "dense_tail": False}
    config = PrefillConfig.from_kwargs(**extremes)
    assert config == PrefillConfig(1 - 1e-12, 8, dense_tail=False)
    assert PrefillConfig(sparsity=0).sparsity == 0
    for name, text in CHOICES.items():
        for value in text.split(", "):
            assert getattr(of(name, value), name) == value
    with pytest.raises(ConfigError, match="block_size must be a whole number"):
        DeviceSettings(block_size="128")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 2  # type: ignore[misc]
