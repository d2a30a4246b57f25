"""Failures that a user can act on; the text of each is one line."""


class FastForwardError(Exception):
    """A failure that the user can act on."""


class ConfigError(FastForwardError, ValueError):
    """A setting that cannot work."""


class UnsupportedModel(FastForwardError, ValueError):
    """The model has no gated FFN that this package knows."""


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


def printable(text: str) -> str:
    """One line without the letters that drive a terminal: names from files may hold any."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def brief(e: BaseException, most: int = 300) -> str:
    """What an exception says, in one line; its name if it says nothing."""
    return " ".join(str(e).split())[:most] or type(e).__name__
