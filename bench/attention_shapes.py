"""The shapes that bench/attention.py measures, in groups, and their tensors."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property

import measure
import torch
from torch import Tensor

HEADS = ((32, 32), (32, 8), (64, 8), (28, 4))
LENGTHS = (
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (8, 1024),
    (8, 8192),
    (32, 1024),
    (32, 4096),
    (64, 2048),
    (128, 1024),
)
WINDOW = 1024


@dataclass(frozen=True)
class Shape:
    """One decode step's attention. Every sequence has `length` keys, or between `shortest` and `length`."""

    batch: int
    length: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    block_size: int = 16
    dtype: str = "float16"
    fp8: bool = False
    shortest: int | None = None
    feature: str = ""

    def __str__(self) -> str:
        lengths = f"{self.shortest}-{self.length}" if self.shortest else f"{self.length}"
        text = f"{self.q_heads}/{self.kv_heads} {self.batch}x{lengths} d{self.head_dim} p{self.block_size}"
        text += f" q{self.q_len}" if self.q_len > 1 else ""
        text += f" {self.dtype}" if self.dtype != "float16" else ""
        return text + (" fp8" if self.fp8 else "") + (f" {self.feature}" if self.feature else "")

    @cached_property
    def lengths(self) -> list[int]:
        """Keys per sequence; ragged lengths are log-uniform and the same in every run."""
        if self.shortest is None:
            return [self.length] * self.batch
        draw = random.Random(0)
        low, high = math.log(self.shortest), math.log(self.length)
        return [round(math.exp(draw.uniform(low, high))) for _ in range(self.batch)]

    @property
    def kv_bytes(self) -> int:
        """The minimum that a call must read: the keys and values that its tokens attend to."""
        keys = self.lengths
        if self.feature in ("window", "all"):
            keys = [min(n, WINDOW + self.q_len - 1) for n in keys]
        return 2 * sum(keys) * self.kv_heads * self.head_dim * (1 if self.fp8 else 2)

    def shrunk(self) -> Shape:
        """A similar shape, small enough for a CPU."""
        length = min(self.length, 192)
        shortest = min(self.shortest, 7) if self.shortest else None
        return replace(self, batch=min(self.batch, 3), length=length, shortest=shortest)


@dataclass(frozen=True)
class Group:
    """Shapes measured against the same peers and with the same choice of GPU kernels."""

    shapes: tuple[Shape, ...]
    peers: tuple[str, ...] = ()  # prefixes of their names
    kernels: str | None = None  # FLASHDECPP_GPU_KERNELS


def _with(shapes: list[Shape], **changes: object) -> list[Shape]:
    return [replace(shape, **changes) for shape in shapes]


_MAIN = tuple(Shape(b, n, *heads) for heads in HEADS for b, n in LENGTHS)
_FP8 = [
    Shape(b, n, 32, kv_heads)
    for kv_heads in (8, 32)
    for b, n in ((1, 8192), (8, 1024), (8, 8192), (64, 2048))
]
_FEW = [Shape(b, n) for b, n in ((1, 8192), (8, 1024), (8, 8192), (64, 2048))]

GROUPS = {
    "main": Group(_MAIN, ("sdpa", "flashinfer", "fa3")),
    "ragged": Group(
        tuple(Shape(64, 32768, 32, kv_heads, shortest=128) for kv_heads in (8, 32)), ("flashinfer", "fa3")
    ),
    "dims": Group(
        (*_with(_FEW, head_dim=64), *_with(_FEW, head_dim=256, q_heads=16)), ("sdpa", "flashinfer", "fa3")
    ),
    "pages": Group(
        tuple(shape for size in (1, 16, 64) for shape in _with(_FEW, block_size=size)), ("flashinfer", "fa3")
    ),
    # Each shape with a 16-bit cache, then with an fp8 one.
    "fp8": Group(
        tuple(
            replace(shape, dtype=dtype, fp8=fp8)
            for dtype in ("float16", "bfloat16")
            for shape in _FP8
            for fp8 in (False, True)
        ),
        ("flashinfer",),
    ),
    "qlen": Group(tuple(Shape(8, 4096, q_len=q_len) for q_len in (1, 2, 4, 8, 16)), ("sdpa", "fa3")),
    "features": Group(
        tuple(
            Shape(8, 8192, feature=feature)
            for feature in ("", "window", "softcap", "sinks", "alibi_slopes", "all")
        )
    ),
    "ampere": Group(_MAIN, kernels="generic"),
}
QUICK = Group(
    tuple(
        Shape(b, n, *heads)
        for heads, b, n in (
            ((32, 32), 1, 1024),
            ((32, 32), 1, 8192),
            ((32, 32), 64, 2048),
            ((32, 8), 1, 1024),
            ((32, 8), 1, 32768),
            ((32, 8), 8, 1024),
            ((32, 8), 8, 8192),
            ((32, 8), 64, 2048),
            ((64, 8), 32, 4096),
            ((28, 4), 8, 8192),
        )
    )
)


class Inputs:
    """The tensors of a shape, with `sets` KV caches to rotate among, each available in up to three layouts.

    `paged`, `contiguous` and `head_major` are views of the same memory, so a shape's KV is allocated once.
    They see its values in different orders, which does not affect the times.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        dtype, size = getattr(torch, shape.dtype), shape.block_size
        blocks = [-(-n // size) for n in shape.lengths]
        memory = (2, sum(blocks), size, shape.kv_heads, shape.head_dim)
        self.sets = measure.rotation(shape.kv_bytes) if device == "cuda" else 2
        self._pools = [torch.randn(memory, dtype=dtype, device=device) for _ in range(self.sets)]
        if shape.fp8:
            self._pools = [pool.to(torch.float8_e4m3fn) for pool in self._pools]

        self.q = torch.randn(
            shape.batch, shape.q_len, shape.q_heads, shape.head_dim, dtype=dtype, device=device
        )
        self.seq_lens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        # Blocks in random order, as in a server's fragmented cache.
        self.block_ids = torch.randperm(sum(blocks), device=device).to(torch.int32)
        self.block_table = torch.zeros(shape.batch, max(blocks), dtype=torch.int32, device=device)
        for row, ids in zip(self.block_table, self.block_ids.split(blocks), strict=True):
            row[: len(ids)] = ids
        self.blocks = blocks
        # Random normal q and k give logits of unit variance, whose row maxima are near 4.
        self.phi = torch.full((shape.q_heads,), 4.0, device=device)
        self.options = self._options(device)

    def _options(self, device: str) -> dict[str, object]:
        """decode_attention's optional arguments for the shape."""
        shape = self.shape
        options = {
            "window": WINDOW,
            "softcap": 20.0,
            "sinks": torch.zeros(shape.q_heads, device=device),
            "alibi_slopes": 2.0 ** -torch.linspace(1, 8, shape.q_heads, device=device),
        }
        options = {name: x for name, x in options.items() if shape.feature in (name, "all")}
        if shape.fp8:
            scale = torch.linspace(0.5, 1, shape.kv_heads, device=device)
            options |= {"k_scale": scale, "v_scale": scale}
        return options

    @property
    def layouts(self) -> list[str]:
        """Ragged sequences are only measured paged: nobody would pad them to the same length."""
        return ["paged"] if self.shape.shortest else ["contiguous", "paged", "head_major"]

    def paged(self, i: int) -> tuple[Tensor, Tensor]:
        """K and V of set i: [num_blocks, block_size, kv_heads, head_dim]."""
        k, v = self._pools[i]
        return k, v

    def contiguous(self, i: int) -> tuple[Tensor, Tensor]:
        """K and V of set i: [batch, length, kv_heads, head_dim]."""
        shape = self.shape
        k, v = self._pools[i].view(2, shape.batch, shape.length, shape.kv_heads, shape.head_dim)
        return k, v

    def head_major(self, i: int) -> tuple[Tensor, Tensor]:
        """K and V of set i, in SDPA's native layout: [batch, kv_heads, length, head_dim]."""
        shape = self.shape
        k, v = self._pools[i].view(2, shape.batch, shape.kv_heads, shape.length, shape.head_dim)
        return k, v
