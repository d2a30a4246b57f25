import subprocess
import sys

import pytest

SHOW = """
import mlx_fastforward as ff
for name in {first!r}, *ff.__all__:
    value = getattr(ff, name)
    assert name == "__version__" or callable(value), (name, value)
"""


@pytest.mark.parametrize("first", ["load", "attach", "stream_generate"])
def test_public_names_whichever_is_used_first(first: str) -> None:
    """Importing a submodule must not put it in the place of a function of its name."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(first=first)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_cheap() -> None:
    """--help and --version should not wait for mlx-lm."""
    show = "import sys, mlx_fastforward; sys.exit('mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", show]).returncode == 0
