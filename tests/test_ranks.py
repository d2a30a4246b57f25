"""Several real processes, each with a part of the model: against one process with all of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import models
import numpy as np
import pytest
import rank_cases
from commands import bad, good, one_line
from rank_cases import CASES
from reference import top_k

from mlx_fastforward import ConfigError, loading, ranks
from mlx_fastforward.attachment import engine_of

HERE = Path(__file__).parent
RANKS = 2


def launched(
    folder: Path, *command: Any, ranks: int = RANKS, **pipes: Any
) -> list[subprocess.Popen]:
    """The same command in several processes that know each other, as mlx.launch starts them."""
    ports = []
    for _ in range(ranks):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            cwd=HERE,
            text=True,
            stdin=subprocess.DEVNULL,
            **pipes,
        )
        for rank in range(ranks)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[Optional[int], str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        done = [p.communicate(timeout=100) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, done)]


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictor files for the models of the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    for compensator in ("low-rank", "mlp"):
        path, model = folder / compensator, rank_cases.made("llama", 0)
        models.save_random_predictor(
            model, path, predictor="token-wise", compensator=compensator
        )
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, np.ndarray]]:
    """What each of two processes saw."""
    done = ended(launched(folder, "rank_cases.py", folder, **PIPES))
    assert [code for code, *_ in done] == [0] * RANKS, done
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(RANKS)]


def per_part(model: Any, keep: int) -> None:
    """The attached model takes the best of each part, as many as one process would."""
    engine = engine_of(model)
    assert engine is not None
    selector = engine.selector

    def choose(layer: int, inputs: Any) -> mx.array:
        scores = np.array(selector.score(layer, engine.ffns[layer], inputs))
        size = scores.shape[1] // RANKS
        parts = [slice(r * size, (r + 1) * size) for r in range(RANKS)]
        kept = [
            [p.start + i for p in parts for i in top_k(row[p], keep)] for row in scores
        ]
        return mx.array(np.sort(kept, axis=1).astype(np.uint32))

    engine.choose = choose  # type: ignore


@pytest.mark.parametrize("case", CASES)
def test_two_processes_answer_like_one(
    case: str, folder: Path, found: list[dict[str, np.ndarray]]
) -> None:
    """The same neurons as one process that selects per part; every neuron: the dense answer."""
    name, bits, selector, _, _, everything = CASES[case]
    model = rank_cases.made(name, bits)
    if everything or not selector:
        wanted = models.prefill(model, rank_cases.IDS)[0]
    else:
        engine = rank_cases.attached(model, case, folder)
        keep = next(k for k in engine.keep if k)
        per_part(model, keep // RANKS)
        wanted = models.prefill(model, rank_cases.IDS)[0]
        dense = models.prefill(rank_cases.made(name, bits), rank_cases.IDS)[0]
        assert models.distance(wanted, dense) > 0.01  # something was dropped
        for other in found:
            assert other[f"{case}/0"].shape[1] == keep // RANKS
    first, second = (other[case] for other in found)
    assert np.array_equal(first, second)
    tolerance = 2e-2 if "stored" in case and bits else 2e-4
    assert models.distance(first, wanted) < tolerance


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.tiny("llama", vocab=4096, tie_word_embeddings=False)
    return models.save_folder(net, tmp_path_factory.mktemp("ranks") / "tiny")


def test_generate_is_said_once(model: Path, tmp_path: Path) -> None:
    """What one process says, by rank 0; at a temperature, from its chance for all."""
    base = ["generate", "Hello " * 60, "--model", model, "--block-size", 8, "-m", 8]
    dense = good(*base, "--sparsity", 0)
    args = ["-m", "mlx_fastforward", *base, "--sparsity", 0]
    one, two = ended(launched(tmp_path, *args, **PIPES))
    assert one == (0, dense, "") and two == (0, "", "")


def test_bench_is_written_once(model: Path, tmp_path: Path) -> None:
    """By rank 0, with how many there were; the model's sizes are those of the whole."""
    saved, args = tmp_path / "saved.json", ["-m", "mlx_fastforward", "bench"]
    args += ["--model", model, "--contexts", 64, "--block-sizes", 8, "-n", 1]
    one, two = ended(launched(tmp_path, *args, "--save", saved, **PIPES))
    assert one[0] == 0 and "probe 50%, block 8" in one[1] and two == (0, "", "")
    found = json.loads(saved.read_text())
    assert found["run"]["processes"] == RANKS
    assert found["model"]["ffn_size"] == models.FFN
    assert found["rows"][0]["ffn_flops_skipped"] > 0.1


def test_what_needs_more_than_mlx_launch_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It started one process; the model cannot be cut; --fast is measured in one."""
    folder = models.save_folder(models.tiny("phi3"), tmp_path / "m")
    with pytest.raises(ConfigError, match="cannot share a phi3 model among"):
        loading._load_part(str(folder), None, False, False)
    monkeypatch.setenv("MLX_RANK", "0")
    empty = tmp_path / "hosts.json"
    empty.write_text("\n")
    monkeypatch.setenv("MLX_HOSTFILE", str(empty))
    said = bad(2, "generate", "hello", "--sparsity", 0, "--fast")
    assert said == "--fast runs in one process; start it without mlx.launch."
    with pytest.raises(ConfigError, match="-n for its own"):
        ranks.group()


def test_a_rank_that_dies_ends_the_others(model: Path, tmp_path: Path) -> None:
    args = ["generate", "Hello", "--model", model, "-m", 2000, "--temp", 1]
    one, two = launched(tmp_path, "-m", "mlx_fastforward", *args, **PIPES)
    assert one.stdout is not None
    one.stdout.read(1)  # both are at work
    two.send_signal(signal.SIGKILL)
    start = time.monotonic()
    (code, _, said), _ = ended([one, two])
    assert code == 1 and time.monotonic() - start < 30
    *_, last = said.splitlines(keepends=True)  # after mlx's own
    ended_with = "another process of mlx.launch has ended, and this one with it."
    assert one_line(last) == ended_with


def test_what_several_processes_cannot_do(model: Path, tmp_path: Path) -> None:
    def refused(*args: Any) -> list[tuple[Optional[int], str, str]]:
        return ended(launched(tmp_path, "-m", "mlx_fastforward", *args, **PIPES))

    one, two = refused("train", "--dry-run")
    said = "mlx_fastforward: train runs in one process; start it without mlx.launch.\n"
    assert one == (2, "", said) and two == (2, "", "")
