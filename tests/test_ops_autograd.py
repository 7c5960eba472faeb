"""The ops have no backward: no gradient is lost silently, and tensor versions follow writes to memory."""

from __future__ import annotations

import pytest
import torch
from op_calls import CPU, OPS, TENSORS, copy, flat, tensors, written
from strategies import every_op, randn, wrapper
from tolerance import assert_same
from torch import Tensor

from flashdecpp import ops

# Tokens have no gradient, nor does the updated carried phi.
FLOATS = [
    (op, name)
    for op, name in TENSORS
    if every_op(CPU)[op][name].is_floating_point() and op != "sample" and name != "carried_phi"
]
RETURNING = [
    (op, name)
    for op, name in FLOATS
    if set(written(op, every_op(CPU)[op])) <= {"fallback_count", "carried_phi"}
]
IN_PLACE = [case for case in FLOATS if case not in RETURNING] + [("decode_attention.carry", "carried_phi")]


@pytest.mark.parametrize(("op", "name"), RETURNING)
def test_backward_is_an_error(one_place, op, name):
    """The forward call works, with the same results as without gradients."""
    arguments = every_op(one_place)[op]
    expected = flat(wrapper(op)(**copy(arguments)))
    leaf = arguments[name].requires_grad_()
    results = flat(wrapper(op)(**copy(arguments) | {name: leaf}))
    for actual, wanted in zip(results, expected, strict=True):
        assert_same(actual, wanted)
    for result in results:
        with pytest.raises(RuntimeError, match=rf"^flashdecpp::{op.partition('.')[0]} has no backward: "):
            (result.float().sum() + leaf.float().sum()).backward(retain_graph=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not any(x.requires_grad for x in flat(wrapper(op)(**arguments)))


@pytest.mark.parametrize("transform", ["grad", "vjp"])
@pytest.mark.parametrize(("op", "name"), RETURNING)
def test_torch_func_derivative_is_an_error(op, name, transform):
    arguments = every_op(CPU)[op]

    def function(x: Tensor) -> Tensor:
        return flat(wrapper(op)(**arguments | {name: x}))[0].sum()

    with pytest.raises(RuntimeError, match=rf"flashdecpp::{op.partition('.')[0]} has no backward: "):
        if transform == "grad":
            torch.func.grad(function)(arguments[name])
        else:
            torch.func.vjp(function, arguments[name])[1](torch.tensor(1.0))


def test_compiled_call_fails_only_in_backward():
    x, weight = randn(CPU, 3, 8), randn(CPU, 4, 8).requires_grad_()
    result = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")(x, weight)
    assert_same(result, ops.linear(x, weight))
    with pytest.raises(RuntimeError, match="flashdecpp::linear has no backward"):
        result.sum().backward()


@pytest.mark.parametrize("made", [False, True], ids=["leaf", "non_leaf"])
@pytest.mark.parametrize(("op", "name"), IN_PLACE)
def test_in_place_while_gradients_are_recorded(one_place, op, name, made):
    arguments = every_op(one_place)[op]
    before = copy(arguments)
    leaf = arguments[name].detach().clone().requires_grad_()
    arguments[name] = leaf * 1 if made else leaf
    message = rf"^flashdecpp::\w+: {name} must not require grad if .+, got one that does: .*no_grad"
    with pytest.raises(ValueError, match=message):
        wrapper(op)(**arguments)
    for other, x in tensors(before).items():
        assert_same(arguments[other], x, other)
    with torch.no_grad():
        wrapper(op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_versions_move_where_memory_changes(one_place, op):
    """Versions tell autograd that a saved tensor has changed. Views of one tensor share a version."""
    arguments = every_op(one_place)[op]
    memory = {name: x.untyped_storage().data_ptr() for name, x in tensors(arguments).items()}
    changed = {memory[name] for name in written(op, arguments)}
    for context in (torch.enable_grad, torch.no_grad):
        before = {name: x._version for name, x in tensors(arguments).items()}
        with context():
            wrapper(op)(**arguments)
        moved = {name for name, x in tensors(arguments).items() if x._version > before[name]}
        assert moved == {name for name in memory if memory[name] in changed}
    with torch.inference_mode():
        wrapper(op)(**copy(arguments))  # inference tensors have no versions
