import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fastforward.config import PrefillConfig
from mlx_fastforward.errors import ConfigError, FastForwardError


def refusal(**settings: object) -> str:
    """The text with which settings are refused; one line, whatever it is."""
    with pytest.raises(ConfigError) as e:
        PrefillConfig.from_kwargs(**settings)
    text = str(e.value)
    assert text == text.strip() and text and "\n" not in text
    return text


NUMBERS = [
    ("sparsity", -0.01, "at least 0 and below 1", "-0.01"),
    ("sparsity", 1, "at least 0 and below 1", "1"),
    ("sparsity", 1.0, "at least 0 and below 1", "1.0"),
    ("sparsity", 50, "at least 0 and below 1", "50"),
    ("sparsity", float("nan"), "at least 0 and below 1", "nan"),
    ("sparsity", float("inf"), "at least 0 and below 1", "inf"),
    ("sparsity", "0.5", "a number", "'0.5'"),
    ("sparsity", None, "a number", "None"),
    ("sparsity", True, "a number", "True"),
    ("sparsity", [0.5], "a number", "[0.5]"),
    ("block_size", 7, "at least 8", "7"),
    ("block_size", 0, "at least 8", "0"),
    ("block_size", -128, "at least 8", "-128"),
    ("block_size", 128.0, "a whole number", "128.0"),
    ("block_size", "128", "a whole number", "'128'"),
    ("block_size", None, "a whole number", "None"),
    ("block_size", True, "a whole number", "True"),
    ("probe_every", 1, "at least 2", "1"),
    ("probe_every", 0, "at least 2", "0"),
    ("probe_every", -8, "at least 2", "-8"),
    ("probe_every", 256, "divide block_size (128)", "256"),
    ("probe_every", 7, "divide block_size (128)", "7"),
    ("probe_every", 8.0, "a whole number", "8.0"),
    ("probe_every", None, "a whole number", "None"),
    ("probe_every", False, "a whole number", "False"),
]
CHOICES = {
    "selector": ("auto", "trained", "probe", "first-block", "oracle"),
    "compensator": ("auto", "none", "mlp", "low-rank"),
    "schedule": ("auto", "uniform", "layerwise"),
    "score": ("weighted", "griffin"),
}
FLAGS = ("dense_head", "dense_tail", "sparse_decode")


@pytest.mark.parametrize("name, value, expected, found", NUMBERS)
def test_bad_numbers(name: str, value: object, expected: str, found: str) -> None:
    text = refusal(**{name: value})
    assert text.startswith(name)
    assert expected in text
    assert f"got {found}" in text


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["Auto", "", "two\nlines", None, 3, True])
def test_bad_choices(name: str, value: object) -> None:
    text = refusal(**{name: value})
    assert text.startswith(name)
    assert ", ".join(CHOICES[name]) in text
    assert repr(value) in text


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, None, "yes", "false"])
def test_bad_flags(name: str, value: object) -> None:
    text = refusal(**{name: value})
    assert text.startswith(name)
    assert "True or False" in text
    assert repr(value) in text


@given(st.integers(8, 4096), st.integers(2, 4096))
def test_probes_must_divide_blocks(block_size: int, probe_every: int) -> None:
    settings = {"block_size": block_size, "probe_every": probe_every}
    if block_size % probe_every == 0:
        assert PrefillConfig(**settings).probe_every == probe_every
    else:
        text = refusal(**settings)
        assert "probe_every" in text and "block_size" in text
        assert str(block_size) in text and str(probe_every) in text


def test_sparse_decode_refuses_the_probe() -> None:
    text = refusal(sparse_decode=True, selector="probe")
    assert "sparse_decode" in text and "probe" in text
    assert "trained, first-block or oracle" in text


@pytest.mark.parametrize("selector", ["auto", "trained", "first-block", "oracle"])
def test_sparse_decode_takes_the_other_selectors(selector: str) -> None:
    config = PrefillConfig(sparse_decode=True, selector=selector)
    assert config.sparse_decode and config.selector == selector


@pytest.mark.parametrize("name", ["sparsty", "", "__class__", "two\nlines"])
def test_unknown_setting(name: str) -> None:
    text = refusal(**{name: 1})
    assert "unknown setting" in text and repr(name) in text
    for field in dataclasses.fields(PrefillConfig):
        assert field.name in text


def test_from_kwargs_sets_everything() -> None:
    settings = {
        "sparsity": 0.25,
        "block_size": 64,
        "selector": "oracle",
        "compensator": "none",
        "schedule": "uniform",
        "score": "griffin",
        "dense_head": False,
        "dense_tail": False,
        "sparse_decode": True,
        "probe_every": 16,
        "strategy": "columns",
        "shortest": 700,
        "attention_block": 256,
    }
    assert dataclasses.asdict(PrefillConfig.from_kwargs(**settings)) == settings
    assert PrefillConfig.from_kwargs() == PrefillConfig()


@pytest.mark.parametrize("sparsity", [0, 0.0, 1e-12, 0.5, 1 - 1e-12])
def test_sparsity_edges(sparsity: float) -> None:
    assert PrefillConfig(sparsity=sparsity).sparsity == sparsity


@pytest.mark.parametrize(
    "block, probe", [(8, 2), (8, 8), (9, 3), (128, 128), (2048, 2)]
)
def test_block_edges(block: int, probe: int) -> None:
    config = PrefillConfig(block_size=block, probe_every=probe)
    assert (config.block_size, config.probe_every) == (block, probe)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken(name: str) -> None:
    for value in CHOICES[name]:
        assert getattr(PrefillConfig(**{name: value}), name) == value


def test_a_checked_config_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrefillConfig().sparsity = 2  # type: ignore[misc]


def test_the_error_is_catchable_by_either_name() -> None:
    for kind in (FastForwardError, ValueError):
        with pytest.raises(kind):
            PrefillConfig(sparsity=1)
