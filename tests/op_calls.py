"""A call of every op, and helpers for the tests that cover them all."""

from __future__ import annotations

import pytest
import torch
from strategies import Place, every_op, wrapper
from tolerance import overload_for
from torch import Tensor

CPU = Place("cpu", torch.float32)
OPS = tuple(every_op(CPU))


def tensors(arguments: dict) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def copy(arguments: dict) -> dict:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def flat(result: Tensor | tuple | None) -> list[Tensor]:
    """An op's results, as a list."""
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def written(op: str, arguments: dict) -> list[str]:
    """The arguments that a call updates in place, according to the op's schema."""
    schema = overload_for(op, arguments)._schema
    return [a.name for a in schema.arguments if a.is_write and arguments.get(a.name) is not None]


def refused(op: str, arguments: dict, message: str) -> None:
    """The wrapper raises a ValueError, and the op itself a RuntimeError with the same text."""
    with pytest.raises(ValueError, match=message) as from_wrapper:
        wrapper(op)(**arguments)
    with pytest.raises(RuntimeError, match=message) as from_op:
        overload_for(op, arguments)(**arguments)
    assert str(from_op.value).startswith(str(from_wrapper.value))


# Every op with each of its tensors, by name.
TENSORS = [(op, name) for op in OPS for name in tensors(every_op(CPU)[op])]
