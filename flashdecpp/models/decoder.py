"""The decoder that all supported architectures share: what one forward pass computes, and nothing else."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

from flashdecpp import ops
from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp.errors import OutOfMemory

from .config import ModelConfig
from .kv_cache import KVCache
from .rope import Rope
from .weights import Layer, Matrix, Weights

# Tokens of a prompt that go through the layers at once: bounds the memory of their activations.
PREFILL_CHUNK = 1024

# From more rows than these on, every linear layer goes to the BLAS.
BLAS_ROWS = 128

# Rows whose logits are made at once where those of a whole prompt are wanted: they take much memory
LOGITS_ROWS = 64

# Tokens of a sequence that the decode op takes at once
MAX_Q_LEN = 16

# (layer, q, k, v) -> [batch, q_len, q_heads, head_dim]; q and k are rotated, k and v are in the cache
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

Norm = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias

# (layer, q, k) of a prompt's chunk, as its attention takes them: q [1, q_len, q_heads, head_dim] are the last
# of the tokens of k [1, tokens, kv_heads, head_dim]
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]

# (position of the first, logits [rows, vocab]) of successive tokens of a prompt
Score = Callable[[int, torch.Tensor], None]


class Decoder:
    """Holds the weights and no state of a sequence: the KV cache and a carried phi are the caller's.

    `phi`: float32 [q_heads] per layer, the unified maximum of its softmax; None computes each row's own.
    Rows that had to be recomputed because their maximum was too far from phi, given or carried, are counted
    in `fallbacks`. `num_splits`: as in ops.decode_attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_len: int,
        phi: Sequence[torch.Tensor] | None = None,
        num_splits: int = 0,
    ) -> None:
        self.config, self.weights = config, weights
        self.device, self.dtype = weights.layers[0].attn_norm.device, weights.dtype
        self.phi, self.num_splits = phi, num_splits
        self.fallbacks = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._check_room(max_len)
        self._cos_sin = self._rotations(lambda rope: rope.table(max_len))
        self._heads = [config.q_heads, config.kv_heads, config.kv_heads]
        # Rounded as Gemma's authors do it
        scale = torch.tensor(config.hidden**0.5, dtype=self.dtype, device="cpu").item()
        self._embed_scale = scale if config.architecture.scaled_embedding else None

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
        config, layers, fallbacks = self.config, cache.layers, self.fallbacks
        phi = self.phi if carried_phi is None else None

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_cache, v_cache = layers[index]
            out, _ = ops.decode_attention(
                q,
                k_cache,
                v_cache,
                seq_lens,
                block_table,
                scale=config.attn_scale,
                phi=None if phi is None else phi[index],
                softcap=config.attn_softcap,
                window=config.windows[index],
                num_splits=self.num_splits,
                fallback_count=fallbacks,
                carried_phi=None if carried_phi is None else carried_phi[index],
            )
            return out

        stream = self._layers(tokens.unsqueeze(1), cache, seq_lens, block_table, self._cos_sin, attend)
        return self._logits(stream)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        block_table: torch.Tensor,
        observe: Observe | None = None,
        *,
        start: int = 0,
        prompt_length: int | None = None,
        score: Score | None = None,
    ) -> torch.Tensor:
        """A prompt, tokens int64 [length], block_table [1, max_blocks]. Logits [1, vocab] of its last token.

        One prompt at a time, so that its result doesn't depend on what it's batched with. `observe` is
        shown what the softmax of every layer is computed from, `score` the logits of all tokens.

        Or a piece of a prompt of `prompt_length` tokens, of which the cache holds `start` already.
        """
        end = start + tokens.numel()
        own = self._rotations(lambda rope: rope.prompt_table(prompt_length or end))
        cos_sin = [b if a is None else a for a, b in zip(own, self._cos_sin, strict=True)]
        for first in range(start, end, PREFILL_CHUNK):
            stop = min(first + PREFILL_CHUNK, end)
            seq_lens = torch.full((1,), stop, dtype=torch.int32, device=self.device)  # no copy to wait for
            attend = self._prompt_attention(cache, block_table, first, stop, observe)
            chunk = tokens[None, first - start : stop - start]
            stream = self._layers(chunk, cache, seq_lens, block_table, cos_sin, attend)
            if score is not None:
                for row in range(0, len(stream), LOGITS_ROWS):
                    score(first + row, self._logits(stream[row : row + LOGITS_ROWS]))
        return self._logits(stream[-1:])

    def _check_room(self, max_len: int) -> None:
        """For the tables, which have a row for every position of a sequence."""
        need = sum(4 * rope.dim * max_len for rope in self.config.distinct_ropes)
        free = available_bytes(self.device)
        if need > free:
            raise OutOfMemory(
                f"the rotary tables of {max_len} positions need {gigabytes(need)} on {self.device}, "
                f"where {gigabytes(free)} are free; lower max_len"
            )

    def _rotations(self, table: Callable[[Rope], torch.Tensor | None]) -> list[torch.Tensor | None]:
        """A table of each layer's rope, on the device; layers that share a rope share it."""
        tables = {id(rope): table(rope) for rope in self.config.distinct_ropes}
        placed = {key: rows.to(self.device) for key, rows in tables.items() if rows is not None}
        return [placed.get(id(rope)) for rope in self.config.ropes]

    def _layers(
        self,
        tokens: torch.Tensor,  # [batch, q_len]
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        cos_sin: Sequence[torch.Tensor | None],
        attend: Attend,
    ) -> torch.Tensor:
        """The residual stream [batch * q_len, hidden] after the last layer."""
        config, norm_after = self.config, self.config.norm_after
        interleaved = config.architecture.rotary == "pairs"
        packed_shape = (*tokens.shape, sum(self._heads), config.head_dim)
        attended_shape = (tokens.numel(), config.q_heads * config.head_dim)
        stream = self._embed(tokens, seq_lens)
        for index, layer in enumerate(self.weights.layers):
            attn_norm = layer.attn_norm, layer.attn_norm_bias
            ffn_norm = layer.ffn_norm, layer.ffn_norm_bias
            k_cache, v_cache = cache.layers[index]
            qkv = self._linear(stream, layer.qkv, layer.qkv_bias, norm=None if norm_after else attn_norm)
            q, k, v = qkv.view(packed_shape).split(self._heads, dim=2)
            if layer.q_norm is not None:
                q, k = (
                    ops.rms_norm(x, norm, eps=config.norm_eps)
                    for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
                )
            place = (k_cache, v_cache, seq_lens, block_table)
            ops.rotary_append(q, k, v, *place, cos_sin=cos_sin[index], interleaved=interleaved)
            attended = attend(index, q, k, v).reshape(attended_shape)
            self._add(stream, attended, layer.o, layer.o_bias, layer.attn_out_norm)
            if norm_after:
                stream = self._norm(stream, attn_norm)
            h = self._up(stream, layer, None if norm_after else ffn_norm)
            self._add(stream, h, layer.down, layer.down_bias, layer.ffn_out_norm)
            if norm_after:
                stream = self._norm(stream, ffn_norm)
        return stream

    def _embed(self, tokens: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """The residual stream [batch * q_len, hidden] that the first layer gets."""
        weights = self.weights
        x = _embedding(tokens.flatten(), weights.embed, self.dtype)
        if weights.project_in is not None:
            x = _linear(x, weights.project_in)
        if self._embed_scale is not None:
            x *= self._embed_scale
        if weights.positions is not None:
            first = seq_lens.long() - tokens.size(1) + self.config.architecture.position_offset
            rows = first[:, None] + torch.arange(tokens.size(1), device=self.device)
            x += _embedding(rows.flatten(), weights.positions, self.dtype)
        return x

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight, bias = norm
        if self.config.architecture.norm == "layer":
            return ops.layer_norm(x, weight, bias, eps=self.config.norm_eps)
        return ops.rms_norm(x, weight, eps=self.config.norm_eps)

    def _linear(
        self,
        x: torch.Tensor,
        weight: Matrix,
        bias: torch.Tensor | None = None,
        norm: Norm | None = None,
        **fusion: str,
    ) -> torch.Tensor:
        """A linear layer of x or of its norm; `fusion` is the gate or activation of ops.linear."""
        if norm is not None and self.config.architecture.norm == "layer":
            x, norm = self._norm(x, norm), None
        if norm is not None:
            return _linear(x, weight, bias, norm_weight=norm[0], norm_eps=self.config.norm_eps, **fusion)
        return _linear(x, weight, bias, **fusion)

    def _up(self, x: torch.Tensor, layer: Layer, norm: Norm | None) -> torch.Tensor:
        """The input of the feed-forward part's down projection."""
        kind = "gate" if self.config.architecture.gated else "activation"
        return self._linear(x, layer.gate_up, layer.gate_up_bias, norm, **{kind: self.config.activation})

    def _add(
        self,
        stream: torch.Tensor,
        x: torch.Tensor,
        weight: Matrix,
        bias: torch.Tensor | None,
        out_norm: torch.Tensor | None,
    ) -> None:
        """Adds a sublayer's last projection to the residual stream."""
        by_blas = stream.is_cuda and stream.size(0) > BLAS_ROWS
        if out_norm is not None:
            stream += ops.rms_norm(_linear(x, weight, bias), out_norm, eps=self.config.norm_eps)
        elif by_blas and bias is None and isinstance(weight, torch.Tensor):
            stream.addmm_(x, weight.t())  # one pass, where ops.linear takes two
        else:
            _linear(x, weight, bias, residual=stream)

    def _logits(self, stream: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] of the residual stream [rows, hidden] after the last layer."""
        weights, cap = self.weights, self.config.logit_softcap
        norm = None if self.config.norm_after else (weights.norm, weights.norm_bias)
        if weights.project_out is not None:
            stream, norm = self._linear(stream, weights.project_out, norm=norm), None
        logits = self._linear(stream, weights.lm_head, norm=norm)
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _prompt_attention(
        self, cache: KVCache, block_table: torch.Tensor, start: int, stop: int, observe: Observe | None
    ) -> Attend:
        """Attention of the prompt's tokens [start, stop) over all before them.

        By torch's SDPA; by the decode op where logits are capped, which SDPA can't.
        """
        config = self.config
        gqa = config.q_heads != config.kv_heads
        masks: dict[int, torch.Tensor] = {}
        blocks = None if start == 0 else block_table[0, : -(-stop // cache.block_size)]

        def mask_for(window: int) -> torch.Tensor | CausalBias:
            if not 0 < window < stop and self.device.type == "cuda":
                return causal_lower_right(stop - start, stop)  # without a mask in memory
            if window not in masks:
                query = torch.arange(start, stop, device=self.device)[:, None]
                key = torch.arange(stop, device=self.device)
                mask = key <= query
                masks[window] = mask & (key > query - window) if window > 0 else mask
            return masks[window]

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if blocks is not None:  # the chunk's own keys are in the cache as well
                k, v = (
                    layer.index_select(0, blocks).flatten(0, 1)[None, :stop] for layer in cache.layers[index]
                )
            if observe is not None:
                observe(index, q, k)
            window = config.windows[index]
            if config.attn_softcap:
                return self._attend_in_pieces(index, q, cache, block_table, stop)
            causal = start == 0 and not 0 < window < stop
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=None if causal else mask_for(window),
                is_causal=causal,
                scale=config.attn_scale,
                enable_gqa=gqa,
            )
            return out.transpose(1, 2)

        return attend

    def _attend_in_pieces(
        self, index: int, q: torch.Tensor, cache: KVCache, block_table: torch.Tensor, stop: int
    ) -> torch.Tensor:
        """Attention of q [1, q_len, q_heads, head_dim], a prompt's tokens up to `stop`, by the decode op.

        Pieces of MAX_Q_LEN tokens are its sequences, which share their keys. Tokens that fill up the first
        piece come before the chunk, and are dropped again.
        """
        padding = -q.size(1) % MAX_Q_LEN
        pieces = F.pad(q[0], (0, 0, 0, 0, padding, 0)).unflatten(0, (-1, MAX_Q_LEN))
        count = pieces.size(0)
        ends = stop - MAX_Q_LEN * torch.arange(count - 1, -1, -1, dtype=torch.int32, device=self.device)
        k_cache, v_cache = cache.layers[index]
        out, _ = ops.decode_attention(
            pieces,
            k_cache,
            v_cache,
            ends,
            block_table.repeat(count, 1),
            scale=self.config.attn_scale,
            softcap=self.config.attn_softcap,
            window=self.config.windows[index],
        )
        return out.flatten(0, 1)[None, padding:]


def _linear(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    **fusion: torch.Tensor | float | str | None,
) -> torch.Tensor | None:
    """A linear layer with the fusions of ops.linear."""
    if isinstance(weight, torch.Tensor):
        return ops.linear(x, weight, bias, **fusion)
    return weight.linear(x, bias, **fusion)


def _embedding(tokens: torch.Tensor, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(tokens, weight) if isinstance(weight, torch.Tensor) else weight.rows(tokens, dtype)
