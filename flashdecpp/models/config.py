"""The configuration of a model as the decoder needs it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from flashdecpp import _C
from flashdecpp.errors import ModelError

from .architectures import Architecture
from .rope import Rope

LARGEST = 2**31 - 1  # size or number of tokens: kernels count in 32 bits
MAX_LAYERS = 10_000  # far above any model's, checked before anything is built per layer


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and features of a model. Raises a ModelError for those that the decoder cannot run."""

    architecture: Architecture
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    embed_dim: int  # `hidden`, unless the embeddings are projected
    norm_eps: float
    context: int  # maximum tokens of a sequence
    ropes: tuple[Rope | None, ...]  # per layer, None without rotation
    tied_embeddings: bool
    windows: tuple[int, ...]  # sliding window per layer, -1 for none
    activation: str = "silu"
    norm_after: bool = False  # norms follow the residual additions instead of preceding the sublayers
    attn_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attn_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()  # without ids outside the vocabulary, which stand for no token
    dtype: torch.dtype = torch.float16  # of the checkpoint; float16 for quantized ones

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ModelError(
                f"{self.q_heads} query heads are not a multiple of {self.kv_heads} key/value heads"
            )
        if self.head_dim % 8 or not 0 < self.head_dim <= _C.MAX_HEAD_DIM:
            raise ModelError(f"head_dim must be a multiple of 8 up to {_C.MAX_HEAD_DIM}, got {self.head_dim}")
        if self.context > LARGEST:
            raise ModelError(f"a context of {self.context} tokens is more than the {LARGEST} that can be run")

        within = {token for token in self.eos_ids if 0 <= token < self.vocab}
        object.__setattr__(self, "eos_ids", tuple(sorted(within)))

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        return (self.q_heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    @cached_property
    def distinct_ropes(self) -> tuple[Rope, ...]:
        """The ropes of all layers, each once."""
        return tuple({id(rope): rope for rope in self.ropes if rope is not None}.values())

    @cached_property
    def rekeyed(self) -> bool:
        """Whether keys are recomputed once a sequence outgrows the frequencies of a rope."""
        return any(rope.recomputed for rope in self.distinct_ropes)

    def rotation(self, length: int) -> int:
        """A number that identifies the frequencies of all ropes for a prompt of `length`."""
        return sum(rope.rotation(length) for rope in self.distinct_ropes)  # no term ever decreases
