import os
from typing import Iterator

import pytest
from hypothesis import settings

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
