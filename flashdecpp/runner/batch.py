"""The sequences that are decoded together: a row each of tensors that stay where they are on the device.

A decode step reads these tensors and moves them on by itself: tokens -> logits -> tokens, one more for every
length, and a length of 0 for a sequence that has ended. So nothing is uploaded for it, and on a GPU one CUDA
graph replays it, captured once for each number of rows (a power of two) and set of sampling features. Rows
without a sequence have the length 0: attention gives them zeros and nothing of theirs gets into the cache.

The host changes rows between steps, and only those where a sequence joins, leaves or gets a block. It reads
the chosen tokens whenever it likes: each step leaves them in a `Choice`, on the way to pinned memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashdecpp import ops

from .cache import KVCache, blocks_for
from .model import Decoder
from .request import Request
from .sampling import SamplingFeatures
from .transfer import Readback, upload

# Rows of Batch._fields: what a sequence has of 32 bits. From TEMPERATURE on they are float32.
LENGTH, TOP_K, ENDLESS, TEMPERATURE, TOP_P, MIN_P, PENALTY = range(7)
FIELDS = 7
# Rows of Batch._longs
TOKEN, SEED = range(2)


@dataclass(frozen=True)
class Choice:
    """The tokens that were chosen for some requests, perhaps not there yet."""

    requests: list[Request]
    readback: Readback


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
        self._graphs: dict[tuple[int, SamplingFeatures], torch.cuda.CUDAGraph] | None = None
        if on_gpu and cuda_graphs:
            self._graphs, self._memory = {}, torch.cuda.graph_pool_handle()
        self._spare: list[Readback] = []
        self._features = SamplingFeatures()

        config, device = decoder.config, self._device
        self._fields = torch.zeros(FIELDS, max_batch, dtype=torch.int32, device=device)
        self._longs = torch.zeros(2, max_batch, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(max_batch, blocks_for(max_len), dtype=torch.int32, device=device)
        self._phi: torch.Tensor | None = None  # carried along: NaN where a sequence is new
        if carry_phi:
            self._phi = torch.full((config.layers, max_batch, config.q_heads), torch.nan, device=device)
        self._seen: torch.Tensor | None = None  # bool [max_batch, vocab], once a penalty asks for it
        self._eos_ids = upload(sorted(eos_ids), torch.int64, device)
        # int32 [vocab]: 0 for a token that ends a sequence, 1 for others
        self._goes_on = torch.ones(config.vocab, dtype=torch.int32, device=device)
        self._goes_on[self._eos_ids] = 0
        # Where a request is its row, the dimension of the rows: what moves when requests leave.
        self._movable = [(self._fields, 1), (self._longs, 1), (self._block_table, 0)]
        if self._phi is not None:
            self._movable.append((self._phi, 1))

    @torch.inference_mode()
    def retain(self, requests: Sequence[Request]) -> None:
        """Gives up the rows of all others; those that stay move up, in their order."""
        kept = set(requests)
        rows = [row for row, request in enumerate(self.requests) if request in kept]
        if len(rows) == len(self.requests):
            return
        if rows and rows[-1] != len(rows) - 1:
            index = upload(rows, torch.int64, self._device)
            for tensor, dim in self._movable:
                tensor.narrow(dim, 0, len(rows)).copy_(tensor.index_select(dim, index))
        self._fields[LENGTH, len(rows) : len(self.requests)] = 0
        self.requests = [self.requests[row] for row in rows]
        self._note_features()

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> None:
        """Takes requests up, in the rows behind the others, all of their tokens known to the host.

        All of these but the newest are in the cache; where no token was chosen yet, `choose_first` is next.
        """
        first, rows = len(self.requests), slice(len(self.requests), len(self.requests) + len(requests))
        params = [request.params for request in requests]
        counts = [
            [request.length for request in requests],
            [p.top_k for p in params],
            [p.ignore_eos for p in params],
        ]
        reals = [[getattr(p, name) for p in params] for name in ("temperature", "top_p", "min_p")]
        reals.append([p.repetition_penalty for p in params])
        floats = torch.tensor(reals, dtype=torch.float32).view(torch.int32).tolist()
        self._fields[:, rows] = upload(counts + floats, torch.int32, self._device)
        newest = [request.token_ids[-1] if request.token_ids else 0 for request in requests]
        seeds = [request.seed for request in requests]
        self._longs[:, rows] = upload([newest, seeds], torch.int64, self._device)
        used = max(len(request.blocks) for request in requests)
        blocks = [request.blocks + [0] * (used - len(request.blocks)) for request in requests]
        self._block_table[rows, :used] = upload(blocks, torch.int32, self._device)
        for row, request in enumerate(requests, start=first):
            if self._phi is not None:
                self._phi[:, row] = torch.nan if request.carried_phi is None else request.carried_phi
            if request.params.repetition_penalty != 1:
                self._mark_seen(row, request)
        self.requests = [*self.requests, *requests]
        self._note_features()

    @torch.inference_mode()
    def choose_first(self, requests: Sequence[Request], logits: torch.Tensor) -> Choice:
        """The first tokens of requests that have just joined, from the logits [1, vocab] of their prompt."""
        count = len(self.requests)
        rows = slice(count - len(requests), count)
        self._choose(logits.repeat(len(requests), 1), rows, self._features)
        return self._send(rows)

    @torch.inference_mode()
    def step(self) -> Choice:
        """The next token of every request: launched, not waited for."""
        rows = next(bucket for bucket in self.buckets if bucket >= len(self.requests))
        if self._graphs is None:
            self._compute(rows, self._features)
        else:
            key = (rows, self._features)
            if key not in self._graphs:
                self._graphs[key] = self._capture(*key)
            self._graphs[key].replay()
        return self._send(slice(0, len(self.requests)))

    @torch.inference_mode()
    def place(self, rows: Sequence[int], columns: Sequence[int], blocks: Sequence[int]) -> None:
        """Changes single blocks of the table."""
        changes = upload([rows, columns, blocks], torch.int64, self._device)
        self._block_table[changes[0], changes[1]] = changes[2].int()

    def phi_of(self, request: Request) -> torch.Tensor | None:
        """float32 [layers, q_heads]: what a request takes along that leaves and comes back."""
        return None if self._phi is None else self._phi[:, self.requests.index(request)].clone()

    def read(self, choice: Choice) -> list[int]:
        """Waits for the tokens of a choice, which is read once."""
        tokens = choice.readback.wait()
        self._spare.append(choice.readback)
        return tokens

    def _compute(self, rows: int, features: SamplingFeatures) -> None:
        """One step of the first rows, on the device alone: what a graph holds."""
        phi = None if self._phi is None else self._phi[:, :rows]
        tokens, lengths = self._longs[TOKEN, :rows], self._fields[LENGTH, :rows]
        logits = self._decoder.decode(tokens, self._cache, lengths, self._block_table[:rows], phi)
        self._choose(logits, slice(0, rows), features)

    def _choose(self, logits: torch.Tensor, rows: slice, features: SamplingFeatures) -> None:
        """Puts the rows' next tokens in their places, and counts them."""
        fields, (tokens, seeds) = self._fields[:, rows], self._longs[:, rows]
        lengths, floats = fields[LENGTH], fields.view(torch.float32)
        if features.endless and self._eos_ids.numel():
            stopping = logits.index_select(1, self._eos_ids)
            stopping.masked_fill_(fields[ENDLESS, :, None].bool(), -torch.inf)
            logits.index_copy_(1, self._eos_ids, stopping)
        sampling = {}
        if features.drawn:
            sampling = {
                "temperature": floats[TEMPERATURE],
                "top_k": fields[TOP_K],
                "top_p": floats[TOP_P],
                "min_p": floats[MIN_P],
                "seed": seeds,
                # The place of the token in its sequence: with the seed it determines the draw.
                "position": lengths.long(),
            }
        if features.penalised:
            sampling |= {"repetition_penalty": floats[PENALTY], "seen": self._seen[rows]}
        tokens.copy_(ops.sample(logits, **sampling))
        lengths.add_(lengths > 0)
        if self._eos_ids.numel():
            lengths.mul_(self._goes_on.index_select(0, tokens))

    def _capture(self, rows: int, features: SamplingFeatures) -> torch.cuda.CUDAGraph:
        changed = [tensor for tensor in (self._fields, self._longs, self._seen) if tensor is not None]
        before = [tensor.clone() for tensor in changed]
        # Libraries load kernels and allocate at first use, which a capture must not. No row is running then.
        self._fields[LENGTH] = 0
        self._compute(rows, features)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._compute(rows, features)
        for tensor, values in zip(changed, before, strict=True):
            tensor.copy_(values)
        return graph

    def _send(self, rows: slice) -> Choice:
        readback = self._spare.pop() if self._spare else Readback(self._longs.size(1), self._device)
        readback.start(self._longs[TOKEN, rows])
        return Choice(self.requests[rows], readback)

    def _mark_seen(self, row: int, request: Request) -> None:
        if self._seen is None:
            shape = (self._fields.size(1), self._decoder.config.vocab)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._movable.append((self._seen, 0))
        self._seen[row] = False
        self._seen[row, upload(request.history, torch.int64, self._device)] = True

    def _note_features(self) -> None:
        self._features = SamplingFeatures.of([request.params for request in self.requests])


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, which is the last."""
    return [*(1 << i for i in range((limit - 1).bit_length())), limit]
