"""The ops of flashdecpp, documented: `torch.ops.flashdecpp.*` with checked arguments and fake kernels.

Every op takes CPU or GPU tensors, runs on the current stream, syncs with nothing, and works under
`torch.compile(fullgraph=True)` and in CUDA graphs: lengths, block tables and phi are read on the device when
the op runs. What an op computes is defined by the function of its name in `flashdecpp.reference`.

An argument of the wrong dtype, device, shape or stride, or in place in memory of another one, raises a
ValueError that names the argument, what it must be and what it was, before anything is launched or written;
one that is no tensor or number where there must be one a TypeError. Values that only the device knows
(lengths, block ids) can't be checked without a sync: the ops stay inside the cache whatever they are, and
`check` reports them. Results that no memory is left for raise torch.OutOfMemoryError.

No op has a backward. Where an argument requires grad, a backward through the result is a RuntimeError, and an
op that updates its arguments in place is refused with a ValueError unless gradients are off. Calls of
`torch.ops.flashdecpp.*` themselves have torch's own rules for such ops: a backward warns, and gives nothing.
Autocast changes nothing of what an op computes.

"The paper" is Hong et al., FlashDecoding++, MLSys 2024 (arXiv 2311.01282).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

from . import (
    _library,  # noqa: F401  (loading it registers torch.ops.flashdecpp)
)
from ._autograd import refuse_gradients, without_backward

__all__ = [
    "check",
    "decode_attention",
    "flat_gemm",
    "gated_activation",
    "gemv",
    "layer_norm",
    "linear",
    "linear_choice",
    "linear_fused",
    "quantized_linear",
    "quantized_linear_fused",
    "rms_norm",
    "rotary_append",
    "sample",
]

# Bound once: an attribute chain on every call would cost more than the rest of a wrapper.
_decode_attention = torch.ops.flashdecpp.decode_attention.default
_decode_attention_carry = torch.ops.flashdecpp.decode_attention.carry
_gemv = torch.ops.flashdecpp.gemv.default
_flat_gemm = torch.ops.flashdecpp.flat_gemm.default
_linear = torch.ops.flashdecpp.linear.default
_linear_choice = torch.ops.flashdecpp.linear_choice.default
_linear_choice_index = torch.ops.flashdecpp.linear_choice_index.default
_linear_fused = torch.ops.flashdecpp.linear_fused.default
_linear_fused_residual = torch.ops.flashdecpp.linear_fused.residual
_quantized_linear = torch.ops.flashdecpp.quantized_linear.default
_quantized_linear_fused = torch.ops.flashdecpp.quantized_linear_fused.default
_quantized_linear_fused_residual = torch.ops.flashdecpp.quantized_linear_fused.residual
_rms_norm = torch.ops.flashdecpp.rms_norm.default
_rms_norm_residual = torch.ops.flashdecpp.rms_norm.residual
_layer_norm = torch.ops.flashdecpp.layer_norm.default
_layer_norm_residual = torch.ops.flashdecpp.layer_norm.residual
_rotary_append = torch.ops.flashdecpp.rotary_append.default
_gated_activation = torch.ops.flashdecpp.gated_activation.default
_sample = torch.ops.flashdecpp.sample.default
_sample_seen = torch.ops.flashdecpp.sample.seen


# What csrc/torch_api.h begins its messages with: fail, out_of_memory.
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
    """What to raise for a call of `op` that failed: an error that names the argument, if it was one."""
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
    """The complaint about the first tensor on another device than the first, or of another layout."""
    names = [argument.name for argument in op._schema.arguments]
    tensors = {name: arguments[name] for name in names if isinstance(arguments.get(name), Tensor)}
    first = next(iter(tensors), None)
    for name, x in tensors.items():
        if x.device != tensors[first].device:
            return f"{op._schema.name}: {name} must be on {tensors[first].device} as {first}, got {x.device}"
        if x.layout is not torch.strided:
            return f"{op._schema.name}: {name} must be strided, got {x.layout}"
    return None


def _fake(*ops: OpOverload) -> Callable[[Callable], Callable]:
    """Registers a function as what ops give where tensors have no memory, which all of them must then be.

    A single meta tensor among others brings torch's dispatcher here, too.
    """

    def checked(op: OpOverload, function: Callable) -> Callable:
        names = [argument.name for argument in op._schema.arguments]

        def fake(*args, **kwargs):
            if foreign := _foreign(op, dict(zip(names, args, strict=False)) | kwargs):
                raise RuntimeError(foreign)
            return function(*args, **kwargs)

        return fake

    def register(function: Callable) -> Callable:
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
    """Attention of 1 to 16 new tokens a sequence over a KV cache that already holds them.

    The keys of a sequence are split over the machine. With `phi` every split subtracts that one value instead
    of its own maximum, so partial results add up in any order (the paper, section 3). A row (one query head
    of one token) whose true maximum is too far from phi for that to be exact falls back inside the same
    launch: its parts take new references, or are recomputed with the online softmax. So the result is the
    exact softmax whatever phi is; a good phi is only faster.

    Query token i of a sequence has the absolute position p = seq_len - q_len + i. Its logit for key j is
    x = scale * q.k, then softcap * tanh(x / softcap), then x - slope * (p - j). It sees key j where j <= p
    and, with a window, j > p - window. Keys that a row doesn't see never influence it, even where they are
    NaN. A visible key whose logit is NaN or infinite makes its row NaN, and no other row.

    Args:
        q: [batch, q_len, q_heads, head_dim], float16 or bfloat16, float32 on the CPU too. q_len 1 to 16;
            head_dim a multiple of 8 up to 256.
        k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim] with a block_table (block_size 1 or a
            multiple of 8), else [batch, max_len, kv_heads, head_dim]. q's dtype, or float8_e4m3fn. Any
            strides with a contiguous last dim: views of [..., kv_heads, block_size, head_dim] or of one
            tensor with K and V are fine. q_heads is 1 to 16 times kv_heads; query heads of one KV head are
            neighbours.
        seq_lens: [batch] int32, keys of each sequence with the new tokens counted; 0 gives zeros and an lse
            of -inf. These and the table are read as early as a weight (`gemv`).
        block_table: [batch, max_blocks] int32, the cache block of each block_size tokens of a sequence.
        scale: 1 / sqrt(head_dim) if None. This and softcap are numbers that float32 holds.
        phi: [q_heads] or [batch, q_heads] float32, the unified maximum in the units of x. None: online
            softmax.
        softcap: 0 for none.
        window: how many keys a token sees, itself included; 0 or less for all.
        alibi_slopes: [q_heads] float32.
        sinks: [q_heads] float32, logits that join the denominator (and lse) and add nothing to the output.
        k_scale, v_scale: [kv_heads] float32, what the values of a float8_e4m3fn cache are multiplied by;
            None: 1.
        num_splits: over how many parts the keys are split; 0 chooses. Fixed, it makes the result of a
            sequence bitwise repeatable, whatever else is in the batch.
        fallback_count: [1] int32; the number of rows that fell back is added to it.
        carried_phi: [batch, q_heads] float32, contiguous last dim; instead of phi. Read as the phi of each
            row, then replaced by the largest x of the last token's row, which is the phi of the next step:
            a row maximum moves little from token to token, so nothing needs to be calibrated. Stays as it was
            where that row sees no key or is NaN. A new sequence starts with NaN, which serves no row.

    Returns:
        out, as q, and lse, [batch, q_heads, q_len] float32: the natural logarithm of the softmax's
        denominator. A row that sees no key has out 0 and lse -inf (its sink, where there are sinks).

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
            "flashdecpp::decode_attention: phi must be None where carried_phi is given, got a tensor"
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
        return without_backward("decode_attention", (out, lse), q, k_cache, v_cache, phi, *scales)
    return out, lse


@_fake(_decode_attention, _decode_attention_carry)
def _(q, k_cache, v_cache, seq_lens, block_table=None, **_):
    batch, q_len, q_heads, _head_dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, q_heads, q_len), dtype=torch.float32)


def check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor | None = None
) -> None:
    """Raises a ValueError where `decode_attention` of the same arguments would have to clamp or mask.

    That is a sequence longer than its cache, a negative length, or a block id outside the cache among the
    blocks that a sequence uses. A debugging aid: it waits for the device, so neither torch.compile nor a CUDA
    graph can hold it.
    """
    num_blocks = min(k_cache.size(0), v_cache.size(0))
    block_size = k_cache.size(1)
    capacity = block_size if block_table is None else block_size * block_table.size(1)
    for sequence, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"flashdecpp::check: seq_lens must be from 0 to the cache's {capacity} tokens a sequence, "
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
    """x @ weight^T + bias as a stream of the weight, for few rows (the paper's ImplA).

    The weight is streamed once. Right for any number of rows M, made for M <= 8; on Hopper, where the
    matrix units do the sums, for M <= 16.

    Args:
        x: [..., K], any strides. float32, float16 or bfloat16 on the CPU, float16 or bfloat16 on a GPU.
        weight: [N, K], x's dtype, contiguous last dim. On a GPU K must be a multiple of 8. On Hopper its
            first rows are read while the kernel ahead in the stream still runs. That is safe after every
            kernel but one that lets its successor start (programmatic dependent launch) before it has
            written this weight.
        bias: [N], x's dtype; read as early.

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
    """x @ weight^T + bias for more rows than `gemv` is made for and fewer than fill a GEMM.

    The flat GEMM of the paper's section 4: M is padded to 8 rather than 64, and the weight is fetched ahead
    of the multiplication. Right for any number of rows M, made for M <= 128. Arguments, result and errors are
    those of `gemv`.
    """
    try:
        out = _flat_gemm(x, weight, bias)
    except RuntimeError as error:
        raise _translate(error, _flat_gemm, locals()) from None
    return without_backward("flat_gemm", (out,), x, weight, bias)[0] if out.requires_grad else out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x @ weight^T + bias by whichever implementation is fastest for the shape (the paper, section 5).

    Args:
        x: [..., K], any strides; float32, float16 or bfloat16.
        weight: [N, K], x's dtype, contiguous last dim; `gemv` says when it is read on Hopper.
        bias: [N], x's dtype.
        impl: "gemv", "flat_gemm", "blas" (torch's own linear), or "auto": by the two inflection points that
            were measured for this device, dtype, N and K (`flashdecpp tune`), or by a rule where they
            weren't. "auto" takes "blas" for what the other two can't do (on a GPU float32, and K not a
            multiple of 8).

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        if impl == "auto":  # the op's own default: a string takes half a microsecond to pass
            out = _linear(x, weight, bias)
        else:
            out = _linear(x, weight, bias, impl=impl)
    except RuntimeError as error:
        raise _translate(error, _linear, locals()) from None
    return without_backward("linear", (out,), x, weight, bias)[0] if out.requires_grad else out


def linear_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """`linear` with what stands around it in a decoder layer, in one launch where there is a kernel for that.

    h = rms_norm(x, norm_weight, eps=norm_eps), or x; y = h @ weight^T + bias; then
    - gated_activation(y, activation) is returned, or y where there is no activation;
    - or residual += y, in place, and nothing is returned.

    h is rounded to x's dtype, as `rms_norm` gives it; the rest is float32 until the result is rounded once.
    What runs as launches of its own instead (below) rounds y to x's dtype, too. On Hopper, where the norm is
    part of `gemv`, x * norm_weight is what is rounded (scaled by a power of two, so that float16 holds it),
    and 1 / rms multiplies the float32 sum: as many roundings, in another place.

    On a GPU the sum with the residual and the gate are part of `gemv` and `flat_gemm`, the norm is part of
    `gemv`; on Hopper only for up to 8 rows and 20480 columns, and for a norm_weight of x's dtype. Other
    norms, everything around `blas`, and whatever does not start on a multiple of 16 bytes (norm_weight, a
    residual whose N is a multiple of 8) are launches of their own. On the CPU norm and gate are passes of
    their own: they cost little there.

    Args:
        x, bias, impl: as in `linear`.
        weight: [N, K] as in `linear`; with an activation [2 * features, K], the rows of the gate, then those
            of the up projection, and bias in the same order.
        norm_weight: [K], contiguous, x's dtype or float32; read as early as a weight (`gemv`). None: no norm.
        norm_eps: added to the mean of squares; 0 or a positive number that float32 holds.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu"; not with a residual.
        residual: [..., N] of x's dtype with x's rows, contiguous; shares no memory with another argument.

    Returns:
        [..., N] of x's dtype, [..., features] with an activation, None with a residual.

    Raises:
        ValueError: an argument is not as described.
    """
    inputs = (x, weight, bias, norm_weight)
    if residual is None:
        around = {"norm_weight": norm_weight, "norm_eps": norm_eps, "activation": activation, "impl": impl}
        try:
            out = _linear_fused(x, weight, bias, **around)
        except RuntimeError as error:
            raise _translate(error, _linear_fused, locals()) from None
        return without_backward("linear_fused", (out,), *inputs)[0] if out.requires_grad else out

    _no_activation("linear_fused", activation)
    if torch.is_grad_enabled():
        tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "residual": residual}
        refuse_gradients("linear_fused", "residual", **tensors)
    try:
        _linear_fused_residual(
            x, weight, bias, residual=residual, norm_weight=norm_weight, norm_eps=norm_eps, impl=impl
        )
    except RuntimeError as error:
        raise _translate(error, _linear_fused_residual, locals()) from None
    increment_version(residual)
    return None


def _no_activation(op: str, activation: str | None) -> None:
    if activation is not None:
        raise ValueError(
            f"flashdecpp::{op}: activation must be None where residual is given, got {activation}"
        )


@_fake(_linear_fused)
def _(x, weight, bias=None, *, norm_weight=None, norm_eps=1e-6, activation=None, impl="auto"):
    return _fused_output(x, weight, activation)


@_fake(_linear_fused_residual, _quantized_linear_fused_residual)
def _(*_args, **_):
    return None


def _fused_output(x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(0) // (1 if activation is None else 2)))


def linear_choice(x: Tensor, weight: Tensor) -> str:
    """What `linear(x, weight)` takes, "gemv", "flat_gemm" or "blas": reads shapes, strides and the address.

    On a CPU "gemv" and "flat_gemm" are one kernel. Arguments and errors are those of `linear`. Not for
    torch.compile: the choice is made when linear runs.
    """
    try:
        return _choose_linear(x, weight)
    except RuntimeError as error:
        raise _translate(error, _linear_choice, locals()) from None


def _choose_linear(x: Tensor, weight: Tensor) -> str:
    return ("gemv", "flat_gemm", "blas")[_linear_choice_index(x, weight)]


torch.library.impl("flashdecpp::linear_choice", ("cpu", "cuda"), _choose_linear)


@_fake(_gemv, _flat_gemm, _linear)
def _(x, weight, bias=None, *, impl="auto"):
    return x.new_empty((*x.shape[:-1], weight.size(0)))


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ w^T + bias for a weight of 8 or 4 bits: w = scale * q + offset, with q as it lies in memory.

    Only the weight is quantised; products are with x as it is, in float32 or better than float32's error. A
    group is K / G weights of one row that share a scale and an offset. Offsets are numbers, in the units of
    w, not zero points: any affine format fits, GGUF's Q4_0 (d, no offsets), Q4_1 (d and m) and Q8_0 exactly.

    On the CPU the weight is streamed as it is stored and decoded in registers. From 32 rows of x on it is
    dequantised into x's dtype, strip by strip, or as a whole where `linear` would take the BLAS. Below that a
    row's result is the same bits whatever else is in the batch.

    On a GPU it is streamed, too, for up to 48 rows of float16 or bfloat16 x, 16 at a time: products with the
    integers are exact, and a group's sum is scaled in float32. Otherwise (more rows, float32, rows of the
    weight that do not start on multiples of 16 bytes) it is dequantised into x's dtype, then multiplied by
    the vendor BLAS.

    Args:
        x: [..., K], any strides; float32, float16 or bfloat16.
        weight: contiguous last dim. 8 bit: int8 [N, K], q from -128 to 127. 4 bit: uint8 [N, K / 2], q from 0
            to 15; 16 bytes hold 32 neighbours along K, the low nibbles the first 16, the high nibbles the
            last 16, both in order (GGUF's own order; `reference.pack_int4` makes it). Read on Hopper
            as `gemv` says, scales and offsets too.
        scales: [N, G], contiguous last dim, for groups of 32, 64 or 128; 8 bit also [N], one a row, for any
            K. float32, float16 or bfloat16, whatever x's dtype.
        offsets: scales' shape and dtype. None: 0 for 8 bit and -8 * scale for 4 bit, which is then symmetric
            around q = 8.
        bias: [N], x's dtype.

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        out = _quantized_linear(x, weight, scales, offsets, bias)
    except RuntimeError as error:
        raise _translate(error, _quantized_linear, locals()) from None
    if out.requires_grad:
        return without_backward("quantized_linear", (out,), x, scales, offsets, bias)[0]
    return out


@_fake(_quantized_linear)
def _(x, weight, scales, offsets=None, bias=None):
    return x.new_empty((*x.shape[:-1], weight.size(0)))


def quantized_linear_fused(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`linear_fused` with the weight of `quantized_linear`.

    On a GPU gate and sum are part of the launch where the weight is streamed (`quantized_linear` says when);
    a norm is a launch of its own.

    Args:
        x, weight, scales, offsets, bias: as in `quantized_linear`; with an activation the rows of the gate,
            then those of the up projection.
        norm_weight, norm_eps, activation, residual: as in `linear_fused`.

    Returns:
        What `linear_fused` returns.

    Raises:
        ValueError: an argument is not as described.
    """
    stored = (weight, scales, offsets, bias)
    if residual is None:
        around = {"norm_weight": norm_weight, "norm_eps": norm_eps, "activation": activation}
        try:
            out = _quantized_linear_fused(x, *stored, **around)
        except RuntimeError as error:
            raise _translate(error, _quantized_linear_fused, locals()) from None
        if out.requires_grad:
            return without_backward("quantized_linear_fused", (out,), x, *stored[1:], norm_weight)[0]
        return out

    _no_activation("quantized_linear_fused", activation)
    if torch.is_grad_enabled():
        tensors = {"x": x, "scales": scales, "offsets": offsets, "bias": bias, "norm_weight": norm_weight}
        refuse_gradients("quantized_linear_fused", "residual", **tensors, residual=residual)
    try:
        _quantized_linear_fused_residual(
            x, *stored, residual=residual, norm_weight=norm_weight, norm_eps=norm_eps
        )
    except RuntimeError as error:
        raise _translate(error, _quantized_linear_fused_residual, locals()) from None
    increment_version(residual)
    return None


@_fake(_quantized_linear_fused)
def _(x, weight, scales, offsets=None, bias=None, *, norm_weight=None, norm_eps=1e-6, activation=None):
    return _fused_output(x, weight, activation)


# ----------------------------------------------------------------------------------------------------- fused


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, after adding x to the residual if there is one.

    Args:
        x: [..., hidden], contiguous last dim, evenly spaced rows; float32, float16 or bfloat16.
        weight: [hidden], x's dtype or float32.
        residual: x's shape and dtype, contiguous; shares no memory with another argument. Becomes
            residual + x, and the norm is taken of that.
        eps: 0 or a positive number that float32 holds.

    Returns:
        x's shape and dtype; the maths is float32.

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
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim, after adding x to the residual stream.

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
def _(x, *_args, **_):
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
    """Rotates q and k in place by their positions (RoPE), then writes k and v to their places in the cache.

    Token i of a sequence has position seq_len - q_len + i. A negative one is left padding: it is neither
    rotated nor written. A position beyond `cos_sin` isn't rotated, one beyond the cache isn't written.

    q, k, k_cache and v_cache share no memory with each other or with another argument. Views of one tensor
    that pass between each other's elements don't.

    Args:
        q: [batch, q_len, q_heads, head_dim], contiguous last dim; float32, float16 or bfloat16. Any q_len.
        k, v: [batch, q_len, kv_heads, head_dim], q's dtype. q, k and v may be views of one packed tensor.
        k_cache, v_cache, block_table, k_scale, v_scale: as in `decode_attention`. A float8_e4m3fn cache
            stores value / scale, saturated to +-448.
        seq_lens: [batch] int32, the tokens of each sequence with the new ones counted. These and the table
            are read as early as a weight (`gemv`).
        cos_sin: [max_positions, rotary_dim] float32: the cosines of each position, then the sines. rotary_dim
            is even and at most head_dim; the rest of a head passes through. None: nothing is rotated.
        interleaved: the pairs are (2d, 2d + 1) as in GPT-J and GLM, not (d, d + rotary_dim / 2) as in NeoX
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
def _(*_args, **_):
    return None


def gated_activation(gate_up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up, where gate and up are the halves of the last dim (SwiGLU, GeGLU, ReGLU).

    Args:
        gate_up: [..., 2 * features], contiguous; float32, float16 or bfloat16.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".

    Returns:
        [..., features] of gate_up's dtype; the maths is float32.

    Raises:
        ValueError: an argument is not as described.
    """
    try:
        out = _gated_activation(gate_up, activation=activation)
    except RuntimeError as error:
        raise _translate(error, _gated_activation, locals()) from None
    return without_backward("gated_activation", (out,), gate_up)[0] if out.requires_grad else out


@_fake(_gated_activation)
def _(gate_up, *, activation="silu"):
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
    """One token id a row: the largest logit, or a draw from the filtered distribution.

    Filters apply in the order of the arguments of transformers: repetition penalty, temperature, top-k, top-p
    over what top-k left, min-p relative to the most likely token. Ties at a threshold are all kept. The draw
    takes its randomness from Philox-4x32-10 of (seed, position), so a row's token doesn't depend on the rest
    of the batch.

    Every parameter is a [batch] tensor on the device of logits. The most likely token passes every filter. As
    the temperature falls to the smallest of float32 the draw becomes the greedy choice; it is even where the
    temperature is infinite.

    Args:
        logits: [batch, vocab], contiguous last dim; float32, float16 or bfloat16. NaN counts as -inf, and
            what is -inf is never chosen, however many top_k asks for.
        temperature: float32. None, or 0, less or NaN in a row: greedy (the lowest index of equals).
        top_k: int32; 0 or less is off.
        top_p: float32; 1, more or NaN is off, less than 0 is 0.
        min_p: float32; 0, less or NaN is off, more than 1 is 1.
        seed, position: int64; None is 0. The position makes successive draws of one seed independent.
        repetition_penalty: float32; divides the positive and multiplies the negative logits of seen tokens.
            One that is not above 0, infinite or NaN is off.
        seen: [batch, vocab] bool, contiguous; the chosen token is marked in it. Needed by repetition_penalty.

    Returns:
        [batch] int64; -1 for a row that has no logit above -inf.

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
def _(logits, *_args, **_):
    return logits.new_empty((logits.size(0),), dtype=torch.int64)
