"""The bundled model, a document that fits its context, and questions about it."""

from pathlib import Path

HERE = Path(__file__).parent
NAME = "demo"  # as --model
MODEL = HERE / "model"
DOCUMENT = HERE / "document.txt"
QUESTIONS = HERE / "questions.txt"


def questions() -> list[tuple[str, str]]:
    """(question, answer) pairs about the document."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line.strip()]
    return [(q, a) for q, a in pairs]
