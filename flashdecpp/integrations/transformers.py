"""flashdecpp inside transformers: decode attention, linear layers and norms of its models.

Importing this module registers `attn_implementation="flashdecpp"` with transformers. A call with 1 to 16 new
tokens and a causal mask (also with a window or padding) runs in `ops.decode_attention`, on transformers'
dynamic or static cache without a copy. Prefill, with more tokens, runs in transformers' SDPA attention, or in
the model's own eager attention if SDPA lacks a feature (softcap, sinks). Any other call runs as prefill does,
is counted by its reason (`attention_calls`), and is logged once.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashdecpp")
    model = flashdecpp.accelerate(model)     # attention, nn.Linear and RMSNorm

`model.config._attn_implementation` then reads "decpp", because transformers treats any name that contains
"flash" as FlashAttention.

Lengths, window and padding are known when transformers creates the mask, once per step for all layers. A mask
that the op supports is not materialized there but described in the op's terms (`_describe`). Models that read
the mask themselves to choose keys (Doge, DeepSeek V3.2 and later) therefore fail with an error.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from flashdecpp import _C, ops

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
        sliding_window_causal_mask_function,
        sliding_window_overlay,
    )
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "flashdecpp.integrations.transformers needs a recent transformers (5.4 or newer): "
        f"pip install -U transformers ({error})"
    ) from error

if TYPE_CHECKING:
    from typing import TypeVar

    Model = TypeVar("Model", bound=PreTrainedModel)

__all__ = ["NAME", "accelerate", "attention_calls", "layer_fallbacks", "restore"]

NAME = "flashdecpp"
# The name in transformers' registries and configs: any that contains "flash" is treated as FlashAttention.
REGISTERED = "decpp"

OURS = "flashdecpp"  # a key of attention_calls, next to the reasons for falling back
PREFILL = "prefill"
GRADIENTS = "gradients are needed: use torch.no_grad()"
AUTOCAST = "autocast"

PLAIN = (Tensor, nn.Parameter)  # only a subclass's own library knows what its data mean
LAYER_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of linear and rms_norm
ON_GPU = torch._C._dispatch_has_kernel_for_dispatch_key("flashdecpp::linear", "CUDA")

# The dtypes of decode_attention, by the device types that this build supports.
DTYPES = {
    key.lower(): dtypes
    for key, dtypes in {
        "CPU": (torch.float16, torch.bfloat16, torch.float32),
        "CUDA": (torch.float16, torch.bfloat16),
    }.items()
    if torch._C._dispatch_has_kernel_for_dispatch_key("flashdecpp::decode_attention", key)
}

logger = logging.get_logger(__name__)


# ------------------------------------------------------------------------------------------------------ masks


def _describe(seq_lens: Tensor, window: int = 0, visible_keys: Tensor | None = None) -> Tensor:
    """A mask in decode_attention's terms, as one tensor that transformers passes from the model to attention.

    Args:
        seq_lens: [batch] int32, the keys of each sequence in this layer's cache.
        window: the number of keys that a token sees; 0 for all.
        visible_keys: [batch, keys] int32, the cache positions of the visible keys, in order; None for all.

    Returns:
        [batch, 1 (+ keys), 1 + window, 2] int32. It has four dimensions like any mask, so transformers passes
        it on unchanged, but a dtype and a last dimension of no mask, so a model that reads it fails. The
        window is encoded as a size because the op needs it on the host.
    """
    rows = seq_lens[:, None] if visible_keys is None else torch.cat((seq_lens[:, None], visible_keys), 1)
    return rows[:, :, None, None].expand(-1, -1, 1 + window, 2)


def _described(mask: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """seq_lens, window and visible_keys of `_describe`."""
    visible_keys = mask[:, 1:, 0, 0] if _has_keys(mask) else None
    return mask[:, 0, 0, 0].contiguous(), mask.size(2) - 1, visible_keys


def _is_description(mask: Tensor, kv_length: int) -> bool:
    return mask.dtype == torch.int32 and mask.size(3) == 2 and mask.size(1) in (1, 1 + kv_length)


def _has_keys(description: Tensor) -> bool:
    return description.size(1) > 1


def _boolean(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
    """The boolean mask [batch, 1, q_length, kv_length] of a description."""
    seq_lens, window, visible_keys = _described(mask)
    key = torch.arange(kv_length, device=mask.device)
    if visible_keys is not None:  # one new token
        used = key < seq_lens[:, None]
        columns = torch.where(used, visible_keys, kv_length).long()
        seen = torch.zeros(mask.size(0), kv_length + 1, dtype=torch.bool, device=mask.device)
        return seen.scatter(1, columns, True)[:, None, None, :-1]
    query = seq_lens[:, None, None, None] - q_length + torch.arange(q_length, device=mask.device)[:, None]
    return (key <= query) & (key > query - window) if window else key <= query


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask function, 0 without one; None for any other function."""
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_compiling():  # which does not support looking into closures
        return None
    if mask_function.__code__ is not sliding_window_causal_mask_function(1).__code__:
        return None
    overlay, *others = _closure(mask_function)["mask_functions"]
    if others != [causal_mask_function] or overlay.__code__ is not sliding_window_overlay(1).__code__:
        return None
    return _closure(overlay)["sliding_window"]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: object,
) -> Tensor | None:
    """Creates the mask, once per step and layer type (`AttentionMaskInterface`).

    Returns a description if decode_attention supports the mask, else SDPA's mask. Padding, and masks that are
    neither causal nor a sliding window, are described for a single new token by the positions of its visible
    keys. Whether there is padding is read from the device, as for SDPA's mask; under torch.compile any
    attention_mask counts as padding.
    """
    described = q_length <= _C.MAX_NEW_TOKENS and mask_function is not bidirectional_mask_function
    if described:
        window = _window(mask_function)
        length = q_offset + q_length
        unpadded = attention_mask is None or (
            not torch.compiler.is_compiling()
            and bool(attention_mask[:, kv_offset:].all() & (length <= attention_mask.size(1)))
        )
        if unpadded and window is not None:
            seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device) + (length - kv_offset)
            return _describe(seq_lens.int(), window)

    described = described and q_length == 1
    if described:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    boolean = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **options,
    )
    return _describe_visible(boolean[:, 0, 0]) if described else boolean


def _describe_visible(visible: Tensor) -> Tensor:
    """Describes a mask [batch, keys] for one new token by the positions of True in each row."""
    rank = visible.cumsum(1)
    keys = visible.size(1)
    positions = torch.zeros(visible.size(0), keys + 1, dtype=torch.int32, device=visible.device)
    position = torch.arange(keys, dtype=torch.int32, device=visible.device).expand_as(visible)
    # The last column receives the positions of False.
    positions = positions.scatter(1, torch.where(visible, rank - 1, keys), position)
    return _describe(rank[:, -1].int(), visible_keys=positions[:, :-1])


# -------------------------------------------------------------------------------------------------- attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a layer (`AttentionInterface`).

    Args:
        module: the layer.
        query: [batch, q_heads, q_len, head_dim].
        key, value: [batch, kv_heads, keys, head_dim], the layer's cache including the new tokens.
        attention_mask: from `mask`, or given by the user.
        s_aux: [q_heads], sinks.

    Returns:
        [batch, q_len, q_heads, head_dim], and the weights if the model's eager attention ran, else None.
    """
    reason = _reason_to_fall_back(query, key, value, attention_mask, dropout, options)
    _count(module, OURS if reason is None else reason)
    if reason is None and attention_mask is not None:
        return _decode(query, key, value, attention_mask, scaling, softcap, s_aux), None

    attention_mask = _for_torch(module, attention_mask, query.size(2), key.size(2))
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"flashdecpp: attn_implementation must be another for {type(module).__name__}: "
            "it has softcap or sinks, which SDPA does not support, and no eager attention for prefill"
        )
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    is_causal = options.get("is_causal", getattr(module, "is_causal", True))
    additive = _additive(attention_mask, query, key, is_causal)
    return eager(module, query, key, value, additive, dropout=dropout, scaling=scaling, **options)


def _reason_to_fall_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, object],
) -> str | None:
    """Why decode_attention cannot run this call; None if it can."""
    _, q_heads, q_length, head_dim = query.shape
    _, kv_heads, kv_length, key_dim = key.shape
    if q_length > _C.MAX_NEW_TOKENS:
        return PREFILL
    if attention_mask is None:
        return "not causal"
    if not _is_description(attention_mask, kv_length):
        return "mask: given by the caller, or padding with several new tokens"
    if dropout > 0:
        return "dropout"
    if any(type(x) not in PLAIN for x in (query, key, value)):
        return f"tensors of types {', '.join(type(x).__name__ for x in (query, key, value))}"
    if _differentiated(query, key, value):
        return GRADIENTS
    if torch._C._is_any_autocast_enabled():
        return AUTOCAST
    for option in ("position_bias", "output_attentions", "cache"):  # "cache" comes from continuous batching
        if (given := options.get(option)) is not None and given is not False:
            return option
    device, dtype = query.device.type, query.dtype
    if device not in DTYPES:
        return f"device {device}"
    if dtype not in DTYPES[device] or key.dtype != dtype or value.dtype != dtype:
        return f"dtype {dtype} of q, {key.dtype} of k and {value.dtype} of v"
    if head_dim % 8 or head_dim > _C.MAX_HEAD_DIM or key_dim != head_dim or value.size(3) != head_dim:
        return f"head_dim {head_dim} of q, {key_dim} of k and {value.size(3)} of v"
    if q_heads % kv_heads or q_heads > _C.MAX_QUERY_GROUP * kv_heads:
        return f"{q_heads} query heads over {kv_heads} KV heads"
    if _has_keys(attention_mask) and (_pitch(key) < 0 or _pitch(key) != _pitch(value)):
        return "padding, and strides of k and v over sequences that differ or are no multiple of a key"
    return None


def _pitch(cache: Tensor) -> int:
    """The stride between sequences in keys; -1 unless it is a whole number of them."""
    if cache.size(0) == 1:
        return 0
    return -1 if cache.stride(0) % cache.stride(2) else cache.stride(0) // cache.stride(2)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    description: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    seq_lens, window, block_table = _described(description)
    if block_table is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    else:
        # Every cache position is a block of one token, numbered across all sequences.
        sequence = torch.arange(key.size(0), dtype=torch.int32, device=key.device)
        block_table = block_table + sequence[:, None] * _pitch(key)
        key, value = _by_token(key), _by_token(value)
    out, _ = ops.decode_attention(
        query.transpose(1, 2),
        key,
        value,
        seq_lens,
        block_table,
        scale=scaling,
        softcap=softcap or 0.0,
        window=window,
        sinks=None if sinks is None else sinks.float(),
    )
    return out


def _by_token(cache: Tensor) -> Tensor:
    """[batch, kv_heads, keys, head_dim] as overlapping [blocks, 1, kv_heads, head_dim]: no copy."""
    batch, kv_heads, keys, head_dim = cache.shape
    _, head, token, element = cache.stride()
    blocks = (batch - 1) * _pitch(cache) + keys
    return cache.as_strided((blocks, 1, kv_heads, head_dim), (token, token, head, element))


def _for_torch(module: nn.Module, mask: Tensor | None, q_length: int, kv_length: int) -> Tensor | None:
    """The mask in SDPA's form."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return mask
    if _is_description(mask, kv_length):
        return _boolean(mask, q_length, kv_length)
    raise ValueError(
        f"flashdecpp: attn_implementation must be another for {type(module).__name__}: its mask must be "
        f"boolean, floating-point or unmodified, got {mask.dtype} of shape {tuple(mask.shape)}"
    )


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """SDPA's mask in eager attention's additive form. None means causal from the first key on, as in SDPA."""
    if mask is None:
        q_length = query.size(2)
        if q_length == 1 or is_causal is False:
            return None
        mask = torch.ones(q_length, key.size(2), dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


# ------------------------------------------------------------------------------------------------- statistics


def _count(module: nn.Module, what: str) -> None:
    if what not in (OURS, PREFILL):
        _warn(f"flashdecpp: attention falls back to transformers' own ({what})")
    if torch.compiler.is_compiling():  # which would recompile whenever the count changes
        return
    vars(module).setdefault("_flashdecpp_calls", Counter())[what] += 1


def _count_fallback(module: nn.Module, reason: str) -> None:
    _warn(f"flashdecpp: a layer runs as it did before accelerate ({reason})")
    if torch.compiler.is_compiling():
        return
    vars(module).setdefault("_flashdecpp_fallbacks", Counter())[reason] += 1


# torch.compile runs this once while tracing and leaves it out of the graph. Its arguments must be constants:
# torch 2.11 cannot pass a module to such a function.
@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    logger.warning_once(message)


def attention_calls(model: nn.Module) -> Counter[str]:
    """Counts a model's attention calls by the way they ran, over all layers since it was loaded.

    Returns:
        "flashdecpp": in `ops.decode_attention`. "prefill": more than 16 new tokens, in transformers'
        attention. Any other key is the reason why a call ran in transformers' attention. Calls under
        torch.compile are not counted; their fallbacks are logged when they are compiled.
    """
    calls: Counter[str] = Counter()
    for module in model.modules():
        calls.update(vars(module).get("_flashdecpp_calls", {}))
    return calls


def layer_fallbacks(model: nn.Module) -> Counter[str]:
    """Counts the calls of linear layers and norms that did not run in flashdecpp, by the reason.

    Covers all layers of an accelerated model since it was loaded, except for calls under torch.compile.
    """
    fallbacks: Counter[str] = Counter()
    for module in model.modules():
        fallbacks.update(vars(module).get("_flashdecpp_fallbacks", {}))
    return fallbacks


# ------------------------------------------------------------------------------------------------- accelerate


def accelerate(model: Model) -> Model:
    """Runs a transformers model's attention, linear layers and RMSNorms through flashdecpp, in place.

    Attention runs as with `attn_implementation="flashdecpp"`; `model.config._attn_implementation` will read
    "decpp", because transformers treats any name that contains "flash" as FlashAttention. `nn.Linear`, but
    not its subclasses, runs in `ops.linear`, which picks GEMV, flat GEMM or BLAS by the shape. RMSNorms with
    the same code as Llama's run in `ops.rms_norm`. Parameters, hooks and state_dict do not change, and
    `restore` undoes everything. Copies and pickles of the model are accelerated as well, with weights of
    their own.

    This is for inference, under `torch.no_grad()` as in `generate`: if gradients are needed, in autocast, and
    for weights that are tensor subclasses (torchao, DTensor), a layer runs as before, and `layer_fallbacks`
    counts the reason.

    Args:
        model: on any device, in any dtype; may be wrapped in an adapter that has get_base_model(), such as
            PEFT's. Layers whose forward another library has replaced are left alone.

    Returns:
        The model.

    Raises:
        TypeError: not a transformers model.
        ValueError: its attention implementation cannot be selected.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"flashdecpp: model must be a transformers PreTrainedModel, got {type(base).__name__}; "
            "pass the model that it wraps"
        )
    if base.config._attn_implementation != REGISTERED:
        previous = {"": base.config._attn_implementation}
        for name in base.config.sub_configs:
            if (part := getattr(base.config, name)) is not None:
                previous[name] = part._attn_implementation
        base.set_attn_implementation(NAME)
        if base.config._attn_implementation != REGISTERED:
            raise ValueError(
                f"flashdecpp: model must take its attention from transformers' AttentionInterface, "
                f"{type(base).__name__} does not"
            )
        base._flashdecpp_previous_attention = previous
    for module in base.modules():
        accelerated = _accelerated(type(module))  # type: ignore[arg-type]  # torch's stubs: not hashable
        if accelerated is not None and "forward" not in vars(module):
            module.__class__ = accelerated
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in place, and returns the model."""
    for module in model.modules():
        if "flashdecpp_original" in vars(type(module)):
            module.__class__ = type(module).flashdecpp_original
        if "_flashdecpp_previous_attention" in vars(module):
            module.set_attn_implementation(module._flashdecpp_previous_attention)
            del module._flashdecpp_previous_attention
    return model


class _InOp(nn.Module):
    """A mixin, placed before a layer's own class by `accelerate`, whose `forward` runs in an op.

    Changing the class rather than the object means that copies of the object (deepcopy, pickle, DataParallel)
    run with the weights of the copy.
    """

    flashdecpp_original: type[nn.Module]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is created at run time, so a pickle names the original one.
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return _unpickled, (self.flashdecpp_original,), *state


class _Linear(_InOp):
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # read once: a module looks up parameters in Python
        reason = _reason_for_torch(input, weight, bias)
        if reason is None:
            return ops.linear(input, weight, bias)
        _count_fallback(self, reason)
        return super().forward(input)


class _RMSNorm(_InOp):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        reason = _reason_for_torch(hidden_states, weight)
        if reason is None:
            return ops.rms_norm(hidden_states.contiguous(), weight, eps=self.variance_epsilon)
        _count_fallback(self, reason)
        return super().forward(hidden_states)


@functools.cache
def _accelerated(original: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass of `original` that runs in an op; None if there is no such op."""
    mixin: type[_InOp]
    if original is nn.Linear:
        mixin = _Linear
    elif _is_llama_norm(original):
        mixin = _RMSNorm
    else:
        return None
    members = {"flashdecpp_original": original, "__module__": __name__}
    return type(f"Accelerated{original.__name__}", (mixin, original), members)


def _unpickled(original: type[nn.Module]) -> nn.Module:
    """An accelerated layer without its state, which the unpickler sets."""
    accelerated = _accelerated(original) or original  # type: ignore[arg-type]
    return accelerated.__new__(accelerated)


def _is_llama_norm(original: type[nn.Module]) -> bool:
    """Whether its code is that of Llama's RMSNorm, which most families copy."""
    code, llama = (getattr(f, "__code__", None) for f in (original.forward, LlamaRMSNorm.forward))
    behavior = operator.attrgetter("co_code", "co_names", "co_consts")
    return code is not None and behavior(code) == behavior(llama)


def _reason_for_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a layer must run as before; None if its op is equivalent."""
    if type(weight) not in PLAIN or type(x) not in PLAIN:
        return f"weight of type {type(weight).__name__}, input of type {type(x).__name__}"
    if weight.layout is not torch.strided or weight.stride(-1) != 1:
        return f"weight of layout {weight.layout} and not contiguous"
    if _differentiated(x, weight, bias):
        return GRADIENTS
    if torch._C._is_any_autocast_enabled():
        return AUTOCAST
    if x.dtype != weight.dtype or x.dtype not in LAYER_DTYPES:
        return f"weight of {weight.dtype}, input of {x.dtype}"
    if not (x.is_cpu or (x.is_cuda and ON_GPU)):
        return f"device {x.device}"
    return None


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether gradients are needed, in reverse mode or in forward mode (which tensors do not show)."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _register() -> None:
    AttentionInterface.register(REGISTERED, attention)
    AttentionMaskInterface.register(REGISTERED, mask)
    choose = PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(choose)
    def choose_by_our_name(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **options: Any
    ) -> Any:
        name = REGISTERED if attn_implementation == NAME else attn_implementation
        return choose(self, name, *args, **options)

    PreTrainedModel._check_and_adjust_attn_implementation = choose_by_our_name


_register()
