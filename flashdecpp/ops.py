"""The ops of flashdecpp: documented wrappers of `torch.ops.flashdecpp.*`, and their fake kernels.

Every op takes CPU or GPU tensors, runs on the current stream, never synchronizes, and works under
`torch.compile(fullgraph=True)` and in CUDA graphs: lengths, block tables and phi are read on the device when
the op runs. The function of the same name in `flashdecpp.reference` defines what an op computes.

An argument of the wrong dtype, device, shape or stride, or one that an in-place argument overlaps in memory,
raises a ValueError that names the argument, what it must be and what it was, before anything is launched or
written. Something other than a tensor or number where one is expected is a TypeError. Values that only the
device knows (lengths, block ids) cannot be checked without a sync: whatever they are, the ops stay inside the
cache, and `check` reports them. If a result does not fit in memory, torch.OutOfMemoryError is raised.

No op has a backward. If an argument requires grad, a backward through the result raises a RuntimeError, and
an op that updates its arguments in place raises a ValueError unless gradients are off. Direct calls of
`torch.ops.flashdecpp.*` follow torch's own rules for ops without a backward: a backward warns and yields no
gradient. Autocast does not affect the ops.

"The paper" is Hong et al., FlashDecoding++, MLSys 2024 (arXiv 2311.01282).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

from . import (
    _library,  # noqa: F401  (loading it registers torch.ops.flashdecpp)
)
from ._autograd import refuse_gradients, without_backward

Fake = Callable[..., Any]

__all__ = [
    "check",
    "decode_attention",
    "flat_gemm",
    "gated_activation",
    "gemv",
    "layer_norm",
    "linear",
    "linear_choice",
    "quantized_linear",
    "rms_norm",
    "rotary_append",
    "sample",
]

# Bound once: looking up the attribute chain on every call would cost more than the rest of a wrapper.
_decode_attention = torch.ops.flashdecpp.decode_attention.default
_decode_attention_carry = torch.ops.flashdecpp.decode_attention.carry
_gemv = torch.ops.flashdecpp.gemv.default
_flat_gemm = torch.ops.flashdecpp.flat_gemm.default
_linear = torch.ops.flashdecpp.linear.default
_linear_plain = torch.ops.flashdecpp.linear.plain
_linear_residual = torch.ops.flashdecpp.linear.residual
_linear_choice = torch.ops.flashdecpp.linear_choice.default
_linear_choice_index = torch.ops.flashdecpp.linear_choice_index.default
_quantized_linear = torch.ops.flashdecpp.quantized_linear.default
_quantized_linear_plain = torch.ops.flashdecpp.quantized_linear.plain
_quantized_linear_residual = torch.ops.flashdecpp.quantized_linear.residual
_rms_norm = torch.ops.flashdecpp.rms_norm.default
_rms_norm_residual = torch.ops.flashdecpp.rms_norm.residual
_layer_norm = torch.ops.flashdecpp.layer_norm.default
_layer_norm_residual = torch.ops.flashdecpp.layer_norm.residual
_rotary_append = torch.ops.flashdecpp.rotary_append.default
_gated_activation = torch.ops.flashdecpp.gated_activation.default
_sample = torch.ops.flashdecpp.sample.default
_sample_seen = torch.ops.flashdecpp.sample.seen


# How the messages of csrc/torch_api.h begin: those of fail, and those of out_of_memory.
_COMPLAINT = re.compile(r"flashdecpp::\w+: ")
_OUT_OF_MEMORY = "flashdecpp: out of memory: "
_KINDS = {
    "Tensor": "a tensor",
    "float": "a number",
    "int": "an int of 64 bits",
    "bool": "a bool",
    "str": "a string",
}


def _translate(error: RuntimeError, op: OpOverload, arguments: Mapping[str, object]) -> Exception:
    """The exception to raise for a failed call of `op`; it names the argument if one was at fault."""
    message = str(error).partition("\n")[0]
    if type(error) is RuntimeError and _COMPLAINT.match(message):
        return ValueError(message)
    if message.startswith(_OUT_OF_MEMORY):
        return torch.OutOfMemoryError(message)
    named = re.search(r"for argument '(\w+)' but instead found", str(error))  # torch's own words
    for argument in op._schema.arguments:
        value = arguments.get(argument.name)
        kind = str(argument.type)
        missing = kind == "Tensor" and not isinstance(value, Tensor)
        if argument.name == named[1] if named else missing:
            kind = _KINDS.get(re.sub(r"Optional\[(\w+)\]", r"\1", kind), kind)
            got = type(value).__name__ if kind == "a tensor" else f"{value!r:.80}"
            return TypeError(f"{op._schema.name}: {argument.name} must be {kind}, got {got}")
    foreign = _foreign(op, arguments)
    return ValueError(foreign) if foreign else error


def _foreign(op: OpOverload, arguments: Mapping[str, object]) -> str | None:
    """The complaint about the first tensor that is on a different device than the first, or not strided."""
    values = ((argument.name, arguments.get(argument.name)) for argument in op._schema.arguments)
    tensors = [(name, x) for name, x in values if isinstance(x, Tensor)]
    for name, x in tensors:
        first, same = tensors[0]
        if x.device != same.device:
            return f"{op._schema.name}: {name} must be on {same.device} as {first}, got {x.device}"
        if x.layout is not torch.strided:
            return f"{op._schema.name}: {name} must be strided, got {x.layout}"
    return None


def _fake(*ops: OpOverload) -> Callable[[Fake], Fake]:
    """Registers a function as the fake kernel of ops, for calls in which no tensor has memory.

    The dispatcher also comes here for one meta tensor among real ones, which is refused.
    """

    def checked(op: OpOverload, function: Fake) -> Fake:
        names = [argument.name for argument in op._schema.arguments]

        def fake(*args: Any, **kwargs: Any) -> Any:
            if foreign := _foreign(op, dict(zip(names, args, strict=False)) | kwargs):
                raise RuntimeError(foreign)
            return function(*args, **kwargs)

        return fake

    def register(function: Fake) -> Fake:
        for op in ops:
            torch.library.register_fake(op)(checked(op, function))
        return function

    return register


# ------------------------------------------------------------------------------------------------- attention


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    phi: Tensor | None = None,
    softcap: float = 0.0,
    window: int = -1,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    fallback_count: Tensor | None = None,
    carried_phi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of 1 to 16 new tokens per sequence over a KV cache that already holds them.

    The keys of a sequence are split across the GPU. With `phi`, every split subtracts that one value instead
    of its own maximum, so partial results add up in any order (the paper, section 3). The result is the exact
    softmax whatever phi is; a good phi only makes it faster. A row (one query head of one token) whose true
    maximum is too far from phi falls back inside the same launch: a GPU rebases the row's partials on the
    maximum that they saw. The CPU always subtracts the true maximum, which costs it nothing; there, phi only
    decides which rows are counted as having fallen back.

    Query token i of a sequence has the absolute position p = seq_len - q_len + i. Its logit for key j is
    x = scale * q.k, then softcap * tanh(x / softcap), then x - slope * (p - j). It sees key j if j <= p and,
    with a window, j > p - window. Keys that a row does not see never influence it, not even as NaN. A visible
    key whose logit is NaN or infinite makes its row NaN, and no other row.

    Args:
        q: [batch, q_len, q_heads, head_dim], float16 or bfloat16, on the CPU also float32. q_len is 1 to 16,
            head_dim a multiple of 8 up to 256.
        k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim] with a block_table (block_size 1 or a
            multiple of 8), else [batch, max_len, kv_heads, head_dim]. q's dtype, or float8_e4m3fn. Any
            strides with a contiguous last dim, such as views of [..., kv_heads, block_size, head_dim] or of
            one tensor with K and V. q_heads is 1 to 16 times kv_heads; the query heads of a KV head are
            adjacent.
        seq_lens: [batch] int32, keys per sequence including the new tokens; 0 gives zeros and an lse of -inf.
            Like block_table, read before the preceding kernel has finished (programmatic dependent launch);
            `gemv` says when that is unsafe.
        block_table: [batch, max_blocks] int32, the cache block of each run of block_size tokens.
        scale: 1 / sqrt(head_dim) if None. scale and softcap must be representable in float32.
        phi: [q_heads] or [batch, q_heads] float32, the unified maximum in units of x. None: online softmax.
        softcap: 0 for none.
        window: number of keys that a token sees, including itself; 0 or less for all.
        alibi_slopes: [q_heads] float32.
        sinks: [q_heads] float32, logits that join the denominator (and lse) and add nothing to the output.
        k_scale, v_scale: [kv_heads] float32, factors of the values in a float8_e4m3fn cache; None: 1.
        num_splits: number of parts into which the keys are split; 0 chooses. If fixed, the result of a
            sequence is bitwise repeatable whatever else is in the batch.
        fallback_count: [1] int32, incremented by the number of rows that fell back.
        carried_phi: [batch, q_heads] float32, contiguous last dim; instead of phi. Read as the phi of each
            row, then replaced by the largest x of the last token's row, to be the phi of the next step: a row
            maximum moves little from token to token, so no calibration is needed. Left unchanged if that row
            sees no key or is NaN. Start a new sequence with NaN, which fits no row.

    Returns:
        out, as q, and lse, [batch, q_heads, q_len] float32: the natural logarithm of the softmax's
        denominator. A row that sees no key has out 0 and lse -inf, or its sink if there are sinks.

    Raises:
        ValueError: an argument is not as described.
    """
    if carried_phi is None:
        op, unified_maximum = _decode_attention, {"phi": phi}
    elif phi is None:
        op, unified_maximum = _decode_attention_carry, {"carried_phi": carried_phi}
        if torch.is_grad_enabled():
            refuse_gradients("decode_attention", "carried_phi", carried_phi=carried_phi)
    else:
        raise ValueError(
            "flashdecpp::decode_attention: phi must be None if carried_phi is given, got a tensor"
        )
    try:
        out, lse = op(
            q,
            k_cache,
            v_cache,
            seq_lens,
            block_table,
            scale=scale,
            **unified_maximum,
            softcap=softcap,
            window=window,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            num_splits=num_splits,
            fallback_count=fallback_count,
        )
    except RuntimeError as error:
        raise _translate(error, op, locals()) from None
    if carried_phi is not None:
        increment_version(carried_phi)
    if fallback_count is not None:
        increment_version(fallback_count)
    if out.requires_grad:
        scales = (alibi_slopes, sinks, k_scale, v_scale)
        out, lse = without_backward("decode_attention", (out, lse), q, k_cache, v_cache, phi, *scales)
    return out, lse


@_fake(_decode_attention, _decode_attention_carry)
def _(q: Tensor, *_args: object, **_: object) -> tuple[Tensor, Tensor]:
    batch, q_len, q_heads, _head_dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, q_heads, q_len), dtype=torch.float32)


def check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None = None
) -> None:
    """Raises a ValueError if `decode_attention` would have to clamp or mask the same arguments.

    It would for a sequence longer than its cache, a negative length, or a block id outside the cache among
    the blocks that a sequence uses. A debugging aid: it waits for the device, so it works neither under
    torch.compile nor in a CUDA graph.
    """
    num_blocks = min(k_cache.size(0), v_cache.size(0))
    block_size = k_cache.size(1)
    capacity = block_size if block_table is None else block_size * block_table.size(1)
    for sequence, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"flashdecpp::check: seq_lens must be from 0 to the cache's {capacity} tokens per sequence, "
                f"got {length} for sequence {sequence}"
            )
    if block_table is None:
        return
    first_token = torch.arange(block_table.size(1), device=block_table.device) * block_size
    used = first_token < seq_lens[:, None]
    wrong = (used & ((block_table < 0) | (block_table >= num_blocks))).nonzero().tolist()
    if wrong:
        sequence, entry = wrong[0]
        raise ValueError(
            f"flashdecpp::check: block_table must hold block ids from 0 to {num_blocks - 1}, "
            f"got {block_table[sequence, entry].item()} at [{sequence}, {entry}]"
        )


# ---------------------------------------------------------------------------------------------------- linear


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias for a few rows of x, which reads the weight once (the paper's ImplA).

    Correct for any number of rows M; made for M <= 8, and on Hopper, where the tensor cores compute the sums,
    for M <= 16.

    Args:
        x: [..., K], any strides. float32, float16 or bfloat16 on the CPU, float16 or bfloat16 on a GPU.
        weight: [N, K], x's dtype, contiguous last dim. On a GPU, K must be a multiple of 8. On Hopper, its
            first rows are read before the preceding kernel has finished (programmatic dependent launch). That
            is unsafe only if the preceding kernel writes this weight after letting its successor start.
        bias: [N], x's dtype; read as early as the weight.

    Returns:
        [..., N] of x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        out = _gemv(x, weight, bias)
    except RuntimeError as error:
        raise _translate(error, _gemv, locals()) from None
    return without_backward("gemv", (out,), x, weight, bias)[0] if out.requires_grad else out


def flat_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias for more rows than `gemv` is made for but too few to fill a GEMM.

    The flat GEMM of the paper's section 4: M is padded to 8 rather than 64, and weights are prefetched while
    the previous ones are multiplied. Correct for any number of rows M, made for M <= 128. Arguments, result
    and errors are those of `gemv`.
    """
    try:
        out = _flat_gemm(x, weight, bias)
    except RuntimeError as error:
        raise _translate(error, _flat_gemm, locals()) from None
    return without_backward("flat_gemm", (out,), x, weight, bias)[0] if out.requires_grad else out


@overload
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: None = None,
    impl: str = "auto",
) -> Tensor: ...
@overload
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: None = None,
    activation: None = None,
    residual: Tensor,
    impl: str = "auto",
) -> None: ...
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """x @ weight^T + bias by the fastest implementation for the shape (the paper, section 5).

    It can be fused with its neighbors in a decoder layer. With h = rms_norm(x, norm_weight, eps=norm_eps), or
    x without norm_weight, and y = h @ weight^T + bias, at most one of these three applies:
    - gate: returns gated_activation(y, activation=gate), which is gate(y[..., :N / 2]) * y[..., N / 2:];
    - activation: returns activation(y);
    - residual: adds y to it in place and returns None.

    y stays in float32 until the result is rounded, once, if the fusion is part of the kernel. On a GPU, gate,
    activation and residual are part of `gemv` and `flat_gemm`. Separate launches, between which y is rounded
    to x's dtype, serve `blas` and a residual that does not start on a multiple of 16 bytes although N is a
    multiple of 8. On the CPU a residual is part of the kernel, and gate and activation are passes of their
    own, which cost little there. The norm is always one launch before the product, as `rms_norm` is: a GEMV
    that normalizes x in each of its CTAs was slower on an H200.

    Args:
        x: [..., K], any strides; float32, float16 or bfloat16.
        weight: [N, K], x's dtype, contiguous last dim; `gemv` says when it is read on Hopper. With a gate,
            the first N / 2 rows are those of the gate, the others those of the up projection.
        bias: [N], x's dtype.
        norm_weight: [K], contiguous, x's dtype or float32.
        norm_eps: added to the mean of squares; 0 or positive, and representable in float32.
        gate, activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".
        residual: [..., N] of x's dtype with x's rows, contiguous; shares no memory with another argument.
        impl: "gemv", "flat_gemm", "blas" (torch's own linear), or "auto": by the two inflection points that
            `flashdecpp tune` measured for this device, dtype, N and K, or by a rule without a measurement.
            "auto" resolves to "blas" for shapes that the other two do not support (on a GPU float32, and K
            that is not a multiple of 8).

    Returns:
        [..., N] of x's dtype, [..., N / 2] with a gate, None with a residual.

    Raises:
        ValueError: an argument is not as described.
    """
    if residual is None:
        plain = norm_weight is None and gate is None and activation is None and norm_eps == 1e-6
        op, keywords = _linear_plain, {}
        if not plain or impl != "auto":
            op, keywords = _linear, _keywords(norm_weight, norm_eps, gate, activation, impl)
        try:
            out = op(x, weight, bias, **keywords)
        except RuntimeError as error:
            raise _translate(error, op, locals()) from None
        return (
            without_backward("linear", (out,), x, weight, bias, norm_weight)[0] if out.requires_grad else out
        )

    _residual_alone("linear", gate, activation)
    if torch.is_grad_enabled():
        tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "residual": residual}
        refuse_gradients("linear", "residual", **tensors)
    keywords = _keywords(norm_weight, norm_eps, None, None, impl)
    try:
        _linear_residual(x, weight, bias, residual=residual, **keywords)
    except RuntimeError as error:
        raise _translate(error, _linear_residual, locals()) from None
    increment_version(residual)
    return None


def _keywords(
    norm_weight: Tensor | None, norm_eps: float, gate: str | None, activation: str | None, impl: str = "auto"
) -> dict[str, Tensor | float | str]:
    """The keywords that differ from the defaults: passing a string costs the host half a microsecond."""
    keywords: dict[str, Tensor | float | str] = {}
    if norm_weight is not None:
        keywords["norm_weight"] = norm_weight
    if norm_eps != 1e-6:
        keywords["norm_eps"] = norm_eps
    if gate is not None:
        keywords["gate"] = gate
    if activation is not None:
        keywords["activation"] = activation
    if impl != "auto":
        keywords["impl"] = impl
    return keywords


def _residual_alone(op: str, gate: str | None, activation: str | None) -> None:
    for name, value in (("gate", gate), ("activation", activation)):
        if value is not None:
            raise ValueError(f"flashdecpp::{op}: {name} must be None if residual is given, got {value!r:.80}")


@_fake(_linear_residual, _quantized_linear_residual)
def _(*_args: object, **_: object) -> None:
    return None


def linear_choice(x: Tensor, weight: Tensor) -> str:
    """The implementation that `linear(x, weight)` would choose: "gemv", "flat_gemm" or "blas".

    It depends on shapes, strides and the weight's address. On a CPU, "gemv" and "flat_gemm" are one kernel.
    Arguments and errors are those of `linear`. Not for torch.compile: linear chooses when it runs.
    """
    try:
        return _choose_linear(x, weight)
    except RuntimeError as error:
        raise _translate(error, _linear_choice, locals()) from None


def _choose_linear(x: Tensor, weight: Tensor) -> str:
    return ("gemv", "flat_gemm", "blas")[_linear_choice_index(x, weight)]


torch.library.impl("flashdecpp::linear_choice", ("cpu", "cuda"), _choose_linear)


@overload
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: None = None,
) -> Tensor: ...
@overload
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: None = None,
    activation: None = None,
    residual: Tensor,
) -> None: ...
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`linear` with a weight of 8 or 4 bits: w = scale * q + offset, with q as stored in memory.

    Only the weight is quantized: x keeps its precision, and sums are as accurate as float32's. A group is
    K / G weights of one row that share a scale and an offset. Offsets are numbers in the units of w, not zero
    points, so any affine format fits: GGUF's Q4_0 (d, no offsets), Q4_1 (d and m) and Q8_0 exactly.

    On the CPU the weight is streamed as stored and decoded in registers. From 32 rows of x on, it is
    dequantized to x's dtype, strip by strip, or all at once if `linear` would choose the BLAS. With fewer
    rows, a row's result has the same bits whatever else is in the batch.

    On a GPU the weight is streamed for up to 48 rows of float16 or bfloat16 x, 16 at a time: products with
    the integers are exact, and each group's sum is scaled in float32. Otherwise (more rows, float32, or
    weight rows that do not start on multiples of 16 bytes) it is dequantized to x's dtype for the vendor
    BLAS.

    Fusions are those of `linear`: part of the kernel if the weight is streamed on a GPU, passes of their own
    otherwise. The norm is always one launch before the product.

    Args:
        x: [..., K], any strides; float32, float16 or bfloat16.
        weight: contiguous last dim. 8 bit: int8 [N, K], q from -128 to 127. 4 bit: uint8 [N, K / 2], q from 0
            to 15; 16 bytes hold 32 neighbors along K, the first 16 in the low nibbles and the last 16 in the
            high nibbles, both in order (GGUF's own order, which `reference.pack_int4` produces). Read on
            Hopper as early as `gemv` says, like scales and offsets.
        scales: [N, G], contiguous last dim, for groups of 32, 64 or 128; with 8 bits also [N], one per row,
            for any K. float32, float16 or bfloat16, whatever x's dtype.
        offsets: scales' shape and dtype. None: 0 with 8 bits, -8 * scale with 4 bits, which is then symmetric
            around q = 8.
        bias: [N], x's dtype.
        norm_weight, norm_eps, gate, activation, residual: as in `linear`.

    Returns:
        [..., N] of x's dtype, [..., N / 2] with a gate, None with a residual.

    Raises:
        ValueError: an argument is not as described.
    """
    if residual is None:
        plain = norm_weight is None and gate is None and activation is None and norm_eps == 1e-6
        op, keywords = _quantized_linear_plain, {}
        if not plain:
            op, keywords = _quantized_linear, _keywords(norm_weight, norm_eps, gate, activation)
        try:
            out = op(x, weight, scales, offsets, bias, **keywords)
        except RuntimeError as error:
            raise _translate(error, op, locals()) from None
        if out.requires_grad:
            return without_backward("quantized_linear", (out,), x, scales, offsets, bias, norm_weight)[0]
        return out

    _residual_alone("quantized_linear", gate, activation)
    if torch.is_grad_enabled():
        tensors = {"x": x, "scales": scales, "offsets": offsets, "bias": bias, "norm_weight": norm_weight}
        refuse_gradients("quantized_linear", "residual", **tensors, residual=residual)
    keywords = _keywords(norm_weight, norm_eps, None, None)
    try:
        _quantized_linear_residual(x, weight, scales, offsets, bias, residual=residual, **keywords)
    except RuntimeError as error:
        raise _translate(error, _quantized_linear_residual, locals()) from None
    increment_version(residual)
    return None


@_fake(_gemv, _flat_gemm, _linear, _linear_plain, _quantized_linear, _quantized_linear_plain)
def _(x: Tensor, weight: Tensor, *_args: object, gate: str | None = None, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(0) // (1 if gate is None else 2)))


# ----------------------------------------------------------------------------------------------- elementwise


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    With a residual, x is added to it first, and the norm is that of the sum.

    Args:
        x: [..., hidden], contiguous last dim, evenly spaced rows; float32, float16 or bfloat16.
        weight: [hidden], x's dtype or float32.
        residual: x's shape and dtype, contiguous; shares no memory with another argument. Updated in place.
        eps: 0 or positive, and representable in float32.

    Returns:
        x's shape and dtype, computed in float32.

    Raises:
        ValueError: an argument is not as described.
    """
    if residual is None:
        try:
            out = _rms_norm(x, weight, eps=eps)
        except RuntimeError as error:
            raise _translate(error, _rms_norm, locals()) from None
        return without_backward("rms_norm", (out,), x, weight)[0] if out.requires_grad else out

    if torch.is_grad_enabled():
        refuse_gradients("rms_norm", "residual", x=x, weight=weight, residual=residual)
    try:
        out = _rms_norm_residual(x, weight, residual, eps=eps)
    except RuntimeError as error:
        raise _translate(error, _rms_norm_residual, locals()) from None
    increment_version(residual)
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim.

    bias is [hidden] of weight's dtype. Everything else is as in `rms_norm`.
    """
    if residual is None:
        try:
            out = _layer_norm(x, weight, bias, eps=eps)
        except RuntimeError as error:
            raise _translate(error, _layer_norm, locals()) from None
        return without_backward("layer_norm", (out,), x, weight, bias)[0] if out.requires_grad else out

    if torch.is_grad_enabled():
        refuse_gradients("layer_norm", "residual", x=x, weight=weight, bias=bias, residual=residual)
    try:
        out = _layer_norm_residual(x, weight, bias, residual, eps=eps)
    except RuntimeError as error:
        raise _translate(error, _layer_norm_residual, locals()) from None
    increment_version(residual)
    return out


@_fake(_rms_norm, _rms_norm_residual, _layer_norm, _layer_norm_residual)
def _(x: Tensor, *_args: object, **_: object) -> Tensor:
    return x.new_empty(x.shape)


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotates q and k in place by their positions (RoPE), then stores k and v in the cache.

    Token i of a sequence has position seq_len - q_len + i. A token at a negative position is left padding,
    neither rotated nor stored. One beyond `cos_sin` is not rotated, one beyond the cache is not stored.

    q, k, k_cache and v_cache share no memory with each other or with another argument; interleaved views of
    one tensor are fine as long as no element is in two of them.

    Args:
        q: [batch, q_len, q_heads, head_dim], contiguous last dim; float32, float16 or bfloat16. Any q_len.
        k, v: [batch, q_len, kv_heads, head_dim], q's dtype. q, k and v may be views of one packed tensor.
        k_cache, v_cache, block_table, k_scale, v_scale: as in `decode_attention`. A float8_e4m3fn cache
            stores value / scale, saturated to +-448.
        seq_lens: [batch] int32, tokens per sequence including the new ones. Like block_table, read before the
            preceding kernel has finished (programmatic dependent launch); `gemv` says when that is unsafe.
        cos_sin: [max_positions, rotary_dim] float32, the cosines of each position, then the sines. rotary_dim
            is even and at most head_dim; the rest of a head is left as it is. None: nothing is rotated.
        interleaved: pairs are (2d, 2d + 1) as in GPT-J and GLM, instead of (d, d + rotary_dim / 2) as in NeoX
            and Llama.

    Raises:
        ValueError: an argument is not as described.
    """
    if torch.is_grad_enabled():
        caches = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
        refuse_gradients("rotary_append", "the cache", q=q, k=k, v=v, **caches, cos_sin=cos_sin)
    try:
        _rotary_append(
            q,
            k,
            v,
            k_cache,
            v_cache,
            seq_lens,
            block_table,
            cos_sin=cos_sin,
            interleaved=interleaved,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    except RuntimeError as error:
        raise _translate(error, _rotary_append, locals()) from None
    increment_version((q, k, k_cache, v_cache))


@_fake(_rotary_append)
def _(*_args: object, **_: object) -> None:
    return None


def gated_activation(gate_up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up, where gate and up are the halves of the last dim (SwiGLU, GeGLU, ReGLU).

    Args:
        gate_up: [..., 2 * features], contiguous; float32, float16 or bfloat16.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".

    Returns:
        [..., features] of gate_up's dtype, computed in float32.

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        out = _gated_activation(gate_up, activation=activation)
    except RuntimeError as error:
        raise _translate(error, _gated_activation, locals()) from None
    return without_backward("gated_activation", (out,), gate_up)[0] if out.requires_grad else out


@_fake(_gated_activation)
def _(gate_up: Tensor, *, activation: str = "silu") -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.size(-1) // 2))


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """One token id per row: the largest logit, or a draw from the filtered distribution.

    Filters apply in transformers' order: repetition penalty, temperature, top-k, top-p over the tokens that
    top-k kept, min-p relative to the most likely token. All ties at a threshold are kept. A draw uses
    Philox-4x32-10 of (seed, position), so a row's token does not depend on the rest of the batch.

    Every parameter is a [batch] tensor on the device of logits. The most likely token passes every filter. As
    the temperature approaches 0, the draw becomes the greedy choice; at infinity, it is uniform.

    Args:
        logits: [batch, vocab], contiguous last dim; float32, float16 or bfloat16. NaN counts as -inf, and a
            logit of -inf is never chosen, whatever top_k is.
        temperature: float32. A row is greedy (lowest index among ties) if it is None, NaN, 0 or less.
        top_k: int32; 0 or less is off.
        top_p: float32; NaN or 1 or more is off, less than 0 counts as 0.
        min_p: float32; NaN or 0 or less is off, more than 1 counts as 1.
        seed, position: int64, 0 if None. The position makes successive draws with one seed independent.
        repetition_penalty: float32; divides the positive and multiplies the negative logits of seen tokens.
            Off if it is NaN, infinite or not above 0.
        seen: [batch, vocab] bool, contiguous; the chosen token is marked in it. Required by
            repetition_penalty.

    Returns:
        [batch] int64; -1 for a row without a logit above -inf.

    Raises:
        ValueError: an argument is not as described.
    """
    if seen is None and repetition_penalty is not None:
        raise ValueError("flashdecpp::sample: seen must be given with repetition_penalty, got None")
    op, history = _sample, {}
    if seen is not None:
        op, history = _sample_seen, {"seen": seen, "repetition_penalty": repetition_penalty}
    try:
        token = op(
            logits,
            **history,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            position=position,
        )
    except RuntimeError as error:
        raise _translate(error, op, locals()) from None
    if seen is not None:
        increment_version(seen)
    return token


@_fake(_sample, _sample_seen)
def _(logits: Tensor, *_args: object, **_: object) -> Tensor:
    return logits.new_empty((logits.size(0),), dtype=torch.int64)
