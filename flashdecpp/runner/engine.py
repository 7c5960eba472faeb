"""Runs requests: admits them to the batch, decodes the batch step by step, lets finished ones leave."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from flashdecpp import ops

from .cache import KVCache, block_bytes, blocks_for
from .errors import OutOfMemory
from .memory import available_bytes
from .model import Decoder
from .sampling import BatchSampling, SamplingParams, fresh_seed
from .tokenizer import BaseTokenizer, TextStream

# Of the free memory, what a cache that isn't given a size may take at most
CACHE_SHARE = 0.9


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer."""

    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    tokenizer: BaseTokenizer
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    blocks: list[int] = field(default_factory=list)
    carried_phi: torch.Tensor | None = None  # float32 [layers, q_heads], since the first decode step
    started_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        self.text = TextStream(self.tokenizer, self.params.stop)
        self.seed = fresh_seed() if self.params.seed is None else self.params.seed

    @property
    def history(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def time_to_first_token(self) -> float:
        return 0.0 if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def tokens_per_second(self) -> float:
        if self.first_token_at is None or len(self.token_ids) < 2:
            return 0.0
        return (len(self.token_ids) - 1) / (self.last_token_at - self.first_token_at)

    def final_length(self, max_len: int) -> int:
        """Tokens of prompt and answer together, at most."""
        limit = self.params.max_tokens
        return max_len if limit is None else min(max_len, len(self.prompt_ids) + limit)


# A token and the text it completed; at a request's end no token and the text that was held back.
Event = tuple[Request, int | None, str]


class Engine:
    def __init__(
        self,
        decoder: Decoder,
        eos_ids: frozenset[int],
        max_len: int,
        max_batch: int,
        cache_tokens: int | None,
        carry_phi: bool,
    ) -> None:
        self.decoder, self.eos_ids = decoder, eos_ids
        self.max_len, self.max_batch, self.carry_phi = max_len, max_batch, carry_phi
        self.decoded_tokens = 0  # by decode steps, of all runs
        self._fixed_blocks = None if cache_tokens is None else blocks_for(cache_tokens)
        # The cache between runs. A run takes it along, so two runs at once never share one.
        self._idle_cache = None if self._fixed_blocks is None else self._new_cache(self._fixed_blocks)

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Generates for all requests; every token is an event, and so is every request's end."""
        now = time.perf_counter()
        for request in requests:
            request.started_at = now
        cache = self._cache_for(requests)
        waiting, running = deque(requests), []
        try:
            while waiting or running:
                while waiting and self._has_room(waiting[0], running, cache):
                    request = waiting.popleft()
                    running.append(request)
                    yield from self._take_token(request, self._prefill(request, cache))
                running = self._drop_finished(running, cache)
                if not running:
                    continue
                batch = Batch(running, self.decoder, self.eos_ids, self.carry_phi)
                while all(request.finish_reason is None for request in running):
                    tokens = batch.step(self.decoder, cache)
                    self.decoded_tokens += len(tokens)
                    for request, token in zip(running, tokens, strict=True):
                        yield from self._take_token(request, token)
                running = self._drop_finished(running, cache)
        finally:
            for request in running:  # the caller stopped early
                cache.give_back(request.blocks)
            self._idle_cache = cache

    def _has_room(self, request: Request, running: list[Request], cache: KVCache) -> bool:
        return len(running) < self.max_batch and self._blocks(request) <= cache.free_blocks

    def _prefill(self, request: Request, cache: KVCache) -> int:
        """Puts the prompt into the cache; the first token of the answer."""
        request.blocks = cache.take(self._blocks(request))
        device = self.decoder.device
        table = torch.tensor([request.blocks], dtype=torch.int32, device=device)
        logits = self.decoder.prefill(torch.tensor(request.prompt_ids, device=device), cache, table)
        return Choice([request], self.decoder, self.eos_ids).tokens(logits).item()

    def _take_token(self, request: Request, token: int) -> Iterator[Event]:
        """Adds a token to a request, and ends it where this was the last one."""
        request.last_token_at = time.perf_counter()
        if request.first_token_at is None:
            request.first_token_at = request.last_token_at
        if token in self.eos_ids:
            request.finish_reason = "stop"
        else:
            request.token_ids.append(token)
            text = request.text.push(token)
            if request.text.stopped:
                request.finish_reason = "stop"
            elif request.length >= request.final_length(self.max_len):
                request.finish_reason = "length"
            yield request, token, text
        if request.finish_reason is not None:
            rest = request.text.finish()
            if request.text.stopped:  # the held back text completed a stop string
                request.finish_reason = "stop"
            yield request, None, rest

    def _drop_finished(self, running: list[Request], cache: KVCache) -> list[Request]:
        for request in running:
            if request.finish_reason is not None:
                cache.give_back(request.blocks)
        return [request for request in running if request.finish_reason is None]

    def _blocks(self, request: Request) -> int:
        return blocks_for(request.final_length(self.max_len))

    def _cache_for(self, requests: Sequence[Request]) -> KVCache:
        """A cache that holds as many of the requests at once as the batch and the memory allow."""
        needs = sorted((self._blocks(request) for request in requests), reverse=True)
        wanted, least = sum(needs[: self.max_batch]), needs[0] if needs else 0
        cache, self._idle_cache = self._idle_cache, None
        if self._fixed_blocks is not None:
            cache = cache or self._new_cache(self._fixed_blocks)
            if least > cache.num_blocks:
                self._idle_cache = cache
                raise OutOfMemory(
                    f"a prompt and its answer may need {least * cache.block_size} tokens of KV cache, "
                    f"which has {cache.num_blocks * cache.block_size}; raise cache_tokens or lower max_tokens"
                )
            return cache
        if cache is not None and cache.num_blocks >= wanted:
            return cache
        del cache  # before the new one is made
        free = int(available_bytes(self.decoder.device) * CACHE_SHARE)
        affordable = free // block_bytes(self.decoder.config, self.decoder.dtype)
        return self._new_cache(max(min(wanted, affordable), least))

    def _new_cache(self, num_blocks: int) -> KVCache:
        return KVCache(self.decoder.config, num_blocks, self.decoder.device, self.decoder.dtype)


class Batch:
    """The sequences that are decoded together, as tensors on the device."""

    def __init__(
        self, requests: Sequence[Request], decoder: Decoder, eos_ids: frozenset[int], carry_phi: bool
    ) -> None:
        device = decoder.device
        widest = max(len(request.blocks) for request in requests)
        tables = [request.blocks + [0] * (widest - len(request.blocks)) for request in requests]
        cached = [request.length - 1 for request in requests]  # the newest token isn't in the cache yet
        self.tokens = torch.tensor([request.token_ids[-1] for request in requests], device=device)
        self.seq_lens = torch.tensor(cached, dtype=torch.int32, device=device)
        self.block_table = torch.tensor(tables, dtype=torch.int32, device=device)
        self.carried_phi = _gather_phi(requests, decoder) if carry_phi else None
        self.choice = Choice(requests, decoder, eos_ids)

    def step(self, decoder: Decoder, cache: KVCache) -> list[int]:
        """The next token of every sequence."""
        self.seq_lens += 1
        logits = decoder.decode(self.tokens, cache, self.seq_lens, self.block_table, self.carried_phi)
        self.tokens = self.choice.tokens(logits)
        return self.tokens.tolist()


def _gather_phi(requests: Sequence[Request], decoder: Decoder) -> torch.Tensor:
    """[layers, batch, q_heads]: what each request carries, NaN for a new one.

    Every request then holds a view of its part, and so takes what decode steps leave there to its next batch.
    """
    config = decoder.config
    shape = (config.layers, len(requests), config.q_heads)
    carried = torch.full(shape, torch.nan, device=decoder.device)
    for row, request in enumerate(requests):
        if request.carried_phi is not None:
            carried[:, row] = request.carried_phi
        request.carried_phi = carried[:, row]
    return carried


class Choice:
    """Chooses the next tokens of a batch, step after step."""

    def __init__(self, requests: Sequence[Request], decoder: Decoder, eos_ids: frozenset[int]) -> None:
        device = decoder.device
        self._sampling = BatchSampling.build(
            [request.params for request in requests],
            [request.seed for request in requests],
            [request.history for request in requests],
            decoder.config.vocab,
            device,
        ).arguments()
        # The place of the token in its sequence: with the seed it determines the draw.
        self._position = torch.tensor([request.length for request in requests], device=device)
        endless = [row for row, request in enumerate(requests) if request.params.ignore_eos]
        self._never = None
        if endless and eos_ids:
            self._never = (
                torch.tensor(endless, device=device)[:, None],
                torch.tensor(sorted(eos_ids), device=device),
            )

    @torch.inference_mode()
    def tokens(self, logits: torch.Tensor) -> torch.Tensor:
        if self._never is not None:
            logits[self._never] = -torch.inf
        chosen = ops.sample(logits, position=self._position, **self._sampling)
        self._position += 1
        return chosen
