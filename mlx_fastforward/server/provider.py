"""mlx-lm's model provider, whose models come back attached."""

import copy
import logging
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.nn as nn
from mlx_lm.server import ModelProvider
from mlx_lm.utils import _download, load, sharded_load

from ..attachment import attach, engine_of
from ..build import with_config
from ..cachefile import fingerprint
from ..config import PrefillConfig
from ..engine import Engine
from ..errors import ConfigError, LoadProblem, UnsupportedModel
from ..hub import problems
from ..loading import check_part, check_stages, take_stage
from ..predictors.base import BaseModel
from ..predictors.file import PredictorFile
from ..predictors.search import named_predictor, predictor_for
from ..predictors.verified import resolved
from ..speculative import Speculative
from .disk import identity
from .names import renamed
from .requests import PRUNED

Prepare = Callable[[nn.Module], None]
MakeReader = Callable[[nn.Module, Any], Optional[Speculative]]


class Provider(ModelProvider):
    """Loads on demand as mlx-lm does; every sparsity that is asked for has its own engine.

    Args:
        cli_args: mlx_lm.server's, with sparsity ("auto" or a number) and predictor.
        prepare: Called with each model that was attached: tunes it.
        make_reader: Returns who reads long prompts of a model in part, None where nobody does.
    """

    def __init__(
        self,
        cli_args: Namespace,
        prepare: Prepare = lambda model: None,
        make_reader: MakeReader = lambda model, tokenizer: None,
    ):
        super().__init__(cli_args)
        self.model: Any  # mlx-lm begins with None
        self.prepare = prepare
        self.make_reader = make_reader
        self.reader: Optional[Speculative] = None
        self.predictor: Optional[PredictorFile] = None
        # of the model, and of it with its predictors, once asked for
        self.marks: Optional[tuple[str, str]] = None
        self.engines: dict[float, Engine] = {}
        self._checked: set[str] = set()
        self._copied: Optional[tuple[Any, Any]] = None
        self.loaded = threading.Event()  # or failed
        self.failure: Optional[BaseException] = None

    def load_default(self) -> None:
        """Runs in the generation thread; ``loaded`` tells the others."""
        try:
            super().load_default()
        except BaseException as e:
            self.failure = e
            raise
        finally:
            self.loaded.set()

    def _load(
        self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None
    ) -> None:
        with problems(model_path, LoadProblem):
            try:
                if self.tensor_group is not None:
                    check_part(model_path, self.cli_args.trust_remote_code)
                run = renamed(ModelProvider._load, sharded_load=self._load_shared)
                run(self, model_path, adapter_path, draft_model_path)
                self._attach(model_path)
            except Exception:
                self.reset()
                raise

    def _load_shared(self, path: str, **settings: Any) -> tuple:
        """mlx-lm's sharded_load; what is dealt out by layers comes whole, to be attached first."""
        if self.pipeline_group is None:
            return sharded_load(path, **settings)
        del settings["pipeline_group"], settings["tensor_group"]
        found = load(path, lazy=True, **settings)
        check_stages(found[0])
        return found

    def reset(self) -> None:
        super().reset()
        self.engines, self.predictor, self.marks = {}, None, None
        self.reader = None

    def _attach(self, model_path: str) -> None:
        model, named = self.model, self.cli_args.predictor
        if named is None:
            self.predictor = predictor_for(model_path, BaseModel.of(model))
        else:
            self.predictor = named_predictor(named)
        skip = self.cli_args.prune_tokens
        asked = {"prune_tokens": skip}
        value, chosen = resolved(self.cli_args.sparsity, self.predictor, asked)
        config = PrefillConfig.from_kwargs(sparsity=value, prune_tokens=skip)
        attach(model, config, predictor=self.predictor).chosen = chosen
        if self.pipeline_group is not None:
            take_stage(model)
        self.prepare(model)
        self.reader = self._reader()

    def _reader(self) -> Optional[Speculative]:
        """None, and a line in the log, where a model that came later cannot be read in part."""
        try:
            return self.make_reader(self.model, self.tokenizer)
        except (ConfigError, UnsupportedModel) as e:
            if not self.loaded.is_set():
                raise
            logging.warning(f"prompts are read whole: {e}")
            return None

    def identity(self, sparsity: float) -> str:
        """What a prefix of the loaded model at a sparsity is, on disk."""
        engine, args = self.engine(sparsity), self.cli_args
        how = {n: getattr(args, n, None) for n in ("kv_bits", "kv_group_size")}
        how["draft"] = self.model_key and self.model_key[2]
        if self.marks is None:
            extra = self.predictor.arrays() if self.predictor else []
            self.marks = fingerprint(self.model), fingerprint(self.model, extra)
        if engine is None:
            return identity(self.marks[0], how)
        return identity(self.marks[1], how | engine.settings())

    def engine(self, sparsity: Optional[float]) -> Optional[Engine]:
        """The loaded model's engine at a sparsity; None where that is dense.

        Args:
            sparsity: None for what the server was started with.
        """
        base = engine_of(self.model)
        assert base is not None
        if sparsity in (None, base.config.sparsity or PRUNED):
            return base if base.sparse else None
        if sparsity == 0:
            return None
        if sparsity not in self.engines:
            config = replace(base.config, sparsity=sparsity)
            self.engines[sparsity] = with_config(base, config, self.predictor)
        engine = self.engines[sparsity]
        return engine if engine.sparse else None

    def check(
        self, model: str, adapter: Optional[str] = None, draft: Optional[str] = None
    ) -> None:
        """Fetch what a request names before anybody waits for it; raises LoadProblem."""
        names = {self._model_map.get(model, model)}
        if draft is not None:
            names.add(self._draft_model_map.get(draft, draft))
        for name in names - self._checked - {None}:
            with problems(name, LoadProblem):
                folder = _download(name)
            if not (Path(folder) / "config.json").is_file():
                raise LoadProblem(f"{name} holds no config.json.")
            self._checked.add(name)
        if adapter is not None and not Path(adapter, "adapters.safetensors").is_file():
            raise LoadProblem(f"{adapter} holds no adapters.safetensors.")

    def own_tokenizer(self) -> Any:
        """A copy of the loaded tokenizer, for another thread: two cannot share one."""
        if self.tokenizer is None:
            raise LoadProblem("no model is loaded.")
        if self._copied is None or self._copied[0] is not self.tokenizer:
            self._copied = (self.tokenizer, copy.deepcopy(self.tokenizer))
        return self._copied[1]
