"""Many prompts of random lengths through one model, in a block pool that is far too small for them.

Every answer must match what its prompt gets alone, no block may leak and memory must stay flat. The model is
a random Llama, a folder or file, or the demo model. Either thousands of prompts in one call (if running
prompts alone is slow, compare only every fifth with --alone-every 5):

    python tests/stress_runner.py [--device cuda] [--prompts 10000] [--model random|demo|PATH]

or, for a number of minutes, several threads with requests of every kind: prompts in batches and streams, some
abandoned, multiple samples, penalties, log-probabilities, guides, and requests that must fail without
affecting others:

    python tests/stress_runner.py --threads 4 --minutes 30 [--model demo] [--device cpu]

That prints a final line of JSON. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from flashdecpp import LLM, Completion, ModelError, SamplingParams, TokenLogprob
from flashdecpp.models.kv_cache import BLOCK_SIZE, blocks_for

LONGEST_PROMPT, LONGEST_ANSWER = 200, 100


def workload(count: int, vocab: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Mostly short prompts, some long; greedy and sampled; some answers stop on their own."""
    rng = random.Random(0)
    prompts, params = [], []
    for number in range(count):
        length = min(LONGEST_PROMPT, 1 + int(rng.expovariate(1 / 30)))
        prompts.append([rng.randrange(vocab) for _ in range(length)])
        params.append(
            SamplingParams(
                max_tokens=min(LONGEST_ANSWER, 1 + int(rng.expovariate(1 / 24))),
                temperature=rng.choice([0.0, 0.0, 0.8]),
                top_k=rng.choice([0, 40]),
                top_p=rng.choice([1.0, 0.95]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
                ignore_eos=rng.random() < 0.5,
                seed=number,
            )
        )
    return prompts, params


def held_bytes(llm: LLM) -> int:
    """Memory that torch has allocated on a GPU; on the CPU only the cache could grow."""
    return torch.cuda.memory_allocated() if llm.device.type == "cuda" else 0


def tokens_of(llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(prompts, params, progress=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--model", default="random")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--alone-every", type=int, default=1, help="compare every n-th prompt")
    parser.add_argument("--threads", type=int, default=0, help="mixed requests from so many threads")
    parser.add_argument("--minutes", type=float, default=1.0, help="for so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "random":
            model = folder
            make_random(Path(folder), options)
        failures = soak(model, options) if options.threads else run(model, options)
    sys.exit(f"{failures} failures" if failures else 0)


def make_random(folder: Path, options: argparse.Namespace) -> None:
    from runner_models import save_model

    if options.threads:  # the number of answers matters, not their size
        save_model(folder, max_position_embeddings=512)
        return
    save_model(
        folder,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        max_position_embeddings=512,
        initializer_range=0.06,
    )


def run(model: str | Path, options: argparse.Namespace) -> int:
    pool = blocks_for(LONGEST_PROMPT + LONGEST_ANSWER) + 4  # room for one long sequence and a short one
    llm = LLM(
        model,
        device=options.device,
        max_len=512,
        max_batch=options.batch,
        cache_tokens=pool * BLOCK_SIZE,
        prefix_cache=False,
        batch_invariant=True,
    )
    prompts, params = workload(
        options.prompts, min(llm.config.vocab, 256 if options.model == "random" else 1 << 30)
    )
    some = max(1, options.prompts // 10)
    tokens_of(llm, prompts[:some], params[:some])  # captures graphs
    before, begin = held_bytes(llm), time.perf_counter()
    together = tokens_of(llm, prompts, params)
    seconds, stats = time.perf_counter() - begin, llm.stats
    grown, used = held_bytes(llm) - before, llm._engine.pool.used_blocks
    print(
        f"{len(prompts)} prompts, {stats.prompt_tokens} + {stats.generated_tokens} tokens, {seconds:.1f} s, "
        f"{stats.preemptions} preemptions in a pool of {stats.cache_blocks} blocks; afterwards {used} are in "
        f"use, and memory grew by {grown} bytes",
        flush=True,
    )
    begin = time.perf_counter()
    wrong = [
        index
        for index in range(0, len(prompts), options.alone_every)
        if llm.generate([prompts[index]], params[index])[0].token_ids != together[index]
    ]
    compared = len(range(0, len(prompts), options.alone_every))
    seconds = time.perf_counter() - begin
    print(f"{compared} one by one {seconds:.1f} s; {len(wrong)} answers differ: {wrong[:10]}")
    return len(wrong) + (used > 0) + (grown > 0) + (stats.preemptions == 0)


# Mixed requests from several threads

CASES = 48
GROWTH = 24 << 20  # bytes a process may grow after warm-up: malloc arenas, a few blocks


class EveryThird:
    """A guide that allows every third token, rotating at each step."""

    def __init__(self) -> None:
        self.place = 0

    def fill(self, mask: torch.Tensor) -> None:
        bits = torch.zeros(len(mask) * 32, dtype=torch.int64)
        bits[self.place % 3 :: 3] = 1
        words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
        mask.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))

    def accept(self, token: int) -> None:
        self.place += 1


def doubled(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits * 2 if len(ids) % 2 else logits


def fails_later(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(ids) % 7 == 0:
        raise ArithmeticError("a processor that fails")
    return logits


def mixed_cases(vocab: int, text_ids: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and their parameters, each with one right answer."""
    rng = random.Random(1)
    common = [rng.randrange(text_ids) for _ in range(40)]
    kinds = [
        {},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"frequency_penalty": 0.7, "logit_bias": {7: 2.0, 9: -3.0}},
        {"logprobs": 3},
        {"prompt_logprobs": 1, "logprobs": 0},
        {"guide": EveryThird, "temperature": 1.0},
        {"bad_words": ["a", "the", "e t"], "min_tokens": 6},
        {"logits_processor": doubled},
        {"temperature": 1.0, "n": 3},
        {"stop_token_ids": list(range(0, vocab, 50))},
        {"stop": ["e", "\n"], "temperature": 0.9},
    ]
    cases = []
    for number in range(CASES):
        own = [rng.randrange(text_ids) for _ in range(1 + int(rng.expovariate(1 / 25)))]
        prompt = common[: rng.choice([0, 0, 16, 40])] + own[:150]
        params = SamplingParams(
            max_tokens=1 + min(60, int(rng.expovariate(1 / 16))), seed=number, ignore_eos=rng.random() < 0.5
        )
        kind = kinds[number % len(kinds)]
        fits = {"min_tokens": min(kind["min_tokens"], params.max_tokens)} if "min_tokens" in kind else {}
        cases.append((prompt, replace(params, **(kind | fits))))
    return cases


def bad_calls(llm: LLM) -> list[Callable[[], object]]:
    """Calls that must fail, immediately or later."""
    nothing = dict.fromkeys(range(llm.config.vocab), float("-inf"))
    return [
        lambda: llm.generate([llm.config.vocab]),
        lambda: llm.generate(None),
        lambda: llm.generate("x", SamplingParams(top_k=1 << 40)),
        lambda: llm.generate("x", SamplingParams(stop_token_ids=[llm.config.vocab])),
        lambda: llm.generate([1] * llm.max_len),
        lambda: llm.generate("caf\udce9"),
        lambda: llm.generate("x", SamplingParams(logit_bias=nothing)),
        lambda: llm.generate(
            [1, 2, 3], SamplingParams(max_tokens=9, logits_processor=fails_later, ignore_eos=True)
        ),
    ]


def ends_alike(answer: Completion, right: Completion) -> bool:
    ended = [(a.token_ids, a.text, a.finish_reason, a.stop_match) for a in (answer, right)]
    return ended[0] == ended[1] and all(
        close(getattr(answer, name), getattr(right, name)) for name in ("logprobs", "prompt_logprobs")
    )


def close(found: Sequence[TokenLogprob | None] | None, right: Sequence[TokenLogprob | None] | None) -> bool:
    """The same tokens; the last digits depend on the rest of the batch."""
    if found is None or right is None:
        return found is right
    return len(found) == len(right) and all(
        f is r
        or (f.token_id == r.token_id and abs(f.logprob - r.logprob) < 1e-3 and len(f.top) == len(r.top))
        for f, r in zip(found, right, strict=True)
    )


class Mallinfo(ctypes.Structure):
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    _fields_ = tuple((name, ctypes.c_size_t) for name in (*NAMES, "keepcost"))


def allocated_bytes() -> int | None:
    """Bytes allocated by malloc and not yet freed; None if the C library can't report them."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def memory_now(device: torch.device) -> dict[str, int]:
    gc.collect()
    held = {"resident": psutil.Process().memory_info().rss}
    if (malloc := allocated_bytes()) is not None:
        held["malloc"] = malloc
    if device.type == "cuda":
        torch.cuda.synchronize()
        held["cuda"] = torch.cuda.memory_allocated(device)
    return held


class Soak:
    """Threads that send requests until time is up, and their findings."""

    def __init__(self, llm: LLM, cases: list, expected: list[list[Completion]]) -> None:
        self.llm, self.cases, self.expected = llm, cases, expected
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def run(self, threads: int, seconds: float, seed: int) -> None:
        end = time.monotonic() + seconds
        workers = [
            threading.Thread(target=self._work, args=(random.Random(seed + i), end)) for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, rng: random.Random, end: float) -> None:
        actions = [self._batch, self._batch, self._stream, self._stream, self._leave, self._fail]
        while time.monotonic() < end and len(self.wrong) < 20:
            action = rng.choice(actions)
            try:
                action(rng)
            except Exception as error:
                self._note("error", wrong=f"{action.__name__}: {type(error).__name__}: {error}")

    def _note(self, what: str, wrong: str | None = None) -> None:
        with self._lock:
            self.counts[what] += 1
            if wrong is not None:
                self.wrong.append(wrong[:300])

    def _batch(self, rng: random.Random) -> None:
        chosen = rng.sample(range(len(self.cases)), rng.randint(1, 5))
        answers = self.llm.generate(
            [self.cases[index][0] for index in chosen], [self.cases[index][1] for index in chosen]
        )
        wanted = [answer for index in chosen for answer in self.expected[index]]
        for answer, right in zip(answers, wanted, strict=True):
            index = chosen[answer.index]
            same = ends_alike(answer, right)
            self._note("answers", None if same else f"case {index}: {answer} is not {right}")

    def _stream(self, rng: random.Random) -> None:
        index = self._streamable(rng)
        pieces = list(self.llm.stream(*self.cases[index]))
        ids = tuple(piece.token_id for piece in pieces[:-1])
        text = "".join(piece.text for piece in pieces)
        right = self.expected[index][0]
        same = (list(ids), text, pieces[-1].finish_reason) == (
            right.token_ids,
            right.text,
            right.finish_reason,
        )
        self._note("streams", None if same else f"case {index}: {ids}, {text!r} is not {right}")

    def _leave(self, rng: random.Random) -> None:
        stream = self.llm.stream(*self.cases[self._streamable(rng)])
        for _ in range(rng.randint(0, 4)):
            next(stream, None)
        if rng.random() < 0.5:
            stream.close()  # otherwise it is left to the garbage collector
        self._note("left")

    def _fail(self, rng: random.Random) -> None:
        try:
            rng.choice(bad_calls(self.llm))()
        except (ModelError, ArithmeticError):
            self._note("refused")
        else:
            self._note("refused", wrong="a bad call was answered")

    def _streamable(self, rng: random.Random) -> int:
        return rng.choice([i for i, (_, params) in enumerate(self.cases) if params.n == 1])


def soak(model: str | Path, options: argparse.Namespace) -> int:
    on_cpu = options.device == "cpu"
    llm = LLM(
        model,
        device=options.device,
        dtype="float32" if on_cpu else None,
        max_len=512,
        max_batch=min(options.batch, 8),
        cache_tokens=BLOCK_SIZE * (blocks_for(512) + 8),
        prefix_cache=on_cpu,
        batch_invariant=not on_cpu,
        prefill_chunk=64,
    )
    cases = mixed_cases(llm.config.vocab, min(llm.config.vocab, 256))
    expected = [llm.generate([p], s) for p, s in cases]
    task = Soak(llm, cases, expected)
    task.run(options.threads, min(60.0, 6 * options.minutes), seed=1)  # warm up threads, arenas and graphs
    task.counts.clear()
    before, begin = memory_now(llm.device), time.monotonic()
    task.run(options.threads, 60 * options.minutes, seed=100)
    gc.collect()
    after = memory_now(llm.device)
    grown = {name: after[name] - before[name] for name in before}
    leaked = llm._engine.pool.used_blocks
    flat = all(growth <= GROWTH for growth in grown.values())
    summary = {
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "threads": options.threads,
        **task.counts,
        "wrong": task.wrong,
        "blocks_leaked": leaked,
        "memory": after,
        "grown": grown,
    }
    print(json.dumps(summary))
    return len(task.wrong) + (leaked > 0) + (not flat)


if __name__ == "__main__":
    main()
