"""The paged KV cache: keys and values of every layer, in blocks."""

from collections.abc import Sequence

import torch

from flashdecpp import _C
from flashdecpp._arguments import integer, require
from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp.errors import OutOfMemory

from .config import ModelConfig

BLOCK_SIZE = 16  # tokens per block in the model runner


def blocks_for(tokens: int) -> int:
    """Blocks of BLOCK_SIZE that hold so many tokens."""
    return -(-tokens // BLOCK_SIZE)


class KVCache:
    """Keys and values of all layers.

    layers[i]: (k_cache, v_cache) of layer i, contiguous [num_blocks, block_size, kv_heads, head_dim] each, as
        `ops.decode_attention` and `ops.rotary_append` take them with a block table. Their contents are
        undefined until written. A `BlockPool` says which sequence owns which block.

    No two of them share a storage: torch.compile clones arguments that are updated in place and alias.

    Raises ModelError for sizes that the ops do not support, OutOfMemory if `device` has too little memory.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        integer("layers", layers, 1)
        shape = (
            integer("num_blocks", num_blocks, 0),
            integer("block_size", block_size, 1),
            integer("kv_heads", kv_heads, 1),
            integer("head_dim", head_dim, 8, _C.MAX_HEAD_DIM),
        )
        require(block_size == 1 or block_size % 8 == 0, "block_size", "1 or a multiple of 8", block_size)
        require(head_dim % 8 == 0, "head_dim", "a multiple of 8", head_dim)
        device = torch.device(device)
        need = 2 * layers * num_blocks * block_size * kv_heads * head_dim * dtype.itemsize
        free = available_bytes(device)
        if need > free:
            raise OutOfMemory(
                f"a KV cache of {num_blocks * block_size} tokens needs {gigabytes(need)} on {device}, where "
                f"{gigabytes(free)} are free; ask for fewer tokens (max_tokens, max_len) or a smaller batch"
            )
        try:
            self._tensors = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(f"a KV cache of {gigabytes(need)} can't be allocated on {device}") from error
        self.num_blocks, self.block_size = num_blocks, block_size
        self.layers = list(zip(self._tensors[::2], self._tensors[1::2], strict=True))

    @classmethod
    def for_model(
        cls, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """A cache of a model's layers, in blocks of BLOCK_SIZE tokens."""
        return cls(
            layers=config.layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            num_blocks=num_blocks,
            dtype=dtype,
            device=device,
        )

    def copy(self, source: int, target: int) -> None:
        """Copies a block in every layer."""
        torch._foreach_copy_([x[target] for x in self._tensors], [x[source] for x in self._tensors])

    def save(self, blocks: Sequence[int]) -> torch.Tensor:
        """Blocks in host memory: [2 * layers, len(blocks), block_size, kv_heads, head_dim]."""
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self._tensors[0].device)
        return torch.stack([x.index_select(0, index) for x in self._tensors]).cpu()

    def restore(self, blocks: Sequence[int], saved: torch.Tensor) -> None:
        """Writes into blocks what `save` returned for as many."""
        device = self._tensors[0].device
        index = torch.tensor(list(blocks), dtype=torch.int64, device=device)
        for x, values in zip(self._tensors, saved.to(device), strict=True):
            x.index_copy_(0, index, values)


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    return BLOCK_SIZE * config.cache_bytes_per_token(dtype)
