"""Models and adapters from a hub: a loopback server, and real processes that ask it.

The server speaks as much of the Hugging Face API as a snapshot download needs.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

import models
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPT = "Keawe was poor, brave, and active; he could read and write. " * 6


class Hub(ThreadingHTTPServer):
    """Repositories are folders; ``gated`` ones refuse, others are not found."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path], gated: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.gated = repos, gated
        self.asked: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        if self.thread.is_alive():
            self.shutdown()
            self.server_close()
            self.thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        if path.startswith("api/models/"):
            repo, rest = self.split(path.removeprefix("api/models/"))
            if self.refused(repo):
                return
            self.tree(repo) if rest.startswith("tree/") else self.info(repo)
            return
        repo, rest = self.split(path)
        if not self.refused(repo):
            self.file(repo, rest.split("/", 2)[2])

    do_HEAD = do_GET

    @staticmethod
    def split(path: str) -> tuple[str, str]:
        owner, name, *rest = path.split("/", 2)
        return f"{owner}/{name}", rest[0] if rest else ""

    def refused(self, repo: str) -> bool:
        if repo in self.server.repos:
            return False
        if repo == self.server.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return True

    def info(self, repo: str) -> None:
        self.answer(200, json.dumps({"id": repo, "sha": COMMIT}).encode())

    def tree(self, repo: str) -> None:
        listed = [
            {
                "type": "file",
                "path": file.name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in sorted(self.server.repos[repo].iterdir())
        ]
        self.answer(200, json.dumps(listed).encode())

    def file(self, repo: str, name: str) -> None:
        file = self.server.repos[repo] / name
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: Optional[dict] = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its adapter, and a repository that is neither."""
    home = tmp_path_factory.mktemp("repos")
    model = models.tiny("llama", vocab=4096)
    (home / "empty").mkdir()
    (home / "empty" / "notes.txt").write_text("Nothing here.")
    return {
        "user/tiny": models.save_folder(model, home / "tiny"),
        "user/side": models.save_random_adapter(model, home / "side"),
        "user/empty": home / "empty",
    }


@pytest.fixture
def hub(repos: dict[str, Path]) -> Iterator[Hub]:
    server = Hub(repos, gated="user/gated")
    yield server
    server.stop()


def generate(
    hub: Hub, home: Path, *flags: str, **env: str
) -> subprocess.CompletedProcess:
    """A generate command with a Hugging Face home and a hub of its own."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and "PROXY" not in k.upper()
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "mlx_fastforward", "generate", PROMPT, "--json"]
        + ["--block-size", "8", "--max-tokens", "4", *flags],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**inherited, **settings, **env},
        text=True,
        timeout=60,
    )


def said(done: subprocess.CompletedProcess) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(done: subprocess.CompletedProcess, after_download: bool = False) -> str:
    """The one line on stderr; the hub's own progress bars may come before it."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 or after_download, done.stderr
    assert lines[-1].startswith("mlx_fastforward: "), done.stderr
    return lines[-1].removeprefix("mlx_fastforward: ")


def test_a_model_is_downloaded_once_and_then_works_without_the_hub(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    flags = ["--model", "user/tiny"]
    wanted = said(generate(hub, tmp_path, "--model", str(repos["user/tiny"])))
    assert hub.asked == []  # a local folder needs no hub
    first = said(generate(hub, tmp_path, *flags))
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert any(path.endswith("/model.safetensors") for path in fetched)
    assert first["text"] == wanted["text"]
    assert first["ffn_sparsity"] == wanted["ffn_sparsity"] > 0.1
    assert first["settings"]["model"] == "user/tiny"
    del hub.asked[:]
    assert said(generate(hub, tmp_path, *flags))["text"] == wanted["text"]
    assert not any(path.endswith(".safetensors") for path in hub.asked)
    hub.stop()
    offline = generate(hub, tmp_path, *flags, HF_HUB_OFFLINE="1")
    assert said(offline)["text"] == wanted["text"]
    down = generate(hub, tmp_path, *flags)
    assert said(down)["text"] == wanted["text"]


def test_offline_and_not_cached(hub: Hub, tmp_path: Path) -> None:
    line = refusal(generate(hub, tmp_path, "--model", "user/tiny", HF_HUB_OFFLINE="1"))
    assert line.startswith("user/tiny is not in the local cache and the hub cannot be")
    assert hub.asked == []


def test_a_hub_that_is_down_and_not_cached(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    line = refusal(generate(hub, tmp_path, "--model", "user/tiny"))
    assert line.startswith("user/tiny is not in the local cache and the hub cannot be")


def test_unknown_and_gated_repositories(hub: Hub, tmp_path: Path) -> None:
    line = refusal(generate(hub, tmp_path, "--model", "user/unknown"))
    assert line.startswith(
        "user/unknown was not found: not a local folder, and no such"
    )
    line = refusal(generate(hub, tmp_path, "--model", "user/gated"))
    assert line.startswith("user/gated is gated: accept its terms")


def test_a_repository_that_holds_no_model(hub: Hub, tmp_path: Path) -> None:
    line = refusal(generate(hub, tmp_path, "--model", "user/empty"), True)
    assert line.startswith("user/empty cannot be loaded: ") and "config.json" in line


def test_an_adapter_is_downloaded_once_and_then_works_offline(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    base = ["--model", str(repos["user/tiny"]), "--selector", "trained"]
    wanted = said(generate(hub, tmp_path, *base, "--adapter", str(repos["user/side"])))
    got = said(generate(hub, tmp_path, *base, "--adapter", "user/side"))
    assert any(path.endswith("/fastforward.safetensors") for path in hub.asked)
    assert got["text"] == wanted["text"]
    assert got["ffn_sparsity"] == wanted["ffn_sparsity"] > 0.1
    del hub.asked[:]
    offline = generate(
        hub, tmp_path, *base, "--adapter", "user/side", HF_HUB_OFFLINE="1"
    )
    assert said(offline)["text"] == wanted["text"]
    assert hub.asked == []


def test_adapters_that_are_not_there(
    hub: Hub, tmp_path: Path, repos: dict[str, Path]
) -> None:
    base = ["--model", str(repos["user/tiny"]), "--adapter"]
    line = refusal(generate(hub, tmp_path, *base, "user/unknown"))
    assert line.startswith("adapter 'user/unknown' is not a local folder and could not")
    line = refusal(generate(hub, tmp_path, *base, "user/empty"), True)
    assert line.endswith("the files fastforward.json and fastforward.safetensors.")
    line = refusal(generate(hub, tmp_path, *base, "user/x", HF_HUB_OFFLINE="1"))
    assert line.startswith("adapter 'user/x' is not a local folder and could not")
