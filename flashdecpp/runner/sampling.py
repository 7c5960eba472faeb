"""How tokens are chosen, and when to stop."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ModelError


@dataclass(frozen=True)
class SamplingParams:
    """Defaults: greedy, up to 256 tokens, until the model's end-of-sequence.

    temperature 0 takes the most likely token; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    seed None draws a fresh one for each prompt; a given seed gives a prompt the same answer in any batch.
    n: answers to a prompt, which is computed and kept once for all; answer i has seed + i.
    stop: the text ends before the first of these strings. max_tokens None goes on to the end of the context.
    ignore_eos never chooses the end-of-sequence token, so that the answer goes on.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    max_tokens: int | None = 256
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _require(_is_number(getattr(self, name)), name, "a finite number", getattr(self, name))
        for name in ("top_k", "seed", "max_tokens", "n"):
            value = getattr(self, name)
            optional = name in ("seed", "max_tokens") and value is None
            _require(optional or _is_int(value), name, "an integer", value)
        _require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _require(self.top_k >= 0, "top_k", "0 (off) or more", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        _require(self.repetition_penalty > 0, "repetition_penalty", "above 0", self.repetition_penalty)
        _require(self.seed is None or 0 <= self.seed < 1 << 63, "seed", "from 0 to 2^63 - 1", self.seed)
        _require(self.max_tokens is None or self.max_tokens > 0, "max_tokens", "1 or more", self.max_tokens)
        _require(self.n > 0, "n", "1 or more", self.n)
        _require(
            all(isinstance(s, str) and s for s in self.stop), "stop", "strings that aren't empty", self.stop
        )


def fresh_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class SamplingFeatures:
    """What some row of a batch makes use of, and a step therefore computes."""

    drawn: bool = False  # a temperature
    penalised: bool = False
    endless: bool = False  # ignore_eos

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> "SamplingFeatures":
        return cls(
            drawn=any(p.temperature > 0 for p in params),
            penalised=any(p.repetition_penalty != 1 for p in params),
            endless=any(p.ignore_eos for p in params),
        )


def _require(holds: bool, name: str, what: str, value: object) -> None:
    if not holds:
        raise ModelError(f"{name} must be {what}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
