"""The ops have no backward: these functions make a lost gradient an error instead of a silent omission.

Autograd kernels in torch's dispatcher would cost more than the ops themselves. So the wrappers of
`flashdecpp.ops` look at the results instead: torch marks those of an op without a backward as requiring grad
if an argument does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("flashdecpp::no_backward", mutates_args=())
def _no_backward(grad: Tensor, like: Tensor, op: str) -> Tensor:
    """Takes the place of the gradient of `like` in a backward pass, traced or not, and raises."""
    raise RuntimeError(
        f"flashdecpp::{op} has no backward: call it under torch.no_grad(), or detach its arguments"
    )


@_no_backward.register_fake
def _(grad: Tensor, like: Tensor, op: str) -> Tensor:
    return torch.empty_like(like)


class _WithoutBackward(torch.autograd.Function):
    """Passes an op's results through unchanged, as a function of the op's inputs."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(result.view_as(result) for result in tensors[:count] if result is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.count, *tensors = inputs
        ctx.likes = [x.detach() if x is not None and x.requires_grad else None for x in tensors[ctx.count :]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (like if like is None else _no_backward(grad, like, ctx.op) for like in ctx.likes)
        return None, None, *[None] * ctx.count, *gradients


def without_backward(op: str, results: tuple[Tensor, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """The results of an op, so that a backward through them raises a RuntimeError that names the op."""
    return _WithoutBackward.apply(op, len(results), *(x.detach() for x in results), *inputs)


def refuse_gradients(op: str, in_place: str, **arguments: Tensor | None) -> None:
    """Raises a ValueError if an argument of an op that updates `in_place` requires grad."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"flashdecpp::{op}: {name} must not require grad if {in_place} is updated in place while "
                "gradients are recorded, got one that does: call the op under torch.no_grad()"
            )
