"""Alternatives to decode_attention: torch's SDPA, FlashInfer, FlashAttention-3.

A peer is set up for a shape outside the timed region (plans and schedules are made once per step for all
layers), then called with the index of a KV set. It raises an exception for anything it does not support.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from attention_shapes import Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

Call = Callable[[int], Tensor]  # KV set -> out [batch, q_len, q_heads, head_dim]


def _sdpa(inputs: Inputs, backend: SDPBackend, layout: str) -> Call:
    q = inputs.q.transpose(1, 2)
    gqa = inputs.shape.q_heads != inputs.shape.kv_heads
    mask = causal_lower_right(inputs.shape.q_len, inputs.shape.length) if inputs.shape.q_len > 1 else None

    def call(i: int) -> Tensor:
        k, v = inputs.contiguous(i) if layout == "contiguous" else inputs.head_major(i)
        if layout == "contiguous":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa).transpose(1, 2)

    return call


def _flashinfer(inputs: Inputs, tensor_cores: bool, pdl: bool) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape, device = inputs.shape, inputs.q.device
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    blocks = torch.tensor(inputs.blocks, dtype=torch.int32, device=device)
    wrapper.plan(
        F.pad(blocks.cumsum(0, dtype=torch.int32), (1, 0)),
        inputs.block_ids,
        inputs.seq_lens - (blocks - 1) * shape.block_size,
        shape.q_heads,
        shape.kv_heads,
        shape.head_dim,
        shape.block_size,
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.paged(0)[0].dtype,
    )
    q = inputs.q.squeeze(1)
    # FlashInfer has no scales per head; it reads fp8 caches without any.
    return lambda i: wrapper.run(q, inputs.paged(i), enable_pdl=pdl).unsqueeze(1)


def _flash_attention_3(inputs: Inputs, layout: str, scheduled: bool) -> Call:
    from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

    shape = inputs.shape
    paged = layout == "paged"
    options = {"cache_seqlens": inputs.seq_lens, "causal": True}
    if scheduled:  # once per step instead of once per layer, like vLLM
        capacity = inputs.block_table.size(1) * shape.block_size if paged else shape.length
        options["scheduler_metadata"] = get_scheduler_metadata(
            shape.batch,
            shape.q_len,
            capacity,
            shape.q_heads,
            shape.kv_heads,
            shape.head_dim,
            inputs.seq_lens,
            qkv_dtype=inputs.q.dtype,
            page_size=shape.block_size if paged else None,
            causal=True,
        )
    if paged:
        options["page_table"] = inputs.block_table
    caches = inputs.paged if paged else inputs.contiguous
    return lambda i: flash_attn_with_kvcache(inputs.q, *caches(i), **options)


# name -> the module it needs, the layout it reads, its setup function
PEERS: dict[str, tuple[str, str, Callable[[Inputs], Call]]] = {
    **{
        f"sdpa {backend.name.split('_')[0].lower()} {layout}": (
            "torch",
            layout,
            partial(_sdpa, backend=backend, layout=layout),
        )
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        for layout in ("contiguous", "head_major")
    },
    **{
        f"flashinfer {kernel}{' pdl' if pdl else ''}": (
            "flashinfer",
            "paged",
            partial(_flashinfer, tensor_cores=kernel == "tensor cores", pdl=pdl),
        )
        for kernel in ("cuda cores", "tensor cores")
        for pdl in (False, True)
    },
    **{
        f"fa3 {layout}{' scheduled' if scheduled else ''}": (
            "flash_attn_interface",
            layout,
            partial(_flash_attention_3, layout=layout, scheduled=scheduled),
        )
        for layout in ("paged", "contiguous")
        for scheduled in (False, True)
    },
}


def installed(wanted: list[str]) -> list[str]:
    """The available peers whose names begin with one of `wanted`. Prints the modules that are missing."""
    missing, names = {}, []
    for name, (module, *_) in PEERS.items():
        if not any(name.startswith(prefix) for prefix in wanted):
            continue
        if module not in missing:
            try:
                importlib.import_module(module)
                missing[module] = None
            except Exception as error:  # including libraries that don't load and incompatible versions
                missing[module] = error
                print(f"{module} is left out: {str(error).splitlines()[0]}", flush=True)
        if missing[module] is None:
            names.append(name)
    return names
