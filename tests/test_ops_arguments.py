"""Arguments of the wrong kind are named; numbers at the edge of what kernels can hold work or are named."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from op_calls import CPU, OPS, copy, refused
from strategies import attention, every_op, wrapper
from tolerance import assert_same, compare, overload_for

from flashdecpp import ops


@pytest.mark.parametrize(
    "value", [None, 1.5, "text", np.zeros((3, 64), np.float32), [[1.0]]], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("op", OPS)
def test_non_tensors_are_named(op, value):
    arguments = every_op(CPU)[op]
    for argument in overload_for(op, arguments)._schema.arguments:
        name, kind = argument.name, str(argument.type)
        optional = kind.startswith("Optional")
        if name not in arguments or "Tensor" not in kind or (optional and value is None):
            continue
        if value is None and overload_for(op, arguments | {name: None}) is not overload_for(op, arguments):
            continue  # calls another overload
        with pytest.raises((TypeError, ValueError), match=rf"^flashdecpp::\w+: {name} must be .+, got \S+"):
            wrapper(op)(**arguments | {name: value})


def test_all_arguments_none():
    with pytest.raises(TypeError, match=r"^flashdecpp::gemv: x must be a tensor, got NoneType$"):
        ops.gemv(None, None)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("decode_attention", "window", 1.5),
        ("decode_attention", "window", 2**70),
        ("decode_attention", "num_splits", "2"),
        ("decode_attention", "scale", "0.1"),
        ("decode_attention", "softcap", None),
        ("linear", "impl", 5),
        ("linear.gated", "gate", 5),
        ("linear.gated", "norm_eps", "small"),
        ("linear.activated", "activation", 5),
        ("quantized_linear.activated", "activation", 5),
        ("rms_norm", "eps", None),
        ("rotary_append", "interleaved", "yes"),
    ],
)
def test_wrong_scalars_are_named(op, name, value):
    arguments = every_op(CPU)[op] | {name: value}
    message = rf"^flashdecpp::{op.partition('.')[0]}: {name} must be (a|an) .+, got {value!r}"
    with pytest.raises(TypeError, match=message):
        wrapper(op)(**arguments)


NUMBERS = [
    ("decode_attention", "scale", False),
    ("decode_attention", "softcap", True),
    ("decode_attention.carry", "softcap", True),
    ("linear.gated", "norm_eps", True),
    ("linear.residual", "norm_eps", True),
    ("quantized_linear.gated", "norm_eps", True),
    ("quantized_linear.residual", "norm_eps", True),
    ("rms_norm", "eps", True),
    ("layer_norm", "eps", True),
]


@pytest.mark.parametrize(("op", "name", "positive"), NUMBERS)
def test_numbers_that_float32_cannot_hold(one_place, op, name, positive):
    arguments = every_op(one_place)[op]
    for value in (
        float("nan"),
        float("inf"),
        -float("inf"),
        1e39,
        1e-46,
        1e-40,
        *([-1.0] if positive else []),
    ):
        refused(op, arguments | {name: value}, rf": {name} must be .+, got {re.escape(f'{value:g}')}$")
    for value in (0.0, 1e-37, 1.0, 1e37):
        wrapper(op)(**copy(arguments) | {name: value})


def test_smallest_softcap(one_place):
    """Every logit is between -softcap and softcap, so all keys weigh the same."""
    arguments = attention(one_place, [4, 9], kv_heads=4)
    out, lse = ops.decode_attention(**arguments, softcap=1.2e-38)
    counts = arguments["seq_lens"].float().log().view(2, 1, 1)
    torch.testing.assert_close(lse, counts.expand_as(lse), rtol=1e-5, atol=1e-5)
    assert out.isfinite().all()


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**40, 2**63 - 1])
def test_numbers_beyond_32_bits(one_place, number):
    arguments = attention(one_place, [5, 33], q_len=2)
    for a, b in zip(
        ops.decode_attention(**arguments, window=number), ops.decode_attention(**arguments), strict=True
    ):
        assert_same(a, b)
    for a, b in zip(
        ops.decode_attention(**arguments, window=-number), ops.decode_attention(**arguments), strict=True
    ):
        assert_same(a, b)
    compare("decode_attention", **arguments, num_splits=number)
    refused("decode_attention", arguments | {"num_splits": -number}, "num_splits must be")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int16, torch.complex64, torch.uint16, torch.float8_e5m2, torch.bool, torch.int64],
)
def test_dtypes_are_named(dtype):
    x, weight = torch.ones(2, 8).to(dtype), torch.ones(3, 8).to(dtype)
    wrong = re.escape(str(dtype).removeprefix("torch."))
    refused("linear", {"x": x, "weight": weight}, rf"x must be float32, float16 or bfloat16, got {wrong}$")
    refused("linear", {"x": torch.ones(2, 8), "weight": weight}, rf"weight must be float32, got {wrong}$")
