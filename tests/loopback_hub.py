"""A Hugging Face hub on the loopback interface, and real processes that ask it.

It speaks as much of the API as a snapshot download and an upload of huggingface_hub need.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional

import yaml

TOKEN = "hf_loopback"


class Hub(ThreadingHTTPServer):
    """Repositories are folders: given ones, and ``uploads/NAME`` for those made here.

    ``gated`` may not be read, ``forbidden`` not written; others are not found.
    """

    daemon_threads = True

    def __init__(
        self,
        repos: dict[str, Path],
        uploads: Path,
        gated: str = "",
        forbidden: str = "",
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.uploads = dict(repos), uploads
        self.gated, self.forbidden = gated, forbidden
        self.asked: list[str] = []  # paths that were read
        self.sent: list[str] = []  # paths that were written to
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []  # names of the files of each
        self.full = False  # refuses blobs
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def revision(self, repo: str) -> str:
        """A commit hash that changes with the files."""
        digest = hashlib.sha1()
        for file in sorted(self.repos[repo].iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

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

    @property
    def asked_path(self) -> str:
        return self.path.partition("?")[0].strip("/")

    @staticmethod
    def split(path: str) -> tuple[str, str]:
        owner, name, *rest = path.split("/", 2)
        return f"{owner}/{name}", rest[0] if rest else ""

    # Reading

    def do_GET(self) -> None:
        path = self.asked_path
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

    def refused(self, repo: str) -> bool:
        if repo in self.server.repos:
            return False
        if repo == self.server.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return True

    def info(self, repo: str) -> None:
        self.answer_json(200, {"id": repo, "sha": self.server.revision(repo)})

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
        self.answer_json(200, listed)

    def file(self, repo: str, name: str) -> None:
        file = self.server.repos[repo] / name
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        commit = self.server.revision(repo)
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    # Writing

    def do_POST(self) -> None:
        path, body = self.asked_path, self.body()
        if path == "api/validate-yaml":  # asks, and changes nothing
            self.validate(json.loads(body)["content"])
            return
        self.server.sent.append(path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid username or password.")
        elif path == "api/repos/create":
            self.create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif path == "lfs/verify":
            asked = json.loads(body)
            same = len(self.server.blobs.get(asked["oid"], b"")) == asked["size"]
            self.answer(200 if same else 404, b"")
        else:
            self.change(path, body)

    def do_PUT(self) -> None:
        """A blob, at an address that is secret enough to need no token."""
        path, body = self.asked_path, self.body()
        self.server.sent.append(path)
        oid = path.removeprefix("lfs/")
        if self.server.full or hashlib.sha256(body).hexdigest() != oid:
            self.refuse(403, "storage quota exceeded")
            return
        self.server.blobs[oid] = body
        self.answer(200, b"")

    def validate(self, card: str) -> None:
        """The hub parses the front matter of a card before it takes it."""
        try:
            yaml.safe_load(card.split("---")[1] if card.startswith("---") else "")
            self.answer_json(200, {"warnings": [], "errors": []})
        except yaml.YAMLError:
            self.answer_json(400, {"errors": [{"message": "YAML cannot be parsed"}]})

    def create(self, asked: dict) -> None:
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo}"}
        if repo == self.server.forbidden:
            self.refuse(403, "You don't have the rights to create a model here")
        elif repo in self.server.repos:
            self.answer_json(409, {"error": "You already created this repo", **url})
        else:
            self.server.created.append(asked)
            folder = self.server.uploads / asked["name"]
            folder.mkdir()
            self.server.repos[repo] = folder
            self.answer_json(200, url)

    def change(self, path: str, body: bytes) -> None:
        """preupload or commit, of a repository that is there and not another's."""
        repo, rest = self.split(path.removeprefix("api/models/"))
        if self.refused(repo):
            return
        if repo == self.server.forbidden:
            self.refuse(403, "You don't have the rights to write here")
        elif rest.startswith("preupload/"):
            self.preupload(repo, json.loads(body))
        else:
            self.commit(repo, [json.loads(line) for line in body.splitlines()])

    def preupload(self, repo: str, asked: dict) -> None:
        """How each file should come, and what the repository has of it: a hash."""
        listed = []
        for path in (f["path"] for f in asked["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            present = self.server.repos[repo] / path
            oid = None
            if present.is_file():
                content = present.read_bytes()
                blob = b"blob %d\0" % len(content) + content
                lfs = mode == "lfs"
                oid = hashlib.sha256(content) if lfs else hashlib.sha1(blob)
                oid = oid.hexdigest()
            listed.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer_json(200, {"files": listed})

    def batch(self, asked: dict) -> None:
        """Where blobs go to; those that are there need not come again."""
        listed = []
        for blob in asked["objects"]:
            if blob["oid"] not in self.server.blobs:
                put, verify = f"lfs/{blob['oid']}", "lfs/verify"
                blob["actions"] = {
                    "upload": {"href": f"{self.server.url}/{put}"},
                    "verify": {"href": f"{self.server.url}/{verify}"},
                }
            listed.append(blob)
        self.answer_json(200, {"transfer": "basic", "objects": listed})

    def commit(self, repo: str, lines: list[dict]) -> None:
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.blobs[value["oid"]]
            else:
                continue
            (self.server.repos[repo] / value["path"]).write_bytes(content)
            names.append(value["path"])
        self.server.commits.append(names)
        commit = self.server.revision(repo)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        self.answer_json(200, {"commitUrl": url, "commitOid": commit})

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    # Answers

    def refuse(self, status: int, why: str) -> None:
        self.answer(status, b"", {"X-Error-Message": why})

    def answer_json(self, status: int, value: Any) -> None:
        self.answer(status, json.dumps(value).encode())

    def answer(self, status: int, body: bytes, headers: Optional[dict] = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Done(NamedTuple):
    """What a command left."""

    code: int
    stdout: str
    stderr: str


# Starting Python and importing mlx-lm is most of a command's time. The hub's log goes to the
# standard error of the command in hand, as in a process of its own.
SEVERAL = """
import json, sys, types
from huggingface_hub.utils import logging
from typer.testing import CliRunner
from mlx_fastforward.cli import app

current = types.SimpleNamespace(
    write=lambda text: sys.stderr.write(text), flush=lambda: sys.stderr.flush()
)
logging.get_logger()
logging.logging.getLogger("huggingface_hub").handlers[0].setStream(current)
for args in json.load(sys.stdin):
    done = CliRunner().invoke(app, args)
    crash = done.exception and not isinstance(done.exception, SystemExit)
    error = f"Traceback: {done.exception!r}" if crash else ""
    print(json.dumps([done.exit_code, done.stdout, done.stderr + error]))
"""


def environment(hub: Hub, home: Path, **env: str) -> dict[str, str]:
    """A Hugging Face home, predictors and a hub of its own; a proxy would not find the loopback."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and "PROXY" not in k.upper()
    }
    return {
        **inherited,
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",  # uploads go to xet's own servers otherwise
        "MLX_FASTFORWARD_HOME": str(home / "own"),
        "NO_PROXY": "127.0.0.1",
        **env,
    }


def process(hub: Hub, home: Path, *args: str, **env: str) -> Done:
    """One command, as typed in a shell."""
    return _run(["-m", "mlx_fastforward", *args], "", environment(hub, home, **env))


def several(hub: Hub, home: Path, *commands: list[str], **env: str) -> list[Done]:
    """Commands one after the other in one process: for those that leave nothing behind in it."""
    env = environment(hub, home, **env)
    done = _run(["-c", SEVERAL], json.dumps(commands), env)
    assert done.code == 0, done.stderr
    return [Done(*json.loads(line)) for line in done.stdout.splitlines()]


def _run(args: list[str], stdin: str, env: dict[str, str]) -> Done:
    done = subprocess.run(
        [sys.executable, *args],
        input=stdin,
        capture_output=True,
        env=env,
        text=True,
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refusal(done: Done, after_download: bool = False, code: int = 1) -> str:
    """The one line on stderr; the hub's own progress bars may come before it."""
    assert (done.code, done.stdout) == (code, ""), done
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 or after_download, done.stderr
    assert lines[-1].startswith("mlx_fastforward: "), done.stderr
    return lines[-1].removeprefix("mlx_fastforward: ")
