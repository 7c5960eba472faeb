"""The fusions of linear and quantized_linear against their references, through every kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Place, quantized, randn
from test_ops_quantized import FORMATS
from tolerance import assert_same, compare

from flashdecpp import ops

IMPLS = ("auto", "gemv", "flat_gemm", "blas")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 40, 130)


def fused(place: Place, rows: int, n: int, k: int, *, norm: bool = False, bias: bool = False) -> dict:
    """x, weight and any extras, with weights small enough to keep gates in their nonlinear range."""
    return {
        "x": randn(place, rows, k),
        "weight": randn(place, n, k, seed=1) / k**0.5,
        "bias": randn(place, n, seed=2) if bias else None,
        "norm_weight": randn(place, k, seed=3) + 1 if norm else None,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
def test_norm(place, rows, impl):
    compare("linear", **fused(place, rows, 192, 256, norm=True), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
def test_gate(place, rows, impl):
    compare("linear", **fused(place, rows, 2 * 96, 256), gate="silu", impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
def test_activation(place, rows, impl):
    compare("linear", **fused(place, rows, 192, 256), activation="relu", impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
def test_residual(place, rows, impl):
    compare("linear", **fused(place, rows, 192, 256), residual=randn(place, rows, 192, seed=5), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 6, 12, 33])
def test_all_at_once(place, rows, impl):
    """A norm and a bias with the gate, and with the residual, for outputs that don't fill a tile."""
    for activation in ACTIVATIONS:
        arguments = fused(place, rows, 2 * 77, 1064, norm=True, bias=True)
        compare("linear", **arguments, gate=activation, norm_eps=0.1, impl=impl)
        compare("linear", **arguments, activation=activation, norm_eps=0.1, impl=impl)
    arguments = fused(place, rows, 77, 1064, norm=True, bias=True)
    compare("linear", **arguments, residual=randn(place, rows, 77, seed=5), norm_eps=0.1, impl=impl)


@pytest.mark.parametrize("shape", [(2, 64), (6, 8), (34, 72), (1536, 576), (64, 4096), (256, 11008)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_shapes(place, impl, shape):
    """One output, sums in one part or many, and K shorter than a wave's first load."""
    for rows in (1, 4, 20):
        arguments = fused(place, rows, *shape, norm=True)
        compare("linear", **arguments, gate="silu", impl=impl)
        compare("linear", **arguments, activation="gelu_tanh", impl=impl)
        compare("linear", **arguments, residual=randn(place, rows, shape[0], seed=5), impl=impl)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("k", [1, 7, 65, 100])
def test_auto_takes_any_k(any_place, rows, k):
    arguments = fused(any_place, rows, 34, k, norm=True, bias=True)
    compare("linear", **arguments, gate="silu")
    compare("linear", **arguments, activation="silu")
    compare("linear", **arguments, residual=randn(any_place, rows, 34, seed=5))


@pytest.mark.parametrize("impl", IMPLS)
def test_alignment(place, impl):
    """Arguments not aligned to 16 bytes, and a float32 norm weight, take other paths to the same result."""
    arguments = fused(place, 3, 48, 64, norm=True)
    wide = torch.cat((arguments["x"], arguments["x"]), dim=1)
    shifted = {
        "x": wide[:, 1:65],
        "norm_weight": randn(place, 65, seed=3)[1:],
        "bias": randn(place, 49, seed=2)[1:],
    }
    residual = randn(place, 3 * 48 + 1, seed=5)
    compare("linear", **arguments | shifted, residual=residual[1:].view(3, 48), impl=impl)
    compare("linear", **arguments | shifted, gate="gelu", impl=impl)
    compare("linear", **arguments | shifted, activation="gelu", impl=impl)
    wide_norm = {"norm_weight": arguments["norm_weight"].float()}
    compare("linear", **arguments | wide_norm, residual=residual[:144].view(3, 48), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_rows(place, impl):
    """x with more dimensions, with only K, and strided."""
    weight, norm = randn(place, 48, 64, seed=1) / 8, randn(place, 64, seed=3)
    wide = randn(place, 6, 4, 128)
    for x in (wide[..., 64:], wide[:, 1, :64], wide[::2, 1:3, 32:96], wide[0, 0, :64]):
        arguments = {"x": x, "weight": weight, "bias": None, "norm_weight": norm, "impl": impl}
        compare("linear", **arguments, gate="silu")
        compare("linear", **arguments, activation="silu")
        residual = randn(place, *x.shape[:-1], 48, seed=5)
        compare("linear", **arguments, residual=residual)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(place, impl):
    x, weight, norm = randn(place, 2, 0, 64), randn(place, 48, 64), randn(place, 64)
    out = ops.linear(x, weight, norm_weight=norm, gate="silu", impl=impl)
    assert out.shape == (2, 0, 24)
    assert ops.linear(x, weight, activation="relu", impl=impl).shape == (2, 0, 48)
    ops.linear(x, weight, norm_weight=norm, residual=randn(place, 2, 0, 48), impl=impl)


@pytest.mark.parametrize("impl", ["gemv", "flat_gemm"])
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_the_norm_is_that_of_rms_norm(place, rows, impl):
    """With an identity weight, the result is the normalized rows."""
    x = randn(place, rows, 128) * 3
    norm = randn(place, 128, seed=3)
    eye = torch.eye(128, device=place.device, dtype=place.dtype)
    assert_same(ops.linear(x, eye, norm_weight=norm, impl=impl), ops.rms_norm(x, norm))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_keeps_extremes_finite(place, impl):
    """Squares and products with the norm's weight overflow or underflow x's dtype."""
    largest = 3e4 if place.dtype == torch.float16 else 1e18
    for magnitude in (largest, 1 / largest):
        arguments = fused(place, 2, 32, 128, norm=True)
        arguments["x"] = randn(place, 2, 128).sign() * magnitude
        arguments["norm_weight"] = torch.full_like(arguments["norm_weight"], 8)
        compare("linear", **arguments, norm_eps=0.0, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_rows_stay_alone(place, impl):
    arguments = fused(place, 5, 24, 64, norm=True)
    arguments["x"][2, 3] = torch.nan
    out = compare("linear", **arguments, impl=impl)
    assert out.isnan().all(-1).tolist() == [False, False, True, False, False]


def test_the_sum_with_the_residual_is_rounded_once(place):
    """1 + 3/4 ulp rounds up if rounded once, but down if rounded twice."""
    eps = torch.finfo(place.dtype).eps
    x = torch.tensor([[eps / 2, eps / 4, *[0.0] * 6]], device=place.device, dtype=place.dtype)
    weight = torch.ones(16, 8, device=place.device, dtype=place.dtype)
    for impl in ("gemv", "flat_gemm"):
        residual = torch.ones(1, 16, device=place.device, dtype=place.dtype)
        ops.linear(x, weight, residual=residual, impl=impl)
        assert (residual == 1 + eps).all()


@pytest.mark.parametrize(("bits", "group"), FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8, 11, 16, 33, 130])
def test_quantized(any_place, rows, bits, group):
    for offsets in (False, True):
        arguments = quantized(
            any_place, rows, 2 * 39, 384, bits=bits, group=group, offsets=offsets, bias=offsets
        )
        arguments["scales"] = arguments["scales"] / 8
        arguments["norm_weight"] = randn(any_place, 384, seed=3)
        compare("quantized_linear", **arguments, gate="silu")
        compare("quantized_linear", **arguments, activation="silu")
        compare("quantized_linear", **arguments, residual=randn(any_place, rows, 78, seed=5))
        arguments["norm_weight"] = None
        compare("quantized_linear", **arguments, residual=randn(any_place, rows, 78, seed=5))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [32, 160, 1056, 5120])
def test_quantized_shapes(any_place, k, bits):
    for rows in (1, 6, 40):
        arguments = quantized(any_place, rows, 42, k, bits=bits, offsets=True)
        arguments["norm_weight"] = randn(any_place, k, seed=3).float()
        compare("quantized_linear", **arguments, gate="gelu")
        compare("quantized_linear", **arguments, activation="gelu")
        compare("quantized_linear", **arguments, residual=randn(any_place, rows, 42, seed=5))


def test_quantized_residual_of_any_address(any_place):
    arguments = quantized(any_place, 3, 48, 64, bits=4)
    residual = randn(any_place, 3 * 48 + 1, seed=5)[1:].view(3, 48)
    norm = randn(any_place, 65, seed=3)[1:]
    compare("quantized_linear", **arguments, residual=residual, norm_weight=norm)


def test_nothing_fused_is_linear(place):
    arguments = fused(place, 3, 40, 64, bias=True)
    for impl in IMPLS:
        plain = ops.linear(arguments["x"], arguments["weight"], arguments["bias"], impl=impl)
        assert_same(ops.linear(**arguments, norm_eps=0.5, impl=impl), plain)


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(place, data):
    rows, half, k = (data.draw(st.integers(1, high)) for high in (70, 150, 60))
    arguments = fused(
        place, rows, 2 * half, 8 * k, norm=data.draw(st.booleans()), bias=data.draw(st.booleans())
    )
    impl = data.draw(st.sampled_from(IMPLS))
    after = data.draw(st.sampled_from(("gate", "activation", "residual")))
    if after != "residual":
        arguments[after] = data.draw(st.sampled_from(ACTIVATIONS))
    else:
        arguments["residual"] = randn(place, rows, 2 * half, seed=5)
    compare("linear", **arguments, impl=impl)
