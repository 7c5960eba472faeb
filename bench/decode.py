"""The demo model compared with transformers: decode tokens/s at batch 1, and prefill of a long prompt.

The contestants share weights, device, threads and process, and take turns, so that drift in the machine's
speed affects all of them alike. transformers runs its forward pass in a bare greedy loop, without the
overhead of its generate; flashdecpp runs its whole `generate`, including tokenizer and streamed text.

    python bench/decode.py [--device cpu] [--rounds 7] [--output FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import measure
import torch
import transformers

from flashdecpp import LLM, SamplingParams
from flashdecpp.models.to_transformers import to_transformers

SHORT_PROMPT, LONG_PROMPT, DECODE_TOKENS = 32, 512, 32
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}

# prompt, decode steps -> (seconds to the first token, tokens/s after it)
Contestant = Callable[[list[int], int], tuple[float, float]]


def flashdecpp_contestant(llm: LLM) -> Contestant:
    def run(prompt: list[int], steps: int) -> tuple[float, float]:
        (answer,) = llm.generate([prompt], SamplingParams(max_tokens=steps + 1, ignore_eos=True))
        return answer.time_to_first_token, answer.tokens_per_second

    return run


def transformers_contestant(llm: LLM, dtype: torch.dtype) -> Contestant:
    model = to_transformers(llm.decoder, dtype)

    @torch.inference_mode()
    def run(prompt: list[int], steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.item()
        first = time.perf_counter()
        for _ in range(steps):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.item()  # a real loop reads each token
        return first - start, steps / (time.perf_counter() - first) if steps else 0.0

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DTYPES), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="default: bench/results/decode_<cpu or cuda>.json")
    options = parser.parse_args()
    dtypes = DTYPES[options.device]

    contestants: dict[str, Contestant] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        llm = LLM("demo", device=options.device, dtype=dtype, quantize="none", prefix_cache=False)
        contestants[f"flashdecpp {name}"] = flashdecpp_contestant(llm)
        if options.device == "cpu":  # the 4-bit and 8-bit weights as stored in the file
            stored = LLM("demo", device="cpu", dtype=dtype, quantize="auto", prefix_cache=False)
            contestants[f"flashdecpp {name}, weights as stored"] = flashdecpp_contestant(stored)
        contestants[f"transformers {name}"] = transformers_contestant(llm, dtype)

    short, long = (torch.randint(100, 40_000, (count,)).tolist() for count in (SHORT_PROMPT, LONG_PROMPT))
    prefill: dict[str, list[float]] = {name: [] for name in contestants}
    decode: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):
        for name, run in contestants.items():
            seconds, _ = run(long, 0)
            _, speed = run(short, DECODE_TOKENS)
            if turn:  # the first round warms up
                prefill[name].append(seconds)
                decode[name].append(speed)

    results: dict[str, object] = {
        name: {
            "decode_tokens_per_second": round(statistics.median(decode[name]), 2),
            "decode_range": [round(min(decode[name]), 2), round(max(decode[name]), 2)],
            "prefill_seconds": round(statistics.median(prefill[name]), 4),
            "prefill_range": [round(min(prefill[name]), 4), round(max(prefill[name]), 4)],
        }
        for name in contestants
    }
    peers = [name for name in contestants if name.startswith("transformers")]
    best_decode = max(statistics.median(decode[name]) for name in peers)
    best_prefill = min(statistics.median(prefill[name]) for name in peers)
    for dtype in dtypes:
        name = f"flashdecpp {dtype}".replace("torch.", "")
        for own in (name, f"{name}, weights as stored"):
            if own in contestants:
                results[f"{own}, over the best transformers"] = {
                    "decode": round(statistics.median(decode[own]) / best_decode, 2),
                    "prefill": round(best_prefill / statistics.median(prefill[own]), 2),
                }
    for name, result in results.items():
        print(f"{name:48} {result}")
    workload = {
        "model": "SmolLM2-135M-Instruct (demo)",
        "transformers": transformers.__version__,
        "decode": f"{DECODE_TOKENS} tokens after {SHORT_PROMPT}, batch 1, median of {options.rounds}",
        "prefill": f"a prompt of {LONG_PROMPT} tokens to its first token, median of {options.rounds}",
    }
    measure.save(
        options.output or f"bench/results/decode_{options.device}.json", {"workload": workload, **results}
    )


if __name__ == "__main__":
    main()
