"""Weight-only quantisation: weights rounded to 8 or 4 bits once, then run as they are stored.

`quantize_(model)` replaces the linear layers of a model; `quantize(weight)` makes the arguments that
`ops.quantized_linear` takes. Both round to nearest: no data is looked at, and nothing but the weight is
rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, reference

__all__ = ["QuantizedLinear", "QuantizedWeight", "quantize", "quantize_"]

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of a linear layer as `ops.quantized_linear` takes it."""

    weight: Tensor  # int8 [N, K], or uint8 [N, K / 2] with 4 bits
    scales: Tensor  # [N, K / group_size], or [N]
    offsets: Tensor | None = None  # as scales

    @property
    def bits(self) -> int:
        return 4 if self.weight.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.size(0), self.weight.size(1) * (8 // self.bits)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.scales, self.offsets) if part is not None)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, **around: Tensor | float | str | None
    ) -> Tensor | None:
        """x @ w^T + bias, with `norm_weight` and more around it as in ops.quantized_linear_fused."""
        return ops.quantized_linear_fused(x, self.weight, self.scales, self.offsets, bias, **around)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `index` of w, [len(index), K]: what an embedding looks up."""
        offsets = None if self.offsets is None else self.offsets[index]
        return reference.dequantize(self.weight[index], self.scales[index], offsets).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w, [N, K]."""
        return reference.dequantize(self.weight, self.scales, self.offsets).to(dtype)


def quantize(
    weight: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    scales_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """A weight rounded to the nearest of 2^bits numbers, which are evenly spaced in every group.

    The error of a weight is at most half a step, the scale of its group. Symmetric: a step is the larger of
    e / 2^(bits - 1) and o / (2^(bits - 1) - 1), where e is the largest magnitude in the group and o that of
    the other sign; zero stays zero. With offsets a step is (max - min) / (2^bits - 1). The largest and
    smallest weights of a group may be off by what `scales_dtype` rounds the ends of its range by, too.

    Args:
        weight: [N, K], float32, float16 or bfloat16; finite.
        bits: 8 or 4.
        group_size: 32, 64 or 128 weights of a row share a scale; K must be a multiple of it. None: a row with
            8 bits, 32 with 4.
        symmetric: no offsets: 4 or 2 bytes less a group, and a little faster.
        scales_dtype: float32, float16 or bfloat16. None: weight's.

    Raises:
        ValueError: an argument is not as described.
    """
    scales_dtype = weight.dtype if scales_dtype is None else scales_dtype
    _check(weight, bits, group_size)
    if group_size is None and bits == 4:
        group_size = GROUPS[0]
    if group_size is not None and weight.size(1) % group_size:
        raise ValueError(
            f"flashdecpp: weight must have a K that is a multiple of {group_size}, got {weight.size(1)}"
        )
    grouped = weight.detach().float().unflatten(1, (-1, group_size or weight.size(1)))
    if not grouped.isfinite().all():
        raise ValueError("flashdecpp: weight must be finite, got NaN or infinite values")

    smallest, largest = grouped.amin(2), grouped.amax(2)
    half = 2 ** (bits - 1)
    lowest, offsets = -half, None
    if symmetric:
        # The sign of the scale puts the largest magnitude on the side that has one number more.
        side = torch.where(largest > -smallest, -1.0, 1.0)
        extreme, other = torch.maximum(largest, -smallest), torch.minimum(largest, -smallest)
        scales = (side * torch.maximum(extreme / half, other / (half - 1))).to(scales_dtype)
    else:
        lowest = 0 if bits == 4 else -half
        scales = ((largest - smallest) / (2**bits - 1)).to(scales_dtype)
        offsets = (smallest - lowest * scales.float()).to(scales_dtype)

    # By the scales and offsets as they are stored. A scale of 0 stands for weights that are all the offset.
    step = scales.float()[:, :, None]
    distance = grouped if offsets is None else grouped - offsets.float()[:, :, None]
    q = torch.where(step == 0, 0.0, distance / torch.where(step == 0, 1.0, step)).round()
    q = q.clamp(lowest, lowest + 2**bits - 1).flatten(1)
    if bits == 4:
        packed = reference.pack_int4((q + 8 if symmetric else q).to(torch.uint8))
    else:
        packed = q.to(torch.int8)
    if group_size is None:
        scales = scales[:, 0]
        offsets = None if offsets is None else offsets[:, 0]
    return QuantizedWeight(packed, scales, offsets)


def _check(weight: Tensor, bits: int, group_size: int | None) -> None:
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            "flashdecpp: weight must be [N, K] in float32, float16 or bfloat16, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    _check_format(bits, group_size)


def _check_format(bits: int, group_size: int | None) -> None:
    if bits not in (4, 8):
        raise ValueError(f"flashdecpp: bits must be 8 or 4, got {bits}")
    if group_size is not None and group_size not in GROUPS:
        raise ValueError(f"flashdecpp: group_size must be 32, 64, 128 or None, got {group_size}")


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantised weight, for inference. Its state are buffers, so state_dict has them all.

    `.to(dtype)` changes what the scales, offsets and bias are kept in, never q. A state_dict goes into a
    model that was quantised the same way.
    """

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("weight", quantized.weight)
        self.register_buffer("scales", quantized.scales)
        self.register_buffer("offsets", quantized.offsets)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(x, self.weight, self.scales, self.offsets, self.bias)

    def extra_repr(self) -> str:
        quantized = QuantizedWeight(self.weight, self.scales, self.offsets)
        group = "a row" if self.scales.dim() == 1 else self.in_features // self.scales.size(1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={quantized.bits}, "
            f"group={group}, symmetric={self.offsets is None}, bias={self.bias is not None}"
        )


@torch.no_grad()
def quantize_(
    module: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    skip: tuple[str, ...] = (),
) -> list[str]:
    """Replaces the nn.Linear layers inside a module by `QuantizedLinear`, in place, for inference.

    What is left as it is: a layer whose weight another module shares (an lm_head that is tied to the
    embedding), one whose K is not a multiple of the group, subclasses of nn.Linear, whose meaning only they
    know, and `skip`.

    Args:
        module: a model on any device.
        bits, group_size, symmetric: as in `quantize`; scales get the dtype of their weight.
        skip: names of layers, or the last part of names ("lm_head").

    Returns:
        The names of the nn.Linear layers that were left as they are.

    Raises:
        ValueError: an argument is not as described, or the module itself is an nn.Linear, which can't be
            replaced in place.
    """
    _check_format(bits, group_size)
    if type(module) is nn.Linear:
        raise ValueError("flashdecpp: module must hold the nn.Linear layers to replace, got an nn.Linear")
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    group = group_size or (GROUPS[0] if bits == 4 else 1)
    left = []
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        skipped = any(name == ending or name.endswith("." + ending) for ending in skip)
        if skipped or layer.in_features % group or owners[id(layer.weight)] > 1:
            left.append(name)
            continue
        parent, _, attribute = name.rpartition(".")
        quantized = quantize(layer.weight, bits, group_size, symmetric)
        setattr(module.get_submodule(parent), attribute, QuantizedLinear(quantized, layer.bias))
    return left
