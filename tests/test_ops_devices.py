"""Every op names an argument that is on another device or has no memory."""

from __future__ import annotations

import pytest
import torch
from op_calls import CPU, OPS, TENSORS, flat, refused, tensors
from strategies import every_op, randn, wrapper
from tolerance import overload_for
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashdecpp import ops

AMONG_OTHERS = [(op, name) for op, name in TENSORS if op != "gated_activation"]  # it has only one tensor


@pytest.mark.parametrize(("op", "name"), AMONG_OTHERS)
def test_one_meta_tensor(one_place, op, name):
    arguments = every_op(one_place)[op]
    first, *_ = tensors(arguments)
    arguments[name] = arguments[name].to("meta")
    refused(op, arguments, r"^flashdecpp::\w+: \w+ must be on \S+ as \w+, got (meta|cpu|cuda:0)$")
    if name != first:
        refused(op, arguments, rf": {name} must be on {one_place.device}\S* as {first}, got meta$")


@pytest.mark.parametrize(("op", "name"), AMONG_OTHERS)
def test_one_tensor_elsewhere_while_traced(op, name):
    """torch.compile and export see fake tensors, which have a device but no memory."""
    arguments = every_op(CPU)[op]
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        fakes[name] = fakes[name].to("meta")
        with pytest.raises((RuntimeError, ValueError), match=r"must be on \w+ as \w+, got \w+"):
            overload_for(op, fakes)(**fakes)


@pytest.mark.parametrize("op", OPS)
def test_all_meta(op):
    """With all tensors on the meta device, an op returns its results' shapes, dtypes and strides."""
    arguments = every_op(CPU)[op]
    shapes = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments.items()}
    results, expected = flat(wrapper(op)(**shapes)), flat(wrapper(op)(**arguments))
    for shape, tensor in zip(results, expected, strict=True):
        assert shape.is_meta
        assert (shape.shape, shape.dtype, shape.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


def test_linear_choice_needs_memory():
    x, weight = randn(CPU, 3, 8), randn(CPU, 4, 8)
    with pytest.raises(
        ValueError, match=r"^flashdecpp::linear_choice: weight must be on cpu as x, got meta$"
    ):
        ops.linear_choice(x, weight.to("meta"))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_non_strided_layouts():
    x, weight = randn(CPU, 3, 8), randn(CPU, 4, 8)
    with pytest.raises(
        ValueError, match=r"^flashdecpp::linear: weight must be strided, got torch.sparse_csr$"
    ):
        ops.linear(x, weight.to_sparse_csr())


def test_freed_storage(one_place):
    x, weight = randn(one_place, 3, 8), randn(one_place, 8, 8)
    weight.untyped_storage().resize_(0)
    refused(
        "gemv", {"x": x, "weight": weight}, "weight must have memory, got a tensor whose storage is empty$"
    )


def test_negative_bit():
    """The imaginary part of a conjugate is stored with the opposite sign."""
    x = torch.complex(randn(CPU, 3, 8), randn(CPU, 3, 8, seed=1)).conj().imag
    assert x.is_neg()
    weight = randn(CPU, 4, 8, seed=2)
    torch.testing.assert_close(ops.gemv(x, weight), x.clone() @ weight.T)
