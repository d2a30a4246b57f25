"""mlx_fastforward readout: teach a model's first layers which tokens of a prompt matter."""

import tempfile
from pathlib import Path
from typing import Annotated, Optional

from rich.console import Console

from . import options as o
from .errors import fail, interruptible, one_line_errors
from .models import public_name, stock_model
from .progress import phases


def readout(
    model: o.Model = None,
    data: Annotated[
        Optional[list[str]],
        o.opt(
            "Text files, folders of them, or a data set of the Hugging Face hub. "
            "Default: bundled prose."
        ),
    ] = None,
    predictor: Annotated[
        Optional[str],
        o.opt("Predictor file that it goes into. Default: the one that chat takes."),
    ] = None,
    prompts: Annotated[int, o.opt("Prompts to read, whole.", min=10)] = 200,
    steps: Annotated[int, o.opt("Steps of the fit.", min=1)] = 2000,
    layers: Annotated[
        Optional[int],
        o.opt("Layers that read every token. Default: half of them.", min=1),
    ] = None,
    seed: o.Seed = 0,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Fit what --prefill-draft self scores tokens by; it goes into the predictor file.

    The model reads prompts with a question at their end, and a small readout of its first layers
    learns where all layers look.

    Examples:

      mlx_fastforward readout --model mlx-community/Llama-3.2-3B-Instruct-4bit
    """
    with one_line_errors(), interruptible():
        import mlx.core as mx

        from ..predictors.base import BaseModel
        from ..predictors.file import add_readout, ensure_predictor
        from ..predictors.search import folder_for
        from ..scorers import LayersScorer
        from ..train.data import open_corpus, usual_length
        from ..train.readout import Questions, fit, observe

        corpus = open_corpus(data)
        net, tokenizer, side = stock_model(model, None, predictor, trust_remote_code)
        if not tokenizer.has_chat_template:
            fail(
                "a readout is fitted on questions in a chat: this model has no chat template."
            )
        if mx.default_device() == mx.cpu:
            net.set_dtype(mx.float32)  # mlx's bfloat16 is slow on CPUs
        layer = LayersScorer(net, layers).layers
        base = BaseModel.of(net, public_name(model))
        folder = folder_for(base, side)
        questions = Questions(corpus, tokenizer, usual_length(net), seed or 0)
        console = Console(stderr=True, highlight=False)
        with tempfile.TemporaryDirectory() as work, phases(console) as tick:
            files = observe(net, questions, prompts, layer, Path(work), tick)
            found, worth = fit(files, layer, steps, seed or 0, tick)
        print(
            "Of what the whole model looks at, held out, 30 % of the tokens hold "
            f"{worth['readout']:.0%} by the readout, {worth['attention']:.0%} by the attention of "
            f"the first {layer} layers, {worth['best']:.0%} at best."
        )
        if worth["readout"] <= worth["attention"]:
            fail(
                "the readout is no better than attention, and not kept: more --prompts."
            )
        ensure_predictor(folder, base)
        add_readout(folder, found, prompts=len(files), kept=worth)
        print(f"kept in {folder}: --prefill-draft self uses it")
