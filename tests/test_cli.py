"""The commands: what they print where, and that every mistake is one line on stderr."""

import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Optional

import mlx_lm
import models
import pytest
from mlx_lm.utils import load
from typer.testing import CliRunner, Result

import mlx_fastforward
from mlx_fastforward import attach, stream_generate
from mlx_fastforward.cli import app
from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.session import render

FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306."
MABEL = "What is the secret code of Mabel?"
FELIX = "What is the secret code of Felix?"
STORY = "Keawe was poor, brave, and active; he could read and write. " * 6
KEYS = [
    "text",
    "prompt_tokens",
    "cached_tokens",
    "ttft_s",
    "prefill_tps",
    "decode_tps",
    "ffn_sparsity",
    "peak_memory_gb",
    "settings",
]


def run(*args: str, stdin: Optional[str] = None) -> Result:
    """One command in this process; its input and output are no terminals."""
    return CliRunner().invoke(app, list(args), input=stdin)


def good(*args: str, stdin: Optional[str] = None) -> str:
    """Standard output of a command that must succeed and stay silent on stderr."""
    done = run(*args, stdin=stdin)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert "\x1b" not in done.stdout
    return done.stdout


def bad(code: int, *args: str, stdin: Optional[str] = None) -> str:
    """The one line on stderr of a command that must fail without a traceback."""
    done = run(*args, stdin=stdin)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert isinstance(done.exception, SystemExit), done.exception
    return one_line(done.stderr)


def one_line(stderr: str) -> str:
    assert stderr.startswith("mlx_fastforward: ") and stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr[len("mlx_fastforward: ") : -1]


def python(*args: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess:
    """A real process with pipes, as from a script in somebody's terminal."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_fastforward", *args],
        input=stdin,
        capture_output=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **env},
        timeout=60,
    )


def as_json(*args: str, stdin: Optional[str] = None) -> dict[str, Any]:
    out = good("generate", "--json", *args, stdin=stdin)
    assert out.count("\n") == 1 and out.endswith("\n")
    return json.loads(out)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load(str(DEMO))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that loads in no time; its answers are gibberish."""
    model = models.tiny("llama", vocab=4096, tie_word_embeddings=False)
    return models.save_folder(model, tmp_path_factory.mktemp("models") / "tiny")


def length(tokenizer: Any, text: str) -> int:
    return len(render(tokenizer, [{"role": "user", "content": text}]))


# What every command tells about itself


def test_version() -> None:
    assert good("--version") == mlx_fastforward.__version__ + "\n"


def test_help_lists_the_commands() -> None:
    out = good("--help")
    for name in ("chat", "generate", "demo"):
        assert re.search(rf"^\W*{name} ", out, re.MULTILINE), name


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_help_shows_examples_and_flags(command: str) -> None:
    out = good(command, "--help")
    assert "Examples" in out
    assert len(re.findall(rf"mlx_fastforward {command}\b", out)) >= 3
    for flag in ("--model", "--sparsity", "--block-size", "--max-tokens", "--file"):
        assert flag in out


def test_no_command_shows_the_help() -> None:
    done = run()
    assert "generate" in done.output and "chat" in done.output


# generate


def test_generate_is_mlx_lm_at_sparsity_0(demo: Any) -> None:
    model, tokenizer = demo
    prompt = f"{FACTS}\n\n{MABEL}"
    ids = render(tokenizer, [{"role": "user", "content": prompt}])
    wanted = mlx_lm.generate(model, tokenizer, ids, max_tokens=8)
    assert wanted.strip() == "7306"
    out = good("generate", prompt, "--max-tokens", "8", "--sparsity", "0")
    assert out == wanted + "\n"


def test_generate_takes_the_prompt_in_five_ways(tmp_path: Path) -> None:
    prompt = f"{FACTS}\n\n{MABEL}"
    document = tmp_path / "document.txt"
    document.write_text(FACTS + "\n")
    whole = tmp_path / "whole.txt"
    whole.write_text(prompt)
    outs = [
        good("generate", prompt, "-m", "8"),
        good("generate", "--prompt", prompt, "-m", "8"),
        good("generate", "-", "-m", "8", stdin=prompt + "\n"),
        good("generate", MABEL, "--file", str(document), "-m", "8"),
        good("generate", "--file", str(whole), "-m", "8"),
    ]
    assert outs[0].strip() == "7306"
    assert outs == [outs[0]] * 5


def test_generate_json(demo: Any) -> None:
    model, tokenizer = demo
    prompt = f"{FACTS} {STORY}\n\n{MABEL}"
    flags = ["--block-size", "16", "--sparsity", "0.4", "-m", "8"]
    got = as_json(prompt, *flags)
    assert list(got) == KEYS
    assert got["text"] + "\n" == good("generate", prompt, *flags)
    assert got["prompt_tokens"] == length(tokenizer, prompt)
    assert got["cached_tokens"] == 0
    assert 0 < got["ttft_s"] < 60
    assert got["prefill_tps"] >= got["prompt_tokens"] / got["ttft_s"] - 1
    assert got["decode_tps"] > 0 and got["peak_memory_gb"] > 0
    assert got["settings"] == {
        "sparsity": 0.4,
        "predictor": str(DEMO),
        "block_size": 16,
        "selector": "auto",
        "compensator": "auto",
        "schedule": "auto",
        "dense_head": True,
        "dense_tail": True,
        "sparse_decode": False,
        "model": "demo",
    }
    config = mlx_fastforward.PrefillConfig(sparsity=0.4, block_size=16)
    attach(model, config, predictor=mlx_fastforward.load_predictor(DEMO))
    ids = render(tokenizer, [{"role": "user", "content": prompt}])
    last = list(stream_generate(model, tokenizer, ids, 8))[-1]
    mlx_fastforward.detach(model)
    assert got["ffn_sparsity"] == round(last.ffn_sparsity, 4) > 0.1


def test_generate_default_blocks_are_sparse_from_512_tokens_on(tiny: Path) -> None:
    tokenizer = models.demo_tokenizer()
    ids = tokenizer.encode(STORY * 9, add_special_tokens=False)
    for n, sparse in ((511, False), (512, True)):
        prompt = tokenizer.decode(ids[:n])
        flags = ["--model", str(tiny), "--ignore-chat-template", "-m", "1"]
        got = as_json(prompt, *flags)
        assert got["prompt_tokens"] == n
        assert (got["ffn_sparsity"] > 0) == sparse


def test_generate_flags_reach_the_engine(tiny: Path) -> None:
    """Each flag changes what is skipped, or what is said, as it should."""
    base = ["--model", str(tiny), "--block-size", "8", "-m", "4"]
    sparsity: dict[str, float] = {}
    for flags in (
        "",
        "--no-dense-head",
        "--no-dense-tail",
        "--sparsity 0.25",
        "--selector first-block",
        "--selector oracle",
    ):
        got = as_json(STORY, *base, *flags.split())
        sparsity[flags] = got["ffn_sparsity"]
        assert got["settings"]["model"] == str(tiny)
    assert sparsity["--no-dense-head"] > sparsity[""] > sparsity["--sparsity 0.25"]
    assert sparsity["--no-dense-tail"] > sparsity[""]
    assert sparsity["--selector first-block"] > sparsity[""]
    assert sparsity["--selector oracle"] < 0
    chosen = ["--selector", "first-block"]
    decode = as_json(STORY, *base, *chosen, "--sparse-decode")
    assert decode["settings"]["sparse_decode"] is True
    assert decode["text"] != as_json(STORY, *base, *chosen)["text"]


def test_generate_system_prompt_and_raw_prompt(demo: Any) -> None:
    _, tokenizer = demo
    count = lambda *flags: as_json(MABEL, "-m", "1", *flags)["prompt_tokens"]  # noqa
    assert count() == length(tokenizer, MABEL)
    messages = [
        {"role": "system", "content": FACTS},
        {"role": "user", "content": MABEL},
    ]
    assert count("--system-prompt", FACTS) == len(render(tokenizer, messages))
    assert count("--ignore-chat-template") == len(tokenizer.encode(MABEL))


def test_generate_without_a_chat_template(tmp_path: Path, demo: Any) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "base", chat_template=False)
    got = as_json(MABEL, "--model", str(folder), "-m", "1")
    assert got["prompt_tokens"] == len(demo[1].encode(MABEL))


def test_generate_seed(tiny: Path) -> None:
    base = ["generate", "Hello", "--model", str(tiny), "-m", "8", "--temp", "3"]
    outs = [good(*base, "--seed", s) for s in ("1", "1", "2")]
    assert outs[0] == outs[1] != outs[2]


def test_generate_with_a_draft_model(tiny: Path) -> None:
    """Greedy text does not depend on who drafts it."""
    base = [STORY, "--model", str(tiny), "--block-size", "8", "-m", "8"]
    alone = as_json(*base)
    drafted = as_json(*base, "--draft-model", str(tiny), "--num-draft-tokens", "4")
    assert drafted["text"] == alone["text"]
    assert drafted["ffn_sparsity"] == pytest.approx(alone["ffn_sparsity"], abs=0.02)


def test_generate_with_a_quantised_kv_cache() -> None:
    flags = ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"]
    out = good("generate", f"{FACTS}\n\n{MABEL}", "-m", "8", *flags)
    assert out.strip() == "7306"


def test_generate_prefill_step_size(tiny: Path) -> None:
    base = [STORY, "--model", str(tiny), "--block-size", "8", "-m", "4"]
    got = as_json(*base, "--selector", "first-block", "--prefill-step-size", "40")
    whole = as_json(*base, "--selector", "first-block")
    assert got["ffn_sparsity"] == pytest.approx(whole["ffn_sparsity"], abs=0.06)
    assert got["prompt_tokens"] == whole["prompt_tokens"]


def test_generate_with_an_adapter_named_and_beside_the_model(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "tiny")
    side = models.save_random_predictor(model, tmp_path / "side")
    base = [STORY, "--model", str(folder), "--block-size", "8", "-m", "4"]
    probed = as_json(*base)
    named = as_json(*base, "--predictor", str(side))
    trained = as_json(*base, "--predictor", str(side), "--selector", "trained")
    models.save_random_predictor(model, folder)
    beside = as_json(*base)
    assert named["ffn_sparsity"] != probed["ffn_sparsity"]
    for got in (trained, beside):
        assert got["ffn_sparsity"] == named["ffn_sparsity"]
        assert got["text"] == named["text"]


def test_generate_stopped_by_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, what was said stays, and no traceback."""

    def stopped(*args: Any, **kwargs: Any) -> Any:
        yield types.SimpleNamespace(text="so far")
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_fastforward.generation.stream_generate", stopped)
    done = run("generate", "Hello")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "so far", "\n")


# generate: mistakes

USAGE = [
    (["--sparsity", "1"], "sparsity must be at least 0 and below 1, got 1.0"),
    (["--sparsity", "-0.1"], "sparsity must be at least 0 and below 1, got -0.1"),
    (["--sparsity", "nan"], "sparsity must be at least 0 and below 1, got nan"),
    (["--block-size", "4"], "block_size must be at least 8 tokens, got 4"),
    (["--block-size", "12"], "probe_every must be at least 2 and divide block_size"),
    (["--selector", "magic"], "selector must be one of auto, trained, probe"),
    (["--selector", "trained"], "selector trained needs a predictor"),
    (["--compensator", "mlp"], "compensator mlp needs a predictor"),
    (["--compensator", "low-rank"], "compensator low-rank needs a predictor"),
    (["--compensator", "lowrank"], "compensator must be one of auto, none, mlp, low"),
    (["--schedule", "layerwise"], "schedule layerwise needs importances"),
    (["--sparse-decode"], "sparse_decode needs the selector trained"),
    (["--max-tokens", "0"], "--max-tokens must be above 0"),
    (
        ["--prefill-step-size", "64"],
        r"--prefill-step-size \(64\) must hold the dense head and a block",
    ),
]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("flags, message", USAGE, ids=lambda x: "=".join(x)[:30])
def test_impossible_settings(command: str, flags: list[str], message: str) -> None:
    prompt = ["Hello"] if command == "generate" else []
    flags = [*flags, "--predictor", "none"]
    assert re.match(message, bad(2, command, *prompt, *flags, stdin="Hello\n"))


def test_generate_needs_a_prompt() -> None:
    assert "no prompt" in bad(2, "generate")
    assert "no prompt" in bad(2, "generate", "-", stdin="")
    assert "no prompt" in bad(2, "generate", "-", stdin=" \n")


def test_generate_wants_the_prompt_once() -> None:
    assert "give the prompt once" in bad(2, "generate", "a", "--prompt", "b")


def problem_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    binary, empty = tmp_path / "photo.jpg", tmp_path / "empty.txt"
    binary.write_bytes(bytes(range(256)))
    empty.write_text(" \n\n")
    missing = tmp_path / "missing.txt"
    return {
        "missing": (missing, "does not exist; expected a text file"),
        "binary": (binary, "is not UTF-8 text"),
        "empty": (empty, "is empty"),
        "folder": (tmp_path, "is a folder; expected a text file"),
    }


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("kind", ["missing", "binary", "empty", "folder"])
def test_unusable_documents(command: str, kind: str, tmp_path: Path) -> None:
    path, message = problem_files(tmp_path)[kind]
    line = bad(1, command, "--file", str(path), stdin="Hello\n")
    assert line.startswith(f"{path} {message}")


def broken_models(tiny: Path, at: Path) -> dict[str, tuple[str, str]]:
    """Folders and names that are no models, and a part of what should be said."""
    for name in ("no-config", "bad-json", "no-weights", "cut", "gpt2"):
        (at / name).mkdir()
        if name != "no-config":
            for file in tiny.iterdir():
                (at / name / file.name).write_bytes(file.read_bytes())
    (at / "bad-json" / "config.json").write_text("{")
    (at / "no-weights" / "model.safetensors").unlink()
    weights = (tiny / "model.safetensors").read_bytes()
    (at / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (at / "gpt2" / "model.safetensors").unlink()
    config = {
        "model_type": "gpt2",
        "n_ctx": 8,
        "n_embd": 8,
        "n_head": 1,
        "n_layer": 1,
        "n_positions": 8,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 4096,
    }
    (at / "gpt2" / "config.json").write_text(json.dumps(config))
    from mlx_lm.models import gpt2

    other = gpt2.Model(gpt2.ModelArgs(**config))
    other.save_weights(str(at / "gpt2" / "model.safetensors"))
    return {
        "no-config": (str(at / "no-config"), "holds no config.json"),
        "bad-json": (str(at / "bad-json"), "cannot be loaded: "),
        "no-weights": (str(at / "no-weights"), "cannot be loaded: "),
        "cut": (str(at / "cut"), "cannot be loaded: "),
        "gpt2": (str(at / "gpt2"), "model type 'gpt2' is not supported; supported"),
        "file": (str(tiny / "config.json"), "is a file; expected a model folder"),
        "no-name": ("not a model!", "is neither a local folder nor a repository"),
        "absent": (str(at / "absent"), "is neither a local folder nor a repository"),
    }


BROKEN = ["no-config", "bad-json", "no-weights", "cut", "gpt2", "file", "no-name"]


@pytest.mark.parametrize("kind", [*BROKEN, "absent"])
def test_unusable_models(kind: str, tiny: Path, tmp_path: Path) -> None:
    name, message = broken_models(tiny, tmp_path)[kind]
    line = bad(1, "generate", "Hello", "--model", name)
    assert message in line
    assert line.startswith(name) or kind == "gpt2"


def test_a_missing_model_in_chat_and_as_a_draft(tiny: Path) -> None:
    line = bad(1, "chat", "--model", "not a model!", stdin="Hello\n")
    assert line.startswith("not a model! is neither")
    flags = ["--model", str(tiny), "--draft-model", "not a model!"]
    assert bad(1, "generate", "Hello", *flags).startswith("not a model! is neither")


def test_unusable_adapters(tiny: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        flags = ["--model", str(tiny), "--predictor", str(path)]
        return bad(1, "generate", "Hello", *flags)

    missing = tmp_path / "missing"
    assert refused(missing).startswith(f"no predictor in {missing}: expected the files")
    foreign = models.save_random_predictor(models.tiny("llama", seed=3), tmp_path / "f")
    assert "the weights of this model do not" in refused(foreign)
    cut = models.save_random_predictor(models.tiny("llama"), tmp_path / "cut")
    file = cut / "fastforward.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert f"{file} cannot be read" in refused(cut)


def test_a_missing_lora_adapter(tiny: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny), "--adapter-path", str(tmp_path / "lora")]
    assert "does not exist" in bad(1, "generate", "Hello", *flags)


def test_refusals_of_mlx_are_one_line(tiny: Path) -> None:
    """For settings that only show to be impossible while running."""
    flags = ["--kv-bits", "8", "--kv-group-size", "7", "--quantized-kv-start", "0"]
    line = bad(1, "generate", "Hello", "--model", str(tiny), *flags)
    assert "group size 7" in line


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "Hello", "--sparsity", "much"],
        ["generate", "Hello", "--top-p", "2"],
        ["generate", "Hello", "--no-such-flag"],
        ["no-such-command"],
    ],
)
def test_what_typer_refuses(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2 and done.stdout == ""
    named = next(a for a in reversed(args) if a.startswith(("--", "no-")))
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_negative_seed_is_refused() -> None:
    done = run("generate", "Hello", "-m", "1", "--seed", "-1")
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 2


# chat


def chat(lines: str, *flags: str, code: int = 0) -> Result:
    """A chat over pipes; 1 if it could not do something, and no escape codes."""
    done = run("chat", "--max-tokens", "8", *flags, stdin=lines)
    assert done.exit_code == code, done.output
    assert "\x1b" not in done.output and "›" not in done.output
    return done


def test_chat_prints_answers_and_nothing_else(demo: Any) -> None:
    model, tokenizer = demo
    first = f"{FACTS} {MABEL}"
    done = chat(f"{first}\n\n{FELIX}\n")
    assert done.stderr == ""
    answers = done.stdout.splitlines()
    assert [a.strip() for a in answers] == ["7306", "4821"]
    messages = [{"role": "user", "content": first}]
    ids = render(tokenizer, messages)
    assert answers[0] == mlx_lm.generate(model, tokenizer, ids, max_tokens=8)


@pytest.mark.parametrize("leave", ["q", "/quit", "/exit", " q "])
def test_chat_leaves(leave: str, tiny: Path) -> None:
    done = chat(f"{leave}\nHello\n", "--model", str(tiny))
    assert (done.stdout, done.stderr) == ("", "")


def test_chat_with_no_input_at_all(tiny: Path) -> None:
    done = chat("", "--model", str(tiny))
    assert (done.stdout, done.stderr) == ("", "")


def test_chat_answers_a_last_line_without_a_newline(tiny: Path) -> None:
    done = chat("Hello", "--model", str(tiny))
    assert done.stdout.endswith("\n") and done.stdout.strip()


@pytest.mark.parametrize("name", ["/help", "h"])
def test_chat_help(name: str, tiny: Path) -> None:
    done = chat(f"{name}\n", "--model", str(tiny))
    for command in ("/file PATH", "/compare", "/dense", "/sparse", "/reset", "/quit"):
        assert command in done.stdout
    assert done.stderr == ""


def test_chat_file(tmp_path: Path) -> None:
    """The document goes before the next message, quotes or not, and stays known."""
    document = tmp_path / "a document.txt"
    document.write_text(FACTS)
    for name in (str(document), f'"{document}"', f"'{document}'"):
        done = chat(f"/file {name}\n{MABEL}\n{FELIX}\n")
        assert [a.strip() for a in done.stdout.splitlines()] == ["7306", "4821"]
        assert done.stderr == ""
    done = chat(f"{MABEL}\n", "--file", str(document))
    assert done.stdout.strip() == "7306"


@pytest.mark.parametrize("kind", ["missing", "binary", "empty", "folder"])
def test_chat_goes_on_after_an_unusable_file(
    kind: str, tmp_path: Path, tiny: Path
) -> None:
    path, message = problem_files(tmp_path)[kind]
    done = chat(f"/file {path}\nHello\n", "--model", str(tiny), code=1)
    assert one_line(done.stderr).startswith(f"{path} {message}")
    assert done.stdout == chat("Hello\n", "--model", str(tiny)).stdout != ""


def test_chat_goes_on_after_a_file_name_that_cannot_be(tiny: Path) -> None:
    done = run("chat", "-m", "8", "--model", str(tiny), stdin="/file a\0b\nHello\n")
    assert done.exit_code == 1, repr(done.exception)
    assert one_line(done.stderr)
    assert done.stdout != ""


PROBLEMS = [
    ("/file", "usage: /file PATH"),
    ("/frobnicate", "unknown command /frobnicate; /help lists them."),
    ("/Compare", "unknown command /Compare; /help lists them."),
    ("/compare", "nothing to compare yet: ask something first."),
]


@pytest.mark.parametrize("command, message", PROBLEMS)
def test_chat_commands_that_cannot_work(command: str, message: str, tiny: Path) -> None:
    done = chat(f"{command}\n", "--model", str(tiny), code=1)
    assert (done.stdout, one_line(done.stderr)) == ("", message)


def test_chat_messages_that_begin_with_a_slash(tiny: Path) -> None:
    """Paths are no commands."""
    done = chat("/etc/hosts holds what?\n", "--model", str(tiny))
    assert done.stdout.strip() and done.stderr == ""


def test_chat_reset_forgets_the_conversation(tmp_path: Path) -> None:
    document = tmp_path / "d.txt"
    document.write_text(FACTS)
    fresh = chat(f"{FELIX}\n").stdout
    for reset in ("/reset", "r"):
        done = chat(f"/file {document}\n{MABEL}\n{reset}\n{FELIX}\n")
        assert done.stdout.splitlines()[0].strip() == "7306"
        assert done.stdout.splitlines(keepends=True)[1] == fresh
        done = chat(f"/file {document}\n{reset}\n{FELIX}\n")
        assert done.stdout == fresh


def test_chat_dense_and_sparse(tiny: Path) -> None:
    """/dense answers as with --sparsity 0, and /sparse switches back."""
    base = ["--model", str(tiny), "--block-size", "8", "--selector", "oracle"]
    sparse = chat(f"{STORY}\n", *base).stdout
    dense = chat(f"{STORY}\n", *base, "--sparsity", "0").stdout
    assert sparse != dense
    assert chat(f"/dense\n{STORY}\n", *base).stdout == dense
    assert chat(f"/dense\n/sparse\n{STORY}\n", *base).stdout == sparse
    done = chat("/sparse\n/dense\n/compare\n", *base, "--sparsity", "0", code=1)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "mlx_fastforward: this chat was started with --sparsity 0; start it with more.",
        "mlx_fastforward: nothing to compare yet: ask something first.",
    ]


def test_chat_compare(tiny: Path) -> None:
    """Both answers, both TTFTs; then the conversation goes on as before."""
    base = ["--model", str(tiny), "--block-size", "8", "--selector", "oracle"]
    sparse = chat(f"{STORY}\n", *base).stdout
    dense = chat(f"{STORY}\n", *base, "--sparsity", "0").stdout
    done = chat(f"{STORY}\n/compare\nHello\n", *base)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{sparse}sparse\n{sparse}dense\n{dense}")
    table = done.stdout[len(f"{sparse}sparse\n{sparse}dense\n{dense}") :]
    assert re.search(r"sparse +│ +\d+ +│ +\d+\.\d\d s", table)
    assert re.search(r"dense \(stock mlx-lm\) +│ +\d+ +│ +\d+\.\d\d s", table)
    assert re.search(r"^TTFT \d+\.\d\dx$", table, re.MULTILINE)
    last = chat(f"{STORY}\nHello\n", *base).stdout[len(sparse) :]
    assert done.stdout.endswith(last) and last.strip()


def test_chat_compare_needs_sparsity(tiny: Path) -> None:
    flags = ["--model", str(tiny), "--sparsity", "0"]
    done = chat("Hello\n/compare\n", *flags, code=1)
    line = "this chat was started with --sparsity 0; start it with more."
    assert one_line(done.stderr) == line


def test_chat_warns_of_more_than_the_models_context(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096, max_position_embeddings=64)
    folder = models.save_folder(model, tmp_path / "small")
    done = chat(f"{STORY}\n", "--model", str(folder))
    n = length(models.demo_tokenizer(), STORY.strip())
    assert n > 64 and done.stdout.strip()
    assert one_line(done.stderr).startswith(
        f"{n:,} tokens, but the model was made for 64"
    )


def test_chat_system_prompt(tiny: Path) -> None:
    base = ["--model", str(tiny)]
    plain = chat("Hello\n", *base).stdout
    assert chat("Hello\n", *base, "--system-prompt", FACTS).stdout != plain


def test_chat_without_a_template_says_so(tmp_path: Path) -> None:
    model = models.tiny("llama", vocab=4096)
    folder = models.save_folder(model, tmp_path / "base", chat_template=False)
    done = chat("Hello\n", "--model", str(folder), code=1)
    assert done.stdout == ""
    assert "has no chat template" in one_line(done.stderr)


def test_chat_ctrl_c_ends_a_script(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """Nobody at the keyboard could ask again."""
    from mlx_fastforward import session

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(session, "stream_generate", stopped)
    assert chat(f"{STORY}\nHello\n", "--model", str(tiny), code=130).stdout == ""


def test_chat_ctrl_c_stops_the_answer_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    """And what was not said is not part of the conversation."""
    from mlx_fastforward import session

    module = importlib.import_module("mlx_fastforward.cli.chat")
    real, calls = session.stream_generate, 0

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        yield from real(*args, **kwargs)

    lines = iter([STORY, "Hello", None])
    reader = types.SimpleNamespace(read=lambda: next(lines))
    monkeypatch.setattr(module, "Lines", lambda interactive: reader)
    monkeypatch.setattr(session, "stream_generate", stopped)
    model, tokenizer = load(str(tiny))
    attach(model)
    loop = module.Chat(session.Session(model, tokenizer), None, max_tokens=8)
    loop.interactive = True
    loop.run()
    assert calls == 2
    assert "(stopped)" in capsys.readouterr().out
    roles = [m["role"] for m in loop.session.messages]
    assert roles == ["user", "assistant"]
    assert loop.session.messages[0]["content"] == "Hello"


def test_chat_paths_as_terminals_paste_them(tmp_path: Path, tiny: Path) -> None:
    document = tmp_path / "my story.txt"
    document.write_text(STORY)
    base = ["--model", str(tiny)]
    wanted = chat("Hello\n", "--file", str(document), *base).stdout
    assert wanted != chat("Hello\n", *base).stdout
    escaped = str(document).replace(" ", "\\ ")
    for typed in (str(document), f"'{document}'", escaped):
        assert chat(f"/file {typed}\nHello\n", *base).stdout == wanted


def test_chat_template_config_reaches_the_template(tiny: Path) -> None:
    base = ["Hello", "-m", "1", "--model", str(tiny)]
    assert good("generate", *base, "--chat-template-config", "{}")
    for wrong in ("{", "[1]"):
        line = bad(2, "generate", *base, "--chat-template-config", wrong)
        assert "must be a JSON object" in line


# Real processes


def test_process_version_is_quick_to_ask() -> None:
    done = python("--version")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == mlx_fastforward.__version__ + "\n"


def test_process_generate_reads_a_pipe(tiny: Path) -> None:
    """The JSON object is all of standard output, whatever the libraries print."""
    base = ["generate", "-", "--model", str(tiny), "--block-size", "8", "-m", "4"]
    done = python(*base, "--json", stdin=STORY.encode())
    assert (done.returncode, done.stderr) == (0, b"")
    got = json.loads(done.stdout)
    assert list(got) == KEYS and got["ffn_sparsity"] > 0.1
    assert got["prompt_tokens"] == length(models.demo_tokenizer(), STORY.strip())


def test_process_chat_over_pipes() -> None:
    lines = f"{FACTS} {MABEL}\n/nonsense\n{FELIX}\nq\nnever read\n"
    done = python("chat", "-m", "8", stdin=lines.encode())
    assert done.returncode == 1  # for the unknown command
    assert [a.strip() for a in done.stdout.decode().splitlines()] == ["7306", "4821"]
    assert one_line(done.stderr.decode()).startswith("unknown command /nonsense")
    assert b"\x1b" not in done.stdout + done.stderr


def test_process_errors_go_to_stderr() -> None:
    done = python("generate", "Hello", "--sparsity", "2")
    assert (done.returncode, done.stdout) == (2, b"")
    assert one_line(done.stderr.decode()).startswith("sparsity must be at least 0")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("command", [["generate", "-"], ["chat"]])
def test_process_input_that_is_not_text(
    command: list[str], errors: str, tiny: Path
) -> None:
    """Python decodes strictly in most locales; in C and POSIX it lets bytes through."""
    done = python(
        *command,
        "--model",
        str(tiny),
        stdin=b"\xff\xfe\x00 binary\n",
        PYTHONIOENCODING=f"utf-8:{errors}",
    )
    assert done.stdout == b""
    assert "UTF-8" in one_line(done.stderr.decode())
    if command[0] == "generate":
        assert done.returncode == 1
