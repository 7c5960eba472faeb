"""How close an op must be to its reference.

The rule (FlashAttention-3's): its largest error is at most twice that of the same math in plain torch at the
op's own precision, plus the rounding of the result. Errors are measured against the reference in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdecpp import ops, reference


def assert_within(actual: Tensor, truth: Tensor, plain: Tensor, what: str, magnitude: float = 0.0) -> None:
    """NaN and infinities must be in the same places; the rule applies everywhere else.

    `magnitude` is the size of a sum's terms, where they may be larger than the sum.
    """
    assert actual.shape == truth.shape, what
    assert (actual.dtype, actual.device) == (truth.dtype, truth.device), what
    # Low precision is rounded to once; float32 is also multiplied and divided in its own precision.
    rounding = torch.finfo(actual.dtype).eps * (2 if actual.dtype == torch.float32 else 1)
    actual, truth, plain = (x.detach().cpu().double() for x in (actual, truth, plain))
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: not finite in other places than the reference"
    assert torch.equal(actual[~finite].nan_to_num(), truth[~finite].nan_to_num()), what
    if not finite.any():
        return
    actual, truth, plain = actual[finite], truth[finite], plain[finite]
    # Plain float16 may overflow where the op must not, so that grants no allowance.
    plain_error = (plain - truth).abs().nan_to_num(nan=0, posinf=0).max()
    allowed = 2 * plain_error + rounding * truth.abs().max().clamp(min=magnitude)
    error = (actual - truth).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Bit for bit; NaN equals NaN."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    actual, expected = (x.detach().cpu().float() for x in (actual, expected))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} values differ"


def compare(op: str, **arguments) -> object:
    """Runs an op, checks everything it returns and mutates against its reference, and returns its result.

    The op's name may have an overload after a dot, but only the arguments tell overloads apart.
    The op gets the tensors themselves, with their strides and shared memory; the references get copies.
    """
    op = op.partition(".")[0]
    own_dtype = next(iter(arguments.values())).dtype  # of x, q, ...
    meaning = getattr(reference, op)
    expected, plain = _copies(arguments), _copies(arguments)
    truths = _outputs(meaning(**expected, compute_dtype=torch.float64))
    plains = _outputs(meaning(**plain, compute_dtype=own_dtype))
    result = getattr(ops, op)(**arguments)

    for i, (actual, truth, low) in enumerate(zip(_outputs(result), truths, plains, strict=True)):
        assert_within(actual, truth, low, f"{op}: output {i}", _size_of_terms(op, i, arguments))
    schema = overload_for(op, arguments)._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) or name == "fallback_count":  # no reference counts fallbacks
            continue
        if name in written and tensor.dtype.is_floating_point:
            magnitude = _size_of_terms(op, name, arguments)
            assert_within(tensor, expected[name], plain[name], f"{op}: {name}", magnitude)
        else:
            assert_same(tensor, expected[name], f"{op}: {name}")
    return result


def overload_for(op: str, arguments: dict) -> torch._ops.OpOverload:
    """The overload that ops.py chooses for these arguments: in place, without keywords, or the default."""
    op = op.partition(".")[0]
    packet = getattr(torch.ops.flashdecpp, op)
    if "plain" in packet.overloads():
        positional = {argument.name for argument in packet.plain._schema.arguments}
        if arguments.keys() <= positional:
            return packet.plain
    in_place, overload = {
        "decode_attention": ("carried_phi", "carry"),
        "rms_norm": ("residual", "residual"),
        "layer_norm": ("residual", "residual"),
        "sample": ("seen", "seen"),
        "linear": ("residual", "residual"),
        "quantized_linear": ("residual", "residual"),
    }.get(op, ("", ""))
    overload = overload if arguments.get(in_place) is not None else "default"
    return getattr(packet, overload)


def _size_of_terms(op: str, output: int | str, arguments: dict) -> float:
    """How large the terms get of outputs that are sums of larger terms, since float32 rounds those."""
    if op == "decode_attention" and output in (1, "carried_phi"):
        return 128  # lse is phi plus a logarithm, both small enough for exp in float32; logits are sums
    if "linear" not in op and op not in ("gemv", "flat_gemm"):
        return 0
    x, weights = arguments["x"], [arguments["weight"]]
    if arguments.get("norm_weight") is not None:
        eps = arguments.get("norm_eps", 1e-6)
        x = reference.rms_norm(x.float(), arguments["norm_weight"], eps=eps)
    if "quantized" in op:  # the sums of scale * q * x and of offset * x
        stored = (arguments["weight"], arguments["scales"])
        dense = reference.dequantize(*stored, arguments["offsets"])
        weights = [dense, dense - reference.dequantize(*stored)]
    largest = max(_random_sum(x, weight) for weight in weights)
    return largest**2 if arguments.get("gate") else largest  # gate times up


def _random_sum(x: Tensor, weight: Tensor) -> float:
    """How large sums of x * weight get when signs are random."""
    sums = (x.float().square() @ weight.float().square().T).sqrt().nan_to_num()
    return sums.max().item() if sums.numel() else 0.0


def _copies(arguments: dict) -> dict:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _outputs(result: Tensor | tuple | None) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)
