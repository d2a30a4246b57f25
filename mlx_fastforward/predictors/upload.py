"""A predictor goes to the Hugging Face hub, with a model card."""

from pathlib import Path
from typing import Any

from .. import hub
from ..errors import ConfigError, HubError
from ..files import read_text
from ..version import __version__
from .file import JSON_NAME, TENSORS_NAME, PredictorFile, load_predictor

CARD = "README.md"


def model_card(predictor: PredictorFile, repo: str) -> str:
    """The card of a predictor's repository: what it is for, how to use it, how it was made."""
    base = predictor.base
    from huggingface_hub import ModelCardData

    known = base.name if base.name.count("/") == 1 else None
    data = ModelCardData(
        library_name="mlx",
        base_model=known,
        tags=["mlx", "mlx-fastforward"],
        pipeline_tag="text-generation",
    )
    model = known or "MODEL"
    return f"""---
{data.to_yaml()}
---

# {repo}

Weights for a shorter time to first token with
[mlx-lm](https://github.com/ml-explore/mlx-lm): predictors and compensators that let
mlx-fastforward run the FFNs of {known or base.name} sparsely while it reads a prompt. They are
no model of their own.

```bash
pip install mlx-fastforward
mlx_fastforward chat --model {model} --predictor {repo} --sparsity 0.5
```

| | |
|---|---|
{_table(predictor)}

Any quantisation of the base model will do; another model is refused.
"""


def _table(predictor: PredictorFile) -> str:
    base, info = predictor.base, predictor.details
    rows: list[tuple[str, Any]] = [("base model", f"{base.name} ({base.sizes()})")]
    for kind in ("predictor", "compensator"):
        section = info.get(kind)
        if isinstance(section, dict):
            rows.append((kind, ", ".join(f"{k} {v}" for k, v in section.items())))
    rows.append(("importances", "yes" if predictor.importances else "no"))
    calibration = info.get("calibration")
    if isinstance(calibration, dict):
        rows += [(str(k), v) for k, v in calibration.items()]
    rows.append(("made with", f"mlx-fastforward {__version__}"))
    return "\n".join(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows)


def _cell(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, float) for v in value):
        value = ", ".join(f"{v:.3f}" for v in value)
    return " ".join(str(value).replace("|", "\\|").split())


def upload(folder: Path, repo: str, private: bool = False) -> str:
    """Push a predictor to a repository, made if it is not there; returns its address.

    A README.md in the folder goes along; without one a card is generated, unless the repository
    has one already. Raises ConfigError, FileProblem, PredictorError and HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigError(
            f"{repo!r} is no repository name; expected one like user/name."
        ) from None
    predictor = load_predictor(folder)
    own = folder / CARD
    card = read_text(own) if own.is_file() else None
    with hub.problems(repo, HubError, "uploaded"):
        api = HfApi()
        # None: an organisation may make its repositories private by default.
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        name = address.repo_id
        operations = [
            CommitOperationAdd(n, str(folder / n)) for n in (TENSORS_NAME, JSON_NAME)
        ]
        if card is None and not api.file_exists(name, CARD):
            card = model_card(predictor, name)
        if card is not None:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(name, operations, commit_message="Upload predictor file")
        return str(address)
