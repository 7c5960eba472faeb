"""How often a calibrated phi does not fit while the demo model decodes, calibrated on the built-in text.

Fallbacks are what the kernel counted while it decoded (its safe window on the CPU is +-22). The share of rows
outside each safe window comes from a second pass over the same tokens that looks at the softmax inputs.

    python bench/phi.py [--device cpu] [--tokens 1100] [--output bench/results/phi_cpu.json]
"""

from __future__ import annotations

import argparse

import measure
import torch
from tqdm import tqdm

from flashdecpp.runner import LLM, Completion, SamplingParams
from flashdecpp.runner import calibrate as calibration
from flashdecpp.runner.cache import KVCache, blocks_for
from flashdecpp.runner.calibration_text import TEXT
from flashdecpp.runner.phi import SAFE_WINDOWS

STORY = ["Once upon a time, in a small village by the sea,"]
QUESTIONS = [
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that sorts a list.",
    "Translate into German: the station is closed on Sundays.",
    "List three prime numbers larger than 100.",
    "What does SELECT COUNT(*) FROM orders do?",
    "Write a short letter to a landlord about a broken window.",
    "What is 17 times 23?",
    "Who was Marie Curie?",
]


def outside(llm: LLM, phi: torch.Tensor, answers: list[Completion]) -> dict[str, float]:
    """The share of the rows decoded for the answers whose maximum is outside each safe window around phi."""
    distances = []
    for answer in answers:
        tokens = (answer.prompt_token_ids + answer.token_ids)[:-1]  # the last token was never fed
        cache = KVCache(llm.config, blocks_for(len(tokens)), llm.device, llm.dtype)
        table = torch.arange(cache.num_blocks, dtype=torch.int32, device=llm.device)[None]
        observer = calibration.SoftmaxObserver(llm.config, tqdm(disable=True))
        llm.decoder.prefill(torch.tensor(tokens, device=llm.device), cache, table, observe=observer)
        rows = torch.stack([observer.row_maxima(layer) for layer in range(llm.config.layers)])
        distances.append((rows - phi[:, :, None]).abs()[:, :, len(answer.prompt_token_ids) :])
    distance = torch.cat(distances, dim=2)
    return {name: round((distance > width).double().mean().item(), 6) for name, width in SAFE_WINDOWS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1100, help="tokens of a story; an answer has a quarter")
    parser.add_argument("--output", help="default: bench/results/phi_<device>.json")
    options = parser.parse_args()

    llm = LLM("demo", device=options.device, dtype="bfloat16", phi="none")
    found = calibration.measure(llm, llm.tokenizer.encode(TEXT))
    for line in calibration.report(found):
        print(line)
    llm = LLM("demo", device=options.device, dtype="bfloat16", phi=list(found.phi.to(llm.device)))

    chats = [llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    long, short = options.tokens, options.tokens // 4
    workloads = {
        "story, greedy": (STORY, SamplingParams(max_tokens=long, ignore_eos=True)),
        "story, temperature 0.8": (
            STORY,
            SamplingParams(max_tokens=long, ignore_eos=True, temperature=0.8, seed=1),
        ),
        "8 chats, temperature 0.8": (
            chats,
            SamplingParams(max_tokens=short, ignore_eos=True, temperature=0.8, seed=2),
        ),
    }
    results: dict[str, object] = {
        "calibration": {
            "tokens": found.tokens,
            "expected outside": {
                name: round(1 - share.double().mean().item(), 6) for name, share in found.coverage.items()
            },
        }
    }
    for name, (prompts, params) in workloads.items():
        answers = llm.generate(prompts, params)
        steps = sum(len(answer.token_ids) - 1 for answer in answers)
        rows = steps * found.phi.numel()
        results[name] = {
            "decoded tokens": steps,
            "rows": rows,
            "fallbacks": llm.stats.softmax_fallbacks,
            "fallback rate": round(llm.stats.softmax_fallbacks / rows, 6),
            "outside": outside(llm, found.phi, answers),
        }
        print(f"{name}: {results[name]}")
    measure.save(options.output or f"bench/results/phi_{llm.device.type}.json", results)


if __name__ == "__main__":
    main()
