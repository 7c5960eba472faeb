"""Sampling of a batch: every row's parameters, and how a step samples the rows' next tokens.

All of it is on the device, in tensors that stay in place, so that a CUDA graph can hold a step. Tables with a
number per token of the vocabulary are made when the first row uses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashdecpp import ops
from flashdecpp._arguments import INT32_MAX
from flashdecpp._host_copy import host_tensor, upload

from . import logprobs
from .guides import ALL, fill_mask, mask_words
from .request import Request, due_to
from .sampling import SamplingFeatures

# Rows of Sampler._fields, 32 bits per entry. From TEMPERATURE on they are float32, and read through _reals.
# EOS_FROM, STOPS_FROM: the sequence length from which an end of sequence, or a token of stop_token_ids, may
# be sampled.
EOS_FROM, STOPS_FROM, TOP_K, TEMPERATURE, TOP_P, MIN_P, PENALTY, PRESENCE, FREQUENCY = range(9)
FIELDS = 9


@dataclass(frozen=True)
class Sampled:
    """A step's tokens: int64 [rows], -1 where no logit was a number above -inf."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None  # of logprobs.pack


class Sampler:
    """The sampling parameters of up to `max_batch` rows."""

    def __init__(self, vocab: int, eos_ids: torch.Tensor, max_batch: int, device: torch.device) -> None:
        self._vocab, self._eos_ids, self._device = vocab, eos_ids, device
        self._fields = torch.zeros(FIELDS, max_batch, dtype=torch.int32, device=device)
        self._reals = self._fields.view(torch.float32)
        self._seeds = torch.zeros(max_batch, dtype=torch.int64, device=device)
        # Made when a row first uses them:
        self._seen = _RowTable(max_batch, vocab, torch.bool, device)  # tokens of prompt and answer
        self._counts = _RowTable(max_batch, vocab, torch.int32, device)  # of each token in the answer
        self._bias = _RowTable(max_batch, vocab, torch.float32, device)  # logit_bias
        self._stops = _RowTable(max_batch, vocab, torch.bool, device)  # stop_token_ids
        self._mask = _RowTable(max_batch, mask_words(vocab), torch.int32, device, ALL)  # bits: see Guide
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def movable(self) -> list[tuple[torch.Tensor, int]]:
        """Tensors with a row per request, and the dimension of the rows."""
        tables = (self._seen, self._counts, self._bias, self._stops, self._mask)
        by_row = [self._seeds, *(table.rows for table in tables if table.used)]
        return [(self._fields, 1), *((tensor, 0) for tensor in by_row)]

    def changed(self) -> list[torch.Tensor]:
        """Tensors that a step changes."""
        return [table.rows for table in (self._seen, self._counts) if table.used]

    def join(self, requests: Sequence[Request], first: int) -> None:
        """Writes the parameters of requests into the rows from `first` on."""
        params = [request.params for request in requests]
        free_from = [min(len(r.prompt_ids) + r.params.min_tokens, INT32_MAX) for r in requests]
        counts = [
            [INT32_MAX if p.ignore_eos else length for p, length in zip(params, free_from, strict=True)],
            free_from,
            [p.top_k for p in params],
        ]
        names = (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        reals = [[getattr(p, name) for p in params] for name in names]
        floats = torch.tensor(reals, dtype=torch.float32, device="cpu").view(torch.int32).tolist()
        rows = slice(first, first + len(requests))
        self._fields[:, rows] = upload(counts + floats, torch.int32, self._device)
        self._seeds[rows] = upload([request.seed for request in requests], torch.int64, self._device)
        for row, request in enumerate(requests, start=first):
            self._join_row(row, request)

    def write_masks(self, requests: Sequence[Request], first: int) -> None:
        """Asks the guides of requests, in the rows from `first` on, which tokens may come next."""
        guided = [(row, request) for row, request in enumerate(requests, start=first) if request.guides]
        if not guided:
            return
        masks = host_tensor((len(guided), self._mask.rows.size(1)), torch.int32, self._device)
        for mask, (_, request) in zip(masks, guided, strict=True):
            with due_to(request):
                fill_mask(request.guides, mask)
        rows = upload([row for row, _ in guided], torch.int64, self._device)
        self._mask.rows.index_copy_(0, rows, masks.to(self._device, non_blocking=True))

    def sample(
        self,
        logits: torch.Tensor,
        own: torch.Tensor,
        rows: slice,
        lengths: torch.Tensor,
        features: SamplingFeatures,
    ) -> Sampled:
        """The next tokens of rows, from their logits [rows, vocab] and the lengths of their sequences so far.

        `own`: the model's unchanged logits, which log-probabilities are computed from. `logits` may be the
        same tensor, and may be overwritten.
        """
        fields, reals = self._fields, self._reals
        masked = features.masked or features.eos_held or features.stops_held
        keep_own = features.logprobs is not None and logits is own
        if features.biased or features.counted or (masked and keep_own):
            logits = logits.to(torch.float32, copy=True)
        if features.biased:
            logits += self._bias.rows[rows]
        if features.counted:
            counts = self._counts.rows[rows]
            frequency, presence = reals[FREQUENCY, rows, None], reals[PRESENCE, rows, None]
            logits -= frequency * counts + presence * (counts > 0)
        if features.masked:
            allowed = (self._mask.rows[rows, :, None] >> self._bits) & 1
            logits.masked_fill_(allowed.flatten(1)[:, : self._vocab] == 0, -torch.inf)
        if features.eos_held and self._eos_ids.numel():
            held = logits.index_select(1, self._eos_ids)
            held.masked_fill_((lengths < fields[EOS_FROM, rows])[:, None], -torch.inf)
            logits.index_copy_(1, self._eos_ids, held)
        if features.stops_held:
            early = lengths < fields[STOPS_FROM, rows]
            logits.masked_fill_(self._stops.rows[rows] & early[:, None], -torch.inf)
        tokens = self._draw(logits, rows, lengths, features)
        if features.logprobs is None and not features.counted:
            return Sampled(tokens, None)
        known = tokens.clamp(min=0)
        if features.counted:
            once = torch.ones_like(known, dtype=torch.int32)
            self._counts.rows[rows].scatter_add_(1, known[:, None], once[:, None])
        scores = None if features.logprobs is None else logprobs.pack(own, known, features.logprobs)
        return Sampled(tokens, scores)

    def _draw(
        self, logits: torch.Tensor, rows: slice, lengths: torch.Tensor, features: SamplingFeatures
    ) -> torch.Tensor:
        reals = self._reals
        arguments: dict[str, torch.Tensor] = {}
        if features.drawn:
            arguments = {
                "temperature": reals[TEMPERATURE, rows],
                "top_k": self._fields[TOP_K, rows],
                "top_p": reals[TOP_P, rows],
                "min_p": reals[MIN_P, rows],
                "seed": self._seeds[rows],
                # Seed and position determine the draw.
                "position": lengths.long(),
            }
        if features.penalized:
            arguments |= {"repetition_penalty": reals[PENALTY, rows], "seen": self._seen.rows[rows]}
        return ops.sample(logits, **arguments)

    def _join_row(self, row: int, request: Request) -> None:
        params, device = request.params, self._device
        if (seen := self._seen.reset_row(row, params.repetition_penalty != 1)) is not None:
            seen.index_fill_(0, upload(request.history, torch.int64, device), True)
        counting = bool(params.presence_penalty or params.frequency_penalty)
        if (counts := self._counts.reset_row(row, counting)) is not None:
            tokens = upload(request.token_ids, torch.int64, device)
            counts.scatter_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        if (bias := self._bias.reset_row(row, bool(params.logit_bias))) is not None:
            biases = dict(params.logit_bias or {})
            tokens = upload(list(biases), torch.int64, device)
            bias.index_copy_(0, tokens, upload(list(biases.values()), torch.float32, device))
        holding = bool(params.min_tokens and params.stop_token_ids)
        if (stops := self._stops.reset_row(row, holding)) is not None:
            stops.index_fill_(0, upload(tuple(params.stop_token_ids or ()), torch.int64, device), True)
        self._mask.reset_row(row, bool(request.guides))


class _RowTable:
    """[max_batch, width], made when a row first uses it, so that unused features cost nothing."""

    def __init__(
        self, max_batch: int, width: int, dtype: torch.dtype, device: torch.device, empty: int = 0
    ) -> None:
        self._shape, self._dtype, self._device, self._empty = (max_batch, width), dtype, device, empty
        self._rows: torch.Tensor | None = None

    @property
    def used(self) -> bool:
        return self._rows is not None

    @property
    def rows(self) -> torch.Tensor:
        if self._rows is None:
            raise RuntimeError("no row has used the table yet")
        return self._rows

    def reset_row(self, row: int, used: bool) -> torch.Tensor | None:
        """Empties a row; returns it if it is used."""
        if self._rows is None and used:
            self._rows = torch.full(self._shape, self._empty, dtype=self._dtype, device=self._device)
        if self._rows is not None:
            self._rows[row].fill_(self._empty)
        return self.rows[row] if used else None
