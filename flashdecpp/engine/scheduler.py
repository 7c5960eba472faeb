"""Which requests run next and in which cache blocks: decisions only, without tensors or a model.

A decision is scheduled here, run by the executor and then committed here. An error in between leaves every
request with what it certainly has, once `recover` has been called.

A step is at most one chunk of prompts, first come first served, then one token of every running sequence.
A chunk may hold several prompts, but each prompt is cut where it would be cut alone. Sequences get blocks as
they grow. When none is free, the youngest sequence is preempted: it gives up its blocks, and resumes before
anything newer is admitted, from a copy of them in host memory. (Recomputed as part of a prompt, its keys
would differ in the last bits.)
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from flashdecpp.models.kv_cache import BLOCK_SIZE, blocks_for

from .block_pool import BlockPool
from .config import EngineConfig
from .request import Request


@dataclass
class Counts:
    """Totals of all runs so far."""

    decoded_tokens: int = 0  # by decode steps
    cached_prompt_tokens: int = 0  # tokens that a prompt found in the cache
    preemptions: int = 0


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, stop) of a request go into its blocks."""

    request: Request
    start: int
    stop: int
    restored: Sequence[int] = ()  # blocks that get their saved contents back first

    @property
    def is_last(self) -> bool:
        return self.stop == self.request.prefill_length


@dataclass(frozen=True)
class DecodeStart:
    """Requests whose prompt is in the cache join those that are being decoded."""

    rows: list[Request]  # of the batch so far
    joining: list[Request]
    samples_first: bool  # whether the prompt's logits give their first token; else they resume


@dataclass(frozen=True)
class Growth:
    """A row of the block table gets a block."""

    row: int
    column: int
    copied_from: int | None  # the block shared with others that it replaces; None appends an empty block
    block: int


@dataclass(frozen=True)
class DecodeStep:
    """One token of every row."""

    rows: list[Request]
    growth: list[Growth]


class Scheduler:
    """Holds all requests, oldest first: `running`, then the one in `prefilling`, then `waiting`.

    rotation: maps a sequence's length to a number that stands for its rotary frequencies; keys computed under
        different numbers are never shared. rekeyed: sequences that outgrow their number start over.
    """

    def __init__(
        self, config: EngineConfig, rotation: Callable[[int], int] = lambda _: 0, rekeyed: bool = False
    ) -> None:
        self.pool = BlockPool(0)  # replaced together with the cache, while idle
        self.counts = Counts()
        self.running: list[Request] = []
        self.prefilling: Request | None = None
        self.waiting: deque[Request] = deque()
        self._config, self._rotation, self._rekeyed = config, rotation, rekeyed

    @property
    def idle(self) -> bool:
        return not (self.running or self.prefilling or self.waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Siblings come with the first request of their prompt."""
        self.waiting.extend(request for request in requests if request.sample == 0)

    def active(self) -> list[Request]:
        """The running requests that need another token: their count may already have reached its limit,
        before the host has read the last token."""
        max_len = self._config.length_limit
        return [r for r in self.running if r.sampled_length < r.final_length(max_len)]

    # ---- prompts

    def schedule_prefill(self, budget: int) -> PrefillChunk | None:
        """The next chunk of the prompt under way, or the first of the oldest waiting request.

        None if the chunk has more than `budget` tokens, or if the batch or the cache has no room for another.
        """
        request = self.prefilling
        if request is not None:
            return self._chunk(request, request.cached, budget)
        active = len(self.active()) if self.waiting else 0
        if not self.waiting or active >= self._config.max_batch:
            return None
        request, pool = self.waiting[0], self.pool
        found = pool.find(self._findable_keys(request))
        start = len(found) * BLOCK_SIZE if request.saved is None else request.cached
        chunk = self._chunk(request, start, budget)
        if chunk is None:
            return None
        shared = pool.share(found)
        missing = blocks_for(request.prefill_length) - len(shared)
        # Each running sequence may soon need a block, and would preempt the newcomer for it.
        if missing + active > pool.free_blocks:
            pool.free(shared)
            return None
        self.prefilling = request
        self.waiting.popleft()
        request.blocks = shared + pool.allocate(missing)
        if request.saved is not None:
            return replace(chunk, restored=request.blocks[len(found) : blocks_for(start)])
        request.cached = start
        if not request.token_ids:
            request.cached_prompt_tokens = start
        self.counts.cached_prompt_tokens += start
        return chunk

    def prefilled(self, chunk: PrefillChunk) -> None:
        """Commits a chunk: its tokens are in the cache."""
        request = chunk.request
        if request.saved is not None:
            request.saved = None
            self._register(request, 0)
        self.advance(request, chunk.stop)

    def schedule_start(self, request: Request) -> DecodeStart:
        """The request's last chunk is in the cache, so it joins the batch with as many siblings as fit."""
        rows, joining, samples_first = self.active(), [request], not request.token_ids
        if samples_first:
            joining += request.siblings[: self._config.max_batch - len(rows) - 1]
            for sibling in joining[1:]:
                sibling.blocks, sibling.cached = self.pool.share(request.blocks), request.cached
                sibling.cached_prompt_tokens = request.cached_prompt_tokens
        return DecodeStart(rows, joining, samples_first)

    def started(self, start: DecodeStart) -> None:
        """Commits a start. Siblings without a row wait first in line, to find the prompt's full blocks."""
        request = start.joining[0]
        self.running += start.joining
        self.prefilling = None
        self.waiting.extendleft(reversed(request.siblings[len(start.joining) - 1 :]))
        request.siblings = []
        if start.samples_first:
            for joined in start.joining:
                joined.unread += 1

    # ---- decode steps

    def schedule_decode(self) -> DecodeStep | None:
        """The next step of all active requests; None if a sequence must first leave the batch: see
        `restart_outgrown` and `victim`."""
        rows = self.active()
        if self._rekeyed and any(map(self._outgrown, rows)):
            return None
        wanted = self._wanted_blocks(rows)
        if len(wanted) > self.pool.free_blocks:
            return None
        if not wanted:
            return DecodeStep(rows, [])
        blocks = self.pool.allocate(len(wanted))
        return DecodeStep(rows, [Growth(*w, block) for w, block in zip(wanted, blocks, strict=True)])

    def decoded(self, step: DecodeStep) -> None:
        """Commits a step that was launched."""
        for growth in step.growth:
            blocks = step.rows[growth.row].blocks
            if growth.copied_from is None:
                blocks.append(growth.block)
            else:
                blocks[growth.column] = growth.block
                self.pool.free([growth.copied_from])
        for request in step.rows:
            request.unread += 1

    def restart_outgrown(self) -> None:
        """Sequences that outgrew the frequencies of their keys wait first in line, all their tokens a prompt.

        The host must have read all tokens.
        """
        if self._rekeyed:
            for request in reversed([r for r in self.active() if self._outgrown(r)]):
                self.running.remove(request)
                self._release(request)
                request.start_over()
                self.waiting.appendleft(request)

    def victim(self) -> Request | None:
        """The youngest sequence, if the next step needs more blocks than are free; else None."""
        if len(self._wanted_blocks(self.active())) <= self.pool.free_blocks:
            return None
        return self.prefilling or self.running[-1]

    def preempt(self, victim: Request) -> None:
        """Takes a victim's blocks, whose contents are saved; it waits first in line.

        The host must have read all tokens.
        """
        if victim is self.prefilling:
            self.prefilling = None
        else:
            self.running.remove(victim)
        self._release(victim)
        self.waiting.appendleft(victim)
        self.counts.preemptions += 1

    # ---- tokens and ends

    def read(self, request: Request, valid: bool = True) -> None:
        """The host has read one of the request's tokens. If it is valid, all before it are in the cache."""
        request.unread -= 1
        if valid and request.finish_reason is None:
            self.counts.decoded_tokens += bool(request.token_ids)
            self.advance(request, request.length)

    def advance(self, request: Request, cached: int) -> None:
        """Notes that the first `cached` tokens are in the cache, and registers the blocks they filled."""
        before, request.cached = request.cached, cached
        self._register(request, before)

    def drop_finished(self) -> None:
        for request in self.running:
            if request.finish_reason is not None:
                self._release(request)
        self.running = [request for request in self.running if request.finish_reason is None]

    def remove(self, requests: Collection[Request]) -> None:
        """Removes requests wherever they are, and frees their blocks."""
        gone = set(requests)
        self.running = [request for request in self.running if request not in gone]
        self.waiting = deque(request for request in self.waiting if request not in gone)
        if self.prefilling in gone:
            self.prefilling = None
        for request in gone:
            self._release(request)

    def recover(self) -> None:
        """After an error: forgets unread tokens and uncommitted decisions; both come out the same again."""
        self.drop_finished()
        begun = [request for request in self.running if request.token_ids]
        again = [request for request in self.running if not request.token_ids]
        if self.prefilling is not None:
            again.append(self.prefilling)
        for request in again:
            self._release(request)
            for sibling in request.siblings:
                self._release(sibling)
            if request.saved is None:
                request.cached = 0
        for request in (*begun, *again):
            request.unread = 0
        others = [request for request in self.waiting if request not in again]
        self.waiting = deque((*again, *others))
        self.running, self.prefilling = begun, None
        # The error may have come between the allocation of blocks and their assignment.
        self.pool.recount(request.blocks for request in (*self.running, *self.waiting))

    def _chunk(self, request: Request, start: int, budget: int) -> PrefillChunk | None:
        size = self._config.prefill_chunk
        stop = min(request.prefill_length, start - start % size + size)
        return PrefillChunk(request, start, stop) if stop - start <= budget else None

    def _register(self, request: Request, start: int) -> None:
        """Lets other requests find the full blocks of the cached tokens from `start` on."""
        first, last = start // BLOCK_SIZE, request.cached // BLOCK_SIZE
        if first < last and self._config.prefix_cache:
            keys = self._keys(request, last)
            for block, key in zip(request.blocks[first:last], keys[first:last], strict=True):
                self.pool.register(block, key)

    def _findable_keys(self, request: Request) -> list[bytes]:
        """Keys of the blocks that need not be computed or restored if they are still in the cache."""
        if request.saved is not None:
            return self._keys(request, request.cached // BLOCK_SIZE)
        if request.scores_prompt:
            return []  # all logits of the prompt are needed
        return self._keys(request, (request.length - 1) // BLOCK_SIZE)  # the last token's logits are needed

    def _keys(self, request: Request, blocks: int) -> list[bytes]:
        """Keys of the first blocks, all full; none without a prefix cache."""
        if not self._config.prefix_cache:
            return []
        return request.block_keys(blocks, rotation=self._rotation(request.rotated_for))

    def _outgrown(self, request: Request) -> bool:
        return self._rotation(request.sampled_length) != self._rotation(request.rotated_for)

    def _wanted_blocks(self, rows: list[Request]) -> list[tuple[int, int, int | None]]:
        """(row, column, shared block or None) wherever the newest token has no block of its row's own."""
        wanted: list[tuple[int, int, int | None]] = []
        left: dict[int, int] = {}  # users of shared blocks that get a copy instead
        for row, request in enumerate(rows):
            column = (request.sampled_length - 1) // BLOCK_SIZE
            if column == len(request.blocks):
                wanted.append((row, column, None))
            elif self.pool.users(shared := request.blocks[column]) - left.get(shared, 0) > 1:
                left[shared] = left.get(shared, 0) + 1
                wanted.append((row, column, shared))
        return wanted

    def _release(self, request: Request) -> None:
        if request.blocks:
            self.pool.free(request.blocks)
            request.blocks = []
