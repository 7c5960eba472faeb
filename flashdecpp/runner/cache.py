"""The paged KV cache: blocks of tokens that sequences take from a free list and give back."""

import torch

from .config import ModelConfig
from .errors import OutOfMemory
from .memory import available_bytes, gigabytes

BLOCK_SIZE = 16


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


class KVCache:
    """K and V of every layer, [num_blocks, block_size, kv_heads, head_dim] each."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        need = num_blocks * block_bytes(config, dtype)
        free = available_bytes(device)
        if need > free:
            raise OutOfMemory(
                f"a KV cache of {num_blocks * BLOCK_SIZE} tokens needs {gigabytes(need)} on {device}, where "
                f"{gigabytes(free)} are free; ask for fewer tokens (max_tokens, max_len) or a smaller batch"
            )
        shape = (config.layers, 2, num_blocks, BLOCK_SIZE, config.kv_heads, config.head_dim)
        try:
            storage = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(f"a KV cache of {gigabytes(need)} can't be allocated on {device}") from error
        self.num_blocks, self.block_size = num_blocks, BLOCK_SIZE
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [(layer[0], layer[1]) for layer in storage]
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks of the free ones."""
        if count > len(self._free):
            raise OutOfMemory(f"{count} cache blocks are wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return BLOCK_SIZE * config.cache_bytes_per_token(dtype)
