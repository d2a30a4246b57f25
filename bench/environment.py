"""The machine, versions and BLAS behind a figure."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..version import __version__


def describe() -> dict[str, Any]:
    """One flat dict for tables and JSON."""
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "blas": blas(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlx_fastforward": __version__,
    }


def device_name() -> str:
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.machine()


def blas() -> str:
    """The BLAS that CPU matmuls use: Metal and CUDA do not use one."""
    if mx.default_device() == mx.gpu:
        return "none (GPU)"
    if platform.system() == "Darwin":
        return "Accelerate"
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return "unknown"
    # NumPy's wheel brings an OpenBLAS of its own, which mlx does not use.
    found = any("openblas" in m and "numpy.libs" not in m for m in maps)
    return "OpenBLAS (preloaded)" if found else "as in the mlx wheel"


def resident() -> float:
    """Most memory that this process has held so far, bytes; pages of mapped files are in it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
