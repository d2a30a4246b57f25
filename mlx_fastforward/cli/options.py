"""Flags that several commands share; names and meanings follow mlx_lm where it has them."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .. import demo

MODEL = "Model"
SPARSE = "Sparse prefill"
SPECULATIVE = "Speculative prefill (approximate: part of the prompt is not read)"
SAMPLING = "Generation"
EXAMPLE = "mlx-community/Llama-3.2-3B-Instruct-4bit"
SELECTORS = ("auto", "trained", "probe", "first-block")


def opt(help: str, *names: str, panel: Optional[str] = None, **more: Any) -> Any:
    """A flag, in the panel of --help that it belongs to."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    Optional[str],
    opt(
        "Local model folder or Hugging Face repository, "
        f"e.g. {EXAMPLE}. Default: demo, the bundled one.",
        panel=MODEL,
        callback=lambda name: None if name == demo.NAME else name,
    ),
]
AdapterPath = Annotated[
    Optional[str], opt("LoRA adapter folder, as in mlx_lm.", panel=MODEL)
]
TrustRemoteCode = Annotated[
    bool,
    opt(
        "Trust code that comes with the model or tokenizer.",
        "--trust-remote-code",
        panel=MODEL,
    ),
]
Pipeline = Annotated[
    bool,
    opt(
        "Under mlx.launch: each process has some of the layers, not a part of each.",
        "--pipeline",
        panel=MODEL,
    ),
]
Sparsity = Annotated[
    float,
    opt(
        "Share of FFN neurons that sparse blocks drop, 0 to below 1; 0 is stock mlx-lm.",
        panel=SPARSE,
    ),
]
AutoSparsity = Annotated[
    str,
    opt(
        "Share of FFN neurons that sparse blocks drop, 0 to below 1; 0 is stock mlx-lm. auto: the "
        "most that was verified for this model, 0.5 without such a table.",
        panel=SPARSE,
    ),
]
PRUNED = (
    "of the tokens between the prompt's ends skip FFNs, 0 to below 1; their keys and values stay. "
    "For the FLOPs that it saves it costs more quality than --sparsity."
)
PruneTokens = Annotated[float, opt(f"Share {PRUNED}", "--prune-tokens", panel=SPARSE)]
PruneShares = Annotated[str, opt(f"Which shares {PRUNED}", "--prune-tokens")]
Speedup = Annotated[
    Optional[float],
    opt(
        "Take the best combination measured for this model (eval --save) that is so many times as "
        "fast by its FLOPs, in the place of --sparsity, --prune-tokens and --keep.",
        panel=SPARSE,
    ),
]
BlockSize = Annotated[
    Optional[int],
    opt(
        "Tokens that share one set of neurons, about. Default: the fastest on this device, "
        "measured once.",
        panel=SPARSE,
    ),
]
NoTune = Annotated[
    bool,
    opt(
        "Do not measure this device on first use: blocks of 128 tokens.",
        "--no-tune",
        panel=SPARSE,
    ),
]
Fast = Annotated[
    bool,
    opt(
        "With --sparsity 0: dequantise packed FFN weights once per call, or compute FFNs in float16, where "
        "that is faster on this device, measured once. Answers are mlx-lm's but for rounding.",
        "--fast",
        panel=SPARSE,
    ),
]
Selector = Annotated[
    str, opt(f"How neurons are picked: {', '.join(SELECTORS)}.", panel=SPARSE)
]
Predictor = Annotated[
    Optional[str],
    opt(
        "Trained predictors (fastforward.json and .safetensors): folder or repository. "
        "Default: those beside the model, else your newest for it; none for none.",
        panel=SPARSE,
    ),
]
PrefillDraft = Annotated[
    Optional[str],
    opt(
        "Who says which tokens of a long prompt matter: 'words', those of the question, without any "
        "model; a small model's folder or repository; 'self', the model's own first layers. Only "
        "those are read; what others say is lost until it is read, too. Default: off.",
        panel=SPECULATIVE,
    ),
]
Keep = Annotated[
    float,
    opt("Share of a long prompt that is read, above 0 to 1.", panel=SPECULATIVE),
]
Drafts = Annotated[
    Optional[str],
    opt(
        "Drafts that say which part of each prompt is read, with commas between them: folders, "
        "repositories, words (of the question), self (the model's own first layers).",
        "--prefill-draft",
    ),
]
KeepShares = Annotated[
    Optional[str],
    opt(
        "Which shares of a prompt are read, with --prefill-draft: 0.5 by default, 1 reads all.",
        "--keep",
    ),
]
PrefillThreshold = Annotated[
    int,
    opt("Prompts of fewer new tokens are read whole.", panel=SPECULATIVE, min=1),
]
Heal = Annotated[
    bool,
    opt(
        "Read the rest of the prompt while you read the answer and type.",
        "--heal/--no-heal",
        panel=SPECULATIVE,
    ),
]
Compensator = Annotated[
    str, opt("What is added back: auto, none, mlp, low-rank.", panel=SPARSE)
]
Schedule = Annotated[
    str, opt("Neurons per layer: auto, uniform, layerwise.", panel=SPARSE)
]
SparseDecode = Annotated[
    bool,
    opt(
        "Decode sparsely too, to measure what it does: slower. "
        "Needs trained predictors or first-block.",
        "--sparse-decode",
        panel=SPARSE,
    ),
]
Dtype = Annotated[
    Optional[str], opt("float32, float16 or bfloat16. Default: the model's own.")
]
Sparsities = Annotated[str, opt("Shares of FFN neurons dropped.")]
Selectors = Annotated[str, opt("auto, trained, probe, first-block, oracle.")]
PredictorFolder = Annotated[
    Optional[Path],
    opt("Folder of the predictor. Default: your predictors' folder, where chat looks."),
]
Overwrite = Annotated[bool, opt("Replace a predictor that is there.", "--overwrite")]
PngFile = Annotated[Optional[Path], opt("Write a picture here.", "--png")]
JsonFile = Annotated[Optional[Path], opt("Write all figures here.", "--json")]
MaxTokens = Annotated[
    int, opt("Tokens to generate at most.", "--max-tokens", "-m", panel=SAMPLING)
]
Temp = Annotated[float, opt("Sampling temperature.", panel=SAMPLING, min=0.0)]
TopP = Annotated[float, opt("Sampling top-p.", panel=SAMPLING, min=0.0, max=1.0)]
MinP = Annotated[float, opt("Sampling min-p.", panel=SAMPLING, min=0.0, max=1.0)]
MinTokensToKeep = Annotated[
    int, opt("Tokens that min-p keeps at least.", panel=SAMPLING, min=1)
]
TopK = Annotated[int, opt("Sampling top-k.", panel=SAMPLING, min=0)]
XtcProbability = Annotated[
    float,
    opt(
        "Probability of XTC sampling for each token.", panel=SAMPLING, min=0.0, max=1.0
    ),
]
XtcThreshold = Annotated[
    float, opt("Threshold of XTC sampling.", panel=SAMPLING, min=0.0, max=0.5)
]
Seed = Annotated[Optional[int], opt("PRNG seed.", panel=SAMPLING, min=0)]
ExtraEosToken = Annotated[
    list[str],
    opt("One more token that ends an answer; may be given again.", panel=SAMPLING),
]
SystemPrompt = Annotated[
    Optional[str], opt("System prompt for the chat template.", panel=SAMPLING)
]
ChatTemplateConfig = Annotated[
    Optional[str],
    opt(
        "JSON object for the chat template, e.g. '{\"enable_thinking\": false}'.",
        panel=SAMPLING,
    ),
]
MaxKvSize = Annotated[
    Optional[int], opt("Maximum size of the KV cache.", panel=SAMPLING, min=1)
]
PrefillStepSize = Annotated[
    Optional[int],
    opt(
        "Prompt tokens processed at a time; smaller values lower peak memory. Default: the fastest on "
        "this device, 2048 where that was not measured.",
        panel=SAMPLING,
        min=1,
    ),
]
CacheDir = Annotated[
    Optional[Path],
    opt(
        "Keep what was read in this folder: a document that was read once answers at once the next "
        "day. It holds your prompts' tokens. Default: off.",
        panel=SAMPLING,
    ),
]
CacheGb = Annotated[
    float,
    opt("Size of that folder; the least recently used are deleted.", panel=SAMPLING),
]
Files = Annotated[
    list[Path],
    opt("A text document to put before the prompt; may be given again.", "--file"),
]
Force = Annotated[
    bool, opt("Read what is longer than the model was made for.", "--force")
]
