"""mlx_fastforward generate: one prompt in, text out."""

import json
import sys
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from ..errors import LoadProblem
from . import options as o
from .errors import fail, one_line_errors
from .first_use import tune_first
from .inputs import (
    check_choice,
    check_lengths,
    decoded,
    length_warning,
    read_text,
    sampling,
    sparsity_of,
    template_config,
)
from .models import load_model
from .outputs import status_line
from .terminal import prefill_progress


def generate(
    prompt: Annotated[
        Optional[str],
        typer.Argument(help="The prompt; '-' reads it from standard input."),
    ] = None,
    prompt_option: Annotated[
        Optional[str], o.opt("The same, as in mlx_lm.", "--prompt", "-p")
    ] = None,
    file: o.File = None,
    json_output: Annotated[
        bool, o.opt("Print one JSON object with statistics.", "--json")
    ] = False,
    model: o.Model = None,
    adapter_path: o.AdapterPath = None,
    trust_remote_code: o.TrustRemoteCode = False,
    sparsity: o.AutoSparsity = "auto",
    prune_tokens: o.PruneTokens = 0.0,
    block_size: o.BlockSize = None,
    no_tune: o.NoTune = False,
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    max_tokens: o.MaxTokens = 100,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    top_k: o.TopK = 0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    seed: o.Seed = None,
    system_prompt: o.SystemPrompt = None,
    chat_template_config: o.ChatTemplateConfig = None,
    ignore_chat_template: Annotated[
        bool, o.opt("Use the raw prompt.", "--ignore-chat-template", panel=o.SAMPLING)
    ] = False,
    max_kv_size: o.MaxKvSize = None,
    prefill_step_size: o.PrefillStepSize = 2048,
    kv_bits: Annotated[
        Optional[int], o.opt("Bits for KV cache quantisation.", panel=o.SAMPLING)
    ] = None,
    kv_group_size: Annotated[
        int, o.opt("Group size for KV cache quantisation.", panel=o.SAMPLING)
    ] = 64,
    quantized_kv_start: Annotated[
        int, o.opt("Step from which the KV cache is quantised.", panel=o.SAMPLING)
    ] = 5000,
    draft_model: Annotated[
        Optional[str], o.opt("A model for speculative decoding.", panel=o.SAMPLING)
    ] = None,
    num_draft_tokens: Annotated[
        int, o.opt("Tokens drafted at a time.", panel=o.SAMPLING, min=1)
    ] = 3,
) -> None:
    """Generate one answer.

    Examples:

      mlx_fastforward generate "Who was Alice?"

      mlx_fastforward generate --file report.txt "Summarise this." --sparsity 0.4

      git diff | mlx_fastforward generate - --model mlx-community/Llama-3.2-3B-Instruct-4bit --json
    """
    with one_line_errors():
        text = _prompt(prompt, prompt_option, file)
        check_lengths(max_tokens, prefill_step_size, block_size)
        check_choice("--selector", selector, o.SELECTORS)
        share = sparsity_of(sparsity)
        template = template_config(chat_template_config)
        if draft_model is not None and max_tokens < 0:
            fail("--max-tokens -1 does not go with --draft-model; give a number.", 2)
        net, tokenizer = load_model(
            model,
            predictor=predictor,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            sparsity=share,
            prune_tokens=prune_tokens,
            block_size=block_size,
            selector=selector,
        )
        tune_first(net, block_size, no_tune)
        more: dict[str, Any] = {}
        if draft_model is not None:
            more["draft_model"] = _draft(draft_model, tokenizer)
            more["num_draft_tokens"] = num_draft_tokens
        else:
            more["max_kv_size"] = max_kv_size
        ids = _render(tokenizer, text, system_prompt, ignore_chat_template, template)
        if warning := length_warning(net, len(ids)):
            print(f"mlx_fastforward: {warning}", file=sys.stderr)
        import mlx.core as mx

        from ..attachment import engine_of

        engine = engine_of(net)
        assert engine is not None
        if seed is not None:
            mx.random.seed(seed)
        _run(
            net,
            tokenizer,
            ids,
            {"model": model or "demo", **engine.settings()},
            json_output,
            max_tokens=max_tokens,
            sampler=sampling(
                tokenizer, temp, top_p, min_p, top_k, xtc_probability, xtc_threshold
            ),
            prefill_step_size=prefill_step_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            **more,
        )


def _prompt(prompt: Optional[str], option: Optional[str], file: Any) -> str:
    if prompt is not None and option is not None:
        fail("give the prompt once: as argument or with --prompt.", 2)
    asked = prompt if prompt is not None else option
    if asked == "-":
        asked = decoded(sys.stdin.buffer.read()).strip()
    document = read_text(file) if file is not None else None
    text = "\n\n".join(t for t in (document, asked) if t)
    if not text:
        fail("no prompt: give it as an argument, '-' for standard input, or --file.", 2)
    return text


def _draft(name: str, tokenizer: Any) -> Any:
    """A draft model; it never prefills sparsely, so any model of mlx-lm will do."""
    from mlx_lm.utils import load

    from ..hub import problems

    with problems(name, LoadProblem):
        model, theirs, *_ = load(name)
    if theirs.vocab_size != tokenizer.vocab_size:
        fail(
            f"{name} has {theirs.vocab_size} tokens, the model {tokenizer.vocab_size}: "
            "a draft model needs the same tokenizer."
        )
    return model


def _render(
    tokenizer: Any,
    text: str,
    system: Optional[str],
    raw: bool,
    template: dict[str, Any],
) -> list[int]:
    from ..generation import encode_prompt
    from ..session import render

    if raw or not tokenizer.has_chat_template:
        return [int(i) for i in encode_prompt(tokenizer, text)]
    messages = [{"role": "system", "content": system}] if system else []
    return render(tokenizer, [*messages, {"role": "user", "content": text}], template)


def _run(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    settings: dict[str, Any],
    json_output: bool,
    **kwargs: Any,
) -> None:
    from ..generation import stream_generate

    text, last = "", None
    try:
        with prefill_progress(sys.stderr.isatty(), Console(stderr=True)) as (
            tick,
            finish,
        ):
            kwargs["prompt_progress_callback"] = tick
            for last in stream_generate(model, tokenizer, ids, **kwargs):
                finish()
                text += last.text
                if not json_output:
                    print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None
    except (
        ValueError
    ) as e:  # mlx-lm's own refusals, e.g. an untrimmable cache with a draft model
        fail(str(e))
    assert last is not None
    if json_output:
        print(json.dumps(report(text, last, settings), ensure_ascii=False))
        return
    print()
    if sys.stdout.isatty() and sys.stderr.isatty():
        print(f"\033[2m{status_line(last)}\033[0m", file=sys.stderr)


def report(text: str, r: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of --json."""
    return {
        "text": text,
        "prompt_tokens": r.prompt_tokens,
        "cached_tokens": r.cached_tokens,
        "ttft_s": round(r.ttft, 4),
        "prefill_tps": round(r.prefill_tps, 2),
        "decode_tps": round(r.generation_tps, 2),
        "ffn_sparsity": round(r.ffn_sparsity, 4),
        "peak_memory_gb": round(r.peak_memory, 3),
        "settings": settings,
    }
