"""flashdecpp inside transformers: decode attention, linear layers and norms of its models.

Importing this module makes `attn_implementation="flashdecpp"` known to transformers. A call with 1 to 16 new
tokens whose mask is causal (with a window, with padding) runs in `ops.decode_attention`, on the cache as
transformers holds it, dynamic or static, without a copy. A longer one is prefill and runs in transformers'
SDPA attention; what SDPA cannot express (softcap, sinks) in the model's own eager attention. Any other call
takes the same way as prefill, is counted with its reason (`attention_calls`), and logged once.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashdecpp")
    model = flashdecpp.accelerate(model)     # attention, nn.Linear and RMSNorm

What makes the difference is known where transformers makes the mask, once a step for all layers: lengths,
window and padding. There a mask that the op can follow is not spelt out but described, in the terms of the op
(`_describe`). So models that read their mask themselves instead of handing it on to attention, to choose keys
(Doge, DeepSeek V3.2 and later), end in an error.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

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
# transformers takes any name with "flash" in it for a build of FlashAttention, and treats models and masks
# accordingly. So the name that its registries and configs hold is another.
REGISTERED = "decpp"
OURS = "flashdecpp"  # what attention_calls counts beside the reasons for falling back
PREFILL = "prefill"
GRADIENTS = "gradients are needed: use torch.no_grad()"
AUTOCAST = "autocast"

PLAIN = (Tensor, nn.Parameter)  # a tensor of any other type has a meaning that only its library knows
LAYER_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of linear and rms_norm
ON_GPU = torch._C._dispatch_has_kernel_for_dispatch_key("flashdecpp::linear", "CUDA")

# What decode_attention takes, by the device types that this build has it for.
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
    """A mask in the terms of decode_attention, as one tensor that transformers hands from model to attention.

    Args:
        seq_lens: [batch] int32, the keys of each sequence in this layer's cache.
        window: the keys that a token sees; 0 for all.
        visible_keys: [batch, keys] int32: only these places of the cache are keys, in this order.

    Returns:
        [batch, 1 (+ keys), 1 + window, 2] int32: four dimensions as every mask has, so that transformers
        passes it on as it is; a dtype that no mask has and a last dimension that broadcasts with none, so
        that a model that reads it fails. The window is a size, since the op wants it on the host.
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


def _spelt_out(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
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


def _window(mask_function: Callable) -> int | None:
    """The window of a causal mask function, 0 where it has none; None for any other function."""
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_compiling():  # closures cannot be looked into there
        return None
    if mask_function.__code__ is not sliding_window_causal_mask_function(1).__code__:
        return None
    overlay, *others = _closure(mask_function)["mask_functions"]
    if others != [causal_mask_function] or overlay.__code__ is not sliding_window_overlay(1).__code__:
        return None
    return _closure(overlay)["sliding_window"]


def _closure(function: Callable) -> dict[str, object]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: object,
) -> Tensor | None:
    """What transformers asks for once a step and kind of layer (`AttentionMaskInterface`).

    A description where decode_attention can follow the mask, else what SDPA gets. Padding, and masks that
    are neither causal nor a sliding window, are described for one new token by the places of its visible
    keys. Reads whether there is padding from the device, as SDPA's mask does; under torch.compile a padding
    mask counts as padding.
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
    """The description of a mask [batch, keys] for one new token: the places of True in each row."""
    rank = visible.cumsum(1)
    keys = visible.size(1)
    places = torch.zeros(visible.size(0), keys + 1, dtype=torch.int32, device=visible.device)
    place = torch.arange(keys, dtype=torch.int32, device=visible.device).expand_as(visible)
    places = places.scatter(1, torch.where(visible, rank - 1, keys), place)  # the last column: of False
    return _describe(rank[:, -1].int(), visible_keys=places[:, :-1])


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
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """What a layer calls (`AttentionInterface`).

    Args:
        module: the layer.
        query: [batch, q_heads, q_len, head_dim].
        key, value: [batch, kv_heads, keys, head_dim], the layer's cache with the new tokens in it.
        attention_mask: of `mask`, or a mask that the user gave.
        s_aux: [q_heads], sinks.

    Returns:
        [batch, q_len, q_heads, head_dim], and the weights where the model's eager attention ran, else None.
    """
    reason = _reason_to_fall_back(query, key, value, attention_mask, dropout, options)
    _count(module, OURS if reason is None else reason)
    if reason is None:
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
            "it has softcap or sinks, which SDPA does not know, and no eager attention for prefill"
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
    """Why decode_attention cannot serve this call; None if it can."""
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
    for option in ("position_bias", "output_attentions", "cache"):  # the last is that of continuous batching
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
    if _has_keys(attention_mask) and (_pitch(key) is None or _pitch(key) != _pitch(value)):
        return "padding, and sequences that are not the same whole number of keys apart in k and v"
    return None


def _pitch(cache: Tensor) -> int | None:
    """How many keys a sequence of the cache is after the one before; None where that is no whole number."""
    if cache.size(0) == 1:
        return 0
    return None if cache.stride(0) % cache.stride(2) else cache.stride(0) // cache.stride(2)


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
        # Every place of the cache is a block of one token, counted through all sequences.
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
    """The mask as SDPA takes it."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return mask
    if _is_description(mask, kv_length):
        return _spelt_out(mask, q_length, kv_length)
    raise ValueError(
        f"flashdecpp: attn_implementation must be another for {type(module).__name__}: its mask must be "
        f"boolean, of floats, or as it was made, got {mask.dtype} of shape {tuple(mask.shape)}"
    )


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """SDPA's mask as eager attention wants it; None stands for causal from the first key on, as in SDPA."""
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
    if torch.compiler.is_compiling():  # which would compile anew whenever the count has changed
        return
    if not hasattr(module, "_flashdecpp_calls"):
        module._flashdecpp_calls = Counter()
    module._flashdecpp_calls[what] += 1


def _count_fallback(module: nn.Module, reason: str) -> None:
    _warn(f"flashdecpp: a layer runs as it did before accelerate ({reason})")
    if torch.compiler.is_compiling():
        return
    if "_flashdecpp_fallbacks" not in vars(module):
        module._flashdecpp_fallbacks = Counter()
    module._flashdecpp_fallbacks[reason] += 1


# torch.compile runs it itself, once, and leaves it out of the graph. Only with constants: torch 2.11 knows no
# way to hand a module to such a function.
@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    logger.warning_once(message)


def attention_calls(model: nn.Module) -> Counter[str]:
    """How many attention calls of a model went where, over all layers since it was loaded.

    Returns:
        "flashdecpp": through `ops.decode_attention`; "prefill": more than 16 new tokens, transformers' own;
        any other key: transformers' own too, for the reason that the key says. Calls below torch.compile
        are not counted; what falls back there is logged when it is compiled.
    """
    calls: Counter[str] = Counter()
    for module in model.modules():
        calls.update(getattr(module, "_flashdecpp_calls", {}))
    return calls


def layer_fallbacks(model: nn.Module) -> Counter[str]:
    """How many calls of linear layers and norms of an accelerated model ran as before, by the reason.

    Over all of them since the model was loaded, but for calls below torch.compile, as in `attention_calls`.
    Calls that went through flashdecpp are not counted.
    """
    fallbacks: Counter[str] = Counter()
    for module in model.modules():
        fallbacks.update(getattr(module, "_flashdecpp_fallbacks", {}))
    return fallbacks


# ------------------------------------------------------------------------------------------------- accelerate


def accelerate(model: Model) -> Model:
    """Runs a transformers model's attention, linear layers and RMSNorms through flashdecpp, in place.

    Attention: as with `attn_implementation="flashdecpp"`. `nn.Linear` (no subclasses): `ops.linear`, which
    picks GEMV, flat GEMM or BLAS by the shape. RMSNorms that compute what Llama's does: `ops.rms_norm`.
    Parameters, hooks and state_dict stay what they are; `restore` undoes all of it. A copy or a pickle of the
    model is accelerated as well, and runs its own weights. For inference: where gradients are needed, in
    autocast, and for weights that are tensor subclasses (torchao, DTensor) a layer runs as it did before, and
    says why in `layer_fallbacks`. So call the model below `torch.no_grad()`, as `generate` does.

    Args:
        model: on any device, in any dtype; also one with an adapter around it, as PEFT's, that has
            get_base_model(). Layers whose forward another library has replaced are left alone.

    Returns:
        The model.

    Raises:
        TypeError: not a transformers model.
        ValueError: its attention cannot be chosen.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"flashdecpp: model must be a transformers PreTrainedModel, got {type(base).__name__}; "
            "pass the one that it is made around"
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
        accelerated = _accelerated(type(module))
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
    """Before a layer's own class in the class that `accelerate` gives it: `forward` runs in an op.

    It is the class that changes, not the object, so that whatever copies the object (deepcopy, pickle,
    DataParallel) copies a layer that runs the weights of the copy.
    """

    flashdecpp_original: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made at run time, so a pickle names the one that it was made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return _unpickled, (self.flashdecpp_original,), *state


class _Linear(_InOp):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a module looks its parameters up in Python
        reason = _reason_for_torch(input, weight, bias)
        if reason is None:
            return ops.linear(input, weight, bias)
        _count_fallback(self, reason)
        return super().forward(input)


class _RMSNorm(_InOp):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        reason = _reason_for_torch(hidden_states, weight)
        if reason is None:
            return ops.rms_norm(hidden_states.contiguous(), weight, eps=self.variance_epsilon)
        _count_fallback(self, reason)
        return super().forward(hidden_states)


@functools.cache
def _accelerated(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class that runs in an op what `original` computes; None where there is no such op."""
    if original is nn.Linear:
        mixin = _Linear
    elif _is_llama_norm(original):
        mixin = _RMSNorm
    else:
        return None
    members = {"flashdecpp_original": original, "__module__": __name__}
    return type(f"Accelerated{original.__name__}", (mixin, original), members)


def _unpickled(original: type[nn.Module]) -> nn.Module:
    """An accelerated layer whose state is still to come."""
    accelerated = _accelerated(original)
    return accelerated.__new__(accelerated)


def _is_llama_norm(original: type[nn.Module]) -> bool:
    """Whether its code is that of Llama's, of which most families have a copy."""
    code, llama = (getattr(f, "__code__", None) for f in (original.forward, LlamaRMSNorm.forward))
    parts = operator.attrgetter("co_code", "co_names", "co_consts")
    return code is not None and parts(code) == parts(llama)


def _reason_for_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a layer has to run as it did before; None where its op gives the same."""
    if type(weight) not in PLAIN or type(x) not in PLAIN:
        return f"weight of type {type(weight).__name__}, input of type {type(x).__name__}"
    if weight.layout is not torch.strided or weight.stride(-1) != 1:
        return f"weight that is {weight.layout} and not contiguous"
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
    """Whether gradients are asked for, backward or forward (which no tensor tells in Python)."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _register() -> None:
    AttentionInterface.register(REGISTERED, attention)
    AttentionMaskInterface.register(REGISTERED, mask)
    choose = PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(choose)
    def choose_by_our_name(self, attn_implementation, *args, **options):
        name = REGISTERED if attn_implementation == NAME else attn_implementation
        return choose(self, name, *args, **options)

    PreTrainedModel._check_and_adjust_attn_implementation = choose_by_our_name


_register()
