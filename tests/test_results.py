"""Saved results: their schema, the files in results/, and the page made of many."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Callable

import jsonschema
import pytest
from commands import bad, good, run
from models import save_folder, save_random_predictor, tiny

from mlx_fastforward.bench import machine
from mlx_fastforward.bench.speed import result, ttft

RESULTS = Path(__file__).parent.parent / "results"
SCHEMA = json.loads((RESULTS / "schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)
SHARED = sorted(p for p in RESULTS.glob("*.json") if p.name != "schema.json")


def row(context: int, speedup: float, sparsity: float = 0.5) -> ttft.Row:
    times = (2 / speedup, (1.5 / speedup, 3 / speedup), 2.0, (1.9, 2.2))
    rest = (speedup, 1.5, 0.6, 1.4, 0.4, 100.0, 1.0, 1.1, 20.0, 20.0)
    return ttft.Row(context, sparsity, 0.0, 128, "trained", "chunk", 0, *times, *rest)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one real run writes, for a model with a predictor file and a table in it."""
    folder = tmp_path_factory.mktemp("results")
    net = tiny("llama", vocab=4096, max_position_embeddings=200)
    model = save_random_predictor(net, save_folder(net, folder / "tiny"))
    info = json.loads((model / "fastforward.json").read_text())
    table = {"sparsity": 0.5, "kl": 0.002, "facts": 0.7, "facts_dense": 0.8}
    info["verified"] = {"rows": [table]}
    (model / "fastforward.json").write_text(json.dumps(info))
    args = ["--model", model, "--contexts", "64,96", "--block-sizes", 8, "-n", 1]
    done = run("bench", *args, "--save", folder / "mine.json")
    assert done.exit_code == 0, done.output
    text = (folder / "mine.json").read_text(encoding="utf-8")
    assert str(folder) not in text
    return json.loads(text)


def test_a_saved_result_is_whole_and_fits_the_schema(saved: Any) -> None:
    CHECK.validate(saved)
    about, rows = saved["model"], saved["rows"]
    assert (about["name"], about["layers"], about["ffn_size"]) == ("tiny", 4, 128)
    assert (about["quantisation"], about["dtype"]) == ("float", "float32")
    run = {"trials": 1, "delay_s": 0, "tuned": False}
    assert saved["run"] == run | {"processes": 1, "pipeline": False}
    assert [r["context"] for r in rows] == [64, 96]
    assert saved["arms"][0]["device"]["strategy"] == "chunk"
    assert saved["arms"][0]["predictor"] is True
    assert [q["kl"] for q in saved["quality"]] == [0.002]
    assert saved["machine"]["memory_gb"] > 0.1


def test_the_schema_names_every_field_of_a_row() -> None:
    known = SCHEMA["properties"]["rows"]["items"]["properties"]
    assert list(known) == [f.name for f in dataclasses.fields(ttft.Row)]


def without(*path: Any) -> Callable[[Any], None]:
    def cut(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        del found[path[-1]]

    return cut


@pytest.mark.parametrize(
    "spoil",
    [
        without("machine", "power"),
        without("rows", 0),
        without("rows", 0, "ideal_speedup"),
        lambda r: r["machine"].update(power="wind"),
        lambda r: r["machine"].update(host="anna.local"),
        lambda r: r["rows"][0].update(ttft_s=0),
        lambda r: r.update(version=2),
    ],
)
def test_the_schema_refuses(saved: Any, spoil: Callable[[Any], None]) -> None:
    found = copy.deepcopy(saved)
    found["rows"] = found["rows"][:1]
    CHECK.validate(found)
    spoil(found)
    assert not CHECK.is_valid(found)


def test_a_result_from_before_some_fields_were_there(
    saved: Any, tmp_path: Path
) -> None:
    found = copy.deepcopy(saved)
    for part in (found["run"], *found["arms"], *found["rows"]):
        part.pop("unpack", None)
        part.pop("half", None)
        part.pop("processes", None)
        part.pop("pipeline", None)
    CHECK.validate(found)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    assert [row.unpack for row in result.read(path).rows] == [0, 0]


@pytest.mark.parametrize("path", SHARED, ids=lambda p: p.name)
def test_shared_results_fit_the_schema(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    CHECK.validate(found)
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)+\.json", path.name)
    assert result.read(path).rows


def written(folder: Path, saved: Any, name: str, chip: str, *rows: ttft.Row) -> Path:
    found = copy.deepcopy(saved)
    found["machine"]["chip"] = chip
    found["rows"] = [dataclasses.asdict(r) for r in rows] or found["rows"]
    path = folder / name
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_the_report_has_every_row_and_a_picture(saved: Any, tmp_path: Path) -> None:
    """Half of the saving of the ideal: 1 - 1/1.2 of 1 - 1/1.5. Names cannot become markup."""
    rows = row(1024, 1.2), row(4096, 1.5), row(4096, 1.1, sparsity=0.3)
    files = [
        written(tmp_path, saved, "a.json", "Chip <b>A|B</b> $x$", *rows),
        written(tmp_path, saved, "b.json", "Other chip"),
    ]
    page, tables = tmp_path / "report.html", tmp_path / "report.md"
    assert good("bench", "report", *files, "--html", page, "--markdown", tables) == ""
    text, md = page.read_text(encoding="utf-8"), tables.read_text(encoding="utf-8")
    assert text.count("<svg") == 1 and "<script" not in text and "src=" not in text
    assert "<b>" not in text and "<b>" not in md
    assert "Chip &lt;b&gt;A|B&lt;/b&gt; $x$" in text and "A\\|B" in md
    for out in (text, md):
        first, second = out.index("Chip &lt;b"), out.rindex("Other chip")
        assert first < second
        assert "0.0020" in out and "0.70 of 0.80" in out
    (line,) = [x for x in md.splitlines() if x.startswith("| 1,024 ")]
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[:3] == ["1,024", "trained 50%, block 128, chunk", "1.67 s (1.25-2.50)"]
    assert cells[3:8] == ["2.00 s (1.90-2.20)", "1.20", "1.50", "50%", "60%"]
    (verified,) = [x for x in md.splitlines() if "trained 30%" in x]
    assert "0.0020" not in verified  # another sparsity
    assert good("bench", "report", *files) == md


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[]", "is not a file of bench --save"),
        ('{"environment": {}, "rows": []}', "is not a file of bench --save"),
        (json.dumps({"format": result.FORMAT, "version": 9}), "is of version 9"),
        (json.dumps({"format": result.FORMAT, "version": 1}), "is damaged: KeyError"),
    ],
)
def test_what_is_no_result(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert said in bad(1, "bench", "report", path)
    assert "does not exist" in bad(1, "bench", "report", tmp_path / "none.json")
    line = bad(1, "bench", "report", path, "--html", tmp_path / "no" / "a.html")
    assert "no such folder" in line
    assert not list(tmp_path.glob("*.html"))


def test_damaged_rows_and_two_files_of_one_name(saved: Any, tmp_path: Path) -> None:
    path = written(tmp_path, saved, "a.json", "x", row(64, 1.0))
    found = json.loads(path.read_text())
    found["rows"][0]["ttft_s"] = -1
    path.write_text(json.dumps(found))
    assert "is damaged: ValueError no rows" in bad(1, "bench", "report", path)
    same = ["--html", tmp_path / "a", "--markdown", tmp_path / "a"]
    assert "must be two files" in bad(2, "bench", "report", path, *same)


def test_macs_say_power_and_cores_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS's tools print, as their manuals show it."""
    said = {
        "pmset": "Now drawing from 'Battery Power'\n -InternalBattery-0 98%",
        "ioreg": '+-o AGX\n  {\n    "gpu-core-count" = 30\n  }',
        "sysctl": "Mac15,9",
    }
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_printed", lambda name, *rest: said[name])
    monkeypatch.setattr(machine, "_thermal_state", lambda: 1)
    found = machine.machine()
    assert (found["power"], found["gpu_cores"]) == ("battery", 30)
    assert found["model"] == "Mac15,9" and machine.thermal() == "fair"
    said["pmset"] = "Now drawing from 'AC Power'"
    assert machine.power() == "mains"
