"""Thousands of prompts of random lengths through one model, in a block pool that is far too small for them.

Every answer must be the one that its prompt gets alone (of a demo that is slow alone, say, every fifth:
--alone-every 5), no block may leak and memory must stay flat. The
model is a random one of a Llama's make, or a folder or file, or the demo model.

    python tests/stress_runner.py [--device cuda] [--prompts 10000] [--model random|demo|PATH]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flashdecpp.runner import LLM, SamplingParams
from flashdecpp.runner.cache import BLOCK_SIZE, blocks_for

LONGEST_PROMPT, LONGEST_ANSWER = 200, 100


def workload(count: int, vocab: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Most are short, some long; greedy and sampled; some end by themselves."""
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
    """What torch has given out on a GPU; on the CPU the cache is the only thing that could grow."""
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "random":
            model = folder
            make_random(Path(folder), options.layers)
        failures = run(model, options)
    sys.exit(f"{failures} failures" if failures else 0)


def make_random(folder: Path, layers: int) -> None:
    from runner_models import save_model

    save_model(
        folder,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        initializer_range=0.06,
    )


def run(model: str | Path, options: argparse.Namespace) -> int:
    pool = blocks_for(LONGEST_PROMPT + LONGEST_ANSWER) + 4  # one long sequence and a short one fit
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


if __name__ == "__main__":
    main()
