"""Failures that a user can act on; the text of each is one line."""


class FastForwardError(Exception):
    """A failure that the user can act on."""


class ConfigError(FastForwardError, ValueError):
    """A setting that cannot work."""


class UnsupportedModel(FastForwardError, ValueError):
    """Nothing of the model can run sparsely, or it cannot be read in part."""


class PredictorError(FastForwardError, ValueError):
    """A predictor file that is missing, damaged or made for another model."""


class HubError(FastForwardError):
    """What the Hugging Face hub, or the way to it, refused."""


class LoadProblem(FastForwardError):
    """A model that cannot be loaded."""


class TemplateError(FastForwardError):
    """The tokenizer's chat template cannot render the conversation."""


class FileProblem(FastForwardError):
    """A document that cannot be used."""


def check_kind(name: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    """An argument of the library's is what it should be; raises ConfigError."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{name} must be {wanted}; got {brief_repr(value)}.")


def brief_repr(value: object) -> str:
    """A value's type, and the value where it is short."""
    shown = repr(value)
    kind = type(value).__name__
    return f"{kind} {shown}" if len(shown) <= 40 and value is not None else kind


def printable(text: str) -> str:
    """One line without the letters that drive a terminal: names from files may hold any."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def brief(e: BaseException, most: int = 300) -> str:
    """What an exception says, in one line; its name if it says nothing."""
    return " ".join(str(e).split())[:most] or type(e).__name__
