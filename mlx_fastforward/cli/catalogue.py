"""mlx_fastforward models: what is in the local cache, and what can be done with it."""

from dataclasses import replace
from pathlib import Path
from typing import Iterator

from .. import demo
from ..errors import FastForwardError, LoadProblem, brief, printable
from .errors import interruptible, one_line_errors
from .tables import say

CONTEXT = 8192  # tokens of KV cache that the memory is told for


def models() -> None:
    """List the models in the Hugging Face cache: supported or not, with what, and the memory they need.

    Nothing is downloaded, and no weights are read.

    Examples:

      mlx_fastforward models
    """
    with one_line_errors(), interruptible():
        from ..hub import cached_models

        say(f"demo (bundled, without --model): {demo.MODEL}")
        _show(str(demo.MODEL), demo.MODEL)
        found = [(n, f) for n, fs in cached_models() for f in fs[:1]]
        models = [(n, f) for n, f in found if (f / "config.json").is_file()]
        for name, folder in models:
            say(printable(name))
            _show(name, folder)
        if not models:
            say(
                "No others in the Hugging Face cache: --model REPOSITORY downloads one."
            )


def _show(name: str, folder: Path) -> None:
    try:
        for line in described(name, folder):
            say(f"    {printable(line)}")
    except FastForwardError as e:
        say(f"    not usable: {printable(brief(e))}")


def described(name: str, folder: Path) -> Iterator[str]:
    """What there is to say of a model that lies in a folder; raises FastForwardError."""
    from mlx_lm.utils import load_model

    from ..hub import problems
    from ..model.families import kv_bytes
    from ..predictors.base import BaseModel
    from ..predictors.search import predictor_for
    from ..predictors.verified import resolved

    if not list(folder.glob("model*.safetensors")):
        raise LoadProblem("no weights in the cache: the download was not finished.")
    with problems(name, LoadProblem):
        net, _ = load_model(folder, lazy=True)
        base = replace(BaseModel.of(net), name=name)
    yield f"supported: {base.model_type}, {base.sizes()}"
    predictor = predictor_for(name, base, fetch=False)
    kind = (
        f"predictor {predictor.source}" if predictor else "no predictor: selector probe"
    )
    share, why = resolved("auto", predictor)
    yield f"{kind}; sparsity {share:.0%}" + (f" ({why})" if why else "")
    weights = sum(f.stat().st_size for f in folder.glob("model*.safetensors"))
    cache = kv_bytes(net, base.hidden_size, CONTEXT)
    yield (
        f"memory: about {(weights + cache) / 1e9:.2f} GB, weights {weights / 1e9:.2f} and "
        f"{cache / 1e9:.2f} for {CONTEXT:,} tokens"
    )
