"""Attention of a pass over the cache: one new token of many sequences, or a chunk of one prompt."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from flashdecpp import _C, ops

from .config import ModelConfig
from .kv_cache import KVCache

# New tokens per sequence that the decode op accepts
MAX_Q_LEN = _C.MAX_NEW_TOKENS

# (layer, q, k) of a prompt's chunk, as its attention sees them: q [1, q_len, q_heads, head_dim] are the last
# tokens of k [1, tokens, kv_heads, head_dim]
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]


class DecodeAttention:
    """One token of each sequence, by the decode op. At most one of `phi` and `carried_phi` is given."""

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        phi: Sequence[torch.Tensor] | None,  # float32 [q_heads] of each layer
        carried_phi: torch.Tensor | None,  # float32 [layers, batch, q_heads]
        num_splits: int,
        fallbacks: torch.Tensor,
    ) -> None:
        self._config, self._cache = config, cache
        self._seq_lens, self._block_table = seq_lens, block_table
        self._phi, self._carried_phi = phi, carried_phi
        self._num_splits, self._fallbacks = num_splits, fallbacks

    def __call__(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k_cache, v_cache = self._cache.layers[index]
        out, _ = ops.decode_attention(
            q,
            k_cache,
            v_cache,
            self._seq_lens,
            self._block_table,
            scale=self._config.attn_scale,
            phi=None if self._phi is None else self._phi[index],
            softcap=self._config.attn_softcap,
            window=self._config.windows[index],
            num_splits=self._num_splits,
            fallback_count=self._fallbacks,
            carried_phi=None if self._carried_phi is None else self._carried_phi[index],
        )
        return out


class PromptAttention:
    """A prompt's tokens [start, stop) over all tokens before them.

    By torch's SDPA, or by the decode op for models that cap their logits, which SDPA cannot.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        block_table: torch.Tensor,  # int32 [1, max_blocks]
        start: int,
        stop: int,
        observe: Observe | None,
    ) -> None:
        self._config, self._cache, self._block_table = config, cache, block_table
        self._start, self._stop, self._observe = start, stop, observe
        # The chunk's own keys are enough for the first chunk; later ones gather all keys from the cache.
        self._blocks = None if start == 0 else block_table[0, : -(-stop // cache.block_size)]
        self._masks: dict[int, torch.Tensor] = {}

    def __call__(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        config, stop = self._config, self._stop
        if self._blocks is not None:
            k, v = (
                layer.index_select(0, self._blocks).flatten(0, 1)[None, :stop]
                for layer in self._cache.layers[index]
            )
        if self._observe is not None:
            self._observe(index, q, k)
        if config.attn_softcap:
            return self._by_decode_op(index, q)
        window = config.windows[index]
        causal = self._start == 0 and not 0 < window < stop
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if causal else self._mask(window),
            is_causal=causal,
            scale=config.attn_scale,
            enable_gqa=config.q_heads != config.kv_heads,
        )
        return out.transpose(1, 2)

    def _mask(self, window: int) -> torch.Tensor:
        start, stop, device = self._start, self._stop, self._block_table.device
        if not 0 < window < stop and device.type == "cuda":
            from torch.nn.attention.bias import causal_lower_right  # late: imports the compiler, for seconds

            return causal_lower_right(stop - start, stop)  # takes no memory
        if window not in self._masks:
            query = torch.arange(start, stop, device=device)[:, None]
            key = torch.arange(stop, device=device)
            mask = key <= query
            self._masks[window] = mask & (key > query - window) if window > 0 else mask
        return self._masks[window]

    def _by_decode_op(self, index: int, q: torch.Tensor) -> torch.Tensor:
        """The prompt as sequences of MAX_Q_LEN new tokens that share their keys.

        Padding fills up the first of them at its beginning, and is dropped again.
        """
        padding = -q.size(1) % MAX_Q_LEN
        pieces = F.pad(q[0], (0, 0, 0, 0, padding, 0)).unflatten(0, (-1, MAX_Q_LEN))
        count = pieces.size(0)
        before_end = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=q.device)
        k_cache, v_cache = self._cache.layers[index]
        out, _ = ops.decode_attention(
            pieces,
            k_cache,
            v_cache,
            self._stop - MAX_Q_LEN * before_end,
            self._block_table.repeat(count, 1),
            scale=self._config.attn_scale,
            softcap=self._config.attn_softcap,
            window=self._config.windows[index],
        )
        return out.flatten(0, 1)[None, padding:]
