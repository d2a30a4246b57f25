"""A Hugging Face hub on the loopback interface, and commands that ask it.

It speaks as much of the API as a snapshot download and an upload of huggingface_hub need.
"""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants
from predictor_files import own_cache
from typer.testing import CliRunner

from mlx_fastforward.cli import app

TOKEN = "hf_loopback"
PROMPT = "Keawe was poor, brave, and active; he could read and write. " * 6
GENERATE = ["generate", PROMPT, "--json", "--block-size", "8", "--max-tokens", "4"]
Answer = tuple[int, dict[str, str]]  # a status and headers


class Hub(ThreadingHTTPServer):
    """Repositories are folders: given ones, and those made here.

    ``refused`` are answered so, ``forbidden`` may be read but not written; others are not found.
    """

    daemon_threads = True
    refused: dict[str, Answer] = {}
    forbidden = ""

    def __init__(self, repos: dict[str, Path], home: Path, patch: pytest.MonkeyPatch):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.home, self.patch = dict(repos), home, patch
        self.asked: list[str] = []  # paths that were read
        self.sent: list[str] = []  # paths that were written to
        self.created: list[dict] = []
        self.commits: list[list[str]] = []  # names of the files of each
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def connect(self, offline: bool = False, token: str = "") -> None:
        """Let this process ask this hub, with a home of its own."""
        own_cache(self.home / "hf" / "hub", self.patch)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        values |= {"HF_HUB_OFFLINE": offline, "HF_TOKEN_PATH": str(self.home / "token")}
        for name, value in {**values, "HF_HUB_DISABLE_XET": True}.items():
            self.patch.setattr(constants, name, value)
        variables = {"HF_TOKEN": token, "MLX_FASTFORWARD_HOME": str(self.home / "own")}
        for name, value in {**variables, "NO_PROXY": "127.0.0.1"}.items():
            self.patch.setenv(name, value)
        bars = sys.modules["huggingface_hub.utils.tqdm"].progress_bar_states
        self.patch.setitem(bars, "_global", False)
        huggingface_hub.close_session()  # it knows other proxies

    def revision(self, repo: str) -> str:
        """A commit hash that changes with the files."""
        files = sorted(self.repos[repo].iterdir())
        content = b"".join(f.name.encode() + f.read_bytes() for f in files)
        return hashlib.sha1(content).hexdigest()

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

    def parts(self) -> tuple[str, str, str]:
        """The path, the repository in it, and what is asked of that."""
        path = self.path.partition("?")[0].strip("/")
        owner, name, *rest = [*path.removeprefix("api/models/").split("/", 2), ""]
        return path, f"{owner}/{name}", rest[0]

    def do_GET(self) -> None:
        path, repo, rest = self.parts()
        self.server.asked.append(path)
        if repo not in self.server.repos:
            unknown = 404, {"X-Error-Code": "RepoNotFound"}
            self.answer(*self.server.refused.get(repo, unknown))
        elif not path.startswith("api/models/"):
            self.file(repo, self.server.repos[repo] / rest.split("/", 2)[2])
        elif rest.startswith("tree/"):
            files = sorted(self.server.repos[repo].iterdir())
            listed = [{"path": f.name, "size": f.stat().st_size} for f in files]
            more = {"type": "file", "oid": "0"}
            self.say([{**f, **more} for f in listed])
        else:
            self.say({"id": repo, "sha": self.server.revision(repo)})

    do_HEAD = do_GET

    def file(self, repo: str, file: Path) -> None:
        if not file.is_file():
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        content, commit = file.read_bytes(), self.server.revision(repo)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, {"ETag": etag, "X-Repo-Commit": commit}, content)

    def do_POST(self) -> None:
        path, repo, rest = self.parts()
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "api/validate-yaml":  # asks, and changes nothing
            self.say({"warnings": [], "errors": []})
            return
        self.server.sent.append(path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"X-Error-Message": "Invalid username or password."})
        elif path == "api/repos/create":
            self.create(json.loads(body))
        elif repo == self.server.forbidden:
            self.answer(403, {"X-Error-Message": "You don't have the rights"})
        elif rest.startswith("preupload/"):
            paths = [f["path"] for f in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.say({"files": [{"path": p, **mode} for p in paths]})
        else:
            self.commit(repo, [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict) -> None:
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        there = repo in self.server.repos
        if not there:
            self.server.created.append(asked)
            self.server.repos[repo] = self.server.home / asked["name"]
            self.server.repos[repo].mkdir()
        self.say({"url": f"{self.server.url}/{repo}"}, 409 if there else 200)

    def commit(self, repo: str, lines: list[dict]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        for file in files:
            content = base64.b64decode(file["content"])
            (self.server.repos[repo] / file["path"]).write_bytes(content)
        self.server.commits.append([f["path"] for f in files])
        url = f"{self.server.url}/{repo}/commit/0"
        self.say({"commitUrl": url, "commitOid": "0"})

    def say(self, value: dict | list, status: int = 200) -> None:
        self.answer(status, {}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Done(NamedTuple):
    """What a command left."""

    code: int
    stdout: str
    stderr: str

    def said(self) -> dict[str, Any]:
        """The JSON of a command that succeeded."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    def refusal(self, code: int = 1) -> str:
        """The one line on stderr."""
        assert (self.code, self.stdout) == (code, ""), self
        (line,) = self.stderr.splitlines()
        assert line.startswith("mlx_fastforward: "), self
        return line.removeprefix("mlx_fastforward: ")


def run(*args: str) -> Done:
    """One command in this process."""
    done = CliRunner().invoke(app, list(args))
    assert isinstance(done.exception, (SystemExit, type(None))), done.exception
    return Done(done.exit_code, done.stdout, done.stderr)
