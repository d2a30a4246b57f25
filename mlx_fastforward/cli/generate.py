"""mlx_fastforward generate: one prompt in, text out."""

import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer
from rich.console import Console

from .. import ranks
from ..errors import FileProblem, LoadProblem
from . import options as o
from .errors import fail, interruptible, one_line_errors, one_process
from .first_use import tune_first
from .inputs import (
    check_choice,
    check_fast,
    check_lengths,
    device_settings,
    sampling,
    template_config,
    yes_or_no,
)
from .lengths import check_bytes, check_tokens, patiently
from .models import load_model
from .outputs import broken, status_line
from .part_read import answers, keep_config, refuse_beside, speculative
from .prompt import add_stops, asked_text, prompt_tokens
from .speedup import explain, settled, typed_in
from .tables import warn
from .terminal import prefill_progress


def generate(
    context: typer.Context,
    prompt: Annotated[
        Optional[str],
        typer.Argument(help="The prompt; '-' reads it from standard input."),
    ] = None,
    prompt_option: Annotated[
        Optional[str], o.opt("The same, as in mlx_lm.", "--prompt", "-p")
    ] = None,
    file: o.Files = [],
    force: o.Force = False,
    json_output: Annotated[
        bool, o.opt("Print one JSON object with statistics.", "--json")
    ] = False,
    verbose: Annotated[
        Optional[str],
        o.opt(
            "True: token counts, speeds and peak memory after the answer, on standard error; "
            "False: only the answer. Default: True in a terminal."
        ),
    ] = None,
    model: o.Model = None,
    adapter_path: o.AdapterPath = None,
    trust_remote_code: o.TrustRemoteCode = False,
    pipeline: o.Pipeline = False,
    sparsity: o.AutoSparsity = "auto",
    prune_tokens: o.PruneTokens = 0.0,
    speedup: o.Speedup = None,
    block_size: o.BlockSize = None,
    no_tune: o.NoTune = False,
    fast: o.Fast = False,
    selector: o.Selector = "auto",
    predictor: o.Predictor = None,
    max_tokens: o.MaxTokens = 100,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    min_tokens_to_keep: o.MinTokensToKeep = 1,
    top_k: o.TopK = 0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    seed: o.Seed = None,
    extra_eos_token: o.ExtraEosToken = [],
    system_prompt: o.SystemPrompt = None,
    prefill_response: Annotated[
        Optional[str], o.opt("How the answer begins; not printed.", panel=o.SAMPLING)
    ] = None,
    chat_template_config: o.ChatTemplateConfig = None,
    use_default_chat_template: Annotated[
        bool,
        o.opt(
            "Accepted, and does nothing, as in mlx_lm.",
            "--use-default-chat-template",
            panel=o.SAMPLING,
        ),
    ] = False,
    ignore_chat_template: Annotated[
        bool, o.opt("Use the raw prompt.", "--ignore-chat-template", panel=o.SAMPLING)
    ] = False,
    max_kv_size: o.MaxKvSize = None,
    prefill_step_size: o.PrefillStepSize = None,
    prompt_cache_file: Annotated[
        Optional[Path],
        o.opt(
            "A prompt that mlx_lm.cache_prompt read already; yours goes on from there.",
            panel=o.SAMPLING,
        ),
    ] = None,
    kv_bits: Annotated[
        Optional[int], o.opt("Bits for KV cache quantisation.", panel=o.SAMPLING)
    ] = None,
    kv_group_size: Annotated[
        int, o.opt("Group size for KV cache quantisation.", panel=o.SAMPLING)
    ] = 64,
    quantized_kv_start: Annotated[
        int, o.opt("Step from which the KV cache is quantised.", panel=o.SAMPLING)
    ] = 5000,
    prefill_draft: o.PrefillDraft = None,
    keep: o.Keep = 0.5,
    prefill_threshold: o.PrefillThreshold = 8192,
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

      git diff | mlx_fastforward generate --file - "Review this change." --json
    """
    with one_line_errors(), interruptible():
        text = asked_text(prompt, prompt_option, file)
        check_lengths(max_tokens, prefill_step_size, block_size)
        check_choice("--selector", selector, o.SELECTORS)
        check_choice("--kv-bits", kv_bits, (1, 2, 3, 4, 5, 6, 8))
        check_choice("--kv-group-size", kv_group_size, (32, 64, 128))
        template = template_config(chat_template_config)
        if draft_model is not None:
            one_process("--draft-model")
        figures = None if verbose is None else yes_or_no("--verbose", verbose)
        if draft_model is not None and max_tokens < 0:
            fail("--max-tokens -1 does not go with --draft-model; give a number.", 2)
        if draft_model is not None and prompt_cache_file is not None:
            fail("--prompt-cache-file does not go with --draft-model.", 2)
        chosen = settled(context.params, typed_in(context))
        check_fast(fast, chosen.sparsity)
        keeping = keep_config(
            chosen.prefill_draft, chosen.keep, chosen.prefill_threshold
        )
        if keeping is not None:
            refuse_beside(
                **{
                    "--draft-model": draft_model,
                    "--prompt-cache-file": prompt_cache_file,
                    "--max-kv-size": max_kv_size,
                }
            )
        cache = None
        if prompt_cache_file is not None:
            cache, model = _cached_prompt(prompt_cache_file, model)
        net, tokenizer = load_model(
            model,
            predictor=predictor,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            pipeline=pipeline,
            sparsity=chosen.sparsity,
            prune_tokens=chosen.prune_tokens,
            block_size=block_size,
            selector=selector,
            device=device_settings(no_tune, fast),
        )
        explain(net, chosen)
        add_stops(tokenizer, extra_eos_token)
        check_bytes(net, text, force)
        ids = patiently(
            lambda: prompt_tokens(
                tokenizer,
                text,
                system_prompt,
                prefill_response,
                ignore_chat_template,
                template,
                cached=cache is not None,
            ),
            len(text),
            Console(stderr=True),
        )
        reader = speculative(net, tokenizer, chosen.prefill_draft, keeping)
        raw = ignore_chat_template or not tokenizer.has_chat_template
        more: dict[str, Any] = {"max_kv_size": max_kv_size}
        if draft_model is not None:
            draft = _draft(draft_model, tokenizer)
            more = {"draft_model": draft, "num_draft_tokens": num_draft_tokens}
        if prefill_step_size is not None:
            more["prefill_step_size"] = prefill_step_size
        read = 0
        if cache is not None:
            from mlx_lm.models.cache import make_prompt_cache

            from ..cachefile import check_cache
            from ..generation import cached_tokens

            check_cache(cache, len(make_prompt_cache(net)), kv_bits, kv_group_size)
            more["prompt_cache"], read = cache, cached_tokens(cache)
        if warning := check_tokens(net, read + len(ids), force):
            warn(warning)
        if not no_tune:
            tune_first(net, len(ids))
        import mlx.core as mx

        from ..attachment import engine_of

        engine = engine_of(net)
        assert engine is not None
        if seed is None and ranks.several():
            seed = ranks.agreed(random.getrandbits(31))
        if seed is not None:
            mx.random.seed(seed)
        _run(
            net,
            tokenizer,
            ids,
            {
                "model": model or "demo",
                **engine.settings(),
                **(reader.settings() if reader is not None else {}),
                **({"chosen": chosen.told} if chosen.told else {}),
            },
            json_output,
            figures,
            partial(answers, reader, None if raw else system_prompt, template),
            max_tokens=max_tokens,
            sampler=sampling(
                tokenizer,
                temp,
                top_p,
                min_p,
                top_k,
                xtc_probability,
                xtc_threshold,
                min_tokens_to_keep,
            ),
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            **more,
        )


def _cached_prompt(file: Path, model: Optional[str]) -> tuple[Any, Optional[str]]:
    """A prompt cache, and the model that it is for; raises FileProblem."""
    from ..cachefile import read_cache

    cache, noted = read_cache(file)
    if "conversation" in noted:
        raise FileProblem(f"{file} is a conversation of chat: /load it there.")
    theirs = noted.get("model")
    if model is not None and theirs != model:
        raise FileProblem(
            f"{file} is for another model, {theirs}: leave --model out, or name that one."
        )
    return cache, theirs


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


def _run(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    settings: dict[str, Any],
    json_output: bool,
    verbose: Optional[bool],
    answers: Callable[..., Any],
    **kwargs: Any,
) -> None:
    text, last = "", None
    try:
        with prefill_progress(model, sys.stderr.isatty(), Console(stderr=True)) as (
            tick,
            finish,
        ):
            kwargs["prompt_progress_callback"] = tick
            for last in answers(model, tokenizer, ids, **kwargs):
                finish()
                text += last.text
                if not json_output:
                    print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None
    # mlx-lm's own refusals, e.g. an untrimmable cache with a draft model
    except ValueError as e:
        fail(str(e))
    assert last is not None
    if json_output:
        print(json.dumps(report(text, last, settings), ensure_ascii=False))
        return
    print()
    if verbose or (verbose is None and sys.stdout.isatty() and sys.stderr.isatty()):
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        if "chosen" in settings:
            console.print(settings["chosen"], style="dim")
        figures = status_line(last)
        if console.is_terminal:
            figures = broken(figures, console.width)
        console.print(figures, style="dim")


def report(text: str, r: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of --json."""
    return {
        "text": text,
        "finish_reason": r.finish_reason,
        "generation_tokens": r.generation_tokens,
        "prompt_tokens": r.prompt_tokens,
        "cached_tokens": r.cached_tokens,
        "ttft_s": round(r.ttft, 4),
        "prefill_tps": round(r.prefill_tps, 2),
        "decode_tps": round(r.generation_tps, 2),
        "ffn_sparsity": round(r.ffn_sparsity, 4),
        "read_tokens": r.prompt_tokens if r.read_tokens is None else r.read_tokens,
        "peak_memory_gb": round(r.peak_memory, 3),
        "settings": settings,
    }
