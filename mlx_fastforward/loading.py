"""load(): mlx_lm.load, and the model comes back attached."""

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load as mlx_lm_load

from .adapter import Adapter, BaseModel
from .attachment import attach
from .config import PrefillConfig
from .finding import adapter_for, named_adapter


def load(
    path_or_hf_repo: str,
    sparsity: float = 0.5,
    *,
    adapter: Optional[str | Path | Adapter] = None,
    tokenizer_config: Optional[dict[str, Any]] = None,
    model_config: Optional[dict[str, Any]] = None,
    adapter_path: Optional[str] = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: Optional[str] = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple:
    """Load a model that prefills sparsely; a drop-in for ``mlx_lm.load``.

    Args:
        path_or_hf_repo: Local folder or Hugging Face repository.
        sparsity: Share of FFN neurons dropped in sparse blocks; 0 is stock mlx-lm.
        adapter: Trained predictors: a folder or repository, or one loaded already; "none" for
            none. Default: the one beside the model, else the user's newest one for it.
        adapter_path: LoRA weights, as in mlx_lm.
        settings: Further fields of PrefillConfig.

    Returns:
        (model, tokenizer), and the config with ``return_config``.

    Raises:
        ConfigError, AdapterError, UnsupportedModel, and what mlx_lm.load raises.
    """
    config = PrefillConfig.from_kwargs(sparsity=sparsity, **settings)
    searching = adapter is None
    if isinstance(adapter, (str, Path)):
        adapter = named_adapter(adapter)
    model, *rest = mlx_lm_load(
        path_or_hf_repo,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        adapter_path=adapter_path,
        lazy=True,  # an adapter for another model is refused before weights are read
        return_config=return_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    assert isinstance(model, nn.Module)
    if searching:
        adapter = adapter_for(path_or_hf_repo, BaseModel.of(model), revision)
    attach(model, config, adapter=adapter)
    if not lazy:
        mx.eval(model.parameters(), adapter.arrays() if adapter else [])
    return (model, *rest)
