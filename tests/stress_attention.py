"""decode_attention in replayed CUDA graphs; inputs change, and every result is checked, on the device.

    python tests/stress_attention.py [--replays 100000] [--poison none | nan | random] [--device cuda | cpu]

A graph draws lengths, block tables, queries and phi, calls decode_attention three times in a row (so that
launches may overlap) and counts errors, all without the host, so replays run back to back. With --poison, the
memory that calls get as workspace is overwritten before each one. The replays are divided among the cases; on
the CPU the same steps run eagerly. FLASHDECPP_GPU_KERNELS=generic tests the kernels that run on any GPU.
Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from strategies import NO_BLOCK
from torch import Tensor

from flashdecpp import ops

BLOCK_SIZE, BLOCKS_PER_SEQUENCE, POOL_BLOCKS = 16, 128, 512
CAPACITY = BLOCK_SIZE * BLOCKS_PER_SEQUENCE
Q_HEADS, KV_HEADS = 8, 2
GROUP = Q_HEADS // KV_HEADS


@dataclass(frozen=True)
class Case:
    name: str
    head_dim: int = 128
    dtype: torch.dtype = torch.float16
    fp8: bool = False
    q_len: int = 1
    unified: bool = True
    num_splits: int = 0
    softcap: float = 0.0
    window: int = -1
    alibi: bool = False
    sinks: bool = False


CASES = (
    Case("online", unified=False),
    Case("unified", head_dim=64),
    Case("unified, 3 splits", num_splits=3),
    Case("online, 5 splits, bfloat16", dtype=torch.bfloat16, unified=False, num_splits=5),
    Case("unified, fp8 cache", fp8=True),
    Case("unified, ALiBi and window, bfloat16", head_dim=64, dtype=torch.bfloat16, window=100, alibi=True),
    Case("unified, 4 new tokens, softcap and sinks", q_len=4, softcap=15.0, sinks=True),
)


class Tally:
    """Totals over a case's steps, kept on the device."""

    def __init__(self, device: str) -> None:
        def zero(dtype: torch.dtype) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.steps = zero(torch.int64)
        self.wrong_out, self.wrong_lse, self.unrepeated = (zero(torch.int64) for _ in range(3))
        self.rows, self.nan_rows, self.empty_rows = (zero(torch.int64) for _ in range(3))
        self.recomputed = torch.zeros(1, dtype=torch.int32, device=device)
        self.worst_out, self.worst_lse = (
            zero(torch.float32),
            zero(torch.float32),
        )  # error / allowed
        self.first_wrong = zero(torch.int64) - 1

    def wrong(self) -> int:
        return int(self.wrong_out + self.wrong_lse + self.unrepeated)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: wrong {self.wrong_out} values, {self.wrong_lse} lse, "
            f"{self.unrepeated} not repeated bit for bit (first in step {self.first_wrong}); error over "
            f"allowed at most {self.worst_out:.2f}, {self.worst_lse:.2f}; of {self.rows} rows "
            f"{self.nan_rows} NaN, {self.empty_rows} empty, {self.recomputed.item()} recomputations"
        )


class Problem:
    """decode_attention's arguments, redrawn in place by every step, and the expected results."""

    def __init__(self, case: Case, batch: int, device: str) -> None:
        self.case, self.batch = case, batch
        tokens = POOL_BLOCKS * BLOCK_SIZE
        k, v = (torch.randn(KV_HEADS, tokens, case.head_dim, device=device) for _ in range(2))
        # One NaN key with a NaN value: only rows that see it become NaN.
        poisoned = 7 * BLOCK_SIZE + 9
        k[0, poisoned] = v[0, poisoned] = torch.nan
        cache_dtype = torch.float8_e4m3fn if case.fp8 else case.dtype
        k, v = k.to(cache_dtype), v.to(cache_dtype)
        shape = (POOL_BLOCKS, BLOCK_SIZE, KV_HEADS, case.head_dim)
        self.k_cache, self.v_cache = (
            x.float().transpose(0, 1).reshape(shape).to(cache_dtype) for x in (k, v)
        )
        # For the answer: [kv_heads, tokens, head_dim], each value followed by its magnitude. The NaN weight
        # makes its row NaN; the NaN value must not reach rows that don't see it.
        v = v.float().nan_to_num()
        self.keys, self.values = k.float(), torch.cat((v, v.abs()), dim=-1)

        self.q = torch.empty(batch, case.q_len, Q_HEADS, case.head_dim, dtype=case.dtype, device=device)
        self.seq_lens = torch.empty(batch, dtype=torch.int32, device=device)
        self.block_table = torch.empty(batch, BLOCKS_PER_SEQUENCE, dtype=torch.int32, device=device)
        self.phi = torch.empty(batch, Q_HEADS, device=device)
        self.slopes = 2.0 ** -torch.arange(1, Q_HEADS + 1, device=device)
        self.sinks = torch.linspace(-3, 6, Q_HEADS, device=device)
        self.scales = torch.tensor([0.5, 1.25], device=device)
        self.token = torch.arange(CAPACITY, device=device)

    def draw(self) -> None:
        """Draws new lengths, queries, blocks and phi."""
        device, batch = self.q.device, self.batch

        def chance(probability: float, *shape: int) -> Tensor:
            return torch.rand(shape, device=device) < probability

        lengths = torch.rand(batch, device=device) * 601
        lengths = torch.where(chance(1 / 16, batch), torch.rand(batch, device=device) * CAPACITY + 1, lengths)
        lengths = torch.where(chance(1 / 16, batch), lengths / 128, lengths)
        self.seq_lens.copy_(lengths)  # rounds down

        self.block_table.random_(0, POOL_BLOCKS)
        unused = self.token[::BLOCK_SIZE] >= self.seq_lens[:, None]
        self.block_table.masked_fill_(unused, NO_BLOCK)

        # Logits with a standard deviation of 0.5 to 4, so maxima are around 3 times that.
        spread = 2 ** (torch.rand(batch, device=device) * 3 - 1)
        self.q.normal_()
        self.q.mul_(spread.to(self.q.dtype)[:, None, None, None])
        phi = 3 * spread[:, None] + 2 * torch.randn(batch, Q_HEADS, device=device)
        hopeless = torch.randn(batch, Q_HEADS, device=device) * 300
        self.phi.copy_(torch.where(chance(1 / 8, batch, Q_HEADS), hopeless, phi))

    def call(self, tally: Tally) -> tuple[Tensor, Tensor]:
        case = self.case
        return ops.decode_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.seq_lens,
            self.block_table,
            phi=self.phi if case.unified else None,
            softcap=case.softcap,
            window=case.window,
            alibi_slopes=self.slopes if case.alibi else None,
            sinks=self.sinks if case.sinks else None,
            k_scale=self.scales if case.fp8 else None,
            v_scale=self.scales if case.fp8 else None,
            num_splits=case.num_splits,
            fallback_count=tally.recomputed,
        )

    def answer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out [kv_heads, batch, q_len, group, head_dim], its terms' size, lse, and which rows see a key.

        flashdecpp.reference's math in float32 for all sequences at once, each of its full cache length and
        masked. A graph can capture it, because no shape depends on the lengths.
        """
        case, batch = self.case, self.batch
        head, rows = (KV_HEADS, 1, 1, 1, 1), (KV_HEADS, batch, case.q_len, GROUP, -1)
        block = self.block_table.clamp(max=POOL_BLOCKS - 1).index_select(1, self.token // BLOCK_SIZE)
        token = (block * BLOCK_SIZE + self.token % BLOCK_SIZE).flatten()
        keys = self.keys.index_select(1, token).view(KV_HEADS, batch, CAPACITY, -1)
        values = self.values.index_select(1, token).view(KV_HEADS, batch, CAPACITY, -1)

        q = self.q.float().view(batch, case.q_len, KV_HEADS, GROUP, -1).permute(2, 0, 1, 3, 4)
        x = (q.flatten(2, 3) @ keys.transpose(-1, -2)).view(rows) * case.head_dim**-0.5
        if case.fp8:
            x = x * self.scales.view(head)
        if case.softcap:
            x = case.softcap * torch.tanh(x / case.softcap)
        position = self.seq_lens[:, None] - case.q_len + torch.arange(case.q_len, device=x.device)
        position = position[None, :, :, None, None]
        if case.alibi:
            x = x - self.slopes.view(KV_HEADS, 1, 1, GROUP, 1) * (position - self.token)
        visible = self.token <= position
        if case.window > 0:
            visible = visible & (self.token > position - case.window)
        x = x.masked_fill(~visible, -torch.inf)

        lse = torch.logsumexp(x, dim=-1)
        if case.sinks:
            lse = torch.logaddexp(lse, self.sinks.view(KV_HEADS, 1, 1, GROUP))
        weights = (x - lse[..., None]).exp().masked_fill(~visible, 0)
        out = (weights.flatten(2, 3) @ values).view(rows)
        if case.fp8:
            out = out * self.scales.view(head)
        out, terms = out.chunk(2, dim=-1)
        return out, terms, lse, visible.any(dim=-1).expand(lse.shape)

    def check(self, results: list[tuple[Tensor, Tensor]], tally: Tally) -> None:
        """Checks every result against the answer and, with fixed splits, against each other.

        out may be off by twice the error of rounding the weights and then the result to q's dtype (the
        weights' share is at most that of the sum of all terms), plus 1e-4 for subnormal half weights, which
        round by 2^-25 of the largest weight. A lost key shows if it weighs more than that; lse, rounded only
        in float32, shows any key that weighs more than 1e-4.
        """
        truth, terms, true_lse, seen = self.answer()
        rounding = torch.finfo(self.case.dtype).eps / 2
        allowed_out = 2 * rounding * (truth.abs() + terms) + 1e-4
        allowed_lse = 1e-4 + 1e-5 * true_lse.abs()
        before = tally.wrong_out + tally.wrong_lse + tally.unrepeated
        shape = (self.batch, self.case.q_len, KV_HEADS, GROUP, -1)
        for out, lse in results:
            out = out.view(shape).permute(2, 0, 1, 3, 4).float()
            lse = lse.view(self.batch, KV_HEADS, GROUP, -1).permute(1, 0, 3, 2)
            _count(out, truth, allowed_out, tally.wrong_out, tally.worst_out)
            _count(lse, true_lse, allowed_lse, tally.wrong_lse, tally.worst_lse)
        if self.case.num_splits:
            for a, b in zip(results[0], results[-1], strict=True):
                bits = torch.int32 if a.dtype == torch.float32 else torch.int16
                same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
                tally.unrepeated.add_((~same).sum())
        wrong = tally.wrong_out + tally.wrong_lse + tally.unrepeated > before
        tally.first_wrong.copy_(torch.where(wrong & (tally.first_wrong < 0), tally.steps, tally.first_wrong))
        tally.rows.add_(true_lse.numel())
        tally.nan_rows.add_(true_lse.isnan().sum())
        tally.empty_rows.add_((~seen).sum())


def _count(actual: Tensor, truth: Tensor, allowed: Tensor, wrong: Tensor, worst: Tensor) -> None:
    """Adds the number of values not within `allowed` to `wrong`; NaN and infinities must match."""
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    ratio = torch.where(same, 0, (actual - truth).abs() / allowed)
    wrong.add_((~(ratio <= 1)).sum())
    worst.copy_(torch.maximum(worst, ratio.nan_to_num(nan=torch.inf).max()))


def poison(pattern: str, device: torch.device) -> None:
    """Overwrites the small and large blocks to be allocated next: all bits set (NaN), or random."""
    if pattern == "none":
        return
    # torch's allocator serves up to 1 MiB from one set of segments and larger sizes from another.
    blocks = [
        torch.empty(n, dtype=torch.int32, device=device)
        for n in [1 << 10] * 32 + [1 << 17] * 8 + [1 << 21] * 3
    ]
    for block in blocks:
        if pattern == "nan":
            block.fill_(-1)
        else:
            block.random_()


def stress(case: Case, replays: int, pattern: str, device: str) -> Tally:
    """One case: two problems with different batches, one called before and after the other."""
    tally = Tally(device)
    first, second = Problem(case, 8, device), Problem(case, 5, device)

    def step() -> None:
        for problem in (first, second):
            problem.draw()
        poison(pattern, first.q.device)
        results = [problem.call(tally) for problem in (first, second, first)]
        first.check([results[0], results[2]], tally)
        second.check([results[1]], tally)
        tally.steps.add_(1)

    if device == "cpu":
        for _ in range(replays):
            step()
        return tally
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()  # libraries create handles and kernels load
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(replays):
            graph.replay()
        stream.synchronize()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--replays", type=int, help="default: 100000, on the CPU 140")
    parser.add_argument("--poison", default="none", choices=["none", "nan", "random"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    replays = options.replays or {"cuda": 100_000, "cpu": 140}[options.device]

    wrong = total = 0
    for case in CASES:
        start = time.perf_counter()
        tally = stress(case, -(-replays // len(CASES)), options.poison, options.device)
        print(f"{case.name} [{time.perf_counter() - start:.1f} s]: {tally}", flush=True)
        wrong += tally.wrong()
        total += int(tally.steps)
    print(f"{total} steps, 3 calls each, poison {options.poison}: {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    with torch.no_grad():
        main()
