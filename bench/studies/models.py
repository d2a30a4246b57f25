"""The table of docs/models.md: every model file of the installed mlx-lm, and what runs sparsely.

python -m mlx_fastforward.bench.studies.models > docs/models.md
"""

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.progress import track

from ...errors import UnsupportedModel
from ...model.proof import WORTH, reach
from . import zoo

WHOLE, PARTLY, REFUSED, UNBUILT = "all FFNs", "partly", "no", "not tested"
EXAMPLES = {
    "afm7": "Apple's 3B and 7B foundation models",
    "afmoe": "Arcee Trinity",
    "apertus": "Apertus 8B, 70B",
    "bailing_moe": "Ling, Ring",
    "bailing_moe_linear": "Ring-linear",
    "bitnet": "BitNet b1.58",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "dbrx": "DBRX",
    "deepseek": "DeepSeek MoE 16B",
    "deepseek_v2": "DeepSeek V2, V2 Lite, Coder V2",
    "deepseek_v3": "DeepSeek V3, R1, Moonlight",
    "deepseek_v32": "DeepSeek V3.2",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B",
    "exaone": "EXAONE 3, 3.5",
    "exaone4": "EXAONE 4",
    "falcon_h1": "Falcon H1",
    "gemma": "Gemma 1, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B to 27B",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n": "Gemma 3n E2B, E4B",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4 E2B, E4B, 31B",
    "gemma4_text, experts": "Gemma 4 26B-A4B",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414 9B, 32B",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7 Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss 20B, 120B",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4 H Tiny, Small",
    "granitemoehybrid, dense": "Granite 4 Micro, 1B, 350M",
    "helium": "Helium 1",
    "hunyuan": "Hunyuan A13B",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "internlm2": "InternLM 2, 2.5",
    "internlm3": "InternLM 3",
    "jamba": "Jamba Mini, Large",
    "jamba, dense": "Jamba Reasoning 3B",
    "kimi_k25": "Kimi K2.5",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "kimi_vl": "Kimi VL",
    "lfm2": "LFM2 350M to 2.6B",
    "lfm2-vl": "LFM2-VL",
    "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 2, 3.x; Mistral 7B, Nemo",
    "llama4": "Llama 4 Scout, Maverick",
    "longcat_flash": "LongCat Flash",
    "mamba": "Mamba",
    "mamba2": "Mamba 2",
    "mimo": "MiMo 7B",
    "mimo_v2_flash": "MiMo V2 Flash",
    "minicpm": "MiniCPM",
    "minicpm3": "MiniCPM 3",
    "minimax": "MiniMax M2",
    "ministral3": "Ministral 3",
    "mistral3": "Mistral Small 3.1, 3.2; Ministral 3",
    "mixtral": "Mixtral",
    "nanochat": "nanochat",
    "nemotron": "Minitron, Nemotron 4",
    "nemotron-nas": "Llama Nemotron Super, Ultra",
    "nemotron_h": "Nemotron H, Nano 2",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "openelm": "OpenELM",
    "phi": "Phi 1, 2",
    "phi3": "Phi 3, Phi 4",
    "phi3small": "Phi 3 Small",
    "phimoe": "Phi 3.5 MoE",
    "pixtral": "Pixtral",
    "plamo2": "PLaMo 2",
    "qwen": "Qwen 1",
    "qwen2": "Qwen 1.5, 2, 2.5",
    "qwen2_moe": "Qwen 1.5 MoE, Qwen 2 57B-A14B",
    "qwen2_vl": "Qwen 2 VL",
    "qwen3": "Qwen 3 0.6B to 32B",
    "qwen3_5": "Qwen 3.5, 3.6, dense",
    "qwen3_5_moe": "Qwen 3.5, 3.6 35B-A3B",
    "qwen3_moe": "Qwen 3 30B-A3B",
    "qwen3_next": "Qwen 3 Next 80B-A3B, Qwen 3 Coder Next",
    "qwen3_vl": "Qwen 3 VL",
    "qwen3_vl_moe": "Qwen 3 VL 30B-A3B",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv7": "RWKV 7",
    "seed_oss": "Seed OSS 36B",
    "smollm3": "SmolLM 3",
    "stablelm": "StableLM 2",
    "starcoder2": "StarCoder 2",
    "step3p5": "Step 3.5 Flash",
}
HEAD = """# Models

Made by `python -m mlx_fastforward.bench.studies.models > docs/models.md` from the model files of mlx-lm
{version}; a test says where it is out of date. Each file was built small and random: what is here is what
its code allows, found by structure and proven on its modules ([how](how-it-works.md#which-models-modelfamiliespy-modelproofpy)).

{counts}

*Partly* with routed experts: dense layers and shared experts run sparsely, routed experts densely. How
much that is depends on the checkpoint; less than {worth:.0%} of the FFN FLOPs is refused. The chat's first
lines tell the share. By their published sizes Qwen 3 Next and Qwen 3.5 35B-A3B are refused: one shared
expert beside ten or eight routed ones.

| model file | for example | sparse | why not more |
|---|---|---|---|"""


def verdict(model: nn.Module) -> tuple[str, str]:
    """What runs sparsely of a model, and what keeps the rest dense."""
    try:
        found = reach(model)
    except UnsupportedModel as e:
        return REFUSED, str(e).partition(": ")[2].rstrip(".")
    if found.share == 1:
        return WHOLE, ""
    return PARTLY, found.odd or "routed experts"


def row(name: str, model: nn.Module) -> str:
    """A line of the table."""
    return _line(name, *verdict(model))


def _line(name: str, sparse: str, why: str) -> str:
    file, _, kind = name.partition(", ")
    label = f"`{file}`" + (f" ({kind})" if kind else "")
    return f"| {label} | {EXAMPLES.get(name, '')} | {sparse} | {why} |"


def main() -> None:
    """Print the page."""
    import mlx_lm

    mx.disable_compile()
    lines, kinds = [], []
    names = sorted([*zoo.names(), *zoo.KINDS, *zoo.UNBUILT])
    for name in track(sorted(set(names)), console=Console(stderr=True)):
        if name in zoo.UNBUILT:
            found = UNBUILT, zoo.UNBUILT[name]
        else:
            found = verdict(zoo.tiny(name))
        lines.append(_line(name, *found))
        kinds.append(found[0])
    counts = ", ".join(
        f"{kinds.count(kind)} {kind}" for kind in (WHOLE, PARTLY, REFUSED, UNBUILT)
    )
    print(HEAD.format(version=mlx_lm.__version__, counts=counts, worth=WORTH))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
