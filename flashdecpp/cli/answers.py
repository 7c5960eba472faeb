"""Prints answers and the line of statistics that follows them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from .terminal import unusable

if TYPE_CHECKING:
    from flashdecpp import LLM, Completion, Piece


def print_stream(pieces: Generator[Piece]) -> tuple[str, bool]:
    """Prints an answer as it arrives, until its end or Ctrl-C. Returns it and whether it was interrupted."""
    answer, interrupted = "", False
    with closing(pieces):
        try:
            for piece in pieces:
                print(piece.text, end="", flush=True)
                answer += piece.text
        except KeyboardInterrupt:
            interrupted = True
        except unusable():
            if answer:
                print(flush=True)
            raise
    print(flush=True)
    return answer, interrupted


def print_texts(completions: Iterable[Completion], samples: int) -> None:
    """Prints answers in the order of the prompts, each as soon as it and all earlier ones are complete."""
    texts: dict[int, str] = {}
    due = 0
    for completion in completions:
        texts[completion.index * samples + completion.sample] = completion.text
        while due in texts:
            print(texts.pop(due), flush=True)
            due += 1


def print_json(completions: Iterable[Completion], prompts: Sequence[str]) -> None:
    """Prints one object per line, each as soon as its answer is complete."""
    # Escaped if the stream would otherwise replace characters.
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    for completion in completions:
        result = _finite(_result(prompts[completion.index], completion))
        print(json.dumps(result, ensure_ascii=ascii_only, allow_nan=False), flush=True)


def _result(prompt: str, completion: Completion) -> dict[str, object]:
    result: dict[str, object] = {
        "index": completion.index,
        "sample": completion.sample,
        "seed": completion.seed,
        "prompt": prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_match": completion.stop_match,
        "counts": {
            "prompt_tokens": completion.prompt_tokens,
            "generated_tokens": completion.generated_tokens,
            "cached_prompt_tokens": completion.cached_prompt_tokens,
        },
        "timings": {
            "time_to_first_token_s": round(completion.time_to_first_token, 4),
            "tokens_per_second": round(completion.tokens_per_second, 2),
        },
    }
    for name in ("logprobs", "prompt_logprobs"):
        tokens = getattr(completion, name)
        if tokens is not None:
            result[name] = [None if token is None else asdict(token) for token in tokens]
    return result


def _finite(value: object) -> object:
    """Replaces the infinite log-probabilities of excluded tokens by null, since JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_stats(llm: LLM) -> None:
    """Prints a line about the last run on stderr."""
    stats = llm.stats
    if stats is None:
        return
    dtype = str(llm.dtype).removeprefix("torch.")
    speed = f"then {stats.tokens_per_second:.1f} tokens/s, " if stats.tokens_per_second else ""
    softmax = stats.softmax
    if softmax != "online softmax":
        softmax += f": {stats.softmax_fallbacks} softmax fallbacks in {stats.softmax_rows} rows"
    cached = stats.cached_prompt_tokens
    found = f"{cached} prompt tokens from the cache, " if cached else ""
    preempted = f"{stats.preemptions} preemptions, " if stats.preemptions else ""
    slower = "" if stats.cuda_graphs else "no CUDA graphs, "
    slower += "batch-invariant, " if stats.batch_invariant else ""
    print(
        f"[{llm.name}, {dtype} on {llm.device}: {stats.prompt_tokens} + {stats.generated_tokens} tokens, "
        f"first after {stats.time_to_first_token:.2f} s, {speed}"
        f"{stats.weights} weights {stats.weight_bytes / 2**20:.0f} MiB, "
        f"peak memory {stats.peak_memory / 2**20:.0f} MiB, {found}{preempted}{slower}{softmax}]",
        file=sys.stderr,
    )
