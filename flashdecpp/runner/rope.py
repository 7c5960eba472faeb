"""Rotary position embedding: the cos/sin table of every scaling rule that checkpoints use."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ModelError

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "factors")


@dataclass(frozen=True)
class Rope:
    """`scaling` holds the parameters of `kind` under the names that Hugging Face configurations use.

    `kind` "factors" divides each frequency by `scaling["factors"]`: GGUF files store llama3 scaling so.
    """

    dim: int
    theta: float
    max_positions: int
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ModelError(f"rope scaling {self.kind!r} is not supported, only {', '.join(SCALINGS)}")

    @property
    def original_positions(self) -> int:
        return int(self.scaling.get("original_max_position_embeddings") or self.max_positions)

    @property
    def context(self) -> int:
        """The positions the checkpoint is meant for, the extension by its scaling included."""
        factor = self.scaling.get("factor") or 1.0
        if self.kind == "dynamic":
            return int(self.max_positions * factor)
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_positions * factor))
        return self.max_positions

    @property
    def unscaled_positions(self) -> int:
        """Up to this length the frequencies don't depend on the length of the sequence."""
        if self.kind == "dynamic":
            return self.max_positions
        if self.kind == "longrope":
            return self.original_positions
        return sys.maxsize

    def table(self, length: int) -> torch.Tensor:
        """float32 [length, dim], cosines then sines: row p is what a token that arrives as the last of a
        sequence of p + 1 is rotated by. A function of p alone, so a batch can share it."""
        fixed = min(length, self.unscaled_positions)
        rows = [self._rows(torch.arange(fixed), fixed)]
        if length > fixed and self.kind == "longrope":
            rows.append(self._rows(torch.arange(fixed, length), length))
        elif length > fixed:
            rows.extend(self._rows(torch.tensor([p]), p + 1) for p in range(fixed, length))
        return torch.cat(rows)

    def prompt_table(self, length: int) -> torch.Tensor | None:
        """The table for a prompt of `length` tokens seen at once, where it isn't the head of `table`."""
        return self._rows(torch.arange(length), length) if length > self.unscaled_positions else None

    def _rows(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        frequencies, magnitude = self._frequencies(length)
        angles = positions.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * magnitude

    def _frequencies(self, length: int) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [dim / 2] for a sequence of `length`, and the factor on cos and sin."""
        s, dim, theta = self.scaling, self.dim, self.theta
        exponents = torch.arange(0, dim, 2).float() / dim
        if self.kind == "dynamic":
            stretch = s["factor"] * max(length, self.max_positions) / self.max_positions - (s["factor"] - 1)
            theta = theta * stretch ** (dim / (dim - 2))
        inverse = 1.0 / theta**exponents
        if self.kind == "linear":
            return inverse / s["factor"], 1.0
        if self.kind == "factors":
            return inverse / torch.tensor(s["factors"], dtype=torch.float32), 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "longrope":
            factors = s["long_factor"] if length > self.original_positions else s["short_factor"]
            return inverse / torch.tensor(factors, dtype=torch.float32), self._longrope_magnitude()
        if self.kind == "yarn":
            return self._yarn(inverse)
        return inverse, 1.0

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Long waves are slowed by the factor, short ones kept, those between blended."""
        s = self.scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = self.original_positions * inverse / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * (keep + (1 - keep) / s["factor"])

    def _longrope_magnitude(self) -> float:
        factor = self.scaling.get("factor") or self.max_positions / self.original_positions
        given = self.scaling.get("attention_factor")
        if given is not None:
            return given
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.original_positions))

    def _yarn(self, inverse: torch.Tensor) -> tuple[torch.Tensor, float]:
        s = self.scaling
        factor = s.get("factor") or self.max_positions / self.original_positions

        def dim_of(turns: float) -> float:
            """The (fractional) pair that makes `turns` full turns within the original context."""
            return (
                self.dim
                * math.log(self.original_positions / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = dim_of(s.get("beta_fast") or 32), dim_of(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        slowed = ((torch.arange(self.dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        mscale, mscale_all = s.get("mscale"), s.get("mscale_all_dim")
        given = s.get("attention_factor")
        if given is None:
            given = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
        return inverse * (1 - slowed) + inverse / factor * slowed, given
