"""Weight-only quantisation: weights rounded to 8 or 4 bits once, then run as they are stored.

`quantize_(model)` replaces the linear layers of a model; `quantize(weight)` makes the arguments that
`ops.quantized_linear` takes. Both round to nearest: no data is looked at, and nothing but the weight is
rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, reference

__all__ = ["QuantizedLinear", "QuantizedWeight", "quantize", "quantize_"]

GROUPS = (32, 64, 128)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
        self, x: Tensor, bias: Tensor | None = None, **fusion: Tensor | float | str | None
    ) -> Tensor | None:
        """x @ w^T + bias with the fusions of ops.quantized_linear."""
        return ops.quantized_linear(x, self.weight, self.scales, self.offsets, bias, **fusion)

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
    if weight.dim() != 2 or weight.dtype not in FLOATS or weight.numel() == 0:
        raise ValueError(
            "flashdecpp: weight must be [N, K] in float32, float16 or bfloat16, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if not _holds_numbers(weight):
        raise ValueError(
            "flashdecpp: weight must be a plain tensor that holds its numbers, "
            f"got a {type(weight).__name__} on {weight.device}"
        )
    _check_format(bits, group_size)


def _holds_numbers(weight: Tensor) -> bool:
    """Whether they can be read: not where they have yet to be loaded, or where only a subclass can."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
    return plain and not weight.is_meta


def _check_format(bits: int, group_size: int | None) -> None:
    if bits not in (4, 8):
        raise ValueError(f"flashdecpp: bits must be 8 or 4, got {bits}")
    if group_size is not None and group_size not in GROUPS:
        raise ValueError(f"flashdecpp: group_size must be 32, 64, 128 or None, got {group_size}")


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantised weight, for inference. Its state are buffers, so state_dict has them all.

    `.to(dtype)` changes what the scales, offsets and bias are kept in, never q. A state_dict goes into a
    model that was quantised the same way. Gradients reach the input, through the weight expanded to x's dtype
    (slower, and as large as before); the layer itself has nothing to train.
    """

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("weight", quantized.weight)
        self.register_buffer("scales", quantized.scales)
        self.register_buffer("offsets", quantized.offsets)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.weight, self.scales, self.offsets)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return nn.functional.linear(x, self.quantized.dense(x.dtype), self.bias)
        return ops.quantized_linear(x, self.weight, self.scales, self.offsets, self.bias)

    def extra_repr(self) -> str:
        group = "a row" if self.scales.dim() == 1 else self.in_features // self.scales.size(1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.quantized.bits}, "
            f"group={group}, symmetric={self.offsets is None}, bias={self.bias is not None}"
        )


@torch.no_grad()
def quantize_(
    module: nn.Module,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    skip: str | Sequence[str] = (),
) -> list[str]:
    """Replaces the nn.Linear layers inside a module by `QuantizedLinear`, in place, for inference.

    What is left as it is: a layer whose weight another module shares (an lm_head that is tied to the
    embedding), one whose K is not a multiple of the group, one that has no numbers to round (on the meta
    device, tensor subclasses, other dtypes), one that has hooks, which know nothing of what would replace it,
    subclasses of nn.Linear, whose meaning only they know, and `skip`.

    Args:
        module: a model on any device.
        bits, group_size, symmetric: as in `quantize`; scales get the dtype of their weight.
        skip: a name of a layer, or the last part of one ("lm_head"), or several of them.

    Returns:
        The names of the nn.Linear layers that were left as they are.

    Raises:
        ValueError: an argument is not as described, a weight is NaN or infinite, or the module itself is an
            nn.Linear, which can't be replaced in place. The module is then as it was.
    """
    _check_format(bits, group_size)
    if _is_linear(module):
        raise ValueError("flashdecpp: module must hold the nn.Linear layers to replace, got an nn.Linear")
    endings = (skip,) if isinstance(skip, str) else tuple(skip)
    owners: Counter[int] = Counter()
    for child in module.modules():
        owners.update(id(parameter) for parameter in child.parameters(recurse=False))
    group = group_size or (GROUPS[0] if bits == 4 else 1)
    taken: dict[nn.Linear, list[str]] = {}  # with its names: a layer may be in several places
    left = []
    for name, layer in module.named_modules(remove_duplicate=False):
        if not _is_linear(layer):
            continue
        skipped = any(name == ending or name.endswith("." + ending) for ending in endings)
        if skipped or layer.in_features % group or owners[id(layer.weight)] != 1 or not _can_replace(layer):
            left.append(name)
        elif not layer.weight.isfinite().all():
            raise ValueError(f"flashdecpp: {name}.weight must be finite, got NaN or infinite values")
        else:
            taken.setdefault(layer, []).append(name)
    while taken:
        layer, names = taken.popitem()  # so that each is gone before the next is rounded
        rounded = quantize(layer.weight, bits, group_size, symmetric)
        replacement = QuantizedLinear(rounded, layer.bias).train(layer.training)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, replacement)
    return left


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear itself, no subclass; `accelerate` makes one, which says what it was."""
    return getattr(type(module), "flashdecpp_original", type(module)) is nn.Linear


def _can_replace(layer: nn.Linear) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    weight = layer.weight
    return not hooked and _holds_numbers(weight) and weight.dtype in FLOATS and weight.numel() > 0
