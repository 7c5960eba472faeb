"""The decoder that all supported architectures share: what one forward pass computes, and nothing else."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from flashdecpp import ops

from .cache import KVCache
from .config import ModelConfig
from .weights import Weights

# Tokens of a prompt that go through the layers at once: bounds the memory of their activations.
PREFILL_CHUNK = 1024

# (layer, q, k, v) -> [batch, q_len, q_heads, head_dim]; q and k are rotated, k and v are in the cache
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# (layer, q, k) of a prompt's chunk, as its attention takes them: q [1, q_len, q_heads, head_dim] are the last
# of the tokens of k [1, tokens, kv_heads, head_dim]
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]


class Decoder:
    """Holds the weights and no state of a sequence: the KV cache and a carried phi are the caller's.

    `phi`: float32 [q_heads] per layer, the unified maximum of its softmax; None computes each row's own.
    Rows that had to be recomputed because their maximum was too far from phi, given or carried, are counted
    in `fallbacks`.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, max_len: int, phi: Sequence[torch.Tensor] | None = None
    ) -> None:
        self.config, self.weights = config, weights
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.phi = phi
        self.fallbacks = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._cos_sin = config.rope.table(max_len).to(self.device)
        self._heads = [config.q_heads, config.kv_heads, config.kv_heads]

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        carried_phi: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token of each sequence: tokens int64 [batch], in seq_lens already. Logits [batch, vocab].

        `carried_phi`: float32 [layers, batch, q_heads], instead of the decoder's phi: NaN for the first token
        of a sequence, then what the token before left in it.
        """
        windows, layers, fallbacks = self.config.windows, cache.layers, self.fallbacks
        phi = self.phi if carried_phi is None else None

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_cache, v_cache = layers[index]
            out, _ = ops.decode_attention(
                q,
                k_cache,
                v_cache,
                seq_lens,
                block_table,
                phi=None if phi is None else phi[index],
                window=windows[index],
                fallback_count=fallbacks,
                carried_phi=None if carried_phi is None else carried_phi[index],
            )
            return out

        x = self._layers(tokens.unsqueeze(1), cache, seq_lens, block_table, self._cos_sin, attend)
        return ops.linear(x, self.weights.lm_head)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        block_table: torch.Tensor,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """A prompt, tokens int64 [length], block_table [1, max_blocks]. Logits [1, vocab] of its last token.

        One prompt at a time, so that its result doesn't depend on what it's batched with. `observe` is
        shown what the softmax of every layer is computed from.
        """
        length = tokens.numel()
        cos_sin = self.config.rope.prompt_table(length)
        cos_sin = self._cos_sin if cos_sin is None else cos_sin.to(self.device)
        for start in range(0, length, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, length)
            seq_lens = torch.tensor([stop], dtype=torch.int32, device=self.device)
            attend = self._prompt_attention(cache, block_table, start, stop, observe)
            x = self._layers(tokens[None, start:stop], cache, seq_lens, block_table, cos_sin, attend)
        return ops.linear(x[-1:], self.weights.lm_head)

    def _layers(
        self,
        tokens: torch.Tensor,  # [batch, q_len]
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        cos_sin: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """The normalised hidden state [batch * q_len, hidden] after the last layer."""
        config, weights, eps = self.config, self.weights, self.config.norm_eps
        interleaved, activation = config.rope.interleaved, config.activation
        packed_shape = (*tokens.shape, sum(self._heads), config.head_dim)
        attended_shape = (tokens.numel(), config.q_heads * config.head_dim)
        # A norm first adds its input, the output of the sublayer before it, to the residual stream.
        following_norms = [layer.attn_norm for layer in weights.layers[1:]] + [weights.norm]
        residual = F.embedding(tokens.flatten(), weights.embed)
        x = ops.rms_norm(residual, weights.layers[0].attn_norm, eps=eps)
        for index, layer in enumerate(weights.layers):
            k_cache, v_cache = cache.layers[index]
            q, k, v = ops.linear(x, layer.qkv, layer.qkv_bias).view(packed_shape).split(self._heads, dim=2)
            ops.rotary_append(
                q, k, v, k_cache, v_cache, seq_lens, block_table, cos_sin=cos_sin, interleaved=interleaved
            )
            x = ops.linear(attend(index, q, k, v).reshape(attended_shape), layer.o, layer.o_bias)
            x = ops.rms_norm(x, layer.ffn_norm, residual, eps=eps)
            x = ops.linear(x, layer.gate_up, layer.gate_up_bias)
            x = ops.linear(ops.gated_activation(x, activation=activation), layer.down, layer.down_bias)
            x = ops.rms_norm(x, following_norms[index], residual, eps=eps)
        return x

    def _prompt_attention(
        self, cache: KVCache, block_table: torch.Tensor, start: int, stop: int, observe: Observe | None
    ) -> Attend:
        """Attention of the prompt's tokens [start, stop) over all before them, by torch's SDPA."""
        gqa = self.config.q_heads != self.config.kv_heads
        masks: dict[int, torch.Tensor] = {}
        blocks = None if start == 0 else block_table[0, : -(-stop // cache.block_size)].long()

        def mask_for(window: int) -> torch.Tensor:
            if window not in masks:
                query = torch.arange(start, stop, device=self.device)[:, None]
                key = torch.arange(stop, device=self.device)
                mask = key <= query
                masks[window] = mask & (key > query - window) if window > 0 else mask
            return masks[window]

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if blocks is not None:  # the chunk's own keys are in the cache as well
                k, v = (layer[blocks].flatten(0, 1)[None, :stop] for layer in cache.layers[index])
            if observe is not None:
                observe(index, q, k)
            window = self.config.windows[index]
            causal = start == 0 and not 0 < window < stop
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=None if causal else mask_for(window),
                is_causal=causal,
                enable_gqa=gqa,
            )
            return out.transpose(1, 2)

        return attend
