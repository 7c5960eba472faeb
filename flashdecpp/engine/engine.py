"""Continuous batching: requests join the batch and leave it between decode steps.

A step is at most a chunk of prompts, one prompt after the other, then one token of every running sequence.
The host only launches it: what the device needs for the next step it has itself (executor.py). While a GPU
works, the host reads the tokens of the step before. So it learns one step late that a sequence has ended;
what was launched for that one in the meantime is dropped. On the CPU, where a step is done once launched, and
where the host has a word in what comes next (guides, logits processors), it reads each token at once.
Blocks of the cache are taken as sequences grow. When none is left, the youngest sequence gives its own back
and goes on later. What was in them waits in the host's memory: computed again, as part of a prompt, it would
differ in the last bits.
(Iteration-level scheduling: Orca, Yu et al. 2022; blocks and preemption: PagedAttention, Kwon et al. 2023;
chunked prefill: Sarathi, Agrawal et al. 2023.)
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock, get_ident

import torch

from flashdecpp._host_copy import upload
from flashdecpp._memory import available_bytes
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import BLOCK_SIZE, KVCache, block_bytes, blocks_for

from .block_pool import BlockPool
from .executor import Batch, Choice
from .logprobs import PromptScores, TokenLogprob
from .request import Event, Request, RequestError, due_to
from .surroundings import undisturbed

# What a cache that isn't given a size leaves free at least: a share of a CPU's memory, where saved sequences
# go too; on a GPU room for activations and for torch's allocator.
CPU_SHARE_LEFT = 0.5
GPU_BYTES_LEFT = 600_000_000


@dataclass
class Counts:
    """Of all runs so far."""

    decoded_tokens: int = 0  # by decode steps
    found_tokens: int = 0  # tokens that were in the cache already, when a prompt came
    preemptions: int = 0


class Engine:
    """Requests of all runs share the cache and the batch; whichever run wants events makes the steps."""

    def __init__(
        self,
        decoder: Decoder,
        eos_ids: frozenset[int],
        max_len: int,
        max_batch: int,
        cache_tokens: int | None,
        carry_phi: bool,
        prefill_chunk: int,
        prefix_cache: bool,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.decoder, self.eos_ids = decoder, eos_ids
        self.max_len, self.max_batch, self.carry_phi = max_len, max_batch, carry_phi
        self.prefill_chunk, self.prefix_cache = prefill_chunk, prefix_cache
        self.cuda_graphs, self.batch_invariant = cuda_graphs, batch_invariant
        self.counts = Counts()
        on_gpu = decoder.device.type == "cuda"
        self.behind = 1 if on_gpu else 0  # steps that the host launches before it reads a token
        self._on_device = partial(torch.cuda.device, decoder.device) if on_gpu else nullcontext
        self._fixed_blocks = None if cache_tokens is None else blocks_for(cache_tokens)
        self._wanted_blocks = 0  # of the cache, had there been memory for more
        self.cache: KVCache | None = None
        self.pool = BlockPool(0)  # the cache's blocks
        if self._fixed_blocks is not None:
            self._make_cache(self._fixed_blocks)
        # All requests, oldest first: running ones, the one whose prompt is being computed, waiting ones.
        self._running: list[Request] = []
        self._prefilling: Request | None = None
        self._waiting: deque[Request] = deque()
        self._batch: Batch | None = None  # of this cache; None: to be made of the running ones
        self._unread: deque[Choice] = deque()  # tokens on their way here, oldest first
        self._prompts_done = False  # of this step
        self._rekeyed = decoder.config.rekeyed
        self._lock = Lock()
        self._worker: int | None = None  # the thread that has the lock
        self._left: deque[Sequence[Request]] = deque()  # by callers who went away while it was had

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Generates for all requests; every token is an event, and so is every request's end.

        What one of them can't go on for is raised here, and ends all of them; those of other runs go on.
        """
        if not requests:
            return
        events: deque[Event] = deque()
        now = time.perf_counter()
        for request in requests:
            request.events, request.started_at = events, now
        unfinished = len(requests)
        try:
            with self._working():
                self._begin(requests)
            while unfinished:
                while events:
                    event = events.popleft()
                    request, token, _ = event
                    if request.error is not None:
                        raise request.error
                    unfinished -= token is None
                    yield event
                if unfinished:
                    with self._working():
                        self._step()
        finally:
            if unfinished:  # the caller stopped early, or an error ended the run
                self._leave(requests)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One thread at a time, undisturbed by what its caller has set in torch."""
        with self._lock, undisturbed(self.decoder.device, inference=True), self._on_device():
            self._worker = get_ident()
            try:
                yield
            finally:
                while self._left:
                    self._forget(self._left.popleft())
                self._worker = None

    def _leave(self, requests: Sequence[Request]) -> None:
        """Forgets requests whose caller is gone; it may be garbage that this thread collects in a step."""
        if self._worker == get_ident():
            self._left.append(requests)
        else:
            with self._working():
                self._forget(requests)

    def _begin(self, requests: Sequence[Request]) -> None:
        with self._recovering():
            self._read()  # nothing is left under way that would keep the cache from being replaced
        self._provide_cache(requests)
        self.pool.peak_blocks = self.pool.used_blocks
        self._waiting.extend(request for request in requests if request.sample == 0)

    def _step(self) -> None:
        with self._recovering():
            if not self._prompts_done:
                self._prefill()
                self._prompts_done = True
                if self._read(leave=self._behind()):
                    return  # somebody's first token is known: the caller may want to see it before it goes on
            self._prompts_done = False
            self._rotate_anew()
            self._grow()
            launched = self._decode()
            self._read(leave=self._behind() if launched else 0)

    def _behind(self) -> int:
        """How many of the last choices the host needn't know before the next step."""
        waiting = any(request.needs_host for request in self._running)
        return 0 if waiting else self.behind

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """An error ends the request that it is due to, else the run that it comes up in. Requests of other
        runs go on with what is certain."""
        try:
            yield
        except RequestError as error:
            self._recover()
            self._fail(error.request, error.__cause__)
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        """Forgets what the host hasn't read; it is computed again, and comes out the same."""
        self._unread.clear()
        self._batch = None
        self._drop_finished()
        begun = [request for request in self._running if request.token_ids]
        again = [request for request in self._running if not request.token_ids]
        if self._prefilling is not None:
            again.append(self._prefilling)
        for request in again:
            self._release(request)
            for sibling in request.siblings:
                self._release(sibling)
            if request.saved is None:
                request.cached = 0
        for request in (*begun, *again):
            request.unread = 0
        others = (request for request in self._waiting if request not in again)
        self._waiting = deque((*again, *others))
        self._running, self._prefilling = begun, None
        self._prompts_done = False
        # The error may have come between taking blocks and noting whose they are.
        self.pool.recount(request.blocks for request in (*self._running, *self._waiting))

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error, which its run raises."""
        request.error, request.finish_reason = error, "error"
        request.events.append((request, None, ""))
        self._remove([request])

    def _prefill(self) -> None:
        """A chunk of tokens of prompts. A prompt is cut where it would be cut without others."""
        left = self.prefill_chunk
        while self._prefilling is not None or self._admit():
            request = self._prefilling
            start, end = request.cached, request.prefill_length
            stop = min(end, start - start % self.prefill_chunk + self.prefill_chunk)
            if stop - start > left:
                return
            left -= stop - start
            with due_to(request):
                logits = self._compute(request, stop) if stop > start else None
                if stop == end:
                    self._start_decoding(request, logits)

    def _admit(self) -> bool:
        """Takes the oldest waiting request, once there's a place in the batch and room in the cache."""
        active = len(self._active())
        if not self._waiting or active >= self.max_batch:
            return False
        request, pool = self._waiting[0], self.pool
        # A prompt's last token is left to compute at least, for its logits.
        findable = (request.length - 1 if request.saved is None else request.cached) // BLOCK_SIZE
        if request.scores_prompt and request.saved is None:
            findable = 0  # all of its logits are wanted
        found = pool.share(pool.find(self._keys(request, findable)))
        missing = blocks_for(request.prefill_length) - len(found)
        # Those that run may each need a block soon, and would preempt the newcomer for it.
        if missing + active > pool.free_blocks:
            pool.free(found)
            return False
        self._prefilling = request
        self._waiting.popleft()
        request.blocks = found + pool.allocate(missing)
        found_tokens = len(found) * BLOCK_SIZE
        if request.saved is None:
            request.cached = found_tokens
            if not request.token_ids:
                request.found = found_tokens
            self.counts.found_tokens += found_tokens
        else:
            lost = request.blocks[len(found) : blocks_for(request.cached)]
            self.cache.restore(lost, request.saved[:, :, len(found) :])
            request.saved = None
            self._publish(request, found_tokens)
        return True

    def _compute(self, request: Request, stop: int) -> torch.Tensor:
        """Puts tokens up to `stop` into the cache; the logits of the last of them, [1, vocab]."""
        device, start = self.decoder.device, request.cached
        tokens = upload(request.history[start:stop], torch.int64, device)
        table = upload([request.blocks], torch.int32, device)
        wanted = {}
        if request.scores_prompt:
            scores = request.prompt_logprobs, request.prompt_ids, request.params.prompt_logprobs
            wanted["score"] = PromptScores(*scores).add
        logits = self.decoder.prefill(
            tokens, self.cache, table, start=start, prompt_length=request.rotated_for, **wanted
        )
        self._advance(request, stop)
        return logits

    def _start_decoding(self, request: Request, logits: torch.Tensor | None) -> None:
        """Takes up a request whose tokens are in the cache, with its siblings where the prompt was new."""
        joining, active = [request], self._active()
        if not request.token_ids:
            joining += request.siblings[: self.max_batch - len(active) - 1]
            for sibling in joining[1:]:
                sibling.blocks, sibling.cached = self.pool.share(request.blocks), request.cached
                sibling.found = request.found
        batch = self._batch_of(active)
        batch.join(joining)
        if not request.token_ids:
            self._note_chosen(batch.choose_first(joining, logits))
        self._running += joining
        self._prefilling = None
        # The others come with the next places, and find the prompt's full blocks.
        self._waiting.extendleft(reversed(request.siblings[len(joining) - 1 :]))
        request.siblings = []

    def _active(self) -> list[Request]:
        """The running requests that need another token, as far as the host knows: without those whose last
        token is chosen already, by their count."""
        return [r for r in self._running if r.chosen_length < r.final_length(self.max_len)]

    def _batch_of(self, requests: Sequence[Request]) -> Batch:
        """The batch with these requests in its rows, and no others."""
        if self._batch is None:
            self._batch = Batch(
                self.decoder,
                self.cache,
                self.eos_ids,
                self.max_len,
                self.max_batch,
                self.carry_phi,
                self.cuda_graphs,
                all_rows=self.batch_invariant,
            )
            if requests:
                self._batch.join(requests)
        self._batch.retain(requests)
        return self._batch

    def _rotate_anew(self) -> None:
        """Sequences that outgrow the frequencies of their keys, where the model then computes keys anew, are
        the next to be admitted, all their tokens being a prompt."""
        if not (self._rekeyed and any(map(self._outgrown, self._active()))):
            return
        self._read()  # their newest tokens must be known
        for request in reversed(list(filter(self._outgrown, self._active()))):
            self._running.remove(request)
            self._release(request)
            request.start_over()
            self._waiting.appendleft(request)

    def _outgrown(self, request: Request) -> bool:
        rotation = self.decoder.config.rotation
        return rotation(request.chosen_length) != rotation(request.rotated_for)

    def _grow(self) -> None:
        """Gives every running sequence a block of its own for its next token, at the cost of the youngest."""
        pool, active = self.pool, self._active()
        if sum(map(self._needs_block, active)) > pool.free_blocks:
            # Who has ended gives its blocks back, and who has to give way must be known to its last token.
            self._read()
            active = self._active()
        rows, columns, blocks = [], [], []
        row = 0
        while row < len(active):
            request = active[row]
            if not self._needs_block(request):
                row += 1
                continue
            if not pool.free_blocks:
                self._preempt()
                active = self._active()
                continue
            column = _next_column(request)
            (block,) = pool.allocate(1)
            if column < len(request.blocks):  # copy on write
                shared = request.blocks[column]
                self.cache.copy(shared, block)
                pool.free([shared])
                request.blocks[column] = block
            else:
                request.blocks.append(block)
            rows.append(row)
            columns.append(column)
            blocks.append(block)
        if blocks:
            self._batch_of(active).place(rows, columns, blocks)

    def _needs_block(self, request: Request) -> bool:
        column = _next_column(request)
        return column == len(request.blocks) or self.pool.is_shared(request.blocks[column])

    def _preempt(self) -> None:
        """The youngest sequence is saved and gives back its blocks; it's the next to be admitted."""
        victim = self._prefilling or self._running[-1]
        if victim.cached:
            victim.saved = self.cache.save(victim.blocks[: blocks_for(victim.cached)])
        if self._prefilling is not None:
            self._prefilling = None
        else:
            self._running.pop()
            if self._batch is not None:
                victim.carried_phi = self._batch.phi_of(victim)
        self._release(victim)
        self._waiting.appendleft(victim)
        self.counts.preemptions += 1

    def _decode(self) -> bool:
        """Launches one token of every running sequence; False where there is none."""
        active = self._active()
        if active:
            self._note_chosen(self._batch_of(active).step())
        return bool(active)

    def _note_chosen(self, choice: Choice) -> None:
        self._unread.append(choice)
        for request in choice.requests:
            request.unread += 1

    def _read(self, leave: int = 0) -> bool:
        """Takes the tokens that were chosen, not those of the last `leave` times; whether there were any."""
        taken = False
        while len(self._unread) > leave:
            choice, taken = self._unread.popleft(), True
            for request, (token, logprob) in zip(choice.requests, self._batch.read(choice), strict=True):
                request.unread -= 1
                if request.finish_reason is not None:  # launched before its end was known
                    continue
                if token < 0:
                    self._fail(request, _no_token(request))
                    continue
                self.counts.decoded_tokens += bool(request.token_ids)
                self._advance(request, request.length)
                try:
                    self._take_token(request, token, logprob)
                except Exception as error:
                    raise RequestError(request) from error
        self._drop_finished()
        return taken

    def _advance(self, request: Request, cached: int) -> None:
        """Notes that tokens are in the cache, and publishes the blocks that they filled."""
        before, request.cached = request.cached, cached
        self._publish(request, before)

    def _publish(self, request: Request, before: int) -> None:
        """Lets the full blocks be found that came after the first `before` tokens."""
        first, last = before // BLOCK_SIZE, request.cached // BLOCK_SIZE
        if first < last:
            keys = self._keys(request, last)
            for block, key in zip(request.blocks[first:last], keys[first:last], strict=False):
                self.pool.register(block, key)

    def _keys(self, request: Request, blocks: int) -> list[bytes]:
        """What the first blocks, which are full, are found by; nothing without a prefix cache."""
        if not self.prefix_cache:
            return []
        # A rope scaling may go by the prompt's length: keys and values then depend on it as well.
        return request.block_keys(blocks, rotation=self.decoder.config.rotation(request.rotated_for))

    def _take_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        """Adds a token to a request, and ends it where this was the last one."""
        now = time.perf_counter()
        if request.first_token_at is None:
            request.first_token_at = request.last_token_at = now
        if token in self.eos_ids or token in request.params.stop_token_ids:
            request.finish_reason, request.stop_match = "stop", token
        else:
            for guide in request.guides:
                guide.accept(token)
            text = request.text.push(token)
            request.token_ids.append(token)
            request.last_token_at = now
            if logprob is not None:
                request.logprobs.append(logprob)
            if request.text.stopped:
                request.finish_reason = "stop"
            elif request.length >= request.final_length(self.max_len):
                request.finish_reason = "length"
            request.events.append((request, token, text))
        if request.finish_reason is not None:
            rest = request.text.finish()
            if request.text.stopped:  # perhaps by the text that was held back
                request.finish_reason, request.stop_match = "stop", request.text.matched
            request.events.append((request, None, rest))

    def _drop_finished(self) -> None:
        for request in self._running:
            if request.finish_reason is not None:
                self._release(request)
        self._running = [request for request in self._running if request.finish_reason is None]

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.finish_reason = request.finish_reason or "abandoned"
        self._remove(requests)

    def _remove(self, requests: Iterable[Request]) -> None:
        """Takes requests out of all lists, and their blocks back."""
        gone = set(requests)
        self._running = [request for request in self._running if request not in gone]
        self._waiting = deque(request for request in self._waiting if request not in gone)
        if self._prefilling in gone:
            self._prefilling = None
        for request in gone:
            self._release(request)

    def _release(self, request: Request) -> None:
        if request.blocks:
            self.pool.free(request.blocks)
            request.blocks = []

    def _provide_cache(self, requests: Sequence[Request]) -> None:
        """Sees to a cache in which each request fits, and as many at once as the memory allows.

        On a GPU all that the batch could ever use; on the CPU one context, or what these requests may need.
        """
        needs = sorted((blocks_for(r.final_length(self.max_len)) for r in requests), reverse=True)
        context, least = blocks_for(self.max_len), needs[0]
        on_cpu = self.decoder.device.type == "cpu"
        wanted = max(context, sum(needs[: self.max_batch])) if on_cpu else context * self.max_batch
        fits = self.cache is not None and least <= self.cache.num_blocks
        if fits and (self._fixed_blocks is not None or wanted <= self._wanted_blocks):
            return
        idle = not (self._running or self._prefilling or self._waiting)
        if self._fixed_blocks is None and idle:
            self.cache, self.pool, self._batch = None, BlockPool(0), None  # before the new one is made
            self._make_cache(max(min(wanted, self._affordable_blocks()), least))
            self._wanted_blocks = wanted
        elif not fits:
            raise OutOfMemory(
                f"a prompt and its answer may need {least * BLOCK_SIZE} tokens of KV cache, "
                f"which has {self.cache.num_blocks * BLOCK_SIZE}; raise cache_tokens or lower max_tokens"
            )

    def _affordable_blocks(self) -> int:
        free = available_bytes(self.decoder.device)
        left = CPU_SHARE_LEFT * free if self.decoder.device.type == "cpu" else GPU_BYTES_LEFT
        return max(0, int(free - left)) // block_bytes(self.decoder.config, self.decoder.dtype)

    def _make_cache(self, num_blocks: int) -> None:
        self.cache, self.pool = self._new_cache(num_blocks), BlockPool(num_blocks)

    def _new_cache(self, num_blocks: int) -> KVCache:
        return KVCache.for_model(self.decoder.config, num_blocks, self.decoder.device, self.decoder.dtype)


def _no_token(request: Request) -> ModelError:
    """For a request whose logits are all NaN or -inf."""
    after = f"after {len(request.token_ids)} tokens of the answer no token can be chosen"
    if constraints := request.params.constraints:
        return ModelError(f"{after}: {', '.join(constraints)} may exclude all, or the logits are NaN")
    return ModelError(f"{after}: all logits are NaN, as where a model's weights are damaged or overflow")


def _next_column(request: Request) -> int:
    """Which of its blocks a decode step writes to: the newest token's."""
    return (request.chosen_length - 1) // BLOCK_SIZE
