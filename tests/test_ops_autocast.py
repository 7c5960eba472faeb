"""torch.autocast changes neither the numbers that ops compute nor their dtype."""

from __future__ import annotations

import pytest
import torch
from op_calls import OPS, flat, written
from strategies import Place, every_op, quantized, randn, wrapper
from tolerance import assert_same
from torch import Tensor

from flashdecpp import ops


def autocast(place: Place) -> torch.autocast:
    """Autocast to a dtype other than the place's."""
    other = torch.float16 if place.dtype == torch.bfloat16 else torch.bfloat16
    return torch.autocast(place.device, dtype=other)


@pytest.mark.parametrize("op", OPS)
def test_every_op(place, op):
    outside, inside = every_op(place)[op], every_op(place)[op]
    expected = flat(wrapper(op)(**outside))
    with autocast(place):
        actual = flat(wrapper(op)(**inside))
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)
    for name in written(op, inside):
        assert_same(inside[name], outside[name], name)


@pytest.mark.parametrize("rows", [1, 3, 40, 256])
@pytest.mark.parametrize("biased", [False, True])
def test_where_torchs_linear_is_called(any_place, rows, biased):
    """When requested, above a row threshold, and for dequantized weights."""
    x, weight = randn(any_place, rows, 64), randn(any_place, 48, 64, seed=1)
    bias = randn(any_place, 48, seed=2) if biased else None
    residual, stored = randn(any_place, rows, 48, seed=3), quantized(any_place, rows, 48, 64, bits=8)
    norm = {"norm_weight": randn(any_place, 64, seed=4)}

    def everything() -> list[Tensor]:
        sums, quantized_sums = residual.clone(), residual.clone()
        ops.linear(x, weight, bias, **norm, residual=sums, impl="blas")
        ops.quantized_linear(**stored, **norm, residual=quantized_sums)
        return [
            sums,
            quantized_sums,
            ops.linear(x, weight, bias),
            ops.linear(x, weight, bias, impl="blas"),
            ops.linear(x, weight, bias, **norm, gate="silu", impl="blas"),
            ops.linear(x, weight, bias, activation="relu", impl="blas"),
            ops.quantized_linear(**stored),
            ops.quantized_linear(**stored, **norm, gate="gelu"),
            ops.quantized_linear(**stored, activation="gelu"),
        ]

    expected = everything()
    with autocast(any_place):
        actual = everything()
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_blas_is_torchs_linear(any_place, shape, biased):
    """For rows of any shape."""
    x, weight = randn(any_place, *shape), randn(any_place, 5, 8)
    bias = randn(any_place, 5) if biased else None
    expected = torch.nn.functional.linear(x, weight, bias)
    spread = torch.stack((x, x), dim=-1)[..., 0]
    for rows in (x, spread):
        actual = ops.linear(rows, weight, bias, impl="blas")
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        torch.testing.assert_close(actual, expected)
    assert ops.linear(x, weight[:0], impl="blas").shape == (*shape[:-1], 0)
