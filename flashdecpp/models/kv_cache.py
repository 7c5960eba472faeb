"""The paged KV cache: K and V of every layer, in blocks."""

from collections.abc import Sequence

import torch

from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp.errors import OutOfMemory

from .config import ModelConfig

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
            self._storage = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(f"a KV cache of {gigabytes(need)} can't be allocated on {device}") from error
        self.num_blocks, self.block_size = num_blocks, BLOCK_SIZE
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [(k, v) for k, v in self._storage]

    def copy(self, source: int, target: int) -> None:
        """Copies a block."""
        self._storage[:, :, target] = self._storage[:, :, source]

    def save(self, blocks: Sequence[int]) -> torch.Tensor:
        """What is in the blocks, [layers, 2, blocks, ...] in the host's memory."""
        return self._storage[:, :, list(blocks)].cpu()

    def restore(self, blocks: Sequence[int], saved: torch.Tensor) -> None:
        self._storage[:, :, list(blocks)] = saved.to(self._storage.device)


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return BLOCK_SIZE * config.cache_bytes_per_token(dtype)
