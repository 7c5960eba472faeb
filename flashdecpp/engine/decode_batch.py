"""The sequences that are decoded together, one row each of tensors that stay in place on the device.

A decode step reads these tensors and advances them by itself: tokens -> logits -> tokens, every length plus
one, and length 0 for a sequence that has ended. So it uploads nothing, and on a GPU one CUDA graph replays
it, captured once per number of rows (a power of two) and set of sampling features. Unused rows have length 0:
attention gives them zeros, and nothing of theirs enters the cache.

The host changes rows only between steps, and only where a sequence joins, leaves, gets a block or has a
guide. It may read the sampled tokens at any time: each step leaves them in a `SampledTokens`, on the way to
pinned memory. With a user's logits_processor the graph ends at the logits, and sampling is launched after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashdecpp._host_copy import HostCopy, upload
from flashdecpp.errors import ModelError
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import KVCache, blocks_for

from . import logprobs
from .config import EngineConfig
from .logprobs import TokenLogprob
from .request import Request, due_to
from .sampler import Sampled, Sampler
from .sampling import LogitsProcessor, SamplingFeatures

# A graph's number of rows and the features by which it samples tokens; None computes the logits alone
GraphKey = tuple[int, SamplingFeatures | None]


@dataclass(frozen=True)
class SampledTokens:
    """One token per request, possibly still on its way to the host."""

    requests: list[Request]
    tokens: HostCopy
    logprobs: HostCopy | None


class DecodeBatch:
    """Up to `config.max_batch` requests, those of `requests`, in the first rows.

    config.cuda_graphs replays steps on a GPU; otherwise they are launched kernel by kernel.
    config.batch_invariant always computes all rows, so that their number does not choose the kernels.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, eos_ids: frozenset[int], config: EngineConfig
    ) -> None:
        self._decoder, self._cache, self._device = decoder, cache, decoder.device
        on_gpu, max_batch = self._device.type == "cuda", config.max_batch
        self.requests: list[Request] = []
        # Row counts that a step may have. The CPU has no graphs, so it computes no unused rows.
        self.buckets = _powers_of_two(max_batch) if on_gpu else list(range(1, max_batch + 1))
        if config.batch_invariant:
            self.buckets = [max_batch]
        # Each with the tensors that hold its results
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, Any]] | None = None
        if on_gpu and config.cuda_graphs:
            self._graphs, self._memory = {}, torch.cuda.graph_pool_handle()
        self._spare: list[HostCopy] = []
        self._features = SamplingFeatures()

        model, device = decoder.config, self._device
        self._lengths = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        table = (max_batch, blocks_for(config.length_limit))
        self._block_table = torch.zeros(table, dtype=torch.int32, device=device)
        self._phi: torch.Tensor | None = None  # carried by each row: NaN until its first step
        if decoder.phi.carried:
            shape = (model.layers, max_batch, model.q_heads)
            self._phi = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self._eos_ids = upload(sorted(eos_ids), torch.int64, device)
        # int32 [vocab]: 0 for tokens that end a sequence, 1 for others
        self._not_eos = torch.ones(model.vocab, dtype=torch.int32, device=device)
        self._not_eos[self._eos_ids] = 0
        self._sampler = Sampler(model.vocab, self._eos_ids, max_batch, device)

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Drops the rows of all other requests. The kept rows move up, in their order."""
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
        """Appends rows for requests, all of whose tokens the host has read.

        All tokens but the newest are in the cache. Before a request's first token, `sample_first` is next.
        """
        if not requests:
            return
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

    def sample_first(self, requests: Sequence[Request], logits: torch.Tensor) -> SampledTokens:
        """The first tokens of requests that have just joined, from the logits [1, vocab] of their prompt."""
        first = len(self.requests) - len(requests)
        self._sampler.write_masks(requests, first)
        features, rows = self._features, slice(first, len(self.requests))
        return self._send(rows, self._sample_processed(logits.repeat(len(requests), 1), rows, features))

    def step(self) -> SampledTokens:
        """Launches the next token of every request."""
        rows = next(bucket for bucket in self.buckets if bucket >= len(self.requests))
        features, used = self._features, slice(0, len(self.requests))
        self._sampler.write_masks(self.requests, 0)
        if features.processed:
            logits = self._compute((rows, None))
            return self._send(used, self._sample_processed(logits, slice(0, rows), features))
        return self._send(used, self._compute((rows, features)))

    def set_blocks(self, rows: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Changes single entries of the block table."""
        changes = upload([rows, columns, blocks], torch.int64, self._device)
        self._block_table[changes[0], changes[1]] = changes[2].int()

    def phi_of(self, request: Request) -> torch.Tensor | None:
        """float32 [layers, q_heads]: the phi that a preempted request resumes with."""
        return None if self._phi is None else self._phi[:, self.requests.index(request)].clone()

    def read(self, sampled: SampledTokens) -> list[tuple[int, TokenLogprob | None]]:
        """Waits for each request's token. Call once per SampledTokens.

        A token of -1 says that none could be sampled: no logit was a number above -inf.
        """
        tokens = sampled.tokens.wait()
        self._spare.append(sampled.tokens)
        if sampled.logprobs is None:
            return [(token, None) for token in tokens]
        rows = zip(tokens, sampled.logprobs.wait(), sampled.requests, strict=True)
        return [(token, _logprob(request, token, row)) for token, row, request in rows]

    def _compute(self, key: GraphKey) -> Any:
        """Replays a step's graph, or launches its kernels. The result is valid until the next step."""
        if self._graphs is None:
            return self._launch(key)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _launch(self, key: GraphKey) -> Any:
        """A step on the device alone: the logits [rows, vocab], or the tokens Sampled from them."""
        rows, features = key
        phi = None if self._phi is None else self._phi[:, :rows]
        tokens, lengths = self._tokens[:rows], self._lengths[:rows]
        logits = self._decoder.decode(tokens, self._cache, lengths, self._block_table[:rows], phi)
        return logits if features is None else self._sample(logits, logits, slice(0, rows), features)

    def _sample(
        self, logits: torch.Tensor, own: torch.Tensor, rows: slice, features: SamplingFeatures
    ) -> Sampled:
        """Samples the rows' next tokens into _tokens and advances the lengths. `own`: see Sampler.sample."""
        tokens, lengths = self._tokens[rows], self._lengths[rows]
        sampled = self._sampler.sample(logits, own, rows, lengths, features)
        torch.clamp(sampled.tokens, min=0, out=tokens)  # the host ends rows without a token
        lengths.add_(lengths > 0)
        if self._eos_ids.numel():
            lengths.mul_(self._not_eos.index_select(0, tokens))
        return sampled

    def _sample_processed(self, logits: torch.Tensor, rows: slice, features: SamplingFeatures) -> Sampled:
        """_sample after logits_processor."""
        own = logits
        if features.processed:
            logits = logits.to(torch.float32, copy=True)
            for row, request in zip(logits, self.requests[rows], strict=False):
                if (processor := request.params.logits_processor) is not None:
                    with due_to(request):
                        row.copy_(_processed(processor, request, row))
        return self._sample(logits, own, rows, features)

    def _capture(self, key: GraphKey) -> tuple[torch.cuda.CUDAGraph, Any]:
        changed = [self._lengths, self._tokens, *self._sampler.changed()]
        before = [tensor.clone() for tensor in changed]
        # First use loads kernels and allocates, which a capture must not. Lengths of 0 leave the cache alone.
        self._lengths.zero_()
        self._launch(key)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = self._launch(key)
        for tensor, values in zip(changed, before, strict=True):
            tensor.copy_(values)
        return graph, result

    def _send(self, rows: slice, sampled: Sampled) -> SampledTokens:
        """Starts the copy of what was sampled for `rows`, the first rows of `sampled`."""
        requests = self.requests[rows]
        tokens = self._spare.pop() if self._spare else self._host_copy(self._tokens.numel(), torch.int64)
        tokens.start(sampled.tokens[: len(requests)])
        if sampled.logprobs is None:
            return SampledTokens(requests, tokens, None)
        scores = self._host_copy(sampled.logprobs.numel(), torch.float64)
        scores.start(sampled.logprobs[: len(requests)])
        return SampledTokens(requests, tokens, scores)

    def _host_copy(self, size: int, dtype: torch.dtype) -> HostCopy:
        return HostCopy(size, dtype, self._device)

    def _movable(self) -> list[tuple[torch.Tensor, int]]:
        """Tensors with a row per request, and the dimension of the rows: they move when requests leave."""
        phi = [] if self._phi is None else [(self._phi, 1)]
        own = [(self._lengths, 0), (self._tokens, 0), (self._block_table, 0)]
        return [*own, *phi, *self._sampler.movable()]

    def _note_features(self) -> None:
        params = [request.params for request in self.requests]
        self._features = SamplingFeatures.of(params, self._not_eos.numel())


def _logprob(request: Request, token: int, row: Sequence[float]) -> TokenLogprob | None:
    count = request.params.logprobs
    return None if count is None else logprobs.unpack(token, row, count)


def _processed(processor: LogitsProcessor, request: Request, logits: torch.Tensor) -> torch.Tensor:
    """The request's logits_processor applied to logits [vocab]."""
    result = processor(request.history, logits)
    if not isinstance(result, torch.Tensor) or result.shape != logits.shape:
        kind = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ModelError(
            f"logits_processor must return logits of the shape {tuple(logits.shape)}, got {kind}"
        )
    return result


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to and including the limit."""
    return [*(1 << i for i in range((limit - 1).bit_length())), limit]
