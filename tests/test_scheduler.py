"""The engine's decisions, without a model: blocks hold what their sequences need, and every request ends.

The executor here is a simple one. Each cache slot stands for a token's keys and values by what they depend
on, all tokens up to that one. A sequence's next token is a hash of all previous tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdecpp import SamplingParams
from flashdecpp.engine.config import EngineConfig
from flashdecpp.engine.engine import Engine
from flashdecpp.engine.request import Request
from flashdecpp.engine.scheduler import DecodeStart, DecodeStep, PrefillChunk
from flashdecpp.loading.generation_config import GenerationDefaults
from flashdecpp.models.kv_cache import BLOCK_SIZE, blocks_for

EOS, MAX_LEN = 0, 120
COMMON = [1 + 7 * i % 50 for i in range(80)]  # prompts share prefixes of this


class Interrupted(BaseException):
    """Like a KeyboardInterrupt, it is no request's fault."""


class Letters:
    """Stands in for a tokenizer."""

    special_tokens: dict[int, str] = {}  # noqa: RUF012

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "x" * len(ids)


def next_token(tokens: list[int], seed: int) -> int:
    chosen = hash((tuple(tokens), seed))
    return EOS if chosen % 31 == 0 else 1 + chosen % 50


def answer_alone(request: Request) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < request.final_length(MAX_LEN) - len(request.prompt_ids):
        token = next_token(request.prompt_ids + tokens, request.seed)
        if token == EOS:
            break
        tokens.append(token)
    return tokens


@dataclass
class Row:
    """A sequence as the device sees it, with tokens the host has not read yet and its own block table."""

    tokens: list[int]
    blocks: list[int]
    ended: bool = False


class PlainExecutor:
    """Runs decisions on lists and checks everything they rely on. Fails at the calls in `fail_at`."""

    def __init__(self, engine: Engine, fail_at: set[int]) -> None:
        self.scheduler, self.config = engine.scheduler, engine.config
        self.cache = engine.cache
        self.eos_ids = frozenset([EOS])
        self.slots: list[list] = [[None] * BLOCK_SIZE for _ in range(engine.pool.num_blocks)]
        self.batch: dict[Request, Row] | None = None
        self.prefilled = 0  # tokens in this step
        self.copies = 0
        self.arrivals: dict[Request, tuple[int, int]] = {}
        self.in_order = True  # whether requests must be admitted in order of arrival
        self._admitted: Request | None = None
        self._calls, self._fail_at = 0, fail_at

    def reset(self) -> None:
        self.batch = self._admitted = None

    def new_batch(self, rows: list[Request]) -> None:
        self.batch = {}
        self.join(rows)

    def join(self, requests: list[Request]) -> None:
        for request in requests:
            assert request.unread == 0 and request not in self.batch
            assert request.cached == request.prefill_length
            self.batch[request] = Row(request.history, list(request.blocks))
            self.check(request, request.history[: request.cached], request.blocks)
        assert len(self.batch) <= self.config.max_batch

    def prefill(self, chunk: PrefillChunk) -> str:
        self.interrupt()
        request = chunk.request
        if request is not self._admitted:
            self._admitted = request
            waiting = [self.arrivals[other] for other in self.scheduler.waiting]
            assert not self.in_order or self.arrivals[request] < min(waiting, default=(1 << 30, 0))
        size = self.config.prefill_chunk
        assert chunk.stop == min(request.prefill_length, chunk.start // size * size + size)
        self.prefilled += chunk.stop - chunk.start
        assert self.prefilled <= size
        if chunk.restored:
            saved = request.saved[-len(chunk.restored) :]
            for block, content in zip(chunk.restored, saved, strict=True):
                assert self.scheduler.pool.users(block) == 1
                self.slots[block] = list(content)
        history = request.history
        for position in range(chunk.start, chunk.stop):
            self.write(request, history[: position + 1], request.blocks)
        self.check(request, history[: chunk.stop], request.blocks)
        self.interrupt()
        return "logits"

    def start(self, start: DecodeStart, logits: str) -> SimpleNamespace | None:
        self.keep_only(start.rows)
        self.join(start.joining)
        self.interrupt()
        return self.sample(start.joining) if start.samples_first else None

    def decode(self, step: DecodeStep) -> SimpleNamespace:
        self.interrupt()
        self.keep_only(step.rows)
        copied = tuple(growth.copied_from for growth in step.growth)
        for growth in step.growth:
            blocks = self.batch[step.rows[growth.row]].blocks
            if growth.copied_from is None:
                assert growth.column == len(blocks)
                blocks.append(growth.block)
            else:
                assert growth.copied_from == blocks[growth.column]
                self.slots[growth.block] = list(self.slots[growth.copied_from])
                self.copies += 1
                blocks[growth.column] = growth.block
        for request in step.rows:
            row = self.batch[request]
            if not row.ended:
                self.write(request, row.tokens, row.blocks, copied)
                self.check(request, row.tokens, row.blocks)
        self.interrupt()
        return self.sample(step.rows)

    def keep_only(self, requests: list[Request]) -> None:
        self.batch = {request: row for request, row in self.batch.items() if request in set(requests)}
        assert list(self.batch) == requests

    def sample(self, requests: list[Request]) -> SimpleNamespace:
        tokens = []
        for request in requests:
            row = self.batch[request]
            token = next_token(row.tokens, request.seed)
            row.ended = row.ended or token == EOS
            row.tokens.append(token)
            tokens.append((token, None))
        return SimpleNamespace(requests=requests, tokens=tokens)

    def read(self, sampled: SimpleNamespace) -> list[tuple[int, None]]:
        return sampled.tokens

    def save(self, victim: Request) -> None:
        assert victim.unread == 0 and victim.finish_reason is None
        assert victim is (self.scheduler.prefilling or self.scheduler.running[-1])
        if victim.cached:
            victim.saved = [list(self.slots[block]) for block in victim.blocks[: blocks_for(victim.cached)]]
        self.interrupt()

    def write(
        self, request: Request, tokens: list[int], blocks: list[int], copied: tuple[int | None, ...] = ()
    ) -> None:
        """Writes the newest token into a block that is not shared, except with rows that just got a copy."""
        position = len(tokens) - 1
        block = blocks[position // BLOCK_SIZE]
        assert self.scheduler.pool.users(block) - copied.count(block) == 1
        self.slots[block][position % BLOCK_SIZE] = self.content(request, tokens)

    def check(self, request: Request, tokens: list[int], blocks: list[int]) -> None:
        for position in range(len(tokens)):
            found = self.slots[blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            assert found == self.content(request, tokens[: position + 1])

    def content(self, request: Request, tokens: list[int]) -> tuple[int, int]:
        return self.scheduler._rotation(request.rotated_for), hash(tuple(tokens))

    def interrupt(self) -> None:
        self._calls += 1
        if self._calls in self._fail_at:
            raise Interrupted


class PlainEngine(Engine):
    def _new_cache(self, num_blocks: int) -> SimpleNamespace:
        return SimpleNamespace(num_blocks=num_blocks)


@dataclass
class Simulation:
    """Requests that arrive between steps, on an engine without a model."""

    config: EngineConfig
    behind: int = 0
    window: int = 0  # how many lengths share a rotation; 0: all
    fail_at: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        model = SimpleNamespace(
            rotation=lambda length: length // self.window if self.window else 0, rekeyed=self.window > 0
        )
        decoder = SimpleNamespace(config=model, device=SimpleNamespace(type="cpu"))
        self.engine = PlainEngine(decoder, frozenset([EOS]), self.config)
        self.engine.behind = self.behind
        self.executor = self.engine.executor = PlainExecutor(self.engine, self.fail_at)
        self.executor.in_order = not self.window
        self.requests: list[Request] = []

    def arrive(self, prompt: list[int], max_tokens: int, n: int = 1) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n, seed=len(self.requests))
        samples = Request.samples("", prompt, params.resolved(GenerationDefaults()), Letters())
        for request in samples:
            self.executor.arrivals[request] = (len(self.requests), request.sample)
        self.requests += samples
        self.engine._begin(samples)

    def step(self) -> None:
        if not self.engine._prompts_done:
            self.executor.prefilled = 0
        try:
            self.engine._step()
        except Interrupted:
            self.executor.prefilled = 0
        self.check_blocks()

    def check_blocks(self) -> None:
        """Every use of a block belongs to a request and is counted."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        assert not any(request.blocks for request in scheduler.waiting)
        assert not any(request.cached for request in scheduler.waiting if request.saved is None)
        holders = [*scheduler.running, *filter(None, [scheduler.prefilling])]
        assert not any(request.blocks for request in self.requests if request not in holders)
        uses = Counter(block for request in holders for block in request.blocks)
        assert [uses[block] for block in range(pool.num_blocks)] == list(
            map(pool.users, range(pool.num_blocks))
        )
        assert pool.used_blocks == len(uses)
        for request in holders:
            assert len(set(request.blocks)) == len(request.blocks)
        known = [*holders, *scheduler.waiting]
        assert len(set(known)) == len(known)

    def finish(self) -> None:
        """Runs until nothing is left to do, within a step limit that requires steady progress."""
        tokens = sum(request.final_length(MAX_LEN) for request in self.requests)
        for _ in range(4 * tokens + 10 * len(self.executor._fail_at) + 10):
            if self.engine.scheduler.idle:
                break
            self.step()
        self.engine._read()  # steps launched before an end was known
        assert self.engine.scheduler.idle
        assert self.engine.pool.used_blocks == 0
        for request in self.requests:
            right = answer_alone(request)
            if request.finish_reason == "aborted":
                assert request.token_ids == right[: len(request.token_ids)]
            else:
                assert request.token_ids == right
                assert request.finish_reason in ("stop", "length")


@st.composite
def prompts(draw) -> tuple[list[int], int, int, int]:
    """Tokens, max_tokens, samples, and steps until arrival."""
    own = draw(st.lists(st.integers(1, 50), min_size=1, max_size=20))
    prompt = COMMON[: draw(st.sampled_from([0, 0, 15, 16, 33, 64]))] + own
    return prompt, draw(st.integers(1, 35)), draw(st.sampled_from([1, 1, 1, 2, 4])), draw(st.integers(0, 6))


@settings(max_examples=150)
@given(
    arrivals=st.lists(prompts(), min_size=1, max_size=8),
    max_batch=st.integers(1, 5),
    spare_blocks=st.integers(0, 6),
    prefill_chunk=st.integers(1, 40),
    prefix_cache=st.booleans(),
    behind=st.integers(0, 1),
    window=st.sampled_from([0, 0, 0, 40]),
    fail_at=st.sets(st.integers(1, 120), max_size=4),
    aborted=st.sets(st.integers(0, 30), max_size=3),
)
def test_every_request_ends_with_its_own_answer(
    arrivals, max_batch, spare_blocks, prefill_chunk, prefix_cache, behind, window, fail_at, aborted
):
    longest = max(min(MAX_LEN, len(prompt) + limit) for prompt, limit, *_ in arrivals)
    config = EngineConfig(
        max_len=MAX_LEN,
        max_batch=max_batch,
        cache_tokens=BLOCK_SIZE * (blocks_for(longest) + spare_blocks),
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
    )
    simulation = Simulation(config, behind, window, fail_at)
    for prompt, max_tokens, samples, wait in arrivals:
        for _ in range(wait):
            simulation.step()
        simulation.arrive(prompt, max_tokens, samples)
    for number in aborted:
        if number < len(simulation.requests):
            gone = simulation.requests[number]
            # A run aborts all samples of its prompts together.
            arrival = simulation.executor.arrivals[gone][0]
            simulation.engine._abort(
                [r for r in simulation.requests if simulation.executor.arrivals[r][0] == arrival]
            )
            simulation.step()
    simulation.finish()


@pytest.mark.parametrize("behind", [0, 1])
def test_a_tight_pool_makes_sequences_share_copy_and_wait(behind):
    """The same checks on a case known to exercise everything."""
    config = EngineConfig(max_len=MAX_LEN, max_batch=6, cache_tokens=BLOCK_SIZE * 9, prefill_chunk=32)
    simulation = Simulation(config, behind)
    for number in range(6):
        simulation.arrive([*COMMON[:40], number], 35, n=3)
    simulation.finish()
    counts = simulation.engine.scheduler.counts
    assert counts.preemptions > 5 and simulation.executor.copies > 5
    assert counts.cached_prompt_tokens >= 5 * 32
    assert simulation.engine.pool.peak_blocks == 9


def test_a_sequence_that_outgrows_its_rotation_starts_over():
    config = EngineConfig(max_len=MAX_LEN, max_batch=2, cache_tokens=BLOCK_SIZE * 20)
    simulation = Simulation(config, window=40)
    simulation.arrive(COMMON[:35], 35)
    simulation.finish()
    (request,) = simulation.requests
    assert len(request.token_ids) < 5 or request.rotated_for >= 40


def test_settings_are_checked_and_the_context_is_filled_in():
    config = EngineConfig(max_batch=3)
    assert config.within(64).max_len == 64 and config.cache_blocks is None
    assert EngineConfig(cache_tokens=17).cache_blocks == 2
    for name in ("max_batch", "prefill_chunk", "cache_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            EngineConfig(**{name: 0})
    with pytest.raises(ValueError, match="prefix_cache must be True or False, got 1"):
        EngineConfig(prefix_cache=1)
    with pytest.raises(ValueError, match="max_len must be from 1 to the model's context of 64, got 65"):
        EngineConfig(max_len=65).within(64)
