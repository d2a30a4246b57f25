"""What commands say about themselves, generate and demo, and real processes."""

import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import mlx_lm
import models
import pytest
from commands import bad, good, one_line, run
from mlx_lm import cache_prompt
from mlx_lm.models import mamba
from mlx_lm.utils import load

import mlx_fastforward
from mlx_fastforward import demo as data
from mlx_fastforward import load_predictor, stream_generate
from mlx_fastforward.attachment import seated
from mlx_fastforward.build import engine_for
from mlx_fastforward.session import render

FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306."
MABEL = "What is the secret code of Mabel?"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6


@pytest.fixture
def tiny(tiny_folder: Path) -> Path:
    """A model folder that loads in no time; its answers are gibberish."""
    return tiny_folder


def as_json(*args: Any) -> dict[str, Any]:
    out = good("generate", "--json", *args)
    assert out.count("\n") == 1 and out.endswith("\n")
    return json.loads(out)


def rendered(text: str, **more: str) -> list[int]:
    messages = [{"role": r, "content": c} for r, c in [*more.items(), ("user", text)]]
    return render(models.demo_tokenizer(), messages)


def test_help_lists_the_commands_and_shows_examples_and_flags() -> None:
    whole = good("--help")
    assert run().output.strip() == whole.strip()
    names = "chat generate serve demo doctor bench eval inspect tune train convert"
    for name in [*names.split(), "predictors", "models", "upload"]:
        assert re.search(rf"^\W*{name} ", whole, re.MULTILINE), name
    for command in ("chat", "generate"):
        out = good(command, "--help")
        assert len(re.findall(rf"mlx_fastforward {command}\b", out)) >= 3
        for flag in ("--model", "--sparsity", "--block-size", "--predictor", "--file"):
            assert flag in out
    # paragraphs as wide as the terminal, not as the source
    assert "cache. Without --predictor, chat takes the" in good("predictors", "--help")


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = sys.modules["mlx_fastforward.cli.generate"]
    monkeypatch.setattr(module, "report", full)
    line = bad(1, "generate", "Hello", "--model", tiny, "-m", "1", "--json")
    assert line == "No space left on device."


def test_generate_with_the_demo_model() -> None:
    """What is printed is mlx-lm's at sparsity 0, and what the library says of a sparse one."""
    model, tokenizer = load(str(data.MODEL))
    prompt = f"{FACTS} {STORY}\n\n{MABEL}"
    wanted = mlx_lm.generate(model, tokenizer, rendered(prompt), max_tokens=8)
    assert wanted.strip() == "7306"
    base = [prompt, "-m", "8"]
    named = [*base, "--model", "demo"]
    assert good("generate", *named, "--sparsity", "0") == wanted + "\n"
    flags = ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"]
    assert good("generate", *base, "--no-tune", *flags).strip() == "7306"
    got = as_json(*base, "--block-size", "16", "--sparsity", "0.4")
    assert got["prompt_tokens"] == len(rendered(prompt))
    assert (got["text"].strip(), got["cached_tokens"]) == ("7306", 0)
    assert 0 < got["ttft_s"] < 60
    assert got["prefill_tps"] >= got["prompt_tokens"] / got["ttft_s"] - 1
    assert got["decode_tps"] > 0 and got["peak_memory_gb"] > 0
    assert got["settings"] == {
        "model": "demo",
        "sparsity": 0.4,
        "prune_tokens": 0.0,
        "block_size": 16,
        "selector": "trained",
        "compensator": "low-rank",
        "schedule": "measured",
        "predictor": str(data.MODEL),
        "strategy": "chunk",
        "shortest": 48,
        "attention_block": 0,
        "unpack": 0,
        "half": False,
    }
    config = mlx_fastforward.PrefillConfig(sparsity=0.4, block_size=16)
    engine = engine_for(model, config, load_predictor(data.MODEL))
    with seated(model, engine):
        *_, last = stream_generate(model, tokenizer, rendered(prompt), 8)
    assert got["ffn_sparsity"] == round(last.ffn_sparsity, 4) > 0.1


def test_the_prompt_comes_in_many_ways(tmp_path: Path, tiny: Path) -> None:
    prompt = f"{FACTS}\n\n{MABEL}"
    document, whole = tmp_path / "document.txt", tmp_path / "whole.txt"
    (question := tmp_path / "question.txt").write_text(MABEL)
    document.write_text(FACTS + "\n")
    whole.write_text(prompt)
    base = ["generate", "--model", tiny, "-m", "8"]
    outs = [
        good(*base, prompt),
        good(*base, "--prompt", prompt),
        good(*base, "-", stdin=prompt + "\n"),
        good(*base, stdin=prompt + "\n"),
        good(*base, MABEL, "--file", document),
        good(*base, "--file", whole),
        good(*base, MABEL, "--file", "-", stdin=FACTS + "\n"),
        good(*base, "--file", document, "--file", question),
    ]
    assert outs == [outs[0]] * 8 and outs[0] != good(*base, MABEL)

    def tokens(*flags: Any) -> int:
        return as_json(MABEL, "--model", tiny, "-m", 1, *flags)["prompt_tokens"]

    assert tokens() == tokens("--chat-template-config", "{}") == len(rendered(MABEL))
    system = rendered(MABEL, system=FACTS)
    assert tokens("--system-prompt", FACTS) == len(system)
    raw = len(models.demo_tokenizer().encode(MABEL))
    assert tokens("--ignore-chat-template") == raw
    net = models.tiny("llama", vocab=4096)
    models.save_folder(net, tmp_path / "base", chat_template=False)
    assert tokens("--model", tmp_path / "base") == raw


def test_flags_reach_the_engine_and_the_loop(tiny: Path, tmp_path: Path) -> None:
    """Each flag changes what is skipped as it should; a draft model changes no greedy text."""
    base = [STORY, "--model", tiny, "--block-size", "8", "-m", "8"]
    plain = as_json(*base)
    share = plain["ffn_sparsity"]
    assert share > as_json(*base, "--sparsity", "0.25")["ffn_sparsity"]
    first = [*base, "--selector", "first-block"]
    whole = as_json(*first)["ffn_sparsity"]
    chunks = as_json(*first, "--prefill-step-size", "40")["ffn_sparsity"]
    assert share < whole != chunks == pytest.approx(whole, abs=0.06)
    drafted = as_json(*base, "--draft-model", tiny, "--num-draft-tokens", "4")
    assert drafted["text"] == plain["text"]
    assert drafted["ffn_sparsity"] == pytest.approx(share, abs=0.02)
    net, _ = load(str(tiny))
    side = models.save_random_predictor(net, tmp_path / "side")
    trained = as_json(*base, "--predictor", side)["settings"]
    assert (trained["selector"], trained["predictor"]) == ("trained", str(side))
    usual = as_json("Hello", "--model", tiny, "-m", 1, "--no-tune")["settings"]
    assert (usual["block_size"], usual["shortest"]) == (128, 512)


def test_a_prompt_that_mlx_lm_cached(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read again, and the answer is that to the whole prompt; others are refused."""
    file = tmp_path / "cache.safetensors"
    argv = ["mlx_lm.cache_prompt", "--prompt", FACTS, "--model", data.MODEL]
    argv += ["--prompt-cache-file", file]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    cache_prompt.main()
    question, flags = f"\n\n{MABEL}", ["--prompt-cache-file", file, "-m", "8"]
    got = as_json(question, *flags)
    assert got["text"].strip() == "7306"
    assert got["cached_tokens"] + got["prompt_tokens"] == len(
        rendered(FACTS + question)
    )
    assert got["prompt_tokens"] < 25 and got["settings"]["model"] == str(data.MODEL)
    line = bad(1, "generate", question, *flags, "--model", tiny)
    assert line.startswith(f"{file} is for another model, {data.MODEL}: leave")
    assert "does not go" in bad(2, "generate", "a", *flags, "--draft-model", tiny)
    for made, said in ((b"", "is no prompt cache ("), (None, "does not exist; exp")):
        file.write_bytes(made) if made is not None else file.unlink()
        assert bad(1, "generate", question, *flags).startswith(f"{file} {said}")


def test_how_an_answer_begins_and_ends(tiny: Path) -> None:
    base = [MABEL, "--model", tiny, "-m", "6"]
    plain = as_json(*base)
    assert (plain["finish_reason"], plain["generation_tokens"]) == ("length", 6)
    tokenizer = models.demo_tokenizer()
    begun = as_json(*base, "--prefill-response", "It is")
    opened = [*rendered(MABEL), *tokenizer.encode("It is", add_special_tokens=False)]
    assert begun["prompt_tokens"] == len(opened) != plain["prompt_tokens"]
    net, _ = load(str(tiny))
    ids = rendered(MABEL)
    first = next(stream_generate(net, tokenizer, ids, 1)).token
    for name in (str(first), tokenizer.convert_ids_to_tokens(first)):
        ended = as_json(*base, "--extra-eos-token", "1", "--extra-eos-token", name)
        assert (ended["finish_reason"], ended["generation_tokens"]) == ("stop", 1)
    for name in ("<|nope|>", "4096"):
        line = bad(2, "generate", *base, "--extra-eos-token", name)
        assert line == f"--extra-eos-token: the tokenizer has no token {name!r}."


def test_the_figures_after_the_answer(tiny: Path) -> None:
    """On standard error, in a terminal or where they are asked for."""
    base = ["generate", MABEL, "--model", tiny, "-m", "6"]
    assert good(*base) == good(*base, "--verbose", "False")
    done = run(*base, "--verbose", "True")
    assert done.stdout == good(*base)
    n, figures = len(rendered(MABEL)), r"TTFT \d.* · 6 tokens at .* · peak \d.* GB\n"
    assert re.fullmatch(rf"{n} prompt tokens · {figures}", done.stderr), done.stderr
    assert bad(2, *base, "--verbose", "maybe").startswith("--verbose must be True or")


def test_sampling(tiny: Path) -> None:
    base = ["generate", "Hello", "--model", tiny, "-m", "8"]
    hot = [*base, "--temp", "3", "--seed"]
    outs = [good(*hot, seed) for seed in ("1", "1", "2")]
    assert outs[0] == outs[1] != outs[2]
    kept = ["--min-p", "1", "--min-tokens-to-keep", "4000"]
    greedy = good(*base)
    assert good(*hot, "1", *kept) != greedy != outs[0]
    for cold in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert good(*hot, "1", *cold) == greedy


def test_generate_stopped_by_ctrl_c(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130, what was said stays, and no traceback."""

    def stopped(*args: Any, **kwargs: Any) -> Any:
        yield types.SimpleNamespace(text="so far")
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_fastforward.generation.stream_generate", stopped)
    done = run("generate", "Hello", "--model", tiny)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "so far", "\n")


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = tmp_path / "story.txt"
    document.write_text(f"{FACTS} {STORY}")
    monkeypatch.setattr(data, "DOCUMENT", document)
    monkeypatch.setattr(data, "questions", lambda: [(MABEL, "7306")])
    out = good("demo", "--block-size", "16")
    assert out.count("7306") == 3  # wanted, sparse and dense
    assert re.search(r"[1-4]\d% of their FFN FLOPs skipped", " ".join(out.split()))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sparsity", "1"], "sparsity must be at least 0 and below 1, got 1.0"),
        (["--block-size", "4"], "--block-size must be 8 to 1,920 tokens, got 4; try"),
        (["--block-size", "2000"], "--block-size must be 8 to 1,920 tokens, got 20"),
        (
            ["--selector", "oracle"],
            "--selector must be one of auto, trained, probe, fi",
        ),
        (["--selector", "trained"], "selector trained needs a predictor"),
        (["--max-tokens", "0"], "--max-tokens must be above 0"),
        (["--prefill-step-size", "64"], "--prefill-step-size (64) must hold the dense"),
        (["--chat-template-config", "{"], "--chat-template-config must be a JSON "),
        (["--chat-template-config", "[1]"], "--chat-template-config must be a JSON"),
        (["--model", ""], "--model must be a folder or repository name, got nothing."),
    ],
)
@pytest.mark.parametrize("command", [["generate", "Hello"], ["chat"]])
def test_impossible_settings(command: Any, flags: list[str], message: str) -> None:
    line = bad(2, *command, "--predictor", "none", *flags, stdin="Hello\n")
    assert line.startswith(message)


def test_the_demo_names_only_flags_that_it_has() -> None:
    assert bad(2, "demo", "--sparsity", "0").startswith("--sparsity 0 drops nothing")
    for size in (0, 2000):
        line = bad(2, "demo", "--block-size", size)
        assert line == f"--block-size must be 8 to 1,920 tokens, got {size}; try 128."


def test_prompts_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    assert "no prompt" in bad(2, "generate")
    assert "no prompt" in bad(2, "generate", "-", stdin=" \n")
    assert "no prompt" in bad(2, "generate", "   ")
    assert "give the prompt once" in bad(2, "generate", "a", "--prompt", "b")
    twice = bad(2, "generate", "-", "--file", "-", stdin="a")
    assert twice.startswith("standard input can be read once")
    draft = ["--draft-model", tiny, "-m", "-1"]
    assert "--max-tokens -1 does not go" in bad(2, "generate", "Hello", *draft)
    for command in (["generate", "-"], ["chat", "--model", tiny]):
        line = bad(1, *command, stdin=b"\xff\xfe\x00 binary\n")
        assert line == "standard input is not UTF-8 text."
    (tmp_path / "photo.jpg").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text(" \n\n")
    for name, message in {
        "missing.txt": "does not exist; expected a text file",
        "photo.jpg": "is not UTF-8 text",
        "empty.txt": "is empty",
        ".": "is a folder; expected a text file",
    }.items():
        path = tmp_path / name
        for command in (["generate"], ["chat"]):
            assert bad(1, *command, "--file", path).startswith(f"{path} {message}")
    for flag, value in (("--kv-bits", "7"), ("--kv-group-size", "48")):
        line = bad(2, "generate", "a", flag, value)
        assert line.startswith(f"{flag} must be one of ") and f"got {value}." in line
    for args in (["--sparsity", "much"], ["--seed", "-1"], ["--no-such-flag"]):
        done = run("generate", "Hello", *args)
        assert done.exit_code == 2 and args[0] in done.stderr and not done.stdout


def test_models_that_cannot_be_used(tiny: Path, tmp_path: Path) -> None:
    def refused(*flags: Any) -> str:
        return bad(1, "generate", "Hello", *flags)

    neither = "is neither a local folder nor a repository"
    for absent in ("not a model!", tmp_path / "absent"):
        assert refused("--model", absent).startswith(f"{absent} {neither}")
    draft = ["--draft-model", "not a model!"]
    assert refused("--model", tiny, *draft).startswith(f"not a model! {neither}")
    lora, nothing = tmp_path / "lora", "expected the folder that mlx_lm.lora wrote"
    for made, line in (
        (lora.parent, f"does not exist; {nothing}"),
        (lora, f"holds no LoRA weights; {nothing}"),
        (lora / "fastforward.json", "holds a predictor, no LoRA weights; use --pred"),
    ):
        made.write_text("{}") if made.suffix else made.mkdir(exist_ok=True)
        got = refused("--model", tiny, "--adapter-path", lora)
        assert got.startswith(f"--adapter-path: {lora} {line}")
    said = f"no predictor file in {tmp_path}: expected the files"
    assert refused("--model", tiny, "--predictor", tmp_path).startswith(said)
    file, folder = tiny / "config.json", tmp_path / "broken"
    assert refused("--model", file).startswith(f"{file} is a file; expected a model")
    folder.mkdir()
    assert refused("--model", folder).startswith(f"{folder} holds no config.json")
    (folder / "config.json").write_text("{")
    assert refused("--model", folder).startswith(f"{folder} cannot be loaded: ")
    args = mamba.ModelArgs("mamba", 4096, 8, 16, 4, 1, 4, False, False, 1)
    other = models.save_folder(mamba.Model(args), tmp_path / "mamba")
    said = "model type 'mamba' is not supported: no FFN was found in its layers"
    assert said in refused("--model", other)
    # what only shows while running
    flags = ["--kv-bits", "8", "--kv-group-size", "64", "--quantized-kv-start", "0"]
    assert "quantize" in refused("--model", tiny, *flags)


def test_version() -> None:
    assert good("--version") == mlx_fastforward.__version__ + "\n"


def test_a_real_process_with_pipes(tiny: Path) -> None:
    """As from a script in somebody's terminal."""
    command = ["chat", "--model", tiny, "-m", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fastforward", *map(str, command)],
        input="Hello\n/nonsense\nHello\nq\nnever read\n",
        text=True,
        capture_output=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        timeout=300,
    )
    assert done.returncode == 1  # for the unknown command
    assert one_line(done.stderr).startswith("unknown command /nonsense")
    assert done.stdout == good(*command, stdin="Hello\nHello\n")
