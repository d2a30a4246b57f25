"""Flags that several commands share; names and meanings follow mlx_lm where it has them."""

from pathlib import Path
from typing import Annotated, Optional

import typer

MODEL = "Model"
SPARSE = "Sparse prefill"
SAMPLING = "Generation"
SELECTORS = ("auto", "trained", "probe", "first-block")

Model = Annotated[
    Optional[str],
    typer.Option(
        help="Local model folder or Hugging Face repository, "
        "e.g. mlx-community/Llama-3.2-3B-Instruct-4bit. Default: the bundled demo model.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
AdapterPath = Annotated[
    Optional[str],
    typer.Option(help="LoRA adapter folder, as in mlx_lm.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Trust code that comes with the model or tokenizer.",
        rich_help_panel=MODEL,
    ),
]
Sparsity = Annotated[
    float,
    typer.Option(
        help="Share of FFN neurons that sparse blocks drop, 0 to below 1; 0 is stock mlx-lm.",
        rich_help_panel=SPARSE,
    ),
]
BlockSize = Annotated[
    Optional[int],
    typer.Option(
        help="Tokens that share one set of neurons, about. Default: the fastest on this device, "
        "measured once.",
        show_default=False,
        rich_help_panel=SPARSE,
    ),
]
NoTune = Annotated[
    bool,
    typer.Option(
        "--no-tune",
        help="Do not measure this device on first use: blocks of 128 tokens.",
        rich_help_panel=SPARSE,
    ),
]
Selector = Annotated[
    str,
    typer.Option(
        help=f"How neurons are picked: {', '.join(SELECTORS)}.",
        rich_help_panel=SPARSE,
    ),
]
Predictor = Annotated[
    Optional[str],
    typer.Option(
        help="Trained predictors (fastforward.json and .safetensors): folder or repository. "
        "Default: those beside the model, else your newest for it; none for none.",
        show_default=False,
        rich_help_panel=SPARSE,
    ),
]
Compensator = Annotated[
    str,
    typer.Option(
        help="What is added back: auto, none, mlp, low-rank.", rich_help_panel=SPARSE
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        help="Neurons per layer: auto, uniform, layerwise.", rich_help_panel=SPARSE
    ),
]
SparseDecode = Annotated[
    bool,
    typer.Option(
        "--sparse-decode",
        help="Decode sparsely too, to measure what it does: slower. "
        "Needs trained predictors or first-block.",
        rich_help_panel=SPARSE,
    ),
]
Dtype = Annotated[
    Optional[str],
    typer.Option(
        help="float32, float16 or bfloat16. Default: the model's own.",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Optional[Path], typer.Option("--json", help="Write all figures here.")
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        "-m",
        help="Tokens to generate at most.",
        rich_help_panel=SAMPLING,
    ),
]
Temp = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sampling top-p.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sampling min-p.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int, typer.Option(min=0, help="Sampling top-k.", rich_help_panel=SAMPLING)
]
XtcProbability = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Probability of XTC sampling for each token.",
        rich_help_panel=SAMPLING,
    ),
]
XtcThreshold = Annotated[
    float,
    typer.Option(
        min=0.0, max=0.5, help="Threshold of XTC sampling.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    Optional[int], typer.Option(min=0, help="PRNG seed.", rich_help_panel=SAMPLING)
]
SystemPrompt = Annotated[
    Optional[str],
    typer.Option(help="System prompt for the chat template.", rich_help_panel=SAMPLING),
]
ChatTemplateConfig = Annotated[
    Optional[str],
    typer.Option(
        help="JSON object for the chat template, e.g. '{\"enable_thinking\": false}'.",
        rich_help_panel=SAMPLING,
    ),
]
MaxKvSize = Annotated[
    Optional[int],
    typer.Option(min=1, help="Maximum size of the KV cache.", rich_help_panel=SAMPLING),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Prompt tokens processed at a time; smaller values lower peak memory.",
        rich_help_panel=SAMPLING,
    ),
]
File = Annotated[
    Optional[Path],
    typer.Option(help="A text document to put before the prompt.", show_default=False),
]
