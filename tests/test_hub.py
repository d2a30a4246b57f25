"""Models, predictors and checkpoints from a hub, and in one line what it or the network refused."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import models
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from loopback_hub import GENERATE, Answer, Hub, run
from predictor_files import held, one_line

from mlx_fastforward.errors import HubError, LoadProblem, PredictorError
from mlx_fastforward.hub import problems
from mlx_fastforward.predictors.file import TENSORS_NAME as WEIGHTS
from mlx_fastforward.predictors.file import load_predictor

WRONG = "Invalid credentials in Authorization header"
REFUSED: dict[str, Answer] = {
    "user/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "user/login": (401, {"X-Error-Message": WRONG}),
    "user/rights": (403, {"X-Error-Message": "No rights"}),
    "user/broken": (500, {"X-Error-Message": "Out of order"}),
}


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one with its predictor, what that was trained as, and what is none of these."""
    home = tmp_path_factory.mktemp("repos")
    model = models.tiny("llama", vocab=4096)
    tiny, both = (models.save_folder(model, home / name) for name in ("tiny", "both"))
    models.save_random_predictor(model, both)
    tensors = mx.load(str(both / WEIGHTS))
    as_torch = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    for name in ("checkpoint", "torch", "empty"):
        (home / name).mkdir()
        if name != "empty":
            torch.save(as_torch, home / name / "trained.pt")
    mx.save_safetensors(str(home / "checkpoint" / "trained.safetensors"), tensors)
    for folder in home.iterdir():  # mlx-lm leaves it on the hub
        (folder / "README.md").write_text("Nothing to download.")
    return {f"user/{folder.name}": folder for folder in home.iterdir()}


@pytest.fixture
def hub(repos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(repos, tmp_path, monkeypatch)
    hub.refused = REFUSED
    hub.connect()
    yield hub
    hub.stop()


def downloaded(hub: Hub, suffix: str) -> bool:
    """Whether anybody asked for such a file."""
    return any("/resolve/" in p and p.endswith(suffix) for p in hub.asked)


NOT_FOUND = " was not found: not a local folder, and no such repository "
NOT_FOUND += "(or it is private: hf auth login)."
REFUSALS = [
    ("user/unknown", NOT_FOUND),
    ("user/gated", " is gated: accept its terms on its page, then run hf auth login."),
    ("user/login", ": the hub refused (*401*); log in with: hf auth login."),
    ("user/rights", ": the hub refused (403*No rights*); log in with: hf auth login."),
    ("user/broken", ": the hub refused (*500*Out of order)."),
    ("a/b/c", " is neither a local folder nor a repository name like *."),
]


@pytest.mark.parametrize("name, wanted", REFUSALS)
def test_what_the_hub_refuses(hub: Hub, name: str, wanted: str) -> None:
    for ask in (HfApi().model_info, snapshot_download):
        with pytest.raises(LoadProblem) as e, problems(name, LoadProblem):
            ask(name)
        assert fnmatchcase(one_line(e.value), name + wanted)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached(hub: Hub, offline: bool) -> None:
    """Asked for itself, for files, or to take some."""
    hub.connect(offline=offline)
    if not offline:
        hub.stop()
    wanted = "user/tiny: the hub cannot be reached"
    local = " and it is not in the local cache; connect once, or pass a local folder."
    for ask in (HfApi().model_info, snapshot_download):
        with pytest.raises(LoadProblem) as e, problems("user/tiny", LoadProblem):
            ask("user/tiny")
        assert str(e.value) == wanted + local
    with pytest.raises(HubError) as h, problems("user/tiny", HubError, "uploaded"):
        HfApi(token="hf_none").create_repo("user/tiny")
    assert str(h.value) == f"{wanted}."
    assert hub.asked == hub.sent == []


def test_other_problems() -> None:
    """Ours are left alone, Ctrl-C is no problem, and others are told in one line."""
    for error in (PredictorError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as e, problems("user/a", LoadProblem):
            raise error
        assert e.value is error
    blob = RuntimeError("Error while uploading")
    blob.__cause__ = OSError("quota exceeded")
    told = {"disk full": OSError("disk\nfull"), "KeyError": KeyError()}
    for words, other in {**told, "Error while uploading*quota exceeded": blob}.items():
        with pytest.raises(LoadProblem) as p, problems("user/a", LoadProblem):
            raise other
        assert fnmatchcase(one_line(p.value), f"user/a cannot be loaded: {words}")


def test_commands_tell_problems_in_one_line(hub: Hub) -> None:
    model = ["--model", str(hub.repos["user/tiny"])]
    for args, name in (
        ([*GENERATE, "--model", "user/unknown"], "user/unknown"),
        (["predictors", "--model", "user/unknown"], "user/unknown"),
        ([*GENERATE, *model, "--predictor", "user/unknown"], "predictor user/unknown"),
        (["convert", "user/unknown", *model], "checkpoint user/unknown"),
    ):
        assert run(*args).refusal() == name + NOT_FOUND
    line = run(*GENERATE, "--model", "user/empty").refusal()
    assert line.startswith("user/empty cannot be loaded: ") and "config.json" in line
    line = run(*GENERATE, *model, "--predictor", "user/empty").refusal()
    assert line.startswith("no predictor file in ")


def test_a_model_with_its_predictor(hub: Hub) -> None:
    """mlx-lm downloads the JSON with a model, and no weights but the model's."""
    command = [*GENERATE, "--model", "user/both"]
    got = run(*command).said()
    assert downloaded(hub, "/model.safetensors") and downloaded(hub, "/" + WEIGHTS)
    assert not downloaded(hub, "README.md") and got["settings"]["model"] == "user/both"
    assert hub.revision("user/both") in got["settings"]["predictor"]
    del hub.asked[:]
    found = [run(*command).said()]
    assert hub.asked and not downloaded(hub, ".safetensors")
    found.append(run(*GENERATE, "--model", str(hub.repos["user/both"])).said())
    hub.stop()
    found.append(run(*command).said())
    hub.connect(offline=True)
    found.append(run(*command).said())
    assert {f["text"] for f in found} == {got["text"]}
    assert found[-1]["settings"]["predictor"] == got["settings"]["predictor"]
    assert run(*command, "--predictor", "none").said()["settings"]["predictor"] is None


def test_checkpoints(hub: Hub) -> None:
    """They are converted, and of two kinds one is fetched."""
    listed = run("convert", "user/checkpoint", "--list")
    assert listed.code == 0 and "layers.3.predictor.w2" in listed.stdout
    wanted = mx.load(str(hub.repos["user/both"] / WEIGHTS))
    for kind, name in (("safetensors", "user/checkpoint"), ("pt", "user/torch")):
        assert not downloaded(hub, ".pt")
        model, out = str(hub.repos["user/tiny"]), hub.home / kind
        done = run("convert", name, "--model", model, "--out", str(out))
        assert done.code == 0 and downloaded(hub, f"/trained.{kind}"), done.stderr
        made = load_predictor(out)
        assert made.details["source"]["name"] == name
        assert held(made).keys() == wanted.keys()
        assert all(mx.array_equal(w, wanted[k]) for k, w in held(made).items())
