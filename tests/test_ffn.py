"""The gathered FFN against eq. 15-18, for every kind of weight that mlx-lm can hold."""

from typing import Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.models import gemma2, llama, phi3
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_fastforward.config import STRATEGIES
from mlx_fastforward.model.families import FAMILIES
from mlx_fastforward.model.ffn import GatedFFN
from mlx_fastforward.model.gather import transposed
from mlx_fastforward.model.linear import rows, unsupported
from mlx_fastforward.neurons.compensators import Estimate

D, F, TOKENS, BLOCKS = 128, 256, 5, 2
LOOSE = {mx.float32: 1e-5, mx.float16: 3e-3, mx.bfloat16: 2e-2}
AFFINE = [("affine", g, b) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
MODES = [*AFFINE, ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def llama_mlp(d: int = D, f: int = F, bias: bool = False) -> nn.Module:
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=d,
        num_hidden_layers=1,
        intermediate_size=f,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=8,
        mlp_bias=bias,
    )
    return llama.MLP(args)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "llama": llama_mlp,
    "phi3": lambda: phi3.MLP(D, F),
    "gemma2": lambda: gemma2.MLP(D, F),
}


def randomised(mlp: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough for the gates to bend, biases that are not zero."""
    key = mx.random.key(seed)

    def fill(w: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        scale = 1.0 if w.ndim == 1 else 2 / w.shape[1] ** 0.5
        return scale * mx.random.normal(w.shape, key=now)

    mlp.update(tree_map(fill, mlp.parameters()))
    return mlp


def with_lora(mlp: nn.Module, rank: int = 4, scale: float = 3.0) -> nn.Module:
    """LoRA over every projection; lora_b starts at zero, which would hide mistakes."""
    for i, name in enumerate(list(mlp.children())):
        lora = LoRALinear.from_base(mlp[name], r=rank, scale=scale)
        shape = lora.lora_b.shape
        lora.lora_b = 0.1 * mx.random.normal(shape, key=mx.random.key(100 + i))
        mlp[name] = lora
    mlp.eval()
    return mlp


def float64(w: mx.array) -> np.ndarray:
    return np.array(w.astype(mx.float32)).astype(np.float64)


def effective(linear: nn.Module) -> tuple[np.ndarray, Optional[np.ndarray]]:
    """Weight (out, in) and bias, with quantisation and LoRA multiplied out."""
    if isinstance(linear, LoRALinear):
        w, bias = effective(linear.linear)
        delta = float64(linear.lora_a) @ float64(linear.lora_b)
        return w + linear.scale * delta.T, bias
    w = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        w = mx.dequantize(
            w,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    return float64(w), float64(linear.bias) if "bias" in linear else None


def expected(mlp: nn.Module, x: mx.array, neurons: Optional[list[int]]) -> np.ndarray:
    """One block (n, d) through the reference."""
    down, down_bias = effective(mlp.down_proj)
    if isinstance(mlp, phi3.MLP):
        both, _ = effective(mlp.gate_up_proj)
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        gate_bias = up_bias = None
    else:
        (gate, gate_bias), (up, up_bias) = map(effective, (mlp.gate_proj, mlp.up_proj))
    return reference.gated_ffn(
        float64(x),
        gate,
        up,
        down,
        neurons,
        reference.gelu_tanh if isinstance(mlp, gemma2.MLP) else reference.silu,
        gate_bias,
        up_bias,
        down_bias,
    )


def inputs(d: int = D, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((BLOCKS, TOKENS, d), key=mx.random.key(7)).astype(dtype)


def picks(f: int, keep: int, seed: int = 3) -> list[list[int]]:
    """Other neurons for each block, in no order."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(f)[:keep].tolist() for _ in range(BLOCKS)]


def error(found: mx.array, wanted: np.ndarray) -> float:
    """Relative to the size of the whole output."""
    assert found.shape == wanted.shape
    difference = np.linalg.norm(float64(found) - wanted)
    return float(difference / np.linalg.norm(wanted))


def check(mlp: nn.Module, family: str, dtype: mx.Dtype = mx.float32) -> None:
    """Few, half and all neurons against the reference, every strategy; all also against mlx-lm.

    A quantised projection that is stored is rounded to 8 bits once more.
    """
    ffns = [GatedFFN(mlp, FAMILIES[family], strategy) for strategy in STRATEGIES]
    d, f = ffns[0].shape
    assert ffns[0].unsupported() is None
    x, packed = inputs(d, dtype), "scales" in base_of(mlp.down_proj)
    for ffn in ffns:
        rounded = packed and ffn.strategy == "stored"
        loose = max(LOOSE[dtype], 8e-3 if rounded else 0)
        for keep in (1, 7, f // 2, f):
            chosen = picks(f, keep)
            y = ffn.sparse(x, mx.array(chosen))
            assert y.dtype == dtype
            wanted = np.stack([expected(mlp, b, i) for b, i in zip(x, chosen)])
            assert error(y, wanted) < loose
        everything = mx.broadcast_to(mx.arange(f), (BLOCKS, f))
        assert error(ffn.sparse(x, everything), float64(mlp(x))) < loose


def base_of(linear: nn.Module) -> nn.Module:
    return getattr(linear, "linear", linear)


@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_stored_follows_the_weights(bits: Optional[int]) -> None:
    mlp, other = randomised(llama_mlp()), randomised(llama_mlp(), 8)
    if bits:
        nn.quantize(mlp, 64, bits)
        nn.quantize(other, 64, bits)
    ffn, x, chosen = GatedFFN(mlp, FAMILIES["llama"], "stored"), inputs(), picks(F, 40)
    before = ffn._stored, ffn.sparse(x, mx.array(chosen))
    kept = ffn._stored["parts"]
    ffn.sparse(x, mx.array(chosen))
    assert ffn._stored["parts"] is kept
    mlp.down_proj = other.down_proj
    wanted = np.stack([expected(mlp, b, i) for b, i in zip(x, chosen)])
    assert error(ffn.sparse(x, mx.array(chosen)), wanted) < 8e-3
    assert error(before[1], wanted) > 0.1


@pytest.mark.parametrize("dtype", LOOSE, ids=str)
@pytest.mark.parametrize("family", MAKE)
def test_float_weights(family: str, dtype: mx.Dtype) -> None:
    mlp = randomised(MAKE[family]())
    mlp.set_dtype(dtype)
    check(mlp, family, dtype)


@pytest.mark.parametrize("mode, group, bits", MODES)
def test_quantised_weights(mode: str, group: int, bits: int) -> None:
    mlp = randomised(llama_mlp())
    nn.quantize(mlp, group, bits, mode=mode)
    assert all(type(m) is nn.QuantizedLinear for m in mlp.children().values())
    check(mlp, "llama")


@pytest.mark.parametrize("mode, group, bits", [MODES[7], *MODES[-3:]])
@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_quantised_fused_and_gelu(
    family: str, mode: str, group: int, bits: int
) -> None:
    mlp = randomised(MAKE[family]())
    nn.quantize(mlp, group, bits, mode=mode)
    check(mlp, family)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_biases(bits: Optional[int]) -> None:
    mlp = randomised(llama_mlp(bias=True))
    if bits:
        nn.quantize(mlp, 64, bits)
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        assert float(mx.abs(linear.bias).min()) > 0
    check(mlp, "llama")


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_bias_on_one_projection(name: str) -> None:
    mlp = randomised(llama_mlp(bias=True))
    for other in {"gate_proj", "up_proj", "down_proj"} - {name}:
        del mlp[other]["bias"]
    check(mlp, "llama")


@pytest.mark.parametrize("mode, group, bits", [(None, 0, 0), MODES[7], *MODES[-3:]])
@pytest.mark.parametrize("family", MAKE)
def test_lora(family: str, mode: Optional[str], group: int, bits: int) -> None:
    mlp = randomised(MAKE[family]())
    if mode:
        nn.quantize(mlp, group, bits, mode=mode)
    check(with_lora(mlp), family)


@pytest.mark.parametrize("bits", [None, 4])
def test_lora_over_biases(bits: Optional[int]) -> None:
    mlp = randomised(llama_mlp(bias=True))
    if bits:
        nn.quantize(mlp, 32, bits)
    check(with_lora(mlp), "llama")


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_lora_on_one_projection(name: str) -> None:
    mlp = randomised(llama_mlp())
    lora = LoRALinear.from_base(mlp[name], r=8, scale=10.0)
    lora.lora_b = mx.random.normal(lora.lora_b.shape, key=mx.random.key(4))
    mlp[name] = lora
    check(mlp, "llama")


def test_lora_in_half_precision() -> None:
    """LoRA weights are float32 over a float16 model, as mlx-lm makes them."""
    mlp = randomised(llama_mlp())
    mlp.set_dtype(mx.float16)
    check(with_lora(mlp), "llama", mx.float16)


@pytest.mark.parametrize("d, f", [(36, 100), (33, 65), (32, 48)])
def test_odd_sizes(d: int, f: int) -> None:
    check(randomised(llama_mlp(d, f)), "llama")


SMALL = randomised(llama_mlp(32, 64))


@settings(max_examples=25)
@given(st.data())
def test_any_neurons(data: st.DataObject) -> None:
    """Any number of them, in any order, other ones for each block."""
    ffn = GatedFFN(SMALL, FAMILIES["llama"])
    keep = data.draw(st.integers(1, 64))
    neuron = st.integers(0, 63)
    one = st.lists(neuron, min_size=keep, max_size=keep, unique=True)
    chosen = [data.draw(one), data.draw(one)]
    x = inputs(32)
    y = ffn.sparse(x, mx.array(chosen))
    wanted = np.stack([expected(SMALL, b, i) for b, i in zip(x, chosen)])
    assert error(y, wanted) < 1e-5


def estimate(f: int, dtype: mx.Dtype = mx.float32) -> Estimate:
    """Guesses about as large as the activations."""
    phi = mx.random.normal((BLOCKS, TOKENS, 3), key=mx.random.key(8))
    return Estimate(phi.astype(dtype), mx.random.normal((f, 3), key=mx.random.key(9)))


def guessed(mlp: nn.Module, guess: Estimate, chosen: list[list[int]]) -> np.ndarray:
    """What the guesses for the neurons that were not chosen add: of each block its own."""
    down, _ = effective(mlp.down_proj)
    none = np.zeros((TOKENS, len(guess.u)))
    return np.stack(
        [
            reference.with_guesses(none, phi, float64(guess.u), kept) @ down.T
            for phi, kept in zip(float64(guess.phi), chosen)
        ]
    )


def completed(
    mlp: nn.Module, x: mx.array, guess: Estimate, chosen: list[list[int]]
) -> np.ndarray:
    exact = np.stack([expected(mlp, b, i) for b, i in zip(x, chosen)])
    return exact + guessed(mlp, guess, chosen)


def check_guess(mlp: nn.Module, family: str, dtype: mx.Dtype = mx.float32) -> None:
    """W_S z_S and the guesses for the others, where S is each block's own choice."""
    ffn = GatedFFN(mlp, FAMILIES[family])
    d, f = ffn.shape
    x, guess = inputs(d, dtype), estimate(f, dtype)
    chosen = picks(f, f // 2)
    wanted = completed(mlp, x, guess, chosen)
    y = ffn.sparse(x, mx.array(chosen), guess)
    assert y.dtype == dtype
    assert error(y, wanted) < LOOSE[dtype]
    assert error(ffn.sparse(x, mx.array(chosen)), wanted) > 0.1


@pytest.mark.parametrize("dtype", LOOSE, ids=str)
@pytest.mark.parametrize("family", MAKE)
def test_guesses_stand_in_for_dropped_neurons(family: str, dtype: mx.Dtype) -> None:
    mlp = randomised(MAKE[family]())
    mlp.set_dtype(dtype)
    check_guess(mlp, family, dtype)


@pytest.mark.parametrize("mode, group, bits", [MODES[7], *MODES[-3:]])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_guesses_in_quantised_layers(
    family: str, mode: str, group: int, bits: int
) -> None:
    mlp = randomised(MAKE[family]())
    nn.quantize(mlp, group, bits, mode=mode)
    check_guess(mlp, family)


@pytest.mark.parametrize("bits", [None, 4])
def test_guesses_under_biases_and_lora(bits: Optional[int]) -> None:
    """They pass through LoRA like activations, and the bias counts once."""
    mlp = randomised(llama_mlp(bias=True))
    if bits:
        nn.quantize(mlp, 64, bits)
    check_guess(with_lora(mlp), "llama")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_large_features_under_a_bias(dtype: mx.Dtype) -> None:
    """What the guesses add is small per feature: it must not be rounded with the bias."""
    mlp = randomised(llama_mlp(bias=True))
    mlp.set_dtype(dtype)
    guess = estimate(F, dtype)
    guess = Estimate(100 * guess.phi, guess.u / 100)
    ffn, x, chosen = GatedFFN(mlp, FAMILIES["llama"]), inputs(D, dtype), picks(F, 99)
    y = ffn.sparse(x, mx.array(chosen), guess)
    assert error(y, completed(mlp, x, guess, chosen)) < LOOSE[dtype]


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_keeping_all_is_dense_whatever_is_guessed(
    bits: Optional[int], bias: bool, lora: bool, scale: float
) -> None:
    mlp = randomised(llama_mlp(bias=bias))
    if bits:
        nn.quantize(mlp, 64, bits)
    if lora:
        with_lora(mlp)
    x, guess = inputs(), estimate(F)
    guess = Estimate(guess.phi, scale * guess.u)
    everything = mx.broadcast_to(mx.arange(F), (BLOCKS, F))
    y = GatedFFN(mlp, FAMILIES["llama"]).sparse(x, everything, guess)
    dense, none_kept = float64(mlp(x)), guessed(mlp, guess, [[]] * BLOCKS)
    off = np.linalg.norm(float64(y) - dense)
    assert off < 1e-5 * max(np.linalg.norm(dense), np.linalg.norm(none_kept))


def test_blocks_do_not_see_each_other() -> None:
    ffn = GatedFFN(SMALL, FAMILIES["llama"])
    x = inputs(32)
    a, b = picks(64, 9)
    both = ffn.sparse(x, mx.array([a, b]))
    for i, neurons in enumerate((a, b)):
        alone = ffn.sparse(x[i : i + 1], mx.array([neurons]))
        assert mx.allclose(both[i], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("bits", [None, 4])
def test_activations(family: str, bits: Optional[int]) -> None:
    mlp = randomised(MAKE[family]())
    if bits:
        nn.quantize(mlp, 64, bits)
    ffn = GatedFFN(mlp, FAMILIES[family])
    x = inputs()
    z = ffn.activations(x)
    assert z.shape == (BLOCKS, TOKENS, F)
    down, _ = effective(mlp.down_proj)
    wanted = np.stack([expected(mlp, b, None) for b in x])
    assert error(mx.array(float64(z) @ down.T), wanted) < 1e-5
    same, y = ffn.activations_and_output(x)
    assert mx.array_equal(same, z)
    assert mx.array_equal(y, mlp(x))


@pytest.mark.parametrize("bits", [None, 4])
def test_no_dense_tokens(bits: Optional[int]) -> None:
    """A middle chunk without head, tail and probes."""
    mlp = randomised(llama_mlp())
    if bits:
        nn.quantize(mlp, 64, bits)
    ffn = GatedFFN(mlp, FAMILIES["llama"])
    z, y = ffn.activations_and_output(mx.zeros((3, 0, D)))
    mx.eval(z, y)
    assert (z.shape, y.shape) == ((3, 0, F), (3, 0, D))


@pytest.mark.parametrize("mode, group, bits", [(None, 0, 0), *MODES])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_shape(family: str, mode: Optional[str], group: int, bits: int) -> None:
    mlp = MAKE[family]()
    if mode:
        nn.quantize(mlp, group, bits, mode=mode)
    assert GatedFFN(mlp, FAMILIES[family]).shape == (D, F)
    assert GatedFFN(with_lora(mlp), FAMILIES[family]).shape == (D, F)


@pytest.mark.parametrize("d, f", [(8, 3), (64, 100), (24, 1), (7, 5), (1, 9), (12, 16)])
def test_transposed(d: int, f: int) -> None:
    w = mx.random.normal((d, f), key=mx.random.key(0))
    t = transposed(w)
    assert np.array_equal(np.array(t), np.array(w).T)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_rows_linear(bits: Optional[int], lora: bool) -> None:
    linear = randomised(llama_mlp(bias=True)).gate_proj
    if bits:
        linear = nn.QuantizedLinear.from_linear(linear, 64, bits)
    if lora:
        linear = LoRALinear.from_base(linear)
        linear.lora_b = mx.random.normal(linear.lora_b.shape, key=mx.random.key(2))
    x = inputs()[0]
    rows = mx.array([200, 3, 3, 0, 255])
    assert mx.allclose(rows(linear, x, rows), linear(x)[:, rows], atol=1e-4)


@pytest.mark.parametrize("mode, group, bits", [(None, 0, 0), *MODES])
@pytest.mark.parametrize("lora", [False, True])
def test_down_norms(lora: bool, mode: Optional[str], group: int, bits: int) -> None:
    mlp = randomised(llama_mlp())
    if mode:
        nn.quantize(mlp, group, bits, mode=mode)
    if lora:
        with_lora(mlp)
    norms = GatedFFN(mlp, FAMILIES["llama"]).down_norms()
    down, _ = effective(mlp.down_proj)
    assert norms.dtype == mx.float32
    assert np.allclose(np.array(norms), reference.column_norms(down), rtol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_down_norms_of_half_precision(dtype: mx.Dtype) -> None:
    """Squares of float16 weights overflow; the norms must not."""
    mlp = randomised(llama_mlp(64, 32))
    mlp.down_proj.weight = 300 * mlp.down_proj.weight
    mlp.set_dtype(dtype)
    norms = GatedFFN(mlp, FAMILIES["llama"]).down_norms()
    down, _ = effective(mlp.down_proj)
    assert np.allclose(np.array(norms), reference.column_norms(down), rtol=1e-5)


def new_weight(mlp: nn.Module) -> None:
    mlp.down_proj.weight = 2 * mlp.down_proj.weight


def quantised(mlp: nn.Module) -> None:
    nn.quantize(mlp, 32, 2)


def lora_added(mlp: nn.Module) -> None:
    with_lora(mlp)


def lora_b(mlp: nn.Module) -> None:
    mlp.down_proj.lora_b = 5 * mlp.down_proj.lora_b


def lora_a(mlp: nn.Module) -> None:
    mlp.down_proj.lora_a = 5 * mlp.down_proj.lora_a


def lora_scale(mlp: nn.Module) -> None:
    mlp.down_proj.scale = 50.0


def weight_under_lora(mlp: nn.Module) -> None:
    mlp.down_proj.linear.weight = 2 * mlp.down_proj.linear.weight


def scales(mlp: nn.Module) -> None:
    mlp.down_proj.scales = 2 * mlp.down_proj.scales


def biases(mlp: nn.Module) -> None:
    """The zero points of a quantised weight."""
    mlp.down_proj.biases = mlp.down_proj.biases - 0.2


CHANGES = [
    (new_weight, None),
    (quantised, None),
    (lora_added, None),
    (lora_b, lora_added),
    (lora_a, lora_added),
    (lora_scale, lora_added),
    (weight_under_lora, lora_added),
    (scales, quantised),
    (biases, quantised),
]


@pytest.mark.parametrize("change, before", CHANGES)
def test_down_norms_follow_the_weights(
    change: Callable[[nn.Module], None], before: Optional[Callable[[nn.Module], None]]
) -> None:
    """LoRA and quantisation applied after attach() are seen."""
    mlp = randomised(llama_mlp(32, 64))
    if before:
        before(mlp)
    ffn = GatedFFN(mlp, FAMILIES["llama"])
    old = np.array(ffn.down_norms())
    change(mlp)
    wanted = reference.column_norms(effective(mlp.down_proj)[0])
    assert not np.allclose(old, wanted, rtol=1e-2)
    assert np.allclose(np.array(ffn.down_norms()), wanted, rtol=1e-4)


def test_down_norms_are_kept() -> None:
    ffn = GatedFFN(randomised(llama_mlp(32, 64)), FAMILIES["llama"])
    assert ffn.down_norms() is ffn.down_norms()


@pytest.mark.parametrize("change, before", CHANGES)
def test_guesses_follow_the_weights(
    change: Callable[[nn.Module], None], before: Optional[Callable[[nn.Module], None]]
) -> None:
    mlp = randomised(llama_mlp(32, 64))
    if before:
        before(mlp)
    ffn, x, guess = GatedFFN(mlp, FAMILIES["llama"]), inputs(32), estimate(64)
    chosen = picks(64, 20)
    mx.eval(ffn.sparse(x, mx.array(chosen), guess))
    old = guessed(mlp, guess, chosen)
    change(mlp)
    assert error(mx.array(old), guessed(mlp, guess, chosen)) > 1e-2
    y = ffn.sparse(x, mx.array(chosen), guess)
    assert error(y, completed(mlp, x, guess, chosen)) < 1e-5


def test_guesses_follow_u() -> None:
    ffn, x, chosen = GatedFFN(SMALL, FAMILIES["llama"]), inputs(32), picks(64, 20)
    first = estimate(64)
    for guess in (first, Estimate(first.phi, 2 * first.u)):
        y = ffn.sparse(x, mx.array(chosen), guess)
        assert error(y, completed(SMALL, x, guess, chosen)) < 1e-5


def test_guesses_follow_the_precision_of_the_tokens() -> None:
    mlp = randomised(llama_mlp())
    mlp.set_dtype(mx.float16)
    ffn, u = GatedFFN(mlp, FAMILIES["llama"]), estimate(F).u
    for dtype in (mx.float32, mx.float16):
        guess = Estimate(estimate(F, dtype).phi, u)
        y = ffn.sparse(inputs(D, dtype), mx.array(picks(F, 9)), guess)
        assert y.dtype == dtype


def uses_of_down(ffn: GatedFFN, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Uses of the whole down matrix from here on."""
    calls: list[str] = []
    whole = ffn.down_matrix

    def matrix() -> mx.array:
        calls.append("used")
        return whole()

    monkeypatch.setattr(ffn, "down_matrix", matrix)
    return calls


@pytest.mark.parametrize("before", [None, quantised, lora_added])
def test_what_guesses_add_is_computed_once(
    before: Optional[Callable[[nn.Module], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is replaced: tokens, features, neurons, other projections, the bias."""
    mlp = randomised(llama_mlp(32, 64, bias=True))
    if before:
        before(mlp)
    ffn, guess = GatedFFN(mlp, FAMILIES["llama"]), estimate(64)
    calls = uses_of_down(ffn, monkeypatch)
    ffn.sparse(inputs(32), mx.array(picks(64, 20)), guess)
    mlp.gate_proj = randomised(llama_mlp(32, 64), 5).gate_proj
    base = mlp.down_proj.linear if before is lora_added else mlp.down_proj
    base.bias = base.bias + 1
    x, chosen = 2 * inputs(32), picks(64, 30, seed=4)
    guess = Estimate(3 * guess.phi, guess.u)
    y = ffn.sparse(x, mx.array(chosen), guess)
    assert error(y, completed(mlp, x, guess, chosen)) < 1e-5
    assert calls == ["used"]


def test_what_guesses_add_is_computed_once_for_tokens_of_lower_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ffn, guess = GatedFFN(SMALL, FAMILIES["llama"]), estimate(64, mx.float16)
    calls = uses_of_down(ffn, monkeypatch)
    for _ in range(2):
        ffn.sparse(inputs(32, mx.float16), mx.array(picks(64, 20)), guess)
    assert len(calls) == 1


@pytest.mark.parametrize("change", [quantised, lora_added, new_weight])
def test_sparse_follows_the_weights(change: Callable[[nn.Module], None]) -> None:
    mlp = randomised(llama_mlp(32, 64))
    ffn = GatedFFN(mlp, FAMILIES["llama"])
    x, chosen = inputs(32), picks(64, 20)
    old = float64(ffn.sparse(x, mx.array(chosen)))
    change(mlp)
    wanted = np.stack([expected(mlp, b, i) for b, i in zip(x, chosen)])
    assert np.linalg.norm(old - wanted) > 1e-2 * np.linalg.norm(wanted)
    assert error(ffn.sparse(x, mx.array(chosen)), wanted) < 1e-5


class OtherLinear(nn.Linear):
    """Might compute anything."""


class OtherQuantized(nn.QuantizedLinear):
    """Might compute anything."""


class OtherLoRA(LoRALinear):
    """Might compute anything."""


UNKNOWN: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "DoRALinear": DoRALinear.from_base,
    "QQLinear": lambda linear: nn.QQLinear(D, D),
    "OtherLinear": lambda linear: OtherLinear(D, D),
    "OtherQuantized": lambda linear: OtherQuantized(D, D),
    "OtherLoRA": lambda linear: OtherLoRA(D, D),
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_unknown_projections_are_named(kind: str, name: str) -> None:
    mlp = llama_mlp(D, D)
    mlp[name] = UNKNOWN[kind](mlp[name])
    assert GatedFFN(mlp, FAMILIES["llama"]).unsupported() == kind


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_unknown_fused_projections_are_named(name: str) -> None:
    mlp = phi3.MLP(D, F)
    mlp[name] = DoRALinear.from_base(mlp[name])
    assert GatedFFN(mlp, FAMILIES["phi3"]).unsupported() == "DoRALinear"


@pytest.mark.parametrize("kind", ["OtherLinear", "OtherQuantized", "QQLinear"])
def test_lora_over_an_unknown_projection_is_named(kind: str) -> None:
    lora = LoRALinear(D, D)
    lora.linear = UNKNOWN[kind](lora.linear)
    assert unsupported(lora) == kind


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_projections_with_more_parameters_are_unknown(
    bits: Optional[int], lora: bool
) -> None:
    """Say, a global scale of some later mlx: known by type, computed otherwise."""
    linear = nn.Linear(D, D)
    base = nn.QuantizedLinear.from_linear(linear, 64, bits) if bits else linear
    found = LoRALinear.from_base(base) if lora else base
    assert unsupported(found) is None
    base.global_scale = mx.ones((1,))
    reason = unsupported(found)
    assert reason == f"{type(base).__name__} with global_scale"


@pytest.mark.parametrize("kind", ["DoRALinear", "QQLinear"])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_the_shape_of_an_unsupported_layer(kind: str, name: str) -> None:
    """Such a layer stays dense and is still counted: its sizes must be known."""
    mlp = llama_mlp(D, D)
    mlp[name] = UNKNOWN[kind](mlp[name])
    mlp.eval()  # QQLinear packs its weight here
    assert GatedFFN(mlp, FAMILIES["llama"]).shape == (D, D)
