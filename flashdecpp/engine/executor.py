"""Runs what the scheduler decided: prefill chunks, decode steps, and the moves of preempted sequences."""

import torch

from flashdecpp._host_copy import upload
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.kv_cache import KVCache, blocks_for

from .config import EngineConfig
from .decode_batch import DecodeBatch, SampledTokens
from .logprobs import PromptScores, TokenLogprob
from .request import Request
from .scheduler import DecodeStart, DecodeStep, PrefillChunk


class Executor:
    """The model, its cache and the batch being decoded. It decides nothing."""

    def __init__(self, decoder: Decoder, eos_ids: frozenset[int], config: EngineConfig) -> None:
        self.decoder, self.eos_ids, self._config = decoder, eos_ids, config
        self.cache: KVCache | None = None
        self.batch: DecodeBatch | None = None

    @property
    def _cache(self) -> KVCache:
        if self.cache is None:
            raise RuntimeError("use_cache must come first")
        return self.cache

    @property
    def _batch(self) -> DecodeBatch:
        if self.batch is None:
            raise RuntimeError("new_batch must come first")
        return self.batch

    def use_cache(self, cache: KVCache | None) -> None:
        """Replaces the cache while nothing runs; None frees the old one."""
        self.cache, self.batch = cache, None

    def reset(self) -> None:
        """Drops the batch, whose tensors an error may have left in any state."""
        self.batch = None

    def new_batch(self, rows: list[Request]) -> None:
        """The first batch, or the one after `reset`: `rows` resume in it."""
        batch = DecodeBatch(self.decoder, self._cache, self.eos_ids, self._config)
        batch.join(rows)
        self.batch = batch

    def prefill(self, chunk: PrefillChunk) -> torch.Tensor | None:
        """Writes a chunk's tokens to the cache. Logits [1, vocab] of the last one; None for no tokens."""
        request, device = chunk.request, self.decoder.device
        if chunk.restored and request.saved is not None:
            self._cache.restore(chunk.restored, request.saved[:, -len(chunk.restored) :])
        if chunk.start == chunk.stop:
            return None
        tokens = upload(request.history[chunk.start : chunk.stop], torch.int64, device)
        table = upload([request.blocks], torch.int32, device)
        score, count = None, request.params.prompt_logprobs
        if request.scores_prompt and count is not None:
            score = PromptScores(request.prompt_logprobs, request.prompt_ids, count).add
        return self.decoder.prefill(
            tokens, self._cache, table, start=chunk.start, prompt_length=request.rotated_for, score=score
        )

    def start(self, start: DecodeStart, logits: torch.Tensor | None) -> SampledTokens | None:
        """Adds rows to the batch. New ones get their first tokens, from the logits of their prompt."""
        batch = self._batch
        batch.keep_only(start.rows)
        batch.join(start.joining)
        if not start.samples_first or logits is None:
            return None
        return batch.sample_first(start.joining, logits)

    def decode(self, step: DecodeStep) -> SampledTokens:
        """Launches one token of every row."""
        batch = self._batch
        batch.keep_only(step.rows)
        if step.growth:
            for growth in step.growth:
                if growth.copied_from is not None:
                    self._cache.copy(growth.copied_from, growth.block)
            rows, columns, blocks = zip(*((g.row, g.column, g.block) for g in step.growth), strict=True)
            batch.set_blocks(rows, columns, blocks)
        return batch.step()

    def read(self, sampled: SampledTokens) -> list[tuple[int, TokenLogprob | None]]:
        """Waits for what a start or a decode step sampled."""
        return self._batch.read(sampled)

    def save(self, victim: Request) -> None:
        """Copies a sequence's state to the host before its blocks are freed."""
        if victim.cached:
            victim.saved = self._cache.save(victim.blocks[: blocks_for(victim.cached)])
        if victim in self._batch.requests:
            victim.carried_phi = self._batch.phi_of(victim)
