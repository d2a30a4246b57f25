"""mlx_fastforward chat: the command."""

from functools import partial

import typer

from . import options as o
from .chat_commands import run
from .conversation import Chat, banner
from .disk_cache import Shelf, disk_cache
from .errors import interruptible, one_line_errors
from .inputs import (
    check_choice,
    check_fast,
    check_lengths,
    device_settings,
    read_text,
    template_config,
)
from .lengths import check_bytes
from .models import load_model
from .part_read import keep_config, refuse_beside, speculative
from .speedup import explain, settled, typed_in
from .tables import warn


def chat(
    context: typer.Context,
    model: o.Model = None,
    file: o.Files = [],
    force: o.Force = False,
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
    max_tokens: o.MaxTokens = 256,
    temp: o.Temp = 0.0,
    top_p: o.TopP = 1.0,
    xtc_probability: o.XtcProbability = 0.0,
    xtc_threshold: o.XtcThreshold = 0.1,
    seed: o.Seed = 0,
    system_prompt: o.SystemPrompt = None,
    chat_template_config: o.ChatTemplateConfig = None,
    max_kv_size: o.MaxKvSize = None,
    cache_dir: o.CacheDir = None,
    cache_gb: o.CacheGb = 10.0,
    prefill_step_size: o.PrefillStepSize = None,
    prefill_draft: o.PrefillDraft = None,
    keep: o.Keep = 0.5,
    prefill_threshold: o.PrefillThreshold = 8192,
    heal: o.Heal = True,
) -> None:
    """Chat with a model that reads long prompts sparsely.

    Examples:

      mlx_fastforward chat --model mlx-community/Llama-3.2-3B-Instruct-4bit

      mlx_fastforward chat --file report.txt --sparsity 0.4

      echo "Who was Alice?" | mlx_fastforward chat > answer.txt
    """
    with one_line_errors(), interruptible():
        check_lengths(max_tokens, prefill_step_size, block_size)
        check_choice("--selector", selector, o.SELECTORS)
        chosen = settled(context.params, typed_in(context))
        check_fast(fast, chosen.sparsity)
        template = template_config(chat_template_config)
        keeping = keep_config(
            chosen.prefill_draft, chosen.keep, chosen.prefill_threshold
        )
        if keeping is not None:
            refuse_beside(**{"--max-kv-size": max_kv_size, "--cache-dir": cache_dir})
        disk = disk_cache(cache_dir, cache_gb, warn)
        documents = [(str(name), read_text(name)) for name in file]
        load = partial(
            load_model,
            sparsity=chosen.sparsity,
            prune_tokens=chosen.prune_tokens,
            block_size=block_size,
            selector=selector,
            trust_remote_code=trust_remote_code,
            pipeline=pipeline,
            device=device_settings(no_tune, fast),
        )
        net, tokenizer = load(model, predictor=predictor, adapter_path=adapter_path)
        explain(net, chosen)
        import mlx.core as mx

        from ..session import Session

        if seed is not None:
            mx.random.seed(seed)
        session = Session(net, tokenizer, system_prompt, max_kv_size, template)
        session.shelf = Shelf(disk) if disk is not None else None
        session.speculative = speculative(net, tokenizer, chosen.prefill_draft, keeping)
        loop = Chat(
            session,
            model or "demo",
            tune=not no_tune,
            force=force,
            loader=partial(load, lazy=True),
            sampling={
                "temp": temp,
                "top_p": top_p,
                "xtc_probability": xtc_probability,
                "xtc_threshold": xtc_threshold,
            },
            max_tokens=max_tokens,
            **(
                {}
                if prefill_step_size is None
                else {"prefill_step_size": prefill_step_size}
            ),
        )
        for name, text in documents:
            check_bytes(net, text, force)
            loop.pending.append((name, text))
        if session.speculative is not None and heal:
            from ..heal import Heal

            loop.heal = Heal(session)
        banner(loop)
        try:
            run(loop)
        finally:
            if disk is not None:
                disk.jobs.join()
