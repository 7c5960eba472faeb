"""What a caller of `LLM` gets back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .logprobs import TokenLogprob

if TYPE_CHECKING:
    from .request import Request


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer. Its text may be empty while a character or a stop string is incomplete.

    The last piece has no token; it has the text that was still held back, the finish reason and the match.
    """

    text: str
    token_id: int | None
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None  # of the token, if requested
    stop_match: str | int | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt, without the end-of-sequence token or the stop string that ended it."""

    prompt: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "stop": end of sequence or a stop; "length": max_tokens or the end of the context
    time_to_first_token: float  # seconds since the call, including the wait for a row of the batch
    tokens_per_second: float  # after the first token
    sample: int = 0  # which of the prompt's SamplingParams.n answers
    index: int = 0  # which of the call's prompts
    seed: int = 0  # SamplingParams(seed=...) that repeats this answer alone
    stop_match: str | int | None = None  # the stop string or the token that ended it
    cached_prompt_tokens: int = 0  # prompt tokens found in the cache
    logprobs: list[TokenLogprob] | None = None  # of token_ids, if requested
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of prompt_token_ids: None for the first

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of(cls, request: "Request") -> "Completion":
        """The result of a request whose answer has ended."""
        params, answer = request.params, request.answer
        return cls(
            prompt=request.prompt,
            text=answer.text,
            token_ids=answer.token_ids,
            prompt_token_ids=request.prompt_ids,
            finish_reason=answer.finish_reason or "",
            time_to_first_token=answer.time_to_first_token(request.started_at),
            tokens_per_second=answer.tokens_per_second,
            sample=request.sample,
            index=request.index,
            seed=request.seed,
            stop_match=answer.stop_match,
            cached_prompt_tokens=request.cached_prompt_tokens,
            logprobs=None if params.logprobs is None else answer.logprobs,
            prompt_logprobs=None if params.prompt_logprobs is None else request.prompt_logprobs,
        )


@dataclass(frozen=True)
class Stats:
    """Figures of the last generate, stream or chat."""

    prompt_tokens: int
    generated_tokens: int
    time_to_first_token: float  # seconds to the first token of any prompt
    tokens_per_second: float  # of the whole batch, after the first token
    peak_memory: int  # bytes: resident on the CPU, allocated by torch on a GPU
    softmax: str  # of decode steps: "fixed phi", "carried phi" or "online softmax"
    softmax_rows: int  # of decode steps: one per token, layer and query head
    softmax_fallbacks: int  # rows whose maximum was too far from phi
    weights: str  # storage of the matrices, such as "bfloat16" or "int4 + int8"
    weight_bytes: int  # of all weights
    cached_prompt_tokens: int  # tokens found in the cache, which were not computed again
    preemptions: int  # how often a sequence left the cache to make room for older ones
    peak_blocks: int  # most cache blocks in use at once
    cache_blocks: int  # cache blocks in total, of 16 tokens each
    cuda_graphs: bool  # the setting: False launched kernels one by one, as the CPU always does
    batch_invariant: bool  # the setting: True computed max_batch rows in every step
