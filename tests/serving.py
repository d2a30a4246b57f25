"""A server in a process of its own, and clients of it."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import httpx

KEY = "open sesame"
# mlx-lm imports transformers, and that torch, where it is: half of the time to start
MAIN = (
    "import sys; sys.modules['torch'] = None; "
    "from mlx_fastforward.cli import main; main()"
)
PATIENCE = 300  # seconds: shared machines stall


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process will do."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Server:
    """A running server, and clients of it."""

    def __init__(self, folder: Path, *flags: str, key: str = KEY):
        command = [sys.executable, "-c", MAIN, "serve", "--no-tune"]
        flags = ("--model", str(folder), "--port", "0", "--log-level", "ERROR", *flags)
        env = {**os.environ, "MLX_FASTFORWARD_API_KEY": key}
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.banner, self.model = "", str(folder)
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.banner += line
            if found := re.search(r"^url +(http://127.0.0.1:(\d+))$", line):
                self.url, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError(self.process.stderr.read())  # type: ignore[union-attr]
        headers = {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)
        self.settings: dict[str, Any] = dict(
            api_key=key, max_retries=0, timeout=PATIENCE
        )

    # imported by those who ask: that takes longest

    @functools.cached_property
    def openai(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", **self.settings)

    @functools.cached_property
    def anthropic(self) -> Any:
        import anthropic

        return anthropic.Anthropic(base_url=self.url, **self.settings)

    def chat(self, text: str = "Who?", **more: Any) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 3,
            **more,
        }
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        return metric(self.http.get("/metrics").text, name)

    def refusal(self, content: Any, path: str = "/v1/chat/completions") -> str:
        """Status and the one line of a request that must be refused."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        response = self.http.post(path, content=raw)
        error = response.json()["error"]
        assert error["message"] and "\n" not in error["message"] and error["type"]
        return f"{response.status_code} {error['message']}"

    def stop(self) -> tuple[int, str]:
        """What it says when it is asked to stop."""
        self.process.send_signal(signal.SIGTERM)
        try:
            _, err = self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
        return self.process.returncode, err
