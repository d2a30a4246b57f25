"""load(): mlx_lm.load, and the model comes back attached."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _download
from mlx_lm.utils import load as mlx_lm_load
from mlx_lm.utils import load_model, sharded_load

from . import ranks
from .attachment import attach, detach
from .config import DeviceSettings, PrefillConfig
from .errors import ConfigError, check_kind
from .model.families import Heads, model_type
from .predictors.base import BaseModel
from .predictors.file import PredictorFile
from .predictors.search import named_predictor, predictor_for
from .predictors.verified import resolved


def load(
    path_or_hf_repo: str,
    sparsity: float | str = 0.5,
    *,
    predictor: Optional[str | Path | PredictorFile] = None,
    device: Optional[DeviceSettings] = None,
    tokenizer_config: Optional[dict[str, Any]] = None,
    model_config: Optional[dict[str, Any]] = None,
    adapter_path: Optional[str] = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: Optional[str] = None,
    trust_remote_code: bool = False,
    pipeline: bool = False,
    **settings: Any,
) -> tuple:
    """Load a model that prefills sparsely; a drop-in for ``mlx_lm.load``.

    Args:
        path_or_hf_repo: Local folder or Hugging Face repository.
        sparsity: Share of FFN neurons dropped in sparse blocks; 0 is stock mlx-lm, "auto" the most
            that the predictor file has verified, 0.5 without such a table.
        predictor: Trained predictors: a folder or repository, or one loaded already; "none" for
            none. Default: the one beside the model, else the user's newest one for it.
        device: How this device runs it. Default: as tuned, see ``tune``; DeviceSettings() for untuned.
        adapter_path: LoRA weights, as in mlx_lm.
        pipeline: Under mlx.launch each process gets some of the layers, not a part of each.
        settings: Further fields of PrefillConfig.

    Returns:
        (model, tokenizer), and the config with ``return_config``.

    Raises:
        ConfigError, PredictorError, UnsupportedModel, and what mlx_lm.load raises.
    """
    wanted = "a local folder or a Hugging Face repository, as text"
    check_kind("path_or_hf_repo", path_or_hf_repo, (str, Path), wanted)
    if predictor is not None:
        wanted = 'a folder, a repository, "none", or what load_predictor() returns'
        check_kind("predictor", predictor, (str, Path, PredictorFile), wanted)
    # wrong settings are refused before anything is loaded
    PrefillConfig.from_kwargs(sparsity=resolved(sparsity, None)[0], **settings)
    searching = predictor is None
    if isinstance(predictor, (str, Path)):
        predictor = named_predictor(predictor)
    several = ranks.several()
    if several and not pipeline:
        _check_shared(adapter_path, model_config, revision)
        model, *rest = _load_part(
            str(path_or_hf_repo), tokenizer_config, return_config, trust_remote_code
        )
    else:
        model, *rest = mlx_lm_load(
            str(path_or_hf_repo),
            tokenizer_config=tokenizer_config,
            model_config=model_config,
            adapter_path=adapter_path,
            lazy=True,  # a predictor for another model is refused before weights are read
            return_config=return_config,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    assert isinstance(model, nn.Module)
    if several and pipeline:
        check_stages(model)
    if searching:
        predictor = predictor_for(str(path_or_hf_repo), BaseModel.of(model), revision)
    value, chosen = resolved(sparsity, predictor, settings)
    config = PrefillConfig.from_kwargs(sparsity=value, **settings)
    attach(model, config, predictor=predictor, device=device).chosen = chosen
    if several and pipeline:
        take_stage(model)
    if not lazy:
        mx.eval(model.parameters(), predictor.arrays() if predictor else [])
    return (model, *rest)


def _check_shared(adapter_path: Any, model_config: Any, revision: Any) -> None:
    """What mlx_lm.sharded_load does not know; raises ConfigError."""
    given = {
        "LoRA adapters": adapter_path,
        "model_config": model_config,
        "revision": revision,
    }
    for what, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{what} cannot be used by several processes; start one without mlx.launch."
            )


def _load_part(
    name: str,
    tokenizer_config: Optional[dict[str, Any]],
    return_config: bool,
    trust_remote_code: bool,
) -> tuple:
    """This process's part of every layer, cut by mlx-lm's own ``shard``."""
    check_part(name, trust_remote_code)
    return sharded_load(
        name,
        None,
        ranks.group(),
        return_config,
        tokenizer_config=tokenizer_config,
        trust_remote_code=trust_remote_code,
    )


def check_part(name: str, trust_remote_code: bool) -> None:
    """Refuse a model whose layers cannot be shared equally; raises ConfigError."""
    folder = _download(name)
    net, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    check_cut(net)


def check_cut(net: nn.Module) -> None:
    """Refuse a model that ``shard`` cannot cut into equal parts; raises ConfigError."""
    if not hasattr(net, "shard"):
        how = "use --pipeline" if _has_stages(net) else "start it without mlx.launch"
        raise ConfigError(
            f"mlx-lm cannot share a {model_type(net)} model among processes by its neurons; {how}."
        )
    base = BaseModel.of(net)
    ranks.check_divisible(Heads.of(net, base.hidden_size), base.widths)


def _has_stages(model: nn.Module) -> bool:
    return hasattr(getattr(model, "model", None), "pipeline")


def check_stages(model: nn.Module) -> None:
    """Refuse a model that cannot be dealt out by layers; raises ConfigError."""
    if not _has_stages(model):
        shards = hasattr(model, "shard")
        how = "leave --pipeline out" if shards else "start it without mlx.launch"
        raise ConfigError(
            f"mlx-lm cannot share a {model_type(model)} model among processes by its layers; {how}."
        )
    layers, n = len(model.layers), ranks.group().size()
    if layers < n:
        raise ConfigError(f"{n} processes cannot share {layers} layers; launch fewer.")


def take_stage(model: Any) -> None:
    """Leave an attached, lazily loaded model only this process's layers.

    It was attached whole, so that budgets, predictors and FLOPs are those of one process; weights of
    other layers are never read.
    """
    model.model.pipeline(ranks.group())
    mx.eval(model.parameters())
    ranks.agreed(0)  # all are here: who still loads would be waited for in vain


def load_stock(
    model: str,
    dtype: Optional[str] = None,
    predictor: Optional[str] = None,
    trust_remote_code: bool = False,
    stages: bool = False,
) -> tuple[nn.Module, Any, Optional[PredictorFile]]:
    """A detached model, its tokenizer, and the predictor file that load() would use with it.

    Args:
        stages: Under mlx.launch the whole model on disk, for a take_stage() after its engines are made.
    """
    trust = {"trust_remote_code": trust_remote_code}
    settings: dict[str, Any] = dict(tokenizer_config=trust)
    settings["trust_remote_code"] = trust_remote_code
    net: Any
    if stages:
        net, tokenizer, *_ = mlx_lm_load(model, lazy=True, **settings)
        check_stages(net)
    else:
        net, tokenizer = load(model, sparsity=0.0, predictor="none", **settings)
        detach(net)
    if dtype:
        net.set_dtype(getattr(mx, dtype))
    if predictor:
        return net, tokenizer, named_predictor(predictor)
    return net, tokenizer, predictor_for(model, BaseModel.of(net))
