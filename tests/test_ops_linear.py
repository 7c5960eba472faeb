"""linear, gemv and flat_gemm against their reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import randn
from tolerance import compare

from flashdecpp import ops

HAND_WRITTEN = ("gemv", "flat_gemm")
# [N, K]: multiples of every tile, multiples of none, one output, and long sums.
SHAPES = [(256, 512), (129, 72), (1, 64), (7, 8), (1000, 136), (48, 4096), (1536, 576)]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 33, 64, 130])
@pytest.mark.parametrize("op", HAND_WRITTEN)
def test_rows(place, op, rows):
    """Any number of rows works, including those that an op isn't designed for."""
    compare(op, x=randn(place, rows, 256), weight=randn(place, 192, 256, seed=1), bias=None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", HAND_WRITTEN)
def test_shapes(place, op, shape):
    n, k = shape
    for rows in (1, 4):
        arguments = {"x": randn(place, rows, k), "weight": randn(place, n, k, seed=1)}
        compare(op, **arguments)
        compare(op, **arguments, bias=randn(place, n, seed=2))


@pytest.mark.parametrize("impl", ["auto", "gemv", "flat_gemm", "blas"])
@pytest.mark.parametrize("rows", [1, 6, 40, 300])
def test_impl(place, impl, rows):
    compare(
        "linear",
        x=randn(place, rows, 128),
        weight=randn(place, 96, 128, seed=1),
        bias=randn(place, 96, seed=2),
        impl=impl,
    )


@pytest.mark.parametrize("rows", [1, 6, 200])
@pytest.mark.parametrize("k", [1, 7, 65, 100])
def test_auto_takes_any_k(any_place, rows, k):
    """And any weight alignment: packed, one row, spaced rows, and misaligned rows."""
    x, spaced = randn(any_place, rows, k), randn(any_place, 33, 128, seed=1)
    for weight in (spaced[:, :k].contiguous(), spaced[:1, :k], spaced[:, :k], spaced[:, 1 : k + 1]):
        compare("linear", x=x, weight=weight)


@pytest.mark.parametrize("op", [*HAND_WRITTEN, "linear"])
def test_any_strides(place, op):
    """x as any view, and weight rows spaced."""
    wide = randn(place, 6, 4, 128)
    weight = randn(place, 40, 200, seed=1)[:, 8:72]
    for x in (
        wide[..., 64:],
        wide[..., 3:67],
        wide[:, 1, :64],
        wide[::2, 1:3, 32:96],
        wide.transpose(0, 1)[..., :64],
    ):
        compare(op, x=x, weight=weight)
    compare(op, x=randn(place, 64, 5).T, weight=weight)
    compare(op, x=randn(place, 64), weight=weight)
    compare(op, x=randn(place, 1, 64).expand(3, 64), weight=weight)


@pytest.mark.parametrize("op", [*HAND_WRITTEN, "linear"])
def test_no_rows(place, op):
    weight = randn(place, 40, 64)
    assert getattr(ops, op)(randn(place, 0, 64), weight).shape == (0, 40)
    assert getattr(ops, op)(randn(place, 2, 0, 64), weight).shape == (2, 0, 40)


@pytest.mark.parametrize("op", HAND_WRITTEN)
def test_sums_are_float32(place, op):
    """Ones among large numbers that cancel: exact in float32 in any order, lost in any lower precision."""
    values = torch.tensor([4096.0] * 300 + [-4096.0] * 299 + [1.0] * 41)
    order = torch.randperm(640, generator=torch.Generator().manual_seed(0))
    x = values[order].to(place.device, place.dtype).expand(3, 640)
    weight = torch.ones(8, 640, device=place.device, dtype=place.dtype)
    bias = torch.full((8,), -4096.0, device=place.device, dtype=place.dtype)
    assert (getattr(ops, op)(x, weight, bias) == 41).all()


@pytest.mark.parametrize("op", HAND_WRITTEN)
def test_bad_rows_stay_alone(place, op):
    x, weight = randn(place, 5, 64), randn(place, 24, 64, seed=1)
    x[2, 3] = torch.nan
    out = compare(op, x=x, weight=weight)
    assert out.isnan().all(-1).tolist() == [False, False, True, False, False]


@settings(max_examples=20)
@given(data=st.data())
def test_any_shape(place, data):
    rows, n, k = (data.draw(st.integers(1, high)) for high in (70, 300, 60))
    compare(
        data.draw(st.sampled_from([*HAND_WRITTEN, "linear"])),
        x=randn(place, rows, 8 * k),
        weight=randn(place, n, 8 * k, seed=1),
        bias=data.draw(st.sampled_from([None, randn(place, n, seed=2)])),
    )
