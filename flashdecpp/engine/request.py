"""A request: one prompt on its way to one answer, and where it has got to."""

from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

import torch

from flashdecpp.loading.tokenizer import BaseTokenizer, TextStream
from flashdecpp.models.kv_cache import BLOCK_SIZE

from .guides import BadWords, Guide, new_guide, spellings
from .logprobs import TokenLogprob
from .sampling import SamplingParams, fresh_seed


@dataclass(eq=False)
class Request:
    """`siblings`: further samples of the same prompt, until it is in the cache and they go on from there.

    params: resolved, without anything that is the model's to say.
    """

    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    tokenizer: BaseTokenizer
    index: int = 0  # of the prompt, in its call
    sample: int = 0
    seed: int = -1  # of this sample; chosen if params have none
    siblings: list["Request"] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # if asked for; all samples'
    finish_reason: str | None = None
    stop_match: str | int | None = None  # the stop string, or the token, that ended it
    error: Exception | None = None  # what ended it instead
    events: deque["Event"] = field(default_factory=deque)  # of all requests of a run
    blocks: list[int] = field(default_factory=list)
    found: int = 0  # tokens of the prompt that were in the cache when it came
    cached: int = 0  # tokens whose keys and values are in the blocks, or saved
    saved: torch.Tensor | None = None  # what was in the blocks of a preempted sequence
    carried_phi: torch.Tensor | None = None  # float32 [layers, q_heads], of a preempted sequence
    rotated_for: int = field(init=False)  # the length by which a rope scaling chose its keys' frequencies
    unread: int = 0  # tokens that were chosen and that the host hasn't seen
    started_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        params = self.params
        self.text = TextStream(
            self.tokenizer,
            params.stop,
            skip_special_tokens=params.skip_special_tokens,
            prompt_ids=self.prompt_ids,
        )
        self.guides: list[Guide] = []  # each says which tokens may come next
        if params.guide is not None:
            self.guides.append(new_guide(params.guide))
        if params.bad_words:
            self.guides.append(BadWords(spellings(params.bad_words, self.tokenizer)))
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
        """params.n requests for one prompt, each with a seed of its own. The first has the others along."""
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
    def chosen_length(self) -> int:
        """The tokens that the host hasn't seen included. All but the newest are in the cache, or will be."""
        return self.length + self.unread

    @property
    def prefill_length(self) -> int:
        """Tokens that are in the cache before a decode step: the prompt, then all but the newest."""
        return self.length - 1 if self.token_ids else self.length

    @property
    def scores_prompt(self) -> bool:
        """Whether it computes its prompt's log-probabilities, once for all samples."""
        return self.params.prompt_logprobs is not None and self.sample == 0 and not self.token_ids

    @property
    def needs_host(self) -> bool:
        """Whether each token must be read before the next is computed."""
        return bool(self.guides) or self.params.logits_processor is not None

    @property
    def time_to_first_token(self) -> float:
        return 0.0 if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def tokens_per_second(self) -> float:
        if len(self.token_ids) < 2 or self.last_token_at <= self.first_token_at:
            return 0.0
        return (len(self.token_ids) - 1) / (self.last_token_at - self.first_token_at)

    def final_length(self, max_len: int) -> int:
        """Tokens of prompt and answer together, at most."""
        limit = self.params.max_tokens
        return max_len if limit is None else min(max_len, len(self.prompt_ids) + limit)

    def start_over(self) -> None:
        """What it has is a prompt from now on, whose keys are yet to be computed."""
        self.rotated_for, self.cached, self.saved = self.length, 0, None
        self._keys.clear()

    def block_keys(self, count: int, rotation: int) -> list[bytes]:
        """Keys of the first `count` blocks, which are full: of all tokens up to the end of each.

        `rotation` is what else keys and values depend on, the same for a request until it starts over.
        """
        while len(self._keys) < count:
            start = len(self._keys) * BLOCK_SIZE
            tokens = array("q", self.history[start : start + BLOCK_SIZE])
            before = self._keys[-1] if self._keys else rotation.to_bytes(8, "little")
            self._keys.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return self._keys[:count]


# A token and the text it completed; at a request's end no token and the text that was held back.
Event = tuple[Request, int | None, str]


class RequestError(Exception):
    """An error, its cause, that comes of one request and ends that alone."""

    def __init__(self, request: Request) -> None:
        super().__init__("a request failed")
        self.request = request


@contextmanager
def due_to(request: Request) -> Iterator[None]:
    """Errors within are this request's, unless they are known to be another's."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(request) from error
