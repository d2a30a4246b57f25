"""A server under load: its answers beside serial ones, TTFT, memory.

python -m mlx_fastforward.bench.studies.serve_load --requests 100 --clients 8

Every request is asked twice: in a row of one server, and by all clients at once of another. Each
prompt is its own, after one of two system prompts or none; greedy answers must be the same. Short prompts are more
frequent than long ones. One that differs is asked once more, alone and of an empty cache: how near was another token?
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Optional

import mlx.core as mx
import numpy as np
import typer
from mlx_lm.utils import load, save

from ... import demo
from ..environment import describe
from ..eval.prose import filler

SYSTEMS = (None, "Answer in one word.", "You find facts in old stories. " * 20)
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "The content of a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
NAMES = ("Felix", "Mabel", "Keawe", "Kokua", "Lopaka", "Jane", "Harold", "Nora")


class Server:
    """A process that serves, until it is closed."""

    def __init__(self, model: str, *flags: str):
        command = [sys.executable, "-m", "mlx_fastforward", "serve", "--port", "0"]
        command += ["--model", model, "--log-level", "ERROR", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"url +(\S+)", line):
                self.url = found[1]
                return
        raise SystemExit("the server did not start.")

    def ask(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The answer, and ttft_s, ffn_sparsity and cached_tokens."""
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=3600) as response:
            raw = response.read().decode()
        if not body["stream"]:
            done = json.loads(raw)
            usage = done["usage"]
            usage["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
            return done["choices"][0]["message"]["content"] or "", usage
        lines = [json.loads(x[6:]) for x in raw.split("\n") if x.startswith("data: {")]
        deltas = [c["choices"][0]["delta"].get("content") or "" for c in lines]
        return "".join(deltas), lines[-1]["fastforward"]

    def gap(self, body: dict[str, Any]) -> tuple[str, float]:
        """The answer of an empty cache, and the least difference of its two best log-probabilities."""
        more = {"stream": False, "cache_prompt": False, "logprobs": True}
        raw = json.dumps({**body, **more, "top_logprobs": 2}).encode()
        url = f"{self.url}/v1/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, raw)) as response:
            (choice,) = json.load(response)["choices"]
        tops = [t["top_logprobs"] for t in choice["logprobs"]["content"]]
        gaps = [abs(a["logprob"] - b["logprob"]) for a, b in tops]
        return choice["message"]["content"] or "", min(gaps)

    def memory(self) -> float:
        """Resident, in MB."""
        out = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True
        )
        return int(out.stdout) / 1024

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def requests(n: int, characters: int, seed: int) -> list[dict[str, Any]]:
    """Mixed lengths, streaming and not, sparse and dense."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        name, code = rng.choice(NAMES), rng.randrange(1000, 9999)
        fact = f"The secret code of {name} is {code}. "
        before, after = filler(rng, int(characters * rng.random() ** 2)), filler(
            rng, 300
        )
        text = f"{i}. {before} {fact}{after}\n\nWhat is the secret code of {name}?"
        messages = [{"role": "user", "content": text}]
        if system := rng.choice(SYSTEMS):
            messages.insert(0, {"role": "system", "content": system})
        body: dict[str, Any] = {"messages": messages, "max_tokens": rng.choice((4, 12))}
        body["stream"] = rng.random() < 0.5
        if rng.random() < 0.2:
            body["tools"] = [TOOL]
        if (sparsity := rng.choice((None, None, 0, 0.3))) is not None:
            body["sparsity"] = sparsity
        made.append(body)
    return made


def float32(folder: Path) -> str:
    """The demo model where CPUs are fast."""
    model, tokenizer, config = load(str(demo.MODEL), return_config=True)  # type: ignore[misc]
    model.set_dtype(mx.float32)
    save(
        folder, str(demo.MODEL), model, tokenizer, {**config, "torch_dtype": "float32"}
    )
    for side in demo.MODEL.glob("fastforward.*"):
        (folder / side.name).write_bytes(side.read_bytes())
    return str(folder)


def report(name: str, found: list[tuple[str, dict[str, Any]]]) -> None:
    for sparse in (True, False):
        times = [u["ttft_s"] for _, u in found if (u["ffn_sparsity"] > 0) == sparse]
        if times:
            p50, p95 = np.percentile(times, [50, 95])
            kind = "sparse" if sparse else "dense or short"
            print(
                f"{name}, {kind}: {len(times)} answers, TTFT p50 {p50:.2f} s, p95 {p95:.2f} s"
            )


def differences(
    server: Server, asked: list[Any], serial: list[Any], loaded: list[Any]
) -> int:
    """How many answers differ, and each of them beside what an empty cache says."""
    found = [(x, a[0], b[0]) for x, a, b in zip(asked, serial, loaded) if a[0] != b[0]]
    for body, a, b in found:
        again, gap = server.gap(body)
        print(
            f"{a!r} alone, {b!r} in company, {again!r} of an empty cache, where the two best "
            f"log-probabilities are at least {gap:.2g} apart"
        )
    return len(found)


def main(
    requests_: Annotated[int, typer.Option("--requests")] = 100,
    clients: int = 8,
    characters: Annotated[int, typer.Option(help="Of the longest prompt.")] = 5500,
    model: Annotated[
        Optional[str], typer.Option(help="Default: the demo model in float32.")
    ] = None,
    seed: int = 0,
    minutes: Annotated[float, typer.Option(help="No new round after these.")] = 600,
) -> None:
    """Ask twice and compare, in ten rounds."""
    print(describe())
    asked, start = requests(requests_, characters, seed), time.perf_counter()
    serial: list[Any] = []
    loaded: list[Any] = []
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        model = model or float32(Path(folder) / "demo")
        alone, busy = Server(model), Server(model)
        busy.ask(asked[0])
        print(f"MB resident before: {busy.memory():.0f}")
        for i in range(0, len(asked), size := -(-len(asked) // 10)):
            part = asked[i : i + size]
            serial += [alone.ask(body) for body in part]
            with ThreadPoolExecutor(clients) as pool:
                loaded += pool.map(busy.ask, part)
            different += differences(busy, part, serial[i:], loaded[i:])
            seconds = time.perf_counter() - start
            done = f"{len(loaded)} requests, {seconds / 60:.0f} min"
            print(f"{done}: {busy.memory():.0f} MB, {different} differ", flush=True)
            if seconds > 60 * minutes:
                break
        alone.close()
        busy.close()
    report("in a row", serial)
    report(f"{clients} clients", loaded)
    cached = sum(u["cached_tokens"] > 0 for _, u in loaded)
    print(
        f"{len(loaded) - different} of {len(loaded)} answers identical to serial ones; "
        f"{cached} reused a prefix"
    )


if __name__ == "__main__":
    typer.run(main)
