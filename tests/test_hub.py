"""Models, predictors and checkpoints from a hub: a loopback server, real processes that ask it."""

import json
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import models
import numpy as np
import pytest
import torch
from loopback_hub import Done, Hub, process, refusal, several

PROMPT = "Keawe was poor, brave, and active; he could read and write. " * 6
GENERATE = ["generate", PROMPT, "--json", "--block-size", "8", "--max-tokens", "4"]
WEIGHTS = "fastforward.safetensors"


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its predictor, both in one, what they were trained as, and what is none of these."""
    home = tmp_path_factory.mktemp("repos")
    model = models.tiny("llama", vocab=4096)
    repos = {
        "user/tiny": models.save_folder(model, home / "tiny"),
        "user/side": models.save_random_predictor(model, home / "side"),
        "user/both": models.save_folder(model, home / "both"),
        "user/checkpoint": home / "checkpoint",
        "user/torch": home / "torch",
        "user/empty": home / "empty",
    }
    models.save_random_predictor(model, repos["user/both"])
    tensors = mx.load(str(repos["user/side"] / WEIGHTS))
    as_torch = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    for name in ("checkpoint", "torch", "empty"):
        (home / name).mkdir()
        torch.save(as_torch, home / name / "trained.pt")
    (home / "empty" / "trained.pt").unlink()
    mx.save_safetensors(str(home / "checkpoint" / "trained.safetensors"), tensors)
    for folder in repos.values():  # mlx-lm leaves it on the hub
        (folder / "README.md").write_text("Nothing to download.")
    return repos


@pytest.fixture
def hub(repos: dict[str, Path], tmp_path: Path) -> Iterator[Hub]:
    server = Hub(repos, tmp_path, gated="user/gated")
    yield server
    server.stop()


def said(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def downloaded(hub: Hub, suffix: str) -> bool:
    """Whether anybody asked for such a file."""
    return any("/resolve/" in p and p.endswith(suffix) for p in hub.asked)


def test_a_model_is_downloaded_once_and_then_works_while_the_hub_is_down(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    command = [*GENERATE, "--model", "user/tiny"]
    first = said(process(hub, tmp_path, *command))
    assert downloaded(hub, "/model.safetensors")
    assert first["settings"]["model"] == "user/tiny"
    assert first["settings"]["predictor"] is None
    del hub.asked[:]
    again = said(process(hub, tmp_path, *command))
    assert hub.asked and not downloaded(hub, ".safetensors")
    hub.stop()
    local = [*GENERATE, "--model", str(repos["user/tiny"])]
    wanted, offline = several(hub, tmp_path, local, command, HF_HUB_OFFLINE="1")
    other = [*GENERATE, "--model", "user/both"]
    down, missing = several(hub, tmp_path, command, other)
    assert said(wanted)["ffn_sparsity"] == first["ffn_sparsity"] > 0.1
    assert again["text"] == first["text"]
    texts = [said(wanted)["text"], said(offline)["text"], said(down)["text"]]
    assert texts == [first["text"]] * 3
    wanted_line = "user/both is not in the local cache and the hub cannot be"
    assert refusal(missing).startswith(wanted_line)


def test_what_is_not_cached_is_refused_offline(hub: Hub, tmp_path: Path) -> None:
    local = str(hub.repos["user/tiny"])
    model, predictor, checkpoint = several(
        hub,
        tmp_path,
        [*GENERATE, "--model", "user/tiny"],
        [*GENERATE, "--model", local, "--predictor", "user/side"],
        ["convert", "user/checkpoint", "--model", local],
        HF_HUB_OFFLINE="1",
    )
    wanted = "user/tiny is not in the local cache and the hub cannot be"
    assert refusal(model).startswith(wanted)
    wanted = "predictor 'user/side' is not a local folder and could not be downloaded"
    assert refusal(predictor).startswith(wanted)
    wanted = "checkpoint 'user/checkpoint' is not a local folder and could not be"
    assert refusal(checkpoint).startswith(wanted)
    assert hub.asked == []


def test_repositories_that_are_unknown_gated_or_hold_something_else(
    hub: Hub, tmp_path: Path
) -> None:
    model = ["--model", str(hub.repos["user/tiny"])]
    cases = [
        (
            [*GENERATE, "--model", "user/unknown"],
            "user/unknown was not found: not a local folder, and no such",
        ),
        (
            [*GENERATE, "--model", "user/gated"],
            "user/gated is gated: accept its terms",
        ),
        ([*GENERATE, "--model", "user/empty"], "user/empty cannot be loaded: "),
        (
            [*GENERATE, *model, "--predictor", "user/unknown"],
            "predictor 'user/unknown' is not a local folder and could not be downloaded",
        ),
        ([*GENERATE, *model, "--predictor", "user/empty"], "no predictor in "),
        (
            ["convert", "user/unknown", *model],
            "checkpoint 'user/unknown' is not a local folder and could not be",
        ),
    ]
    done = several(hub, tmp_path, *(command for command, _ in cases))
    for (command, wanted), one in zip(cases, done):
        line = refusal(one, after_download="user/empty" in command)
        assert line.startswith(wanted), command
    assert "config.json" in refusal(done[2], True)
    end = "the files fastforward.json and fastforward.safetensors."
    assert refusal(done[4], True).endswith(end)


def test_an_adapter_is_downloaded_once_and_then_works_offline(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    base = [*GENERATE, "--model", str(repos["user/tiny"]), "--selector", "trained"]
    command = [*base, "--predictor", "user/side"]
    got = said(process(hub, tmp_path, *command))
    assert downloaded(hub, "/" + WEIGHTS)
    assert got["settings"]["predictor"] == "user/side"
    del hub.asked[:]
    local = [*base, "--predictor", str(repos["user/side"])]
    wanted, offline = several(hub, tmp_path, local, command, HF_HUB_OFFLINE="1")
    assert said(wanted)["text"] == said(offline)["text"] == got["text"]
    assert said(wanted)["ffn_sparsity"] == got["ffn_sparsity"] > 0.1
    assert hub.asked == []


def test_an_adapter_in_the_models_own_repository_is_found_and_its_weights_fetched(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    """mlx-lm downloads the JSON with a model, and no weights but the model's."""
    command = [*GENERATE, "--model", "user/both"]
    got = said(process(hub, tmp_path, *command))
    assert downloaded(hub, "/" + WEIGHTS)
    assert hub.revision("user/both") in got["settings"]["predictor"]
    del hub.asked[:]
    local = [*GENERATE, "--model", str(repos["user/both"])]
    wanted, offline, without = several(
        hub,
        tmp_path,
        local,
        command,
        [*command, "--predictor", "none"],
        HF_HUB_OFFLINE="1",
    )
    assert said(wanted)["text"] == said(offline)["text"] == got["text"]
    assert said(offline)["settings"]["predictor"] == got["settings"]["predictor"]
    assert said(without)["settings"]["predictor"] is None
    assert hub.asked == []


def test_checkpoints_of_a_repository_are_converted_and_of_two_kinds_one_is_fetched(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    model = ["--model", str(repos["user/tiny"]), "--out"]
    listed, tensors = several(
        hub,
        tmp_path,
        ["convert", "user/checkpoint", "--list"],
        ["convert", "user/checkpoint", *model, str(tmp_path / "tensors")],
    )
    assert listed.code == 0 and "layers.3.predictor.w2" in listed.stdout
    assert_converted(tensors, tmp_path / "tensors", repos["user/side"])
    assert downloaded(hub, "/trained.safetensors") and not downloaded(hub, ".pt")
    source = json.loads((tmp_path / "tensors" / "fastforward.json").read_text())
    assert source["source"] == {"name": "user/checkpoint", "kind": "safetensors"}


def test_a_repository_with_nothing_but_a_pt_file_is_converted(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    flags = ["--model", str(repos["user/tiny"]), "--out", str(tmp_path / "made")]
    done = process(hub, tmp_path, "convert", "user/torch", *flags)
    assert_converted(done, tmp_path / "made", repos["user/side"])


def assert_converted(done: Done, out: Path, trained: Path) -> None:
    """The weights are the ones that were trained, bit by bit."""
    assert done.code == 0, done.stderr
    made, wanted = (mx.load(str(f / WEIGHTS)) for f in (out, trained))
    assert made.keys() == wanted.keys() and len(made) == 12
    for name, w in wanted.items():
        assert mx.array_equal(made[name], w), name
