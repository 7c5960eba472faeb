"""How tokens are chosen, and when to stop."""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from flashdecpp._arguments import INT32_MAX, flag, integer, number, require
from flashdecpp.errors import ModelError
from flashdecpp.loading.generation_config import GenerationDefaults

from .guides import GuideFactory
from .prompts import token_ids

MAX_ANSWERS = 65_536  # to a prompt

# (token ids of prompt and answer so far, float32 logits [vocab] to change or to replace) -> logits [vocab]
LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


class Unset(Enum):
    """In place of a value that may be None."""

    MODEL_DEFAULT = "the model's own default"


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is answered. What isn't given is the model's own default, or the one that is said here.

    temperature: 0 takes the most likely token.
    top_k, top_p, min_p, repetition_penalty: off at 0, 1, 0 and 1. Tokens of prompt and answer are penalized.
        These and temperature: None is what the model's generation_config.json says, else greedy and off.
    seed: None draws a fresh one for each prompt; a given seed gives a prompt the same answer in any batch.
    stop: the text ends before the first of these strings.
    max_tokens: most tokens of the answer; None goes on to the end of the context. By default what
        generation_config.json says, else 256.
    ignore_eos: never chooses the end-of-sequence token, so that the answer goes on.
    n: answers to a prompt, which is computed and kept once for all; answer i has seed + i.
    presence_penalty, frequency_penalty: taken off the logit of a token that the answer has, and once for
        each time that it has it.
    logit_bias: token id -> what is added to its logit; -inf excludes it.
    bad_words: never generated, nor after a space; as the tokens that the tokenizer makes of them.
    stop_token_ids: the answer ends before the first of these tokens, as before an end of sequence.
    min_tokens: so many tokens come before an end of sequence or a token of stop_token_ids is chosen.
    logprobs: log-probabilities of the answer's tokens, and of so many of the most likely at each place
        (0: the answer's alone): see TokenLogprob.
    prompt_logprobs: the same of the prompt's tokens, which then isn't taken from the prefix cache.
    skip_special_tokens: False keeps special tokens, such as those of a chat template, in the text.
    logits_processor: called for every token, on the host, before all else that changes logits:
        (token ids of prompt and answer so far, logits float32 [vocab]) -> logits. Steps wait for it.
    guide: makes a Guide (guides.py) for each answer: a grammar's mask of the tokens that may come next.
        On a GPU it is applied within the step's graph; the step after waits for its token.
    Logits change in this order: logits_processor, logit_bias, presence and frequency penalty, masks (guide,
    bad_words, min_tokens, ignore_eos), repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    max_tokens: int | Unset | None = Unset.MODEL_DEFAULT
    ignore_eos: bool = False
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    bad_words: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
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
        """With the model's defaults for what wasn't given."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        own = {name: getattr(defaults, name) for name in names if getattr(self, name) is None}
        if self.max_tokens is Unset.MODEL_DEFAULT:
            own["max_tokens"] = defaults.max_tokens
        return replace(self, **own) if own else self

    def check_vocabulary(self, vocab: int) -> None:
        """ModelError for token ids and counts that a model with this vocabulary doesn't have."""
        for name in ("logit_bias", "stop_token_ids"):
            outside = [token for token in getattr(self, name) or () if not 0 <= token < vocab]
            if outside:
                raise ModelError(f"{name} has the token id {outside[0]}, outside the vocabulary of {vocab}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            require(count is None or count <= vocab, name, f"at most the vocabulary of {vocab}", count)

    @property
    def constraints(self) -> list[str]:
        """The names of what may have excluded all tokens."""
        by_user = [
            name for name in ("guide", "logits_processor", "logit_bias", "bad_words") if getattr(self, name)
        ]
        of_eos = [name for name in ("min_tokens", "ignore_eos") if getattr(self, name)]
        return by_user + of_eos if by_user else []


def fresh_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class SamplingFeatures:
    """What some row of a batch makes use of, and a step therefore computes."""

    drawn: bool = False  # a temperature
    penalized: bool = False  # repetition_penalty
    counted: bool = False  # presence_penalty, frequency_penalty
    biased: bool = False  # logit_bias
    eos_held: bool = False  # ignore_eos, min_tokens
    stops_held: bool = False  # min_tokens with stop_token_ids
    masked: bool = False  # guide, bad_words
    processed: bool = False  # logits_processor
    logprobs: int | None = None  # the most that a row asks for, or some more

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int) -> "SamplingFeatures":
        counts = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            drawn=any(p.temperature > 0 for p in params),
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
    """Not below count, so that a few sizes serve all."""
    return 1 << (count - 1).bit_length() if count else 0


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    what = "strings that aren't empty"
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


def _most_tokens(name: str, value: Any) -> Any:
    return value if value is Unset.MODEL_DEFAULT else integer(name, value, 1)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": lambda name, value: number(name, value, 0),
    "top_k": lambda name, value: integer(name, value, 0, INT32_MAX),
    "top_p": lambda name, value: number(name, value, above=0, high=1),
    "min_p": lambda name, value: number(name, value, 0, 1),
    "repetition_penalty": lambda name, value: number(name, value, above=0),
    "seed": lambda name, value: integer(name, value, 0, (1 << 63) - 1),
    "stop": lambda name, value: () if value is None else _strings(name, value),
    "max_tokens": _most_tokens,
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
