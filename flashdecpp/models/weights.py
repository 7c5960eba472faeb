"""The weights of a decoder, each packed as its op reads it."""

from dataclasses import dataclass

import torch

from flashdecpp.quantization import QuantizedWeight

Matrix = torch.Tensor | QuantizedWeight


@dataclass(frozen=True)
class Layer:
    attn_norm: torch.Tensor  # [hidden]
    qkv: Matrix  # [(q_heads + 2 kv_heads) * head_dim, hidden]
    o: Matrix  # [hidden, q_heads * head_dim]
    ffn_norm: torch.Tensor  # [hidden]
    gate_up: Matrix  # [2 ffn, hidden]; [ffn, hidden] without a gate
    down: Matrix  # [hidden, ffn]
    attn_norm_bias: torch.Tensor | None = None
    ffn_norm_bias: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [head_dim]
    k_norm: torch.Tensor | None = None  # [head_dim]
    attn_out_norm: torch.Tensor | None = None  # [hidden]
    ffn_out_norm: torch.Tensor | None = None  # [hidden]


@dataclass(frozen=True)
class Weights:
    embed: Matrix  # [vocab, embed_dim]
    lm_head: Matrix  # [vocab, embed_dim]; the same as embed where they are tied
    layers: tuple[Layer, ...]
    dtype: torch.dtype  # of what isn't quantized, and of activations
    norm: torch.Tensor | None = None  # [hidden]
    norm_bias: torch.Tensor | None = None
    positions: torch.Tensor | None = None  # [context + position_offset, hidden]
    project_in: Matrix | None = None  # [hidden, embed_dim]
    project_out: Matrix | None = None  # [embed_dim, hidden]

    @property
    def _all(self) -> list[Matrix]:
        parts = [self, *self.layers]
        found = [value for part in parts for value in vars(part).values() if isinstance(value, Matrix)]
        return list({id(weight): weight for weight in found}.values())  # a tied lm_head once

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._all)

    @property
    def storage_formats(self) -> str:
        """What the matrices are stored in, as "int4 + int8": the one with the most bytes first."""
        sizes: dict[str, int] = {}
        for weight in self._all:
            if isinstance(weight, QuantizedWeight):
                kind = f"int{weight.bits}"
            else:
                kind = str(weight.dtype).removeprefix("torch.")
            if len(weight.shape) == 2:
                sizes[kind] = sizes.get(kind, 0) + weight.nbytes
        return " + ".join(sorted(sizes, key=lambda name: sizes[name], reverse=True))
