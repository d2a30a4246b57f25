"""Reading layer by layer changes nothing but what is heard of it, and when it can be stopped."""

import mlx.core as mx
import mlx.nn as nn
import models
import pytest
from models import settings, tiny, token_ids

from mlx_fastforward import attach
from mlx_fastforward.prefill import by_layers

IDS = token_ids(61)


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_to_the_last_bit(name: str, sparse: bool) -> None:
    """Each layer but the last says when it is done, on a GPU when the next one is queued."""
    model, heard = tiny(name), []
    if sparse:
        attach(model, settings())
    before, wanted = classes(model), models.prefill(model, IDS)
    with by_layers(model, lambda n, share: heard.append((n, share)), least=8):
        got = models.prefill(model, IDS)
        models.assert_close(got, wanted, 0)
        got = models.prefill(model, IDS[:1], got[1])  # a decode step
    models.assert_close(got, models.prefill(model, IDS[:1], wanted[1]), 0)
    done = (1, 2, 3) if mx.default_device() == mx.cpu else (1, 2)
    assert heard == [(61, n / 4) for n in done] and classes(model) == before


def test_a_stop_between_layers() -> None:
    model, kinds = tiny("llama"), classes(tiny("llama"))

    def stop(tokens: int, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), by_layers(model, stop, least=8):
        models.prefill(model, IDS)
    assert classes(model) == kinds
