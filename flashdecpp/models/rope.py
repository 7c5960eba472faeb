"""Rotary position embedding: cos/sin tables for every scaling rule that checkpoints use."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashdecpp.errors import ModelError

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
CPU = torch.device("cpu")  # tables are computed here, whatever torch's default device is
ROWS_AT_ONCE = 1 << 16  # bounds the temporary memory of computing a table


@dataclass(frozen=True)
class Rope:
    """The rotation of a layer's queries and keys.

    scaling: the parameters of `kind` under their names in Hugging Face configurations, and three of GGUF's.
        `factors` [dim / 2] divides the frequencies before anything else. `extrapolation` (default 1) is the
        proportion of yarn's fast frequencies that is kept. `by_context` selects longrope's factors by the
        length of the context rather than of the sequence.
    recomputed: once a sequence outgrows `unscaled_positions`, its keys are recomputed as those of a prompt of
        its length. Otherwise they stay as they are.
    """

    dim: int
    theta: float
    max_positions: int
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    recomputed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ModelError(f"rope scaling {self.kind!r} is not supported, only {', '.join(SCALINGS)}")
        least = 4 if self.kind == "dynamic" else 2  # its exponent is dim / (dim - 2)
        if self.dim % 2 or self.dim < least:
            raise ModelError(
                f"rope scaling {self.kind!r} must rotate an even number of dimensions, {least} or more, "
                f"got {self.dim}"
            )

    @property
    def original_positions(self) -> int:
        return self.scaling.get("original_max_position_embeddings") or self.max_positions

    @property
    def context(self) -> int:
        """The positions that the checkpoint supports, including the extension by scaling."""
        factor = self.scaling.get("factor") or 1.0
        if self.kind == "dynamic":
            return max(self.max_positions, int(self.max_positions * factor))
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_positions * factor))
        return self.max_positions

    @property
    def unscaled_positions(self) -> int:
        """The length up to which the frequencies do not depend on the sequence's length."""
        if self.kind == "dynamic":
            return self.max_positions
        if self.kind == "longrope" and not self.scaling.get("by_context"):
            return self.original_positions
        return sys.maxsize

    def rotation(self, length: int) -> int:
        """A number that identifies the frequencies of a prompt of `length` and never decreases with it."""
        if length <= self.unscaled_positions:
            return 0
        return length if self.kind == "dynamic" else 1

    def table(self, length: int) -> torch.Tensor:
        """Returns float32 [length, dim] on the CPU, cosines then sines.

        Row p rotates a token that arrives as the last of p + 1. It depends on p only, so a batch can share
        the table.
        """
        table = torch.empty(length, self.dim, dtype=torch.float32, device=CPU)
        fixed = min(length, self.unscaled_positions)
        self._fill(table[:fixed], 0, fixed)
        self._fill(table[fixed:], fixed, None if self.kind == "dynamic" else length)
        return table

    def prompt_table(self, length: int) -> torch.Tensor | None:
        """The table of a prompt of `length` tokens, or None if it is the beginning of `table`."""
        if length <= self.unscaled_positions:
            return None
        table = torch.empty(length, self.dim, dtype=torch.float32, device=CPU)
        self._fill(table, 0, length)
        return table

    def _fill(self, rows: torch.Tensor, first: int, length: int | None) -> None:
        """Fills rows from position `first` of a sequence of `length`. None: each row ends its own one."""
        for start in range(0, rows.size(0), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            begin = first + start
            positions = torch.arange(begin, begin + chunk.size(0), dtype=torch.int64, device=CPU)[:, None]
            lengths = positions + 1 if length is None else torch.full_like(positions[:1], length)
            frequencies, magnitude = self._frequencies(lengths)
            angles = positions.float() * frequencies
            chunk[:, : self.dim // 2] = angles.cos() * magnitude
            chunk[:, self.dim // 2 :] = angles.sin() * magnitude

    def _frequencies(self, lengths: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [n, dim / 2] for `lengths`, int64 [n, 1], and the factor of cos and sin.

        n is 1 except for "dynamic".
        """
        s = self.scaling
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=CPU) / self.dim
        inverse = 1.0 / self._base(lengths) ** exponents
        if "factors" in s:
            inverse = inverse / _row(s["factors"])
        if self.kind == "linear":
            return inverse / s["factor"], s.get("attention_factor", 1.0)
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "longrope":
            long = lengths.max() > self.original_positions
            return inverse / _row(s["long_factor" if long else "short_factor"]), self._longrope_magnitude()
        if self.kind == "yarn":
            return self._yarn(inverse)
        return inverse, 1.0

    def _base(self, lengths: torch.Tensor) -> torch.Tensor:
        """The base of the frequencies, float32 [n, 1]: theta, which "dynamic" raises with the length."""
        theta = torch.full_like(lengths, self.theta, dtype=torch.float64)
        if self.kind == "dynamic":
            factor = self.scaling["factor"]
            beyond = (lengths.clamp(min=self.max_positions) / self.max_positions).double()
            theta *= (factor * beyond - (factor - 1)) ** (self.dim / (self.dim - 2))
        return theta.float()

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Slows long wavelengths by the factor, keeps short ones and blends in between."""
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
            """The fractional pair index that makes `turns` full turns within the original context."""
            return (
                self.dim
                * math.log(self.original_positions / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = dim_of(s.get("beta_fast") or 32), dim_of(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        pairs = torch.arange(self.dim // 2, dtype=torch.float32, device=CPU)
        kept = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
        kept = kept * s.get("extrapolation", 1.0)
        mscale, mscale_all = s.get("mscale"), s.get("mscale_all_dim")
        given = s.get("attention_factor")
        if given is None:
            of_all = yarn_magnitude(factor, mscale_all) if mscale and mscale_all else 1.0
            given = yarn_magnitude(factor, mscale if mscale and mscale_all else 1.0) / of_all
        return inverse * kept + inverse / factor * (1 - kept), given


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """yarn's factor of cosines and sines for a context that is `factor` times as long."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=CPU)
