"""The machine behind a saved result: chip, cores, memory, system, power and heat; no names, no paths."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx

from .environment import blas, device_name

UNKNOWN = "unknown"
THERMAL = ("nominal", "fair", "serious", "critical")  # NSProcessInfoThermalState


def machine() -> dict[str, Any]:
    """What results/schema.json calls a machine; what cannot be found out is None or unknown."""
    return {
        "chip": device_name(),
        "model": _printed("sysctl", "-n", "hw.model") or None,
        "cores": os.cpu_count(),
        "gpu_cores": _gpu_cores(),
        "memory_gb": memory_gb(),
        "os": system(),
        "backend": backend(),
        "blas": blas(),
        "power": power(),
    }


def backend() -> str:
    """What mlx computes with by default: metal, cuda or cpu."""
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def system() -> str:
    """macOS by its own version, which is the one that people know."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def power() -> str:
    """mains, battery or unknown: laptops are slower on battery."""
    if sys.platform == "darwin":
        said = _printed("pmset", "-g", "batt")
        named = (("AC Power", "mains"), ("Battery Power", "battery"))
        return next((word for text, word in named if text in said), UNKNOWN)
    files = Path("/sys/class/power_supply").glob("*/online")
    online = [text for f in files if (text := _read(f))]
    if not online:
        return UNKNOWN
    return "mains" if "1" in online else "battery"


def thermal() -> str:
    """How hot the machine is, in macOS's words; elsewhere the hottest sensor, or unknown."""
    if sys.platform == "darwin":
        try:
            return THERMAL[_thermal_state()]
        except (OSError, AttributeError, IndexError):
            return UNKNOWN
    files = Path("/sys/class/thermal").glob("thermal_zone*/temp")
    degrees = [int(text) / 1000 for f in files if (text := _read(f)).isdigit()]
    return f"{max(degrees):.0f} °C" if degrees else UNKNOWN


def _thermal_state() -> int:
    """[[NSProcessInfo processInfo] thermalState]: pmset tells it to administrators only."""
    ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
    objc = ctypes.CDLL("/usr/lib/libobjc.dylib")
    objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p

    def send(to: Any, message: bytes, result: Any) -> Any:
        kind = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p)
        selector = objc.sel_registerName(message)
        return kind(("objc_msgSend", objc))(to, selector)

    info = send(objc.objc_getClass(b"NSProcessInfo"), b"processInfo", ctypes.c_void_p)
    return int(send(info, b"thermalState", ctypes.c_long))


def _gpu_cores() -> Optional[int]:
    """One chip name stands for several sizes of GPU."""
    found = re.search(
        r'"gpu-core-count" = (\d+)', _printed("ioreg", "-rc", "AGXAccelerator", "-d1")
    )
    return int(found[1]) if found else None


def _printed(*command: str) -> str:
    """What a macOS tool prints; nothing elsewhere."""
    if sys.platform != "darwin":
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
