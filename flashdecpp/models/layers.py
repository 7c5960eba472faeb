"""A decoder layer: an attention part and a feed-forward part, which add to the residual stream in turn.

A part is called with the residual stream [tokens, hidden], which it may change in place, and the pass, and
returns the stream. A mixture of experts or a sharded layer is another class with that interface.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch

from flashdecpp import ops

from .config import ModelConfig
from .kv_cache import KVCache
from .weights import Layer, Matrix

# With more rows than this, linear layers go to the BLAS.
BLAS_ROWS = 128

# (layer, q, k, v) -> [batch, q_len, q_heads, head_dim]; q and k are rotated, k and v are in the cache
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ForwardPass:
    """What all layers of one pass share."""

    shape: tuple[int, int]  # batch, q_len
    cache: KVCache
    seq_lens: torch.Tensor  # int32 [batch], including the new tokens
    block_table: torch.Tensor  # int32 [batch, max_blocks]
    cos_sin: Sequence[torch.Tensor | None]  # of each layer; None where nothing is rotated
    attend: Attend


class LayerPart(Protocol):
    def __call__(self, stream: torch.Tensor, forward: ForwardPass) -> torch.Tensor:
        """The residual stream [tokens, hidden] with this part's result added."""


class DecoderLayer:
    """Two parts, run one after the other on the same residual stream."""

    def __init__(self, attention: LayerPart, feed_forward: LayerPart) -> None:
        self.attention, self.feed_forward = attention, feed_forward

    def __call__(self, stream: torch.Tensor, forward: ForwardPass) -> torch.Tensor:
        return self.feed_forward(self.attention(stream, forward), forward)

    @classmethod
    def dense(cls, config: ModelConfig, index: int, weights: Layer) -> "DecoderLayer":
        """The layer of every architecture supported so far."""
        return cls(Attention(config, index, weights), FeedForward(config, weights))


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm for architectures that have it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, config: ModelConfig, weight: torch.Tensor, bias: torch.Tensor | None = None) -> "Norm":
        return cls(weight, bias, config.norm_eps, rms=config.architecture.norm != "layer")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rms:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


@dataclass(frozen=True)
class Projection:
    """A linear layer of x or of its norm, with a gate or an activation of the result as in ops.linear."""

    weight: Matrix
    bias: torch.Tensor | None = None

    def __call__(
        self,
        x: torch.Tensor,
        norm: Norm | None = None,
        gate: str | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        return linear(x, self.weight, self.bias, norm=norm, gate=gate, activation=activation)


@dataclass(frozen=True)
class OutputProjection:
    """The last linear layer of a part. `norm`: of its result, before that is added to the residual stream."""

    weight: Matrix
    bias: torch.Tensor | None
    norm: Norm | None

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """stream += norm(linear(x)), the only place where a part's result meets the residual stream.

        Without a norm the sum is fused into the linear layer. A sharded layer, whose results are summed over
        devices first, does the two separately.
        """
        by_blas = stream.is_cuda and stream.size(0) > BLAS_ROWS
        if self.norm is not None:
            stream += self.norm(linear(x, self.weight, self.bias))
        elif by_blas and self.bias is None and isinstance(self.weight, torch.Tensor):
            stream.addmm_(x, self.weight.t())  # one pass, where the op takes two
        else:
            linear(x, self.weight, self.bias, residual=stream)


class Attention:
    """Self-attention over a sequence in the cache, grouped-query, with or without norms of its heads."""

    def __init__(self, config: ModelConfig, index: int, weights: Layer) -> None:
        self.index, self._config = index, config
        self._norm = Norm.of(config, weights.attn_norm, weights.attn_norm_bias)
        self._qkv = Projection(weights.qkv, weights.qkv_bias)
        self._q_norm, self._k_norm = weights.q_norm, weights.k_norm
        self._out = OutputProjection(weights.o, weights.o_bias, _out_norm(config, weights.attn_out_norm))
        self._heads = [config.q_heads, config.kv_heads, config.kv_heads]
        self._interleaved = config.architecture.rotary == "pairs"

    def __call__(self, stream: torch.Tensor, forward: ForwardPass) -> torch.Tensor:
        config, norm_after = self._config, self._config.norm_after
        qkv = self._qkv(stream, None if norm_after else self._norm)
        q, k, v = qkv.view(*forward.shape, sum(self._heads), config.head_dim).split(self._heads, dim=2)
        if self._q_norm is not None and self._k_norm is not None:
            q = ops.rms_norm(q, self._q_norm, eps=config.norm_eps)
            k = ops.rms_norm(k, self._k_norm, eps=config.norm_eps)
        ops.rotary_append(
            q,
            k,
            v,
            *forward.cache.layers[self.index],
            forward.seq_lens,
            forward.block_table,
            cos_sin=forward.cos_sin[self.index],
            interleaved=self._interleaved,
        )
        attended = forward.attend(self.index, q, k, v)
        self._out.add_to(stream, attended.reshape(len(stream), config.q_heads * config.head_dim))
        return self._norm(stream) if norm_after else stream


class FeedForward:
    """A dense feed-forward network, gated or not."""

    def __init__(self, config: ModelConfig, weights: Layer) -> None:
        self._norm = Norm.of(config, weights.ffn_norm, weights.ffn_norm_bias)
        self._up = Projection(weights.gate_up, weights.gate_up_bias)
        self._down = OutputProjection(
            weights.down, weights.down_bias, _out_norm(config, weights.ffn_out_norm)
        )
        gated = config.architecture.gated
        self._gate = config.activation if gated else None
        self._activation = None if gated else config.activation
        self._norm_after = config.norm_after

    def __call__(self, stream: torch.Tensor, forward: ForwardPass) -> torch.Tensor:
        h = self._up(stream, None if self._norm_after else self._norm, self._gate, self._activation)
        self._down.add_to(stream, h)
        return self._norm(stream) if self._norm_after else stream


@overload
def linear(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    activation: str | None = None,
    residual: None = None,
) -> torch.Tensor: ...
@overload
def linear(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: torch.Tensor,
) -> None: ...
def linear(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    gate: str | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`ops.linear` or, for a quantized weight, `ops.quantized_linear`, of x or of norm(x)."""
    fusion: dict[str, Any] = {"gate": gate, "activation": activation, "residual": residual}
    if norm is not None and norm.rms:
        fusion |= {"norm_weight": norm.weight, "norm_eps": norm.eps}
    elif norm is not None:
        x = norm(x)
    if isinstance(weight, torch.Tensor):
        return ops.linear(x, weight, bias, **fusion)
    return weight.linear(x, bias, **fusion)


def _out_norm(config: ModelConfig, weight: torch.Tensor | None) -> Norm | None:
    """These are RMSNorms whatever the architecture's other norms are."""
    return None if weight is None else Norm(weight, None, config.norm_eps, rms=True)
