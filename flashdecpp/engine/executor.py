"""The sequences that are decoded together: a row each of tensors that stay where they are on the device.

A decode step reads these tensors and moves them on by itself: tokens -> logits -> tokens, one more for every
length, and a length of 0 for a sequence that has ended. So nothing is uploaded for it, and on a GPU one CUDA
graph replays it, captured once for each number of rows (a power of two) and set of sampling features. Rows
without a sequence have the length 0: attention gives them zeros and nothing of theirs gets into the cache.

The host changes rows between steps, and only those where a sequence joins, leaves or gets a block, or has a
guide. It reads the chosen tokens whenever it likes: each step leaves them in a `Choice`, on the way to pinned
memory. Where functions of the user's change logits, a graph ends with these, and tokens are chosen behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashdecpp._host_copy import Readback, upload
from flashdecpp.errors import ModelError
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import KVCache, blocks_for

from . import logprobs
from .logprobs import TokenLogprob
from .request import Request, due_to
from .sampler import Chosen, Sampler
from .sampling import SamplingFeatures

# What a graph computes of so many rows: tokens by these features; None: the logits alone
Step = tuple[int, SamplingFeatures | None]


@dataclass(frozen=True)
class Choice:
    """The tokens that were chosen for some requests, perhaps not there yet."""

    requests: list[Request]
    tokens: Readback
    logprobs: Readback | None


class Batch:
    """Up to `max_batch` requests, those of `requests`, in its first rows.

    `cuda_graphs`: replay the steps; else, and on the CPU, they are launched one kernel after the other.
    `all_rows`: always compute `max_batch` rows, so that kernels aren't chosen by how many there are.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        eos_ids: frozenset[int],
        max_len: int,
        max_batch: int,
        carry_phi: bool,
        cuda_graphs: bool,
        all_rows: bool = False,
    ) -> None:
        self._decoder, self._cache, self._device = decoder, cache, decoder.device
        on_gpu = self._device.type == "cuda"
        self.requests: list[Request] = []
        # How many rows a step may have. On the CPU, where graphs don't count, no row is computed in vain.
        self.buckets = _powers_of_two(max_batch) if on_gpu else list(range(1, max_batch + 1))
        if all_rows:
            self.buckets = [max_batch]
        # Each with the tensors that it leaves its results in
        self._graphs: dict[Step, tuple[torch.cuda.CUDAGraph, Any]] | None = None
        if on_gpu and cuda_graphs:
            self._graphs, self._memory = {}, torch.cuda.graph_pool_handle()
        self._spare: list[Readback] = []
        self._features = SamplingFeatures()

        config, device = decoder.config, self._device
        self._lengths = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(max_batch, blocks_for(max_len), dtype=torch.int32, device=device)
        self._phi: torch.Tensor | None = None  # carried along: NaN where a sequence is new
        if carry_phi:
            shape = (config.layers, max_batch, config.q_heads)
            self._phi = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self._eos_ids = upload(sorted(eos_ids), torch.int64, device)
        # int32 [vocab]: 0 for a token that ends a sequence, 1 for others
        self._goes_on = torch.ones(config.vocab, dtype=torch.int32, device=device)
        self._goes_on[self._eos_ids] = 0
        self._sampler = Sampler(config.vocab, self._eos_ids, max_batch, device)

    def retain(self, requests: Sequence[Request]) -> None:
        """Gives up the rows of all others; those that stay move up, in their order."""
        kept = set(requests)
        rows = [row for row, request in enumerate(self.requests) if request in kept]
        if len(rows) == len(self.requests):
            return
        if rows and rows[-1] != len(rows) - 1:
            index = upload(rows, torch.int64, self._device)
            for tensor, dim in self._movable():
                tensor.narrow(dim, 0, len(rows)).copy_(tensor.index_select(dim, index))
        self._lengths[len(rows) : len(self.requests)] = 0
        self.requests = [self.requests[row] for row in rows]
        self._note_features()

    def join(self, requests: Sequence[Request]) -> None:
        """Takes requests up, in the rows behind the others, all of their tokens known to the host.

        All of these but the newest are in the cache; where no token was chosen yet, `choose_first` is next.
        """
        first, rows = len(self.requests), slice(len(self.requests), len(self.requests) + len(requests))
        lengths = [request.length for request in requests]
        self._lengths[rows] = upload(lengths, torch.int32, self._device)
        newest = [request.token_ids[-1] if request.token_ids else 0 for request in requests]
        self._tokens[rows] = upload(newest, torch.int64, self._device)
        used = max(len(request.blocks) for request in requests)
        blocks = [request.blocks + [0] * (used - len(request.blocks)) for request in requests]
        self._block_table[rows, :used] = upload(blocks, torch.int32, self._device)
        if self._phi is not None:
            for row, request in enumerate(requests, start=first):
                self._phi[:, row] = torch.nan if request.carried_phi is None else request.carried_phi
        self._sampler.join(requests, first)
        self.requests = [*self.requests, *requests]
        self._note_features()

    def choose_first(self, requests: Sequence[Request], logits: torch.Tensor) -> Choice:
        """The first tokens of requests that have just joined, from the logits [1, vocab] of their prompt."""
        first = len(self.requests) - len(requests)
        self._sampler.write_masks(requests, first)
        features, rows = self._features, slice(first, len(self.requests))
        return self._send(rows, self._choose_processed(logits.repeat(len(requests), 1), rows, features))

    def step(self) -> Choice:
        """The next token of every request: launched, not waited for."""
        rows = next(bucket for bucket in self.buckets if bucket >= len(self.requests))
        features, used = self._features, slice(0, len(self.requests))
        self._sampler.write_masks(self.requests, 0)
        if features.processed:
            logits = self._compute((rows, None))
            return self._send(used, self._choose_processed(logits, slice(0, rows), features))
        return self._send(used, self._compute((rows, features)))

    def place(self, rows: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Changes single blocks of the table."""
        changes = upload([rows, columns, blocks], torch.int64, self._device)
        self._block_table[changes[0], changes[1]] = changes[2].int()

    def phi_of(self, request: Request) -> torch.Tensor | None:
        """float32 [layers, q_heads]: what a request takes along that leaves and comes back."""
        return None if self._phi is None else self._phi[:, self.requests.index(request)].clone()

    def read(self, choice: Choice) -> list[tuple[int, TokenLogprob | None]]:
        """Waits for what was chosen for each request of a choice, which is read once.

        A token of -1 stands for none: no logit was a number above -inf.
        """
        tokens = choice.tokens.wait()
        self._spare.append(choice.tokens)
        if choice.logprobs is None:
            return [(token, None) for token in tokens]
        rows = zip(tokens, choice.logprobs.wait(), choice.requests, strict=True)
        return [(token, _logprob(request, token, row)) for token, row, request in rows]

    def _compute(self, step: Step) -> Any:
        """A step by its graph, or else kernel by kernel; what it leaves holds until the next."""
        if self._graphs is None:
            return self._launch(step)
        if step not in self._graphs:
            self._graphs[step] = self._capture(step)
        graph, result = self._graphs[step]
        graph.replay()
        return result

    def _launch(self, step: Step) -> Any:
        """A step on the device alone: the logits [rows, vocab], or the tokens that were Chosen."""
        rows, features = step
        phi = None if self._phi is None else self._phi[:, :rows]
        tokens, lengths = self._tokens[:rows], self._lengths[:rows]
        logits = self._decoder.decode(tokens, self._cache, lengths, self._block_table[:rows], phi)
        return logits if features is None else self._choose(logits, logits, slice(0, rows), features)

    def _choose(
        self, logits: torch.Tensor, own: torch.Tensor, rows: slice, features: SamplingFeatures
    ) -> Chosen:
        """Puts the rows' next tokens in their places, and counts them; `own` as in Sampler.choose."""
        tokens, lengths = self._tokens[rows], self._lengths[rows]
        chosen = self._sampler.choose(logits, own, rows, lengths, features)
        torch.clamp(chosen.tokens, min=0, out=tokens)  # where there is none the host will end the row
        lengths.add_(lengths > 0)
        if self._eos_ids.numel():
            lengths.mul_(self._goes_on.index_select(0, tokens))
        return chosen

    def _choose_processed(self, logits: torch.Tensor, rows: slice, features: SamplingFeatures) -> Chosen:
        """_choose, after logits_processor."""
        own = logits
        if features.processed:
            logits = logits.to(torch.float32, copy=True)
            for row, request in zip(logits, self.requests[rows], strict=False):
                if request.params.logits_processor is not None:
                    with due_to(request):
                        row.copy_(_processed(request, row))
        return self._choose(logits, own, rows, features)

    def _capture(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Any]:
        changed = [self._lengths, self._tokens, *self._sampler.changed()]
        before = [tensor.clone() for tensor in changed]
        # Libraries load kernels and allocate at first use, which a capture must not. No row is running then.
        self._lengths.zero_()
        self._launch(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = self._launch(step)
        for tensor, values in zip(changed, before, strict=True):
            tensor.copy_(values)
        return graph, result

    def _send(self, rows: slice, chosen: Chosen) -> Choice:
        """What was chosen for rows, on its way; of `chosen`, which begins with them."""
        requests = self.requests[rows]
        tokens = self._spare.pop() if self._spare else self._readback(self._tokens.numel(), torch.int64)
        tokens.start(chosen.tokens[: len(requests)])
        if chosen.logprobs is None:
            return Choice(requests, tokens, None)
        scores = self._readback(chosen.logprobs.numel(), torch.float64)
        scores.start(chosen.logprobs[: len(requests)])
        return Choice(requests, tokens, scores)

    def _readback(self, size: int, dtype: torch.dtype) -> Readback:
        return Readback(size, dtype, self._device)

    def _movable(self) -> list[tuple[torch.Tensor, int]]:
        """Where a request is its row, the dimension of the rows: what moves when requests leave."""
        phi = [] if self._phi is None else [(self._phi, 1)]
        own = [(self._lengths, 0), (self._tokens, 0), (self._block_table, 0)]
        return [*own, *phi, *self._sampler.movable()]

    def _note_features(self) -> None:
        params = [request.params for request in self.requests]
        self._features = SamplingFeatures.of(params, self._goes_on.numel())


def _logprob(request: Request, token: int, row: Sequence[float]) -> TokenLogprob | None:
    count = request.params.logprobs
    return None if count is None else logprobs.unpack(token, row, count)


def _processed(request: Request, logits: torch.Tensor) -> torch.Tensor:
    """What the request's logits_processor makes of logits [vocab]."""
    result = request.params.logits_processor(request.history, logits)
    if not isinstance(result, torch.Tensor) or result.shape != logits.shape:
        kind = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ModelError(
            f"logits_processor must return logits of the shape {tuple(logits.shape)}, got {kind}"
        )
    return result


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, which is the last."""
    return [*(1 << i for i in range((limit - 1).bit_length())), limit]
