"""How tokens are chosen and when an answer ends."""

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from flashdecpp._arguments import INT32_MAX, flag, integer, number, require
from flashdecpp.errors import ModelError
from flashdecpp.loading.generation_config import GenerationDefaults

from .guides import GuideFactory
from .prompts import token_ids

MAX_ANSWERS = 65_536  # per prompt

# (token ids of prompt and answer so far, float32 logits [vocab], which it may modify) -> logits [vocab]
LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


class Unset(Enum):
    """Stands for an argument that was not given, where None is a value."""

    MODEL_DEFAULT = "the model's own default"


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is answered.

    temperature: 0 always picks the likeliest token.
    top_k, top_p, min_p, repetition_penalty: 0, 1, 0 and 1 turn them off. The penalty applies to tokens of
        prompt and answer. For these and temperature, None is the default in the model's
        generation_config.json, else greedy decoding with all of them off.
    seed: None draws one per prompt. With a given seed a prompt gets the same answer in any batch.
    stop: the text ends before the first of these strings.
    max_tokens: maximum tokens of the answer; None continues to the end of the context. The default is that of
        generation_config.json, else 256.
    ignore_eos: never choose an end-of-sequence token.
    n: answers per prompt, which is computed and stored once for all of them. Answer i has seed + i.
    presence_penalty: subtracted from the logit of every token in the answer.
    frequency_penalty: subtracted from a token's logit once per occurrence in the answer.
    logit_bias: token id -> value added to its logit; -inf excludes the token.
    bad_words: never generated, neither as they are nor after a space, in the tokenizer's spelling.
    stop_token_ids: the answer ends before the first of these tokens, as before an end of sequence.
    min_tokens: minimum tokens before an end-of-sequence token or one of stop_token_ids may be chosen.
    logprobs: return the log-probabilities of the answer's tokens and of this many of the likeliest tokens at
        each position (see TokenLogprob). 0 returns only those of the answer.
    prompt_logprobs: the same for the prompt's tokens. Such a prompt does not use the prefix cache.
    skip_special_tokens: False keeps special tokens, such as those of a chat template, in the text.
    logits_processor: called on the host for every token, before anything else changes the logits:
        (token ids of prompt and answer so far, logits float32 [vocab]) -> logits. Each step waits for it.
    guide: returns a new Guide for each answer, which masks the tokens that may come next, as for a grammar.
        On a GPU the mask is applied within the step's graph, and the next step waits for the token.

    Logits change in this order: logits_processor, logit_bias, presence and frequency penalty, masks (guide,
    bad_words, min_tokens, ignore_eos), repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Collection[str] | None = ()
    max_tokens: int | Unset | None = Unset.MODEL_DEFAULT
    ignore_eos: bool = False
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    bad_words: str | Collection[str] | None = ()
    stop_token_ids: Collection[int] | None = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logits_processor: LogitsProcessor | None = None
    guide: GuideFactory | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, check(name, value))
        if isinstance(self.max_tokens, int):
            what = f"at most max_tokens, which is {self.max_tokens}"
            require(self.min_tokens <= self.max_tokens, "min_tokens", what, self.min_tokens)

    def resolved(self, defaults: GenerationDefaults) -> "SamplingParams":
        """A copy in which the model's defaults replace values that were not given."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        missing: dict[str, Any] = {
            name: getattr(defaults, name) for name in names if getattr(self, name) is None
        }
        if self.max_tokens is Unset.MODEL_DEFAULT:
            missing["max_tokens"] = defaults.max_tokens
        return replace(self, **missing) if missing else self

    def check_vocabulary(self, vocab: int) -> None:
        """Raises a ModelError for token ids and counts beyond the vocabulary."""
        for name in ("logit_bias", "stop_token_ids"):
            outside = [token for token in getattr(self, name) or () if not 0 <= token < vocab]
            if outside:
                raise ModelError(f"{name} has the token id {outside[0]}, outside the vocabulary of {vocab}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            require(count is None or count <= vocab, name, f"at most the vocabulary of {vocab}", count)

    @property
    def constraints(self) -> list[str]:
        """The names of the parameters that may have excluded all tokens."""
        by_user = [
            name for name in ("guide", "logits_processor", "logit_bias", "bad_words") if getattr(self, name)
        ]
        of_eos = [name for name in ("min_tokens", "ignore_eos") if getattr(self, name)]
        return by_user + of_eos if by_user else []


def fresh_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class SamplingFeatures:
    """The features that some row of a batch uses, and that a step therefore computes."""

    drawn: bool = False  # a temperature
    penalized: bool = False  # repetition_penalty
    counted: bool = False  # presence_penalty, frequency_penalty
    biased: bool = False  # logit_bias
    eos_held: bool = False  # ignore_eos, min_tokens
    stops_held: bool = False  # min_tokens with stop_token_ids
    masked: bool = False  # guide, bad_words
    processed: bool = False  # logits_processor
    logprobs: int | None = None  # maximum over the rows, rounded up

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int) -> "SamplingFeatures":
        counts = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            drawn=any((p.temperature or 0) > 0 for p in params),
            penalized=any(p.repetition_penalty != 1 for p in params),
            counted=any(p.presence_penalty or p.frequency_penalty for p in params),
            biased=any(p.logit_bias for p in params),
            eos_held=any(p.ignore_eos or p.min_tokens for p in params),
            stops_held=any(p.min_tokens and p.stop_token_ids for p in params),
            masked=any(p.guide or p.bad_words for p in params),
            processed=any(p.logits_processor for p in params),
            logprobs=min(vocab, _power_of_two(max(counts))) if counts else None,
        )


def _power_of_two(count: int) -> int:
    """Rounds up, so that few sizes occur."""
    return 1 << (count - 1).bit_length() if count else 0


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    what = "nonempty strings"
    require(isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)), name, what, value)
    value = tuple(value)
    require(all(isinstance(text, str) and text for text in value), name, what, value)
    return value


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    return tuple(token_ids(name, value, "token ids"))


def _bias(name: str, value: Any) -> dict[int, float]:
    require(isinstance(value, Mapping), name, "a mapping of token ids to numbers", value)
    ids = token_ids(name, value.keys(), "a mapping of token ids")
    return {
        token: bias if bias == -math.inf else number(f"{name}[{token}]", bias)
        for token, bias in zip(ids, value.values(), strict=True)
    }


def _callable(name: str, value: Any) -> Any:
    require(callable(value), name, "a function", value)
    return value


def _max_tokens(name: str, value: Any) -> Any:
    return value if value is Unset.MODEL_DEFAULT else integer(name, value, 1)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": lambda name, value: number(name, value, 0),
    "top_k": lambda name, value: integer(name, value, 0, INT32_MAX),
    "top_p": lambda name, value: number(name, value, above=0, high=1),
    "min_p": lambda name, value: number(name, value, 0, 1),
    "repetition_penalty": lambda name, value: number(name, value, above=0),
    "seed": lambda name, value: integer(name, value, 0, (1 << 63) - 1),
    "stop": lambda name, value: () if value is None else _strings(name, value),
    "max_tokens": _max_tokens,
    "ignore_eos": flag,
    "n": lambda name, value: integer(name, value, 1, MAX_ANSWERS),
    "presence_penalty": number,
    "frequency_penalty": number,
    "logit_bias": _bias,
    "bad_words": lambda name, value: () if value is None else _strings(name, value),
    "stop_token_ids": lambda name, value: () if value is None else _tokens(name, value),
    "min_tokens": lambda name, value: integer(name, value, 0),
    "logprobs": lambda name, value: integer(name, value, 0),
    "prompt_logprobs": lambda name, value: integer(name, value, 0),
    "skip_special_tokens": flag,
    "logits_processor": _callable,
    "guide": _callable,
}
_MAY_BE_NONE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "logit_bias",
    "logprobs",
    "prompt_logprobs",
    "logits_processor",
    "guide",
)
