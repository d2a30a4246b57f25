import os
import signal
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
from hypothesis import settings

# On a CPU mlx would compile each fused function with a C++ compiler, for a second or so; what an
# installed wheel does in CI has that on.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

# transformers, which mlx-lm imports, would import much of torch where it is; only tests need that
sys.modules["torch"] = None  # type: ignore[assignment]
import mlx_lm  # noqa: E402, F401

del sys.modules["torch"]

# A first example compiles kernels, and shared machines stall: no time limits.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of the tests' own: what lies in the user's would be found, and used."""
    before = os.environ.get("MLX_FASTFORWARD_HOME")
    os.environ["MLX_FASTFORWARD_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    if before is None:
        del os.environ["MLX_FASTFORWARD_HOME"]
    else:
        os.environ["MLX_FASTFORWARD_HOME"] = before


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C interrupts: a test run in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads in no time; its answers are gibberish."""
    import models

    model = models.tiny("llama", vocab=4096, tie_word_embeddings=False)
    return models.save_folder(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_folder: Path) -> Iterator[Any]:
    """A running server of that model; stopped, it has nothing to complain of."""
    from serving import Server

    made = Server(tiny_folder)
    yield made
    code, err = made.stop()
    assert code == 0 and "Traceback" not in err, err
