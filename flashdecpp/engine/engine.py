"""Continuous batching: requests join the batch and leave it between decode steps.

A step is scheduled (scheduler.py), run (executor.py) and read. The host only launches it, because all
per-step state lives on the device (decode_batch.py), and while a GPU works it reads the tokens of the step
before. So it learns one step late that a sequence has ended, and drops what was launched for it meanwhile.
On the CPU, where a step is done once launched, and where the host decides what may come next (guides, logits
processors), it reads each token at once.
(Iteration-level scheduling: Orca, Yu et al. 2022; blocks and preemption: PagedAttention, Kwon et al. 2023;
chunked prefill: Sarathi, Agrawal et al. 2023.)
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock, get_ident

import torch

from flashdecpp._memory import available_bytes
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import BLOCK_SIZE, KVCache, block_bytes, blocks_for

from .block_pool import BlockPool
from .config import EngineConfig
from .decode_batch import SampledTokens
from .executor import Executor
from .logprobs import TokenLogprob
from .request import Event, Request, RequestError, due_to
from .results import Piece
from .scheduler import Scheduler
from .surroundings import undisturbed

# Memory that a cache of no fixed size leaves free: on a CPU a fraction, for saved sequences; on a GPU bytes,
# for activations and torch's allocator.
CPU_FRACTION_LEFT = 0.5
GPU_BYTES_LEFT = 600_000_000


class Engine:
    """Requests of all runs share the cache and the batch; whichever run waits for events makes the steps."""

    def __init__(self, decoder: Decoder, eos_ids: frozenset[int], config: EngineConfig) -> None:
        self.decoder, self.config = decoder, config
        model, on_gpu = decoder.config, decoder.device.type == "cuda"
        self.scheduler = Scheduler(config, model.rotation, model.rekeyed)
        self.executor = Executor(decoder, eos_ids, config)
        self.behind = 1 if on_gpu else 0  # steps that are launched before the host reads a token
        self._on_device = partial(torch.cuda.device, decoder.device) if on_gpu else nullcontext
        self._wanted_blocks = 0  # of the cache, had there been memory for more
        if config.cache_blocks is not None:
            self._make_cache(config.cache_blocks)
        self._unread: deque[SampledTokens] = deque()  # on their way to the host, oldest first
        self._prompts_done = False  # in this step
        self._lock = Lock()
        self._worker: int | None = None  # the thread that holds the lock
        self._left: deque[Sequence[Request]] = deque()  # by callers who went away while it was held

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def cache(self) -> KVCache | None:
        return self.executor.cache

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Piece]]:
        """Generates for all requests: a piece for every token, and a last one for every request's end.

        Tokens become text here, in the caller's thread and without the lock. A request whose text has reached
        a stop string ends here too; tokens sampled meanwhile by another thread's steps are dropped.
        An error of one request is raised here and ends all of them; those of other runs go on.
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
                    request, answer = event.request, event.request.answer
                    if answer.has_ended():
                        continue
                    if event.error is not None:
                        raise event.error
                    pieces = answer.receive(event)
                    if answer.has_ended():
                        unfinished -= 1
                        if event.token is not None:  # a stop string, of which the engine knows nothing
                            self._leave([request])
                    for piece in pieces:
                        yield request, piece
                if unfinished:
                    with self._working():
                        if not events:  # another thread's step may have made some
                            self._step()
        finally:
            if unfinished:  # the caller stopped early, or an error ended the run
                self._leave(requests)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One thread at a time, unaffected by its caller's settings of torch."""
        with self._lock, undisturbed(self.decoder.device, inference=True), self._on_device():
            self._worker = get_ident()
            try:
                yield
            finally:
                while self._left:
                    self._abort(self._left.popleft())
                self._worker = None

    def _leave(self, requests: Sequence[Request]) -> None:
        """Aborts requests whose caller wants no more of them, even as garbage collected during a step."""
        if self._worker == get_ident():
            self._left.append(requests)
        else:
            with self._working():
                self._abort(requests)

    def _begin(self, requests: Sequence[Request]) -> None:
        with self._recovering():
            self._read()  # nothing in flight may keep the cache from being replaced
        self._provide_cache(requests)
        self.pool.peak_blocks = self.pool.used_blocks
        self.scheduler.add(requests)

    def _step(self) -> None:
        with self._recovering():
            if self.executor.batch is None:
                self.executor.new_batch(self.scheduler.active())
            if not self._prompts_done:
                self._prefill()
                self._prompts_done = True
                if self._read(leave=self._readable_later()):
                    return  # the caller may want to see a first token before the decode step
            if self._decode():
                self._prompts_done = False

    def _prefill(self) -> None:
        """A chunk of prompts."""
        budget, scheduler = self.config.prefill_chunk, self.scheduler
        while (chunk := scheduler.schedule_prefill(budget)) is not None:
            budget -= chunk.stop - chunk.start
            with due_to(chunk.request):
                logits = self.executor.prefill(chunk)
                scheduler.prefilled(chunk)
                if chunk.is_last:
                    start = scheduler.schedule_start(chunk.request)
                    if (sampled := self.executor.start(start, logits)) is not None:
                        self._unread.append(sampled)
                    scheduler.started(start)

    def _decode(self) -> bool:
        """A token of every running sequence. False, with nothing launched, if unread tokens had to be read
        first: sequences that ended may have left room for all others."""
        while (step := self.scheduler.schedule_decode()) is None:
            if self._read():
                return False
            self._make_room()
        if step.rows:
            self._unread.append(self.executor.decode(step))
            self.scheduler.decoded(step)
        self._read(leave=self._readable_later() if step.rows else 0)
        return True

    def _make_room(self) -> None:
        """Takes sequences out of the batch, those that can't stay and then the youngest."""
        self.scheduler.restart_outgrown()
        while (victim := self.scheduler.victim()) is not None:
            self.executor.save(victim)
            self.scheduler.preempt(victim)

    def _readable_later(self) -> int:
        """How many of the last launches the host need not read before the next step."""
        waiting = any(request.needs_host for request in self.scheduler.running)
        return 0 if waiting else self.behind

    def _read(self, leave: int = 0) -> bool:
        """Reads the sampled tokens, except those of the last `leave` launches. Whether there were any."""
        any_read = len(self._unread) > leave
        while len(self._unread) > leave:
            sampled = self._unread.popleft()
            for request, (token, logprob) in zip(sampled.requests, self.executor.read(sampled), strict=True):
                self.scheduler.read(request, valid=token >= 0)
                if request.finish_reason is not None:  # launched before its end was known
                    continue
                if token < 0:
                    self._fail(request, _no_token(request))
                    continue
                try:
                    self._append_token(request, token, logprob)
                except Exception as error:
                    raise RequestError(request, error) from error
        self.scheduler.drop_finished()
        return any_read

    def _append_token(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        """Adds a token to a request, and ends the request if this was its last one."""
        now = time.perf_counter()
        if token in self.executor.eos_ids or token in (request.params.stop_token_ids or ()):
            request.finish_reason, request.stop_token = "stop", token
        else:
            for guide in request.guides:
                guide.accept(token)
            request.token_ids.append(token)
            if request.length >= request.final_length(self.config.length_limit):
                request.finish_reason = "length"
            request.events.append(Event(request, token, logprob, at=now))
        if request.finish_reason is not None:
            request.events.append(Event(request, at=now))

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """An error ends the request that it is due to, or else the run in which it occurs. Requests of other
        runs go on from what is certain."""
        try:
            yield
        except RequestError as error:
            self._recover()
            self._fail(error.request, error.error)
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        self._unread.clear()
        self.executor.reset()
        self.scheduler.recover()
        self._prompts_done = False

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends a request with an error, which its run raises."""
        request.finish_reason = "error"
        request.events.append(Event(request, error=error))
        self.scheduler.remove([request])

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.finish_reason = request.finish_reason or "aborted"
        self.scheduler.remove(requests)

    def _provide_cache(self, requests: Sequence[Request]) -> None:
        """Makes a cache in which each request fits, and as many at once as the memory allows.

        On a GPU as large as a full batch can ever need; on the CPU one context, or what these requests need.
        """
        config, fixed = self.config, self.config.cache_blocks
        max_len = config.length_limit
        needs = sorted((blocks_for(r.final_length(max_len)) for r in requests), reverse=True)
        context, least = blocks_for(max_len), needs[0]
        on_cpu = self.decoder.device.type == "cpu"
        wanted = max(context, sum(needs[: config.max_batch])) if on_cpu else context * config.max_batch
        cache = self.executor.cache
        fits = cache is not None and least <= cache.num_blocks
        if fits and (fixed is not None or wanted <= self._wanted_blocks):
            return
        if fixed is None and self.scheduler.idle:
            self.executor.use_cache(None)  # freed before the new one is made
            self.scheduler.pool = BlockPool(0)
            self._make_cache(max(min(wanted, self._affordable_blocks()), least))
            self._wanted_blocks = wanted
        elif not fits:
            raise OutOfMemory(
                f"a prompt and its answer may need {least * BLOCK_SIZE} tokens of KV cache, "
                f"which has {self.pool.num_blocks * BLOCK_SIZE}; raise cache_tokens or lower max_tokens"
            )

    def _affordable_blocks(self) -> int:
        free = available_bytes(self.decoder.device)
        left = CPU_FRACTION_LEFT * free if self.decoder.device.type == "cpu" else GPU_BYTES_LEFT
        return max(0, int(free - left)) // block_bytes(self.decoder.config, self.decoder.dtype)

    def _make_cache(self, num_blocks: int) -> None:
        self.executor.use_cache(self._new_cache(num_blocks))
        self.scheduler.pool = BlockPool(num_blocks)

    def _new_cache(self, num_blocks: int) -> KVCache:
        return KVCache.for_model(self.decoder.config, num_blocks, self.decoder.device, self.decoder.dtype)


def _no_token(request: Request) -> ModelError:
    """For a request whose logits are all NaN or -inf."""
    after = f"after {len(request.token_ids)} tokens of the answer no token can be chosen"
    if constraints := request.params.constraints:
        return ModelError(f"{after}: {', '.join(constraints)} may exclude all, or the logits are NaN")
    return ModelError(f"{after}: all logits are NaN, as where a model's weights are damaged or overflow")
