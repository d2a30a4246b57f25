"""Several real processes, each with a part of the model: against one process with all of it.

Two processes and four are started once each, and do everything that is compared here.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import httpx
import mlx.core as mx
import models
import numpy as np
import pytest
import rank_cases
from commands import bad, good
from rank_cases import CASES, STAGES
from reference import top_k
from serving import PATIENCE

import mlx_fastforward as ff
from mlx_fastforward import ConfigError, loading, ranks
from mlx_fastforward.attachment import engine_of

HERE = Path(__file__).parent
CUT = {2: list(CASES), 4: ["probe", "trained, 8 bits"]}  # by processes: cases
DEALT = {2: list(STAGES), 4: ["qwen2", "qwen3_5"]}
LONG = "Keawe was poor, brave, and active; he could read and write. " * 50
GONE = "mlx_fastforward: another process of mlx.launch has ended, and this one with it."
PROMPT = ["Hello " * 60, "--block-size", 8, "-m", 8]
BENCH = ["--contexts", 64, "--block-sizes", 8, "-n", 1]


@dataclass
class Seen:
    """What several processes did, by rank, and what the last said when one was killed."""

    arrays: list[dict[str, np.ndarray]]
    commands: list[list[tuple[int, str, str]]]
    served: list[dict[str, Any]]
    codes: list[int]
    errors: list[str]


# mlx-lm imports transformers, and that torch, where it is: half of the time to start
MAIN = (
    "import sys; sys.modules['torch'] = None; from pathlib import Path; "
    "import rank_cases; rank_cases.main(Path(sys.argv[1]))"
)


class Launched:
    """rank_cases.main in several processes that know each other, as mlx.launch starts them."""

    def __init__(self, folder: Path, size: int, **commands: list[list[Any]]):
        self.folder, self.size = folder, size
        plan = {"cases": CUT[size], "stages": DEALT[size]}
        for when, found in commands.items():
            plan[when] = [list(map(str, args)) for args in found]  # type: ignore
        (folder / "plan.json").write_text(json.dumps(plan))
        for compensator in ("low-rank", "mlp"):
            models.save_random_predictor(
                rank_cases.made("llama", 0),
                folder / compensator,
                predictor="token-wise",
                compensator=compensator,
            )
        # held to the end, so that nobody else gets these ports; mlx may listen at them
        self.ports = [socket.socket() for _ in range(size)]
        for s in self.ports:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                s.setsockopt(socket.SOL_SOCKET, option, 1)
            s.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in self.ports]
        (folder / "hosts.json").write_text(json.dumps(hosts))
        self.processes = [self.start(rank) for rank in range(size)]

    def start(self, rank: int) -> subprocess.Popen:
        hosts = str(self.folder / "hosts.json")
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, str(self.folder)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": hosts},
            cwd=HERE,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.folder / f"{rank}.err").open("w"),
        )

    def url(self) -> str:
        """Of the server, as soon as it runs."""
        for line in self.processes[0].stdout:  # type: ignore[union-attr]
            if found := re.search(r"^url +(http\S+)$", line):
                return found[1]
        raise AssertionError([p.read_text() for p in self.folder.glob("*.err")])

    def killed(self, served: list[dict[str, Any]]) -> Seen:
        """All that was seen, after the last process was killed."""
        folder = self.folder
        self.processes[-1].send_signal(signal.SIGKILL)
        codes = [p.wait(PATIENCE) for p in self.processes]
        everyone = range(self.size)
        return Seen(
            [dict(np.load(folder / f"{r}.npz")) for r in everyone],
            [json.loads((folder / f"{r}.json").read_text()) for r in everyone],
            served,
            codes,
            [(folder / f"{r}.err").read_text() for r in everyone],
        )

    def end(self) -> None:
        for p in self.processes:
            p.kill()
            p.wait()
        for s in self.ports:
            s.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that can be shared either way."""
    sizes = dict(num_key_value_heads=4, intermediate_size=256, vocab=4096)
    net = models.tiny("qwen2", tie_word_embeddings=False, **sizes)  # type: ignore[arg-type]
    return models.save_folder(net, tmp_path_factory.mktemp("ranks") / "tiny")


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Launched]]:
    """Nothing is left behind."""
    all_of_them: list[Launched] = []

    def started(size: int, **commands: Any) -> Launched:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        all_of_them.append(Launched(folder, size, **commands))
        return all_of_them[-1]

    yield started
    for launched in all_of_them:
        launched.end()


ASKED: list[dict[str, Any]] = [
    {"sparsity": 0.0},
    {"sparsity": 0.5},
    {"sparsity": 0.5, "seed": 7},  # served alone
]


def completions(url: str) -> list[dict[str, Any]]:
    """Answers of a server: text and usage."""
    asked = {"prompt": LONG, "max_tokens": 8, "cache_prompt": False}
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        found = [
            client.post("/v1/completions", json=asked | more).json() for more in ASKED
        ]
        # refused when all have it, which they take when they are done with the others
        assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
    return [{"text": f["choices"][0]["text"], **f["usage"]} for f in found]


def serve(model: Path, *flags: Any) -> list[Any]:
    return ["serve", "--model", model, "--port", 0, "--log-level", "ERROR", *flags]


@pytest.fixture(scope="module")
def two(model: Path, start: Callable[..., Launched]) -> Seen:
    """Two: commands, a server that is told to stop, and a long answer that is cut off."""
    saved = model.parent / "saved.json"
    llama = models.save_folder(models.tiny("llama"), model.parent / "llama")
    bench = ["bench", "--model", model, *BENCH, "--save", saved]
    commands = [
        ["generate", "--model", model, *PROMPT, "--sparsity", 0],
        ["generate", "--model", model, *PROMPT, "--json", "--pipeline"],
        bench,
        [*bench[:-1], model.parent / "layers.json", "--pipeline"],
        ["train", "--dry-run"],
        ["generate", "--model", llama, "hello", "--pipeline"],
        [*serve(model), "--cache-dir", model.parent],
    ]
    long = ["generate", "Hello", "--model", model, "-m", 2000, "--temp", 1]
    both = start(2, commands=commands, last=[serve(model), long])
    served = completions(both.url())
    both.processes[0].send_signal(signal.SIGTERM)
    assert both.processes[0].stdout is not None
    both.processes[0].stdout.read(1)  # both write the long answer
    return both.killed(served)


@pytest.fixture(scope="module")
def four(model: Path, start: Callable[..., Launched]) -> Seen:
    """Four: a server by layers, idle when one of them dies."""
    every = start(4, commands=[], last=[serve(model, "--pipeline")])
    return every.killed(completions(every.url()))


@pytest.fixture(params=[2, 4])
def seen(request: pytest.FixtureRequest) -> Seen:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def per_part(model: Any, parts: int) -> int:
    """The attached model takes the best of each part, as many as one process would; returns how many."""
    engine = engine_of(model)
    assert engine is not None
    selector, keep = engine.selector, next(k for k in engine.keep if k)

    def choose(layer: int, inputs: Any) -> mx.array:
        scores = np.array(selector.score(layer, engine.ffns[layer], inputs))
        kept = [
            [
                start + i
                for start, part in split(row)
                for i in top_k(part, keep // parts)
            ]
            for row in scores
        ]
        return mx.array(np.sort(kept, axis=1).astype(np.uint32))

    def split(row: np.ndarray) -> list[tuple[int, np.ndarray]]:
        size = len(row) // parts
        return [(i * size, row[i * size : (i + 1) * size]) for i in range(parts)]

    engine.choose = choose  # type: ignore
    return keep // parts


@pytest.mark.parametrize("size, case", [(n, c) for n in CUT for c in CUT[n]])
def test_parts_answer_like_the_whole(
    size: int, case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same neurons as one process that selects per part; every neuron: the dense answer."""
    seen: Seen = request.getfixturevalue({2: "two", 4: "four"}[size])
    name, bits, selector, compensator, _, everything = CASES[case]
    model = rank_cases.made(name, bits)
    if selector and not everything:
        if selector == "trained":
            kinds = {"predictor": "token-wise", "compensator": compensator}
            plain = rank_cases.made("llama", 0)
            models.save_random_predictor(plain, tmp_path / compensator, **kinds)
        rank_cases.attached(model, case, tmp_path)
        kept = per_part(model, size)
        assert all(found[f"{case}/0"].shape[1] == kept for found in seen.arrays)
    wanted = models.prefill(model, rank_cases.IDS)[0]
    if selector and not everything:
        dense = models.prefill(rank_cases.made(name, bits), rank_cases.IDS)[0]
        assert models.distance(wanted, dense) > 0.01  # something was dropped
    first, *others = (found[case] for found in seen.arrays)
    assert len(others) == size - 1
    assert all(np.array_equal(first, other) for other in others)
    tolerance = 2e-2 if "stored" in case and bits else 2e-4
    assert models.distance(first, wanted) < tolerance


@pytest.mark.parametrize("size, name", [(n, c) for n in DEALT for c in DEALT[n]])
def test_layers_dealt_out_answer_like_the_whole(
    size: int, name: str, request: pytest.FixtureRequest
) -> None:
    """Every layer keeps the neurons that it keeps in one process; the answer is the same to the bit."""
    seen: Seen = request.getfixturevalue({2: "two", 4: "four"}[size])
    model, engine = rank_cases.staged(name)
    neurons = rank_cases.noted(engine)
    wanted = models.prefill(model, rank_cases.IDS)[0]
    theirs: dict[str, np.ndarray] = {}
    for found in seen.arrays:
        mine = {k: v for k, v in found.items() if k.startswith(f"{name}/")}
        assert not theirs.keys() & mine.keys()  # each layer ran once
        theirs |= mine
        assert np.array_equal(found[name], wanted)
    assert theirs.keys() == {f"{name}/{layer}" for layer in neurons}
    assert all(np.array_equal(theirs[f"{name}/{i}"], n) for i, n in neurons.items())


def test_commands_speak_once(two: Seen, model: Path) -> None:
    """What one process says, by rank 0; a file is written once, with how many there were."""
    dense, pipeline, bench, layers, *_ = two.commands[0]
    args = ["generate", "--model", model, *PROMPT]
    assert dense == [0, good(*args, "--sparsity", 0), ""]
    found, alone = json.loads(pipeline[1]), json.loads(good(*args, "--json"))
    for name in ("text", "ffn_sparsity", "settings", "generation_tokens"):
        assert found[name] == alone[name]
    assert alone["ffn_sparsity"] > 0.1 and pipeline[::2] == [0, ""]
    assert bench[0] == 0 and "probe 50%, block 8" in bench[1]
    saved = json.loads((model.parent / "saved.json").read_text())
    assert saved["run"]["processes"] == 2 and saved["model"]["ffn_size"] == 256
    assert saved["rows"][0]["ffn_flops_skipped"] > 0.1
    assert layers[0] == 0 and "processes 2 by layers" in layers[1]
    assert all(said[1:] == ["", ""] for said in two.commands[1])


def test_bench_by_layers_counts_the_whole_model(
    two: Seen, model: Path, tmp_path: Path
) -> None:
    """Two processes, each with some of the layers: FLOPs and sizes are those of one process."""
    good("bench", "--model", model, *BENCH, "--save", tmp_path / "alone.json")
    files = (model.parent / "layers.json", tmp_path / "alone.json")
    found, alone = (json.loads(f.read_text()) for f in files)
    assert found["run"]["pipeline"] and not alone["run"]["pipeline"]
    assert found["model"] == alone["model"]
    for name in ("ideal_speedup", "ffn_flops_skipped", "block_size", "selector"):
        assert found["rows"][0][name] == alone["rows"][0][name]
    assert alone["rows"][0]["ideal_speedup"] > 1.01


def test_what_several_processes_cannot_do(two: Seen) -> None:
    """One line, once."""
    wanted = [
        "train runs in one process; start it without mlx.launch.",
        "mlx-lm cannot share a llama model among processes by its layers; leave --pipeline out.",
        "--cache-dir runs in one process; start it without mlx.launch.",
    ]
    assert two.commands[0][4:] == [
        [2, "", f"mlx_fastforward: {line}\n"] for line in wanted
    ]
    assert [code for code, *_ in two.commands[1][4:]] == [2, 2, 2]


def test_what_needs_more_than_mlx_launch_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It started one process; the model cannot be cut; --fast is measured in one."""
    folder = models.save_folder(models.tiny("phi3"), tmp_path / "m")
    with pytest.raises(ConfigError, match="cannot share a phi3 model among"):
        loading.check_part(str(folder), False)
    with pytest.raises(ConfigError, match="by its layers; start it without mlx.launch"):
        loading.check_stages(models.tiny("phi3"))
    monkeypatch.setenv("MLX_RANK", "0")
    empty = tmp_path / "hosts.json"
    empty.write_text("\n")
    monkeypatch.setenv("MLX_HOSTFILE", str(empty))
    said = bad(2, "generate", "hello", "--sparsity", 0, "--fast")
    assert said == "--fast runs in one process; start it without mlx.launch."
    with pytest.raises(ConfigError, match="-n for its own"):
        ranks.group()


def test_a_server_answers_like_one_process(seen: Seen, model: Path) -> None:
    """Densely and sparsely; by layers with the very neurons of one process."""
    net, tokenizer = ff.load(str(model), device=ff.DeviceSettings())
    parts = 2 if len(seen.codes) == 2 else 1
    for asked, served in zip(ASKED, seen.served, strict=True):
        sparsity = asked["sparsity"]
        ff.attach(net, ff.PrefillConfig(sparsity), device=ff.DeviceSettings())
        if sparsity and parts > 1:
            per_part(net, parts)
        found = list(ff.stream_generate(net, tokenizer, LONG, 8))
        assert served["text"] == "".join(r.text for r in found)
        assert (served["ffn_sparsity"] > 0.1) == bool(sparsity)
        if parts == 1:  # what choosing costs is more of a part
            skipped = round(found[-1].ffn_sparsity, 4)
            assert served["ffn_sparsity"] == skipped


def test_one_that_dies_ends_the_others(seen: Seen) -> None:
    """With a line that says so, after mlx's own; a server that was told to stop said nothing."""
    assert seen.codes[-1] == -signal.SIGKILL
    assert set(seen.codes[:-1]) == {1}
    for rank, said in enumerate(seen.errors[:-1]):
        own = [line for line in said.splitlines() if "mlx_fastforward" in line]
        assert own == [GONE + (f" (rank {rank})" if rank else "")], said
        assert "Traceback" not in said
