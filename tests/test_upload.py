"""upload: what arrives on the hub, that it can be used from there, and what is refused."""

import json
from pathlib import Path
from typing import Any, Iterator, Optional

import mlx.core as mx
import models
import pytest
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, Done, Hub, process, refusal, several
from typer.testing import CliRunner

from mlx_fastforward import save_predictor
from mlx_fastforward.cli import app

PROMPT = "Keawe was poor, brave, and active; he could read and write. " * 6
GENERATE = ["generate", PROMPT, "--json", "--block-size", "8", "--max-tokens", "4"]
JSON, WEIGHTS, CARD = "fastforward.json", "fastforward.safetensors", "README.md"
OWN_CARD = "---\nlicense: mit\n---\n\nWritten by hand.\n"
BASE = "mlx-community/Tiny-4bit"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its predictor, and predictors that differ from that one in one thing."""
    home = tmp_path_factory.mktemp("folders")
    model = models.tiny("llama", vocab=4096)
    folders = {"model": models.save_folder(model, home / "model")}
    for name in ("plain", "newer", "named", "carded", "damaged", "miscarded", "binary"):
        rank = 8 if name == "newer" else 4
        folders[name] = models.save_random_predictor(model, home / name, rank)
    rename(folders["named"], BASE)
    (folders["carded"] / CARD).write_text(OWN_CARD)
    (folders["miscarded"] / CARD).write_text("---\ntags: [mlx\n---\n")
    (folders["binary"] / CARD).write_bytes(b"\xff\xfe")
    cut = folders["damaged"] / WEIGHTS
    cut.write_bytes(cut.read_bytes()[:-8])
    folders["empty"] = home / "empty"
    folders["empty"].mkdir()
    return folders


def rename(folder: Path, name: str) -> None:
    """Let a predictor say which model it is for, and how well it is made."""
    info = json.loads((folder / JSON).read_text())
    info["base_model"]["name"] = name
    info["calibration"] = {"tokens": 4096, "text": "a | b"}
    save_predictor(folder, info, dict(mx.load(str(folder / WEIGHTS))))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Nothing of ours is there yet; another's repository may be read."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    server = Hub({"user/forbidden": theirs}, uploads, forbidden="user/forbidden")
    yield server
    server.stop()


def command(folder: Path, repo: str, *flags: str) -> list[str]:
    return ["upload", "--path", str(folder), "--upload-repo", repo, *flags]


def sent(hub: Hub, done: Done, repo: str) -> Path:
    """The folder that an upload filled; its address is all of standard output."""
    assert done.code == 0, done.stderr
    assert done.stdout == f"{hub.url}/{repo}\n"
    return hub.repos[repo]


def same(folder: Path, arrived: Path) -> bool:
    names = (JSON, WEIGHTS)
    return all((folder / n).read_bytes() == (arrived / n).read_bytes() for n in names)


def said(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def test_an_uploaded_adapter_works_from_the_hub_and_then_offline(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    plain, name = folders["plain"], "user/new"
    done = process(hub, tmp_path, *command(plain, name), HF_TOKEN=TOKEN)
    arrived = sent(hub, done, name)
    assert same(plain, arrived)
    assert {f.name for f in arrived.iterdir()} == {JSON, WEIGHTS, CARD}
    assert len(hub.commits) == 1
    model = str(folders["model"])
    base = [*GENERATE, "--model", model, "--predictor"]
    got = said(process(hub, tmp_path, *base, name))
    assert got["settings"]["predictor"] == name
    del hub.asked[:]
    local, offline, listed, fitting, again = several(
        hub,
        tmp_path,
        [*base, str(plain)],
        [*base, name],
        ["predictors"],
        ["predictors", "--model", model],
        command(plain, name),
        HF_HUB_OFFLINE="1",
    )
    assert said(local)["text"] == said(offline)["text"] == got["text"]
    assert got["ffn_sparsity"] == said(local)["ffn_sparsity"] > 0.1
    assert hub.asked == [] and len(hub.commits) == 1
    assert refusal(again).startswith(f"{name}: the hub cannot be reached (")
    for predictors in (listed, fitting):
        assert (predictors.code, predictors.stderr) == (0, "")
        first, what, parts = predictors.stdout.splitlines()
        assert first == name  # chat takes it only when it is named
        assert what == "    for tiny: 4 layers, hidden 32, FFN 128"
        assert parts.startswith("    pooled predictor rank 4 (float32, 0.0")


def test_uploads_with_all_kinds_of_cards_and_repositories(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """One process; what is said of each upload comes below, in turn."""
    kept = tmp_path / "uploads" / "kept"
    kept.mkdir()
    (kept / CARD).write_text(OWN_CARD)
    hub.repos["user/kept"] = kept
    uploads = [
        ("named", "user/named", ["--private"]),
        ("plain", "user/new", []),
        ("newer", "user/new", []),
        ("newer", "user/new", []),
        ("carded", "user/carded", []),
        ("plain", "user/kept", []),
        ("plain", "alone", []),
    ]
    commands = [command(folders[f], repo, *more) for f, repo, more in uploads]
    done = several(hub, tmp_path, *commands, HF_TOKEN=TOKEN)
    arrived = [
        sent(hub, d, repo if "/" in repo else f"user/{repo}")
        for d, (_, repo, _) in zip(done, uploads)
    ]
    named, new, _, _, carded, again, alone = arrived
    # --private is passed on, and nothing else is private
    created = {c["name"]: c.get("visibility") == "private" for c in hub.created}
    assert created == {"named": True, "new": False, "carded": False, "alone": False}
    assert same(folders["named"], named)
    check_card(named, "user/named", BASE)
    check_card(alone, "user/alone", None)
    # a second upload replaces files and keeps the card; a third changes nothing
    assert same(folders["newer"], new) and not same(folders["plain"], new)
    check_card(new, "user/new", None)
    assert hub.commits[1:3] == [[WEIGHTS, JSON, CARD], [WEIGHTS, JSON]]
    assert hub.commits[3] == [WEIGHTS, JSON, CARD]  # of user/carded
    # the folder's own README.md goes along, the repository's is kept
    assert same(folders["carded"], carded)
    assert (carded / CARD).read_text() == OWN_CARD
    assert same(folders["plain"], again)
    assert (again / CARD).read_text() == OWN_CARD


def check_card(folder: Path, repo: str, base: Optional[str]) -> None:
    """A generated card, as the hub reads it: a base model only where the hub has it."""
    card = ModelCard.load(folder / CARD, ignore_metadata_errors=False)
    assert card.data.base_model == base
    assert ("base_model" in card.data.to_dict()) == (base is not None)
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "text-generation"
    assert set(card.data.tags) == {"mlx", "mlx-fastforward"}
    assert card.text.lstrip().startswith(f"# {repo}\n")
    usage = f"mlx_fastforward chat --model {base or 'MODEL'} --predictor {repo} "
    assert f"\n{usage}--sparsity 0.5\n" in card.text
    rows = [r for r in card.text.splitlines() if r.startswith("| ")]
    shape = "4 layers, hidden 32, FFN 128"
    assert f"| base model | {base or 'tiny'} ({shape}) |" in rows
    assert "| predictor | rank 4 |" in rows or "| predictor | rank 8 |" in rows
    assert ("| text | a \\| b |" in rows) == (base is not None)  # of the calibration


def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    empty, damaged, plain = (folders[n] for n in ("empty", "damaged", "plain"))
    names = ["a/b/c", "user/new model", "user/..", ""]
    nothing, cut, *misnamed = several(
        hub,
        tmp_path,
        command(empty, "user/new"),
        command(damaged, "user/new"),
        *(command(plain, name) for name in names),
        HF_TOKEN=TOKEN,
    )
    assert refusal(nothing).startswith(f"no predictor in {empty}: expected the files")
    assert refusal(cut).startswith(f"{damaged / WEIGHTS} cannot be read: ")
    for name, done in zip(names, misnamed):
        line = refusal(done, code=2)
        assert line == f"{name!r} is no repository name; expected one like user/name."
    assert hub.sent == hub.asked == []


def test_what_the_hub_refuses_is_one_line_with_its_reason(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    theirs = command(folders["plain"], "user/forbidden")
    line = refusal(process(hub, tmp_path, *theirs, HF_TOKEN=TOKEN))
    assert line.startswith("user/forbidden: the hub refused (403 Forbidden: You don't")
    assert line.endswith(" Log in with: hf auth login.")
    assert not any(hub.repos["user/forbidden"].iterdir())
    mine = command(folders["plain"], "user/new")
    nobody, stranger = several(hub, tmp_path, mine, theirs)
    line = refusal(nobody)
    assert line.startswith("user/new: the hub refused (") and "401" in line
    assert line.endswith(" Log in with: hf auth login.")
    assert refusal(stranger).startswith("user/forbidden: the hub refused (")
    assert hub.commits == [] and hub.created == []


def test_what_the_hub_does_not_take_is_one_line(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    hub.full = True
    names = ("miscarded", "binary", "plain")
    uploads = (command(folders[name], f"user/{name}") for name in names)
    card, binary, blob = several(hub, tmp_path, *uploads, HF_TOKEN=TOKEN)
    assert CARD in (line := refusal(card)) and "YAML cannot be parsed" in line
    assert CARD in (line := refusal(binary)) and "utf-8" in line.lower()
    assert "storage quota exceeded" in refusal(blob, after_download=True)
    assert hub.commits == []


def test_the_home_of_nobody_is_one_line() -> None:
    done = CliRunner().invoke(app, command(Path("~no-such-user/a"), "user/new"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stderr.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    hub.stop()
    upload = command(folders["plain"], "user/new")
    line = refusal(process(hub, tmp_path, *upload, HF_TOKEN=TOKEN))
    assert line.startswith("user/new: the hub cannot be reached (")
