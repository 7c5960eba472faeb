"""The sequences that are decoded together, as tensors on the device."""

from collections.abc import Sequence

import torch

from flashdecpp import ops

from .cache import KVCache, blocks_for
from .model import Decoder
from .request import Request
from .sampling import BatchSampling


class Batch:
    """Made anew whenever a sequence joins or leaves; step by step it only moves on."""

    def __init__(
        self,
        requests: Sequence[Request],
        decoder: Decoder,
        eos_ids: frozenset[int],
        max_len: int,
        carry_phi: bool,
    ) -> None:
        device = decoder.device
        used = max(len(request.blocks) for request in requests)
        widest = max(blocks_for(request.final_length(max_len)) for request in requests)
        blocks = [request.blocks + [0] * (used - len(request.blocks)) for request in requests]
        self.tokens = torch.tensor([request.token_ids[-1] for request in requests], device=device)
        cached = [request.cached for request in requests]  # the newest token isn't in the cache yet
        self.seq_lens = torch.tensor(cached, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(len(requests), widest, dtype=torch.int32, device=device)
        self.block_table[:, :used] = torch.tensor(blocks, dtype=torch.int32, device=device)
        self.carried_phi = _gather_phi(requests, decoder) if carry_phi else None
        self.choice = Choice(requests, decoder, eos_ids)

    def place(self, rows: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Changes single blocks of the table."""
        changes = torch.tensor([rows, columns, blocks], device=self.block_table.device)
        self.block_table[changes[0], changes[1]] = changes[2].int()

    def step(self, decoder: Decoder, cache: KVCache) -> list[int]:
        """The next token of every sequence."""
        self.seq_lens += 1
        logits = decoder.decode(self.tokens, cache, self.seq_lens, self.block_table, self.carried_phi)
        self.tokens = self.choice.tokens(logits)
        return self.tokens.tolist()


def _gather_phi(requests: Sequence[Request], decoder: Decoder) -> torch.Tensor:
    """[layers, batch, q_heads]: what each request carries, NaN for a new one.

    Every request then holds a view of its part, and so takes what decode steps leave there to its next batch.
    """
    config = decoder.config
    shape = (config.layers, len(requests), config.q_heads)
    carried = torch.full(shape, torch.nan, device=decoder.device)
    for row, request in enumerate(requests):
        if request.carried_phi is not None:
            carried[:, row] = request.carried_phi
        request.carried_phi = carried[:, row]
    return carried


class Choice:
    """Chooses the next tokens of a batch, step after step."""

    def __init__(self, requests: Sequence[Request], decoder: Decoder, eos_ids: frozenset[int]) -> None:
        device = decoder.device
        self._sampling = BatchSampling.build(
            [request.params for request in requests],
            [request.seed for request in requests],
            [request.history for request in requests],
            decoder.config.vocab,
            device,
        ).arguments()
        # The place of the token in its sequence: with the seed it determines the draw.
        self._position = torch.tensor([request.length for request in requests], device=device)
        endless = [row for row, request in enumerate(requests) if request.params.ignore_eos]
        self._never = None
        if endless and eos_ids:
            self._never = (
                torch.tensor(endless, device=device)[:, None],
                torch.tensor(sorted(eos_ids), device=device),
            )

    @torch.inference_mode()
    def tokens(self, logits: torch.Tensor) -> torch.Tensor:
        if self._never is not None:
            logits[self._never] = -torch.inf
        chosen = ops.sample(logits, position=self._position, **self._sampling)
        self._position += 1
        return chosen
