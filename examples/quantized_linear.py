"""Weights of 8 and 4 bits: one linear layer by hand, then a whole model.

python examples/quantized_linear.py
"""

import torch
from torch import nn

from flashdecpp import ops, quantize_
from flashdecpp.quantization import quantize


def one_layer(device, dtype):
    """Relative error of the result for every format, and what it saves."""
    x, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((4, 1024), (512, 1024)))
    exact = x.double() @ weight.double().T
    errors = {}
    for bits, group_size in ((8, None), (8, 64), (4, 128), (4, 32)):
        q = quantize(weight, bits, group_size)
        out = ops.quantized_linear(x, q.weight, q.scales, q.offsets)
        errors[bits, group_size] = ((out - exact).norm() / exact.norm()).item()
        group = group_size or "row"
        size = q.nbytes / weight.nbytes
        print(f"int{bits}, group {group}: error {errors[bits, group_size]:.4f}, {size:.2f} of the bytes")
    return errors


@torch.no_grad()
def one_model(device, dtype):
    """A model's output before and after all its linear layers but the last are rounded to int8."""
    layers = nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, 256), nn.SiLU(), nn.Linear(256, 10)
    model, x = nn.Sequential(*layers).to(device, dtype), torch.randn(8, 256, device=device, dtype=dtype)
    before = model(x)
    left = quantize_(model, bits=8, skip="4")  # in place; returns the names that it left alone
    after = model(x)
    print(model)
    print(f"left in {dtype}: {left}; largest difference {(after - before).abs().max().item():.4f}")
    return before, after, left


if __name__ == "__main__":
    torch.manual_seed(0)
    place = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
    one_layer(*place)
    one_model(*place)
