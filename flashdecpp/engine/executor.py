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

    def use_cache(self, cache: KVCache | None) -> None:
        """Replaces the cache while nothing runs; None frees the old one."""
        self.cache, self.batch = cache, None

    def reset(self) -> None:
        """Drops the batch, whose tensors an error may have left in any state."""
        self.batch = None

    def new_batch(self, rows: list[Request]) -> None:
        """The first batch, or the one after `reset`: `rows` resume in it."""
        batch = DecodeBatch(self.decoder, self.cache, self.eos_ids, self._config)
        batch.join(rows)
        self.batch = batch

    def prefill(self, chunk: PrefillChunk) -> torch.Tensor | None:
        """Writes a chunk's tokens to the cache. Logits [1, vocab] of the last one; None for no tokens."""
        request, device = chunk.request, self.decoder.device
        if chunk.restored:
            self.cache.restore(chunk.restored, request.saved[:, :, -len(chunk.restored) :])
        if chunk.start == chunk.stop:
            return None
        tokens = upload(request.history[chunk.start : chunk.stop], torch.int64, device)
        table = upload([request.blocks], torch.int32, device)
        wanted = {}
        if request.scores_prompt:
            scores = request.prompt_logprobs, request.prompt_ids, request.params.prompt_logprobs
            wanted["score"] = PromptScores(*scores).add
        return self.decoder.prefill(
            tokens, self.cache, table, start=chunk.start, prompt_length=request.rotated_for, **wanted
        )

    def start(self, start: DecodeStart, logits: torch.Tensor | None) -> SampledTokens | None:
        """Adds rows to the batch. New ones get their first tokens, from the logits of their prompt."""
        self.batch.keep_only(start.rows)
        self.batch.join(start.joining)
        return self.batch.sample_first(start.joining, logits) if start.samples_first else None

    def decode(self, step: DecodeStep) -> SampledTokens:
        """Launches one token of every row."""
        self.batch.keep_only(step.rows)
        if step.growth:
            for growth in step.growth:
                if growth.copied_from is not None:
                    self.cache.copy(growth.copied_from, growth.block)
            rows, columns, blocks = zip(*((g.row, g.column, g.block) for g in step.growth), strict=True)
            self.batch.set_blocks(rows, columns, blocks)
        return self.batch.step()

    def read(self, sampled: SampledTokens) -> list[tuple[int, TokenLogprob | None]]:
        """Waits for what a start or a decode step sampled."""
        return self.batch.read(sampled)

    def save(self, victim: Request) -> None:
        """Copies a sequence's state to the host before its blocks are freed."""
        if victim.cached:
            victim.saved = self.cache.save(victim.blocks[: blocks_for(victim.cached)])
        if victim in self.batch.requests:
            victim.carried_phi = self.batch.phi_of(victim)
