import subprocess
import sys

# --help and --version should not wait for mlx-lm; names are loaded as they are used.
SHOW = """
import sys
sys.modules["torch"] = None  # transformers would import it, which takes longest
import mlx_fastforward as ff
assert "mlx_lm" not in sys.modules
for name in ff.__all__:
    assert name == "__version__" or callable(getattr(ff, name)), name
assert not hasattr(ff, "no_such_name")
"""


def test_importing_the_package_is_cheap_and_every_public_name_is_there() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
