"""A request: one prompt on its way to one answer.

The engine's half says which tokens are sampled and cached; it changes under the engine's lock. The caller's
half, `Answer`, turns the sampled tokens into text, in the caller's thread and without the lock.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch

from flashdecpp.loading.tokenizer import BaseTokenizer, TextStream
from flashdecpp.models.kv_cache import BLOCK_SIZE

from .guides import BadWords, Guide, new_guide, spellings
from .logprobs import TokenLogprob
from .results import Piece
from .sampling import SamplingParams, fresh_seed


class Event(NamedTuple):
    """A sampled token; without one, the end of a request or the error that ended it."""

    request: "Request"
    token: int | None = None
    logprob: TokenLogprob | None = None
    at: float = 0.0  # time.perf_counter()
    error: Exception | None = None


class Answer:
    """The text of a request's tokens, and where it ends: by a stop string, or where the engine ended it."""

    def __init__(self, text: TextStream) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []  # of token_ids, if requested
        self.finish_reason: str | None = None
        self.stop_match: str | int | None = None  # the stop string or the token that ended it
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self._text = text

    @property
    def text(self) -> str:
        return self._text.text

    def has_ended(self) -> bool:
        return self.finish_reason is not None

    def receive(self, event: Event) -> list[Piece]:
        """The text that is certain after this event: the token's piece, then the last one if it ends here."""
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at = event.at
        if event.token is None:
            return [self._end(event.request)]
        self.token_ids.append(event.token)
        self.last_token_at = event.at
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        pieces = [Piece(self._text.push(event.token), event.token, logprob=event.logprob)]
        if self._text.stopped:
            pieces.append(self._end(event.request))
        return pieces

    def _end(self, request: "Request") -> Piece:
        rest = self._text.finish()
        if self._text.stopped:  # possibly by the text that was held back
            self.finish_reason, self.stop_match = "stop", self._text.matched
        else:
            self.finish_reason, self.stop_match = request.finish_reason, request.stop_token
        return Piece(rest, None, self.finish_reason, stop_match=self.stop_match)

    def time_to_first_token(self, started_at: float) -> float:
        return 0.0 if self.first_token_at is None else self.first_token_at - started_at

    @property
    def tokens_per_second(self) -> float:
        seconds = self.last_token_at - (self.first_token_at or 0.0)
        return (len(self.token_ids) - 1) / seconds if len(self.token_ids) > 1 and seconds > 0 else 0.0


@dataclass(eq=False)
class Request:
    """siblings: further samples of the same prompt, which go on from its blocks once it is in the cache.

    params: resolved, with the model's defaults filled in.
    """

    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    tokenizer: BaseTokenizer
    index: int = 0  # of the prompt in its call
    sample: int = 0
    seed: int = -1  # of this sample; chosen if params have none
    siblings: list["Request"] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # sampled and read by the host
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # shared by all samples
    finish_reason: str | None = None
    stop_token: int | None = None  # that ended it
    events: deque[Event] = field(default_factory=deque)  # of all requests of a run
    blocks: list[int] = field(default_factory=list)
    cached_prompt_tokens: int = 0  # prompt tokens found in the cache
    cached: int = 0  # tokens whose keys and values are in the blocks, or saved
    saved: torch.Tensor | None = None  # the contents of a preempted sequence's blocks, in host memory
    carried_phi: torch.Tensor | None = None  # float32 [layers, q_heads] of a preempted sequence
    rotated_for: int = field(init=False)  # the length that chose the frequencies of its keys' rotation
    unread: int = 0  # tokens sampled but not yet read by the host
    started_at: float = 0.0

    def __post_init__(self) -> None:
        params = self.params
        stream = TextStream(
            self.tokenizer,
            tuple(params.stop or ()),
            skip_special_tokens=params.skip_special_tokens,
            prompt_ids=self.prompt_ids,
        )
        self.answer = Answer(stream)
        self.guides: list[Guide] = []  # each says which tokens may come next
        if params.guide is not None:
            self.guides.append(new_guide(params.guide))
        if params.bad_words:
            self.guides.append(BadWords(spellings(tuple(params.bad_words), self.tokenizer)))
        self._keys: list[bytes] = []
        self.rotated_for = len(self.prompt_ids)
        if self.seed < 0:
            self.seed = fresh_seed() if params.seed is None else params.seed

    @classmethod
    def samples(
        cls,
        prompt: str,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: BaseTokenizer,
        index: int = 0,
    ) -> list["Request"]:
        """params.n requests for one prompt, each with its own seed. The first has the others as siblings."""
        first = cls(prompt, prompt_ids, params, tokenizer, index)
        first.siblings = [
            cls(prompt, prompt_ids, params, tokenizer, index, sample=i, seed=(first.seed + i) % (1 << 63))
            for i in range(1, params.n)
        ]
        for sibling in first.siblings:
            sibling.prompt_logprobs = first.prompt_logprobs
        return [first, *first.siblings]

    @property
    def history(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def sampled_length(self) -> int:
        """Includes the unread tokens. All but the newest token are in the cache, or will be."""
        return len(self.prompt_ids) + len(self.token_ids) + self.unread

    @property
    def prefill_length(self) -> int:
        """Tokens that must be cached before a decode step: the prompt, later all tokens but the newest."""
        return self.length - 1 if self.token_ids else self.length

    @property
    def scores_prompt(self) -> bool:
        """Whether its prefill computes the log-probabilities of the prompt, once for all samples."""
        return self.params.prompt_logprobs is not None and self.sample == 0 and not self.token_ids

    @property
    def needs_host(self) -> bool:
        """Whether the host must read each token before the next is sampled."""
        return bool(self.guides) or self.params.logits_processor is not None

    def final_length(self, max_len: int) -> int:
        """The most tokens that prompt and answer may have together."""
        limit = self.params.max_tokens
        return min(max_len, len(self.prompt_ids) + limit) if isinstance(limit, int) else max_len

    def start_over(self) -> None:
        """Makes all its tokens a prompt whose keys are yet to be computed."""
        self.rotated_for, self.cached, self.saved = self.length, 0, None
        self._keys.clear()

    def block_keys(self, count: int, rotation: int) -> list[bytes]:
        """Keys of the first `count` blocks, all full. Each stands for all tokens up to its block's end.

        `rotation` is what else keys and values depend on; it stays the same until the request starts over.
        """
        while len(self._keys) < count:
            start = len(self._keys) * BLOCK_SIZE
            tokens = array("q", self.history[start : start + BLOCK_SIZE])
            before = self._keys[-1] if self._keys else rotation.to_bytes(8, "little")
            self._keys.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return self._keys[:count]


class RequestError(Exception):
    """An error that is due to one request and ends that request alone."""

    def __init__(self, request: Request, error: Exception) -> None:
        super().__init__("a request failed")
        self.request, self.error = request, error


@contextmanager
def due_to(request: Request) -> Iterator[None]:
    """Attributes errors to this request, unless they are already attributed to another."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(request, error) from error
