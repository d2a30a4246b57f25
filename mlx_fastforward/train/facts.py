"""The one wording of planted facts and quotes: what `train` fits on and `eval` asks."""

NAMES = (
    "Alma Boris Clara Dmitri Edith Felix Greta Hugo Irene Jasper Katrin Leopold Mabel Nestor "
    "Olive Percy Quentin Rosalind Silas Tabitha Ulric Verity Wendell Xenia Yorick Zelda"
).split()
WORDS = (
    "apple table river candle garden mirror window silver thunder basket feather copper lantern "
    "pepper saddle ribbon castle forest meadow harbor kettle violin pillow hammer ladder needle "
    "blanket button pocket bottle anchor barrel"
).split()
CODE, WORD = "secret code", "favourite word"
QUOTE = "Complete this sentence from the text:"


def planted(kind: str, name: str, value: str) -> str:
    """The sentence that is put into a text."""
    return f"The {kind} of {name} is {value}."


def asked(kind: str, name: str) -> str:
    """The question about it."""
    return f"What is the {kind} of {name}?"
