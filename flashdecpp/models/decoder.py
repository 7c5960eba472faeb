"""The decoder of all supported architectures: it computes one forward pass, and nothing else."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp.errors import OutOfMemory

from .attention import DecodeAttention, Observe, PromptAttention
from .config import ModelConfig
from .kv_cache import KVCache
from .layers import Attend, DecoderLayer, ForwardPass, Norm, Projection
from .phi import PhiSource
from .rope import Rope
from .weights import Matrix, Weights

# Tokens of a prompt per pass through the layers: bounds the memory of their activations.
PREFILL_CHUNK = 1024

# Rows per computation of logits where a whole prompt's are wanted: they take much memory.
LOGITS_ROWS = 64

# (position of the first, logits [rows, vocab]) of successive tokens of a prompt
Score = Callable[[int, torch.Tensor], None]


class Decoder:
    """Holds the weights and no state of a sequence: the KV cache and a carried phi are the caller's.

    `phi`: where the unified maximum of each layer's softmax comes from; None is online softmax. Rows whose
    maximum was too far from it are counted in `fallbacks`. `num_splits`: as in ops.decode_attention.
    `layers`: may be replaced, or parts of them, before the first pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_len: int,
        phi: PhiSource | None = None,
        num_splits: int = 0,
    ) -> None:
        self.config, self.weights = config, weights
        self.device, self.dtype = weights.layers[0].attn_norm.device, weights.dtype
        self.phi, self.num_splits = phi or PhiSource.none(), num_splits
        self.layers = [DecoderLayer.dense(config, i, layer) for i, layer in enumerate(weights.layers)]
        self.fallbacks = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._check_room(max_len)
        self._cos_sin = self._rotations(lambda rope: rope.table(max_len))
        # Rounded as Gemma's authors do it
        scale = torch.tensor(config.hidden**0.5, dtype=self.dtype, device="cpu").item()
        self._embed_scale = scale if config.architecture.scaled_embedding else None
        norm = weights.norm  # None with norm_after
        self._norm = None if norm is None else Norm.of(config, norm, weights.norm_bias)

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        carried_phi: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token of each sequence: tokens int64 [batch], counted in seq_lens. Logits [batch, vocab].

        `carried_phi`: float32 [layers, batch, q_heads], used instead of the decoder's phi: NaN for the first
        token of a sequence, afterwards what the step before left in it.
        """
        phi = self.phi.layers if carried_phi is None else None
        attend = DecodeAttention(
            self.config, cache, seq_lens, block_table, phi, carried_phi, self.num_splits, self.fallbacks
        )
        stream = self._run_layers(tokens.unsqueeze(1), cache, seq_lens, block_table, self._cos_sin, attend)
        return self._logits(stream)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        block_table: torch.Tensor,
        observe: Observe | None = None,
        *,
        start: int = 0,
        prompt_length: int | None = None,
        score: Score | None = None,
    ) -> torch.Tensor:
        """A prompt, tokens int64 [length], block_table [1, max_blocks]. Logits [1, vocab] of its last token.

        Or a chunk of a prompt of `prompt_length` tokens, the first `start` of which are in the cache.

        One prompt at a time, so that its result does not depend on others in a batch. `observe` is called
        with the inputs of every layer's softmax, `score` with the logits of all tokens.
        """
        end = start + tokens.numel()
        own = self._rotations(lambda rope: rope.prompt_table(prompt_length or end))
        cos_sin = [b if a is None else a for a, b in zip(own, self._cos_sin, strict=True)]
        for first in range(start, end, PREFILL_CHUNK):
            stop = min(first + PREFILL_CHUNK, end)
            seq_lens = torch.full((1,), stop, dtype=torch.int32, device=self.device)  # no copy to wait for
            attend = PromptAttention(self.config, cache, block_table, first, stop, observe)
            chunk = tokens[None, first - start : stop - start]
            stream = self._run_layers(chunk, cache, seq_lens, block_table, cos_sin, attend)
            if score is not None:
                for row in range(0, len(stream), LOGITS_ROWS):
                    score(first + row, self._logits(stream[row : row + LOGITS_ROWS]))
        return self._logits(stream[-1:])

    def _check_room(self, max_len: int) -> None:
        """For the rotary tables, which have a row per position of a sequence."""
        need = sum(4 * rope.dim * max_len for rope in self.config.distinct_ropes)
        free = available_bytes(self.device)
        if need > free:
            raise OutOfMemory(
                f"the rotary tables of {max_len} positions need {gigabytes(need)} on {self.device}, "
                f"where {gigabytes(free)} are free; lower max_len"
            )

    def _rotations(self, table: Callable[[Rope], torch.Tensor | None]) -> list[torch.Tensor | None]:
        """A table for each layer's rope, on the device; layers with the same rope share it."""
        tables = {id(rope): table(rope) for rope in self.config.distinct_ropes}
        placed = {key: rows.to(self.device) for key, rows in tables.items() if rows is not None}
        return [placed.get(id(rope)) for rope in self.config.ropes]

    def _run_layers(
        self,
        tokens: torch.Tensor,  # [batch, q_len]
        cache: KVCache,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        cos_sin: Sequence[torch.Tensor | None],
        attend: Attend,
    ) -> torch.Tensor:
        """The residual stream [batch * q_len, hidden] after the last layer."""
        batch, q_len = tokens.shape
        forward = ForwardPass((batch, q_len), cache, seq_lens, block_table, cos_sin, attend)
        stream = self._embed(tokens, seq_lens)
        for layer in self.layers:
            stream = layer(stream, forward)
        return stream

    def _embed(self, tokens: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """The residual stream [batch * q_len, hidden] before the first layer."""
        weights = self.weights
        x = _embedding(tokens.flatten(), weights.embed, self.dtype)
        if weights.project_in is not None:
            x = Projection(weights.project_in)(x)
        if self._embed_scale is not None:
            x *= self._embed_scale
        if weights.positions is not None:
            first = seq_lens.long() - tokens.size(1) + self.config.architecture.position_offset
            rows = first[:, None] + torch.arange(tokens.size(1), device=self.device)
            x += _embedding(rows.flatten(), weights.positions, self.dtype)
        return x

    def _logits(self, stream: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] from the residual stream [rows, hidden] after the last layer."""
        weights, cap, norm = self.weights, self.config.logit_softcap, self._norm
        if weights.project_out is not None:
            stream, norm = Projection(weights.project_out)(stream, norm), None
        logits = Projection(weights.lm_head)(stream, norm)
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _embedding(tokens: torch.Tensor, weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(tokens, weight) if isinstance(weight, torch.Tensor) else weight.rows(tokens, dtype)
