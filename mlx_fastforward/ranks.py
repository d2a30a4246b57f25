"""Several processes under mlx.launch, one part of the model each. Nothing heavy is imported here.

Every process runs the same program on the same prompt and gets the same tokens; what would tell them
apart (clocks, files, chance) must not decide anything. The first one, rank 0, speaks for all.
"""

import os
from typing import Any, Optional

from .errors import ConfigError

NAMES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # of mlx.launch and of MPI


def rank() -> Optional[int]:
    """This process's number among those that were launched together; None where it is alone."""
    for name in NAMES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def several() -> bool:
    """Whether other processes hold parts of the model."""
    return rank() is not None and group().size() > 1


def group() -> Any:
    """mlx's group of all processes; raises ConfigError where mlx.launch was told to start one."""
    import mlx.core as mx

    try:
        return mx.distributed.init()
    except RuntimeError as e:
        if "parse_error" not in str(e):
            raise
        raise ConfigError(
            "mlx.launch started one process, expected two or more: it takes -n for its own wherever "
            "that stands; write --num-trials for bench's."
        ) from None


def is_lost_peer(e: BaseException) -> bool:
    """Whether a collective operation failed for want of another process."""
    return str(e).startswith(("[ring]", "[jaccl]"))


def agreed(number: int) -> int:
    """Rank 0's number, below 2**31, in every process."""
    import mlx.core as mx

    mine = number if group().rank() == 0 else 0
    total: Any = mx.distributed.all_sum(mx.array(mine, mx.int32), stream=mx.cpu)
    return int(total.item())


def check_divisible(heads: Any, widths: list[int]) -> None:
    """Refuse a model whose heads or neurons cannot be dealt out equally; raises ConfigError."""
    n = group().size()
    counts = {"attention heads": heads.queries, "key-value heads": heads.keys}
    counts |= {f"FFN neurons of layer {i}": f for i, f in enumerate(widths)}
    for what, count in counts.items():
        if count % n:
            raise ConfigError(
                f"{count:,} {what} cannot be shared equally by {n} processes; "
                "launch another number of them."
            )
