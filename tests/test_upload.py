"""upload: what arrives on the hub, that it can be used from there, and what is refused."""

import shutil
from pathlib import Path
from typing import Iterator, Optional

import models
import pytest
from huggingface_hub import ModelCard
from loopback_hub import GENERATE, TOKEN, Done, Hub, run
from predictor_files import edit

from mlx_fastforward.predictors.file import JSON_NAME, TENSORS_NAME

CARD, OWN_CARD = "README.md", "---\nlicense: mit\n---\n\nWritten by hand.\n"
BASE = "mlx-community/Tiny-4bit"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A predictor, beside its model."""
    model = models.tiny("llama", vocab=4096)
    models.save_folder(model, tmp_path / "model")
    return models.save_random_predictor(model, tmp_path / "plain")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Nothing of ours is there yet; another's repository may be read."""
    (tmp_path / "theirs").mkdir()
    hub = Hub({"user/theirs": tmp_path / "theirs"}, tmp_path, monkeypatch)
    hub.forbidden = "user/theirs"
    hub.connect(token=TOKEN)
    yield hub
    hub.stop()


def upload(folder: Path, repo: str, *flags: str) -> Done:
    return run("upload", "--path", str(folder), "--upload-repo", repo, *flags)


def sent(hub: Hub, folder: Path, repo: str, *flags: str) -> Path:
    """The folder that an upload filled; its address is all of standard output."""
    done = upload(folder, repo, *flags)
    assert done.code == 0, done.stderr
    repo = repo if "/" in repo else f"user/{repo}"
    assert done.stdout == f"{hub.url}/{repo}\n"
    for name in (JSON_NAME, TENSORS_NAME):
        assert (folder / name).read_bytes() == (hub.repos[repo] / name).read_bytes()
    return hub.repos[repo]


def test_from_the_hub_and_then_offline(hub: Hub, plain: Path) -> None:
    """What was uploaded is used; the card stays there."""
    name = "user/new"
    files = {f.name for f in sent(hub, plain, name).iterdir()}
    assert files == {JSON_NAME, TENSORS_NAME, CARD} and len(hub.commits) == 1
    del hub.asked[:]
    base = [*GENERATE, "--model", str(hub.home / "model"), "--predictor"]
    got = run(*base, name).said()
    assert got["settings"]["predictor"] == name
    asked = {p.rpartition("/")[2] for p in hub.asked if "/resolve/" in p}
    assert asked == {JSON_NAME, TENSORS_NAME}
    del hub.asked[:]
    hub.connect(offline=True, token=TOKEN)
    local, offline = run(*base, str(plain)).said(), run(*base, name).said()
    assert local["text"] == offline["text"] == got["text"]
    assert got["ffn_sparsity"] == local["ffn_sparsity"] > 0.1
    assert upload(plain, name).refusal() == f"{name}: the hub cannot be reached."
    assert hub.asked == [] and len(hub.commits) == 1


def test_cards_and_repositories(hub: Hub, plain: Path) -> None:
    named = Path(shutil.copytree(plain, hub.home / "named"))
    edit(named, "base_model", name=BASE)
    edit(named, calibration={"text": "a | b"})
    check_card(sent(hub, named, "user/private", "--private"), "private", BASE)
    check_card(sent(hub, plain, "alone"), "alone", None)
    # a second upload replaces files and keeps the card that is there
    (sent(hub, plain, "user/new") / CARD).write_text(OWN_CARD)
    assert (sent(hub, named, "user/new") / CARD).read_text() == OWN_CARD
    assert hub.commits[3] == [TENSORS_NAME, JSON_NAME]
    # the folder's own README.md goes along
    (plain / CARD).write_text(OWN_CARD)
    assert (sent(hub, plain, "user/carded") / CARD).read_text() == OWN_CARD
    # --private is passed on; else an organisation's own default holds
    created = {c["name"]: c.get("visibility") for c in hub.created}
    assert created.pop("private") == "private" and set(created.values()) == {None}


def check_card(folder: Path, name: str, base: Optional[str]) -> None:
    """A generated card, as the hub reads it: a base model only where the hub has it."""
    card = ModelCard.load(folder / CARD, ignore_metadata_errors=False)
    assert card.data.base_model == base
    assert ("base_model" in card.data.to_dict()) == (base is not None)
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "text-generation"
    assert set(card.data.tags) == {"mlx", "mlx-fastforward"}
    assert card.text.lstrip().startswith(f"# user/{name}\n")
    usage = f"mlx_fastforward chat --model {base or 'MODEL'} --predictor user/{name} "
    assert f"\n{usage}--sparsity 0.5\n" in card.text
    rows = [r for r in card.text.splitlines() if r.startswith("| ")]
    shape = "4 layers, hidden 32, FFN 128"
    assert f"| base model | {base or 'tiny'} ({shape}) |" in rows
    assert (
        "| predictor | kind pooled, rank 4 |" in rows and "| importances | no |" in rows
    )
    assert ("| text | a \\| b |" in rows) == (base is not None)  # of the calibration


def test_what_cannot_be_uploaded(hub: Hub, plain: Path) -> None:
    """It is refused before anything is sent; and what the hub refuses, with its reason."""
    for name in ("a/b/c", "user/new model", "user/..", ""):
        line = upload(plain, name).refusal(2)
        assert line.startswith(repr(name)) and "no repository name" in line
    line = upload(hub.home, "user/new").refusal()
    assert line.startswith(f"no predictor file in {hub.home}: expected the files")
    line = upload(Path("~no-such-user/a"), "user/new").refusal()
    assert line.startswith("~no-such-user/a: no such user")
    (plain / CARD).write_bytes(b"\xff\xfe")
    line = upload(plain, "user/new").refusal()
    assert line == f"{plain / CARD} is not UTF-8 text."
    assert hub.sent == hub.asked == []
    (plain / CARD).unlink()
    rights = "403 Forbidden: You don't have the rights"
    for name, token, reason in (("theirs", TOKEN, rights), ("new", "", "401")):
        hub.connect(token=token)
        line = upload(plain, f"user/{name}").refusal()
        assert line.startswith(f"user/{name}: the hub refused (") and reason in line
        assert line.endswith("; log in with: hf auth login.")
    assert hub.commits == hub.created == []
