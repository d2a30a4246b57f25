"""Which part of a predictor a checkpoint's tensor is, told by its name or by the user's map."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..files import expanded
from .files import CheckpointError

PARTS = (
    "predictor.query",
    "predictor.w1",
    "predictor.w2",
    "compensator.w1",
    "compensator.w2",
)
IMPORTANCE = "importance"

# Wrappers that PyTorch puts into names: DataParallel, torch.compile.
WRAPPERS = {"module", "_orig_mod"}
WORDS = {
    "query": "predictor.query",
    "q": "predictor.query",
    **{w: "w1" for w in ("w1", "fc1", "linear1", "wc1", "w_c1")},
    **{w: "w2" for w in ("w2", "fc2", "linear2", "wc2", "w_c2")},
}
ROLES = {"predictor": "predictor", "expert_predictor": "predictor"} | {
    "compensator": "compensator",
    "error_compensator": "compensator",
}
LAYERS = {"layers", "layer", "blocks", "h"}
CANONICAL = re.compile(r"(?:layers\.(\d{1,6}|\*)\.)?([a-z0-9.]+)")


@dataclass(frozen=True)
class Match:
    """Where a tensor belongs.

    Args:
        part: One of PARTS, or "importance".
        layer: None where one tensor holds all layers along its first axis.
        transpose: The user's word on it; None: told by the shape.
        linear: The name says that it is a Linear's weight, stored (out, in).
    """

    part: str
    layer: Optional[int]
    transpose: Optional[bool] = None
    linear: bool = False


class Unknown(Exception):
    """The name speaks of a predictor or compensator, yet says nothing that is known."""


def match(name: str) -> Optional[Match]:
    """Read a tensor's name; None for tensors that are none of a predictor's business.

    Known are ``[...]layers.3.[...]predictor.w1[.weight]`` and ``predictors.3.w1[.weight]``, with
    usual other words for each, and the same without a layer for tensors that hold all layers.
    Raises Unknown for other tensors of a predictor or compensator, such as biases.
    """
    words = [w for w in name.lower().split(".") if w not in WRAPPERS]
    if words and words[-1] in ("importance", "importances"):
        if any(_is_number(w) for w in words) and _layer(words) is None:
            raise Unknown(name)
        return Match(IMPORTANCE, _layer(words))
    roles = [i for i, w in enumerate(words) if w.removesuffix("s") in ROLES]
    if not roles:
        if any("predictor" in w or "compensator" in w for w in words):
            raise Unknown(name)
        return None
    at = roles[-1]
    role = ROLES[words[at].removesuffix("s")]
    before, after = words[:at], words[at + 1 :]
    layer = _layer(before)
    if layer is None and any(w.isdigit() for w in before):  # net.3.predictor
        raise Unknown(name)
    if after and _is_number(after[0]):  # predictors.3.w1
        if layer is not None:
            raise Unknown(name)
        layer, after = _number(after[0]), after[1:]
    linear = after[-1:] == ["weight"]
    if linear:
        after = after[:-1]
    found = WORDS.get(after[0]) if len(after) == 1 else None
    part = found if found and "." in found else f"{role}.{found}"
    if part not in PARTS or not part.startswith(role):
        raise Unknown(name)
    return Match(part, layer, linear=linear)


def _layer(words: list[str]) -> Optional[int]:
    """The number after the last "layers"."""
    pairs = zip(words, words[1:])
    numbers = [b for a, b in pairs if a in LAYERS and _is_number(b)]
    return _number(numbers[-1]) if numbers else None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _number(word: str) -> int:
    """int() of thousands of digits is slow, and nine are wrong enough."""
    return int(word.lstrip("0")[:9] or "0")


@dataclass(frozen=True)
class Rule:
    """One line of a user's map: names that match get ``target``, None leaves them out."""

    pattern: re.Pattern[str]
    target: Optional[str]
    transpose: Optional[bool]

    def apply(self, name: str) -> Optional[Match]:
        """The match for a name that the pattern fits; None leaves the tensor out."""
        if self.target is None:
            return None
        found = self.pattern.fullmatch(name)
        assert found is not None
        text = found.expand(self.target)
        canonical = CANONICAL.fullmatch(text)
        if canonical is None or canonical[2] not in (*PARTS, IMPORTANCE):
            raise CheckpointError(
                f"the map turns {name!r} into {text!r}; expected layers.N.PART, or layers.*.PART "
                f"for all layers in one tensor, PART being one of {', '.join(PARTS)}, {IMPORTANCE}."
            )
        number = canonical[1]
        if number is None and canonical[2] != IMPORTANCE:
            raise CheckpointError(f"the map turns {name!r} into {text!r}: no layers.N.")
        layer = None if number in (None, "*") else int(number)
        return Match(canonical[2], layer, self.transpose, name.endswith(".weight"))


def read_map(path: Path) -> list[Rule]:
    """A user's map, JSON: regular expression -> canonical name.

    The value is the name (``layers.\\\\1.predictor.w1``), or {"name": ..., "transpose": true}, or
    null to leave matching tensors out. The first expression that fits a whole name counts.
    """
    try:
        lines = json.loads(expanded(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"map {path} cannot be read: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"map {path} is not JSON: {e}.") from e
    if not isinstance(lines, dict) or not lines:
        raise CheckpointError(
            f'map {path}: expected an object like {{"net.(\\\\d+).a": "layers.\\\\1.predictor.w1"}}.'
        )
    return [_rule(path, pattern, value) for pattern, value in lines.items()]


def _rule(path: Path, pattern: str, value: Any) -> Rule:
    entry = value if isinstance(value, dict) else {"name": value}
    name, transpose = entry.get("name"), entry.get("transpose")
    if (
        not isinstance(name, (str, type(None)))
        or not isinstance(transpose, (bool, type(None)))
        or "name" not in entry
        or set(entry) - {"name", "transpose"}
    ):
        raise CheckpointError(
            f"map {path}, {pattern!r}: expected a name, null, or "
            '{"name": ..., "transpose": true or false}.'
        )
    try:
        compiled = re.compile(pattern)
        if name is not None:
            compiled.sub(name, "")  # checks its \1 and the like
    except (re.error, IndexError, OverflowError, RecursionError) as e:
        raise CheckpointError(f"map {path}, {pattern!r}: {e}.") from e
    return Rule(compiled, name, transpose)


def place(name: str, rules: list[Rule]) -> Optional[Match]:
    """The user's rules first, then the names that are known; may raise Unknown."""
    for rule in rules:
        if rule.pattern.fullmatch(name):
            return rule.apply(name)
    return match(name)
