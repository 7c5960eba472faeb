"""How often rows fall back from the unified maximum: phi calibrated per head, and phi carried between steps.

Measured on the demo model while it decodes, calibrated on the built-in text, and on synthetic softmax inputs
with the range of OPT's, where every output is also checked against the float64 reference. Fallbacks are
counted by the kernel (its safe window on the CPU is +-22); the fractions outside each safe window come from
the recorded maximum of each row.

    python bench/phi.py [--device cpu] [--tokens 1100] [--steps 1000] [--output bench/results/phi_cpu.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import measure
import torch
from torch import Tensor
from tqdm import tqdm

from flashdecpp import LLM, SamplingParams, ops, reference
from flashdecpp.calibration import calibrate as calibration
from flashdecpp.calibration.text import TEXT
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.phi import SAFE_WINDOWS

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


def outside(distance: Tensor) -> dict[str, float]:
    """Fraction of rows outside each safe window. NaN (the start of a sequence) is outside all of them."""
    return {name: fraction(~(distance <= width)) for name, width in SAFE_WINDOWS.items()}


def fraction(rows: Tensor) -> float:
    return round(rows.double().mean().item(), 6)


def carried_distance(maxima: Tensor) -> Tensor:
    """[steps, ...]: distance of a row's maximum from that of the previous step. NaN for the first step."""
    previous = torch.cat((torch.full_like(maxima[:1], torch.nan), maxima[:-1]))
    return (maxima - previous).abs()


def summary(fallbacks: int, distance: Tensor) -> dict[str, object]:
    """The kernel's fallbacks under one policy, and the rows outside the windows. distance is [steps, ...]."""
    return {
        "fallbacks": fallbacks,
        "fallback rate": round(fallbacks / distance.numel(), 6),
        "outside": outside(distance),
        "outside after the first step": outside(distance[1:]),
    }


# ------------------------------------------------------------------------------------------ the demo model


class Recorder:
    """Wraps a decoder's `decode` and records the row maxima that each step leaves in carried_phi."""

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode
        self.steps: list[Tensor] = []
        decoder.decode = self

    def __call__(
        self, tokens: Tensor, cache: object, seq_lens: Tensor, block_table: Tensor, carried_phi: Tensor
    ) -> Tensor:
        logits = self._decode(tokens, cache, seq_lens, block_table, carried_phi)
        self.steps.append(carried_phi.transpose(0, 1).to("cpu", copy=True))  # [batch, layers, q_heads]
        return logits


def demo(device: str, tokens: int) -> dict[str, object]:
    llm = LLM("demo", device=device, dtype="bfloat16", phi="none", prefix_cache=False)
    found = calibration.measure(llm, llm.tokenizer.encode(TEXT))
    for line in calibration.report(found):
        print(line)
    fixed = LLM(
        "demo", device=device, dtype="bfloat16", phi=list(found.phi.to(llm.device)), prefix_cache=False
    )
    # The recorder copies to the host at every step, which a CUDA graph cannot capture.
    carried = LLM("demo", device=device, dtype="bfloat16", phi="carry", prefix_cache=False, cuda_graphs=False)
    recorder = Recorder(carried.decoder)

    chats = [llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    endless = dict(ignore_eos=True, temperature=0.8)
    workloads = {
        "story, greedy": (STORY, SamplingParams(max_tokens=tokens, ignore_eos=True)),
        "story, temperature 0.8": (STORY, SamplingParams(max_tokens=tokens, seed=1, **endless)),
        "8 chats, temperature 0.8": (chats, SamplingParams(max_tokens=tokens // 4, seed=2, **endless)),
    }
    results: dict[str, object] = {
        "calibration": {
            "tokens": found.tokens,
            "expected outside": {
                name: round(1 - within.double().mean().item(), 6) for name, within in found.coverage.items()
            },
        }
    }
    for name, (prompts, params) in workloads.items():
        recorder.steps.clear()
        fixed.generate(prompts, params)
        carried.generate(prompts, params)
        maxima = torch.stack(recorder.steps)  # [steps, batch, layers, q_heads]
        results[name] = {
            "steps": maxima.size(0),
            "sequences": maxima.size(1),
            "rows": maxima.numel(),
            "fixed phi": summary(fixed.stats.softmax_fallbacks, (maxima - found.phi).abs()),
            "carried phi": summary(carried.stats.softmax_fallbacks, carried_distance(maxima)),
        }
        print(f"{name}: {results[name]}")
    return results


# ------------------------------------------------------------------------- inputs with the range of OPT's


@dataclass(frozen=True)
class Walk:
    """How a head's level changes from step to step.

    level' = center + memory * (level - center) + step * normal. With memory 0 the steps are independent; with
    memory 1 they form a random walk.
    """

    memory: float
    step: float


WALKS = {
    "independent steps": Walk(0.0, 4.0),
    "mean-reverting": Walk(0.95, 3.0),
    "random walk": Walk(1.0, 3.0),
    "rough random walk": Walk(1.0, 10.0),
}
LOWEST, HIGHEST = -497.0, 364.0  # softmax inputs of OPT
DEPTH = 60.0  # distance from a row's maximum to its lowest input
HEADS, HEAD_DIM, KEYS, SEQUENCES = 32, 64, 128, 2
CALIBRATION_STEPS = 250


def opt_like_steps(walk: Walk, steps: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Arguments of decode_attention for each step: KEYS random keys and values, and a new query per step.

    Each head has a level, and its row maximum lies nearby. The heads' centers are spaced evenly over the
    range that keeps all inputs within LOWEST and HIGHEST, and levels are reflected at its ends. A key's first
    two numbers are 1, and the query's add up to the level (two, so that bfloat16 can hold its fraction); a
    key's third number is a depth from -1 to 0, which the query multiplies by DEPTH; the rest is noise, which
    decides among the keys near the top. The cache is constant; only the query changes.
    """
    generator = torch.Generator().manual_seed(0)
    noise = 0.5  # margin for the random part

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys = normal(SEQUENCES, KEYS, HEADS, HEAD_DIM) * 0.3
    keys[..., :2] = 1
    keys[..., 2] = -torch.rand(keys.shape[:-1], generator=generator)
    cache = {"k_cache": keys, "v_cache": normal(*keys.shape)}
    cache = {name: x.to(device, torch.bfloat16) for name, x in cache.items()}
    seq_lens = torch.full((SEQUENCES,), KEYS, dtype=torch.int32, device=device)
    low, high = LOWEST + DEPTH + noise, HIGHEST - noise
    center = torch.linspace(low, high, HEADS).expand(SEQUENCES, HEADS)
    level = center
    for _ in range(steps):
        level = center + walk.memory * (level - center) + walk.step * normal(SEQUENCES, HEADS)
        level = torch.where(level < low, 2 * low - level, torch.where(level > high, 2 * high - level, level))
        q = normal(SEQUENCES, 1, HEADS, HEAD_DIM)
        target = level[:, None] * HEAD_DIM**0.5
        q[..., 0] = target.bfloat16().float()
        q[..., 1] = target - q[..., 0]
        q[..., 2] = DEPTH * HEAD_DIM**0.5
        yield {"q": q.to(device, torch.bfloat16), "seq_lens": seq_lens, **cache}


class Exactness:
    """Checks every result against the float64 reference and keeps the largest ratio of error to bound.

    The bound is the same as in the tests: twice the error of plain bfloat16 torch, plus rounding.
    """

    def __init__(self) -> None:
        self.results, self.worst = 0, 0.0

    def truth(self, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and the row maxima [batch, q_heads]. Sets the bounds for the checks that follow."""
        maxima = torch.full(arguments["q"].shape[::2][:2], torch.nan, device=arguments["q"].device)
        truth = reference.decode_attention(**arguments, carried_phi=maxima, compute_dtype=torch.float64)
        plain = reference.decode_attention(**arguments, compute_dtype=torch.bfloat16)
        self._truth = [x.double() for x in truth]
        roundings = (torch.finfo(torch.bfloat16).eps, 2 * torch.finfo(torch.float32).eps)
        self._bounds = [
            2 * (low.double() - x).abs().max() + rounding * x.abs().max()
            for low, x, rounding in zip(plain, self._truth, roundings, strict=True)
        ]
        return *truth, maxima

    def check(self, result: tuple[Tensor, Tensor]) -> None:
        for actual, truth, bound in zip(result, self._truth, self._bounds, strict=True):
            ratio = ((actual.double() - truth).abs().max() / bound).item()
            if not ratio <= 1:
                raise SystemExit(f"a result is off by {ratio:.2f} times the tolerance")
            self.worst = max(self.worst, ratio)
        self.results += 1


def opt_like(walk: Walk, steps: int, device: str) -> dict[str, object]:
    exact = Exactness()
    policies = ("fixed phi", "carried phi", "hopeless phi")
    counts = {name: torch.zeros(1, dtype=torch.int32, device=device) for name in policies}
    carried = torch.full((SEQUENCES, HEADS), torch.nan, device=device)
    phi = {"hopeless phi": torch.full((HEADS,), 1000.0, device=device)}
    maxima: list[Tensor] = []
    lowest, highest = torch.inf, -torch.inf
    source = opt_like_steps(walk, CALIBRATION_STEPS + steps, device)
    for step, arguments in enumerate(tqdm(source, total=CALIBRATION_STEPS + steps, disable=None)):
        if step == CALIBRATION_STEPS:
            seen = torch.stack(maxima).flatten(0, 1).T.contiguous()  # [q_heads, rows]
            phi["fixed phi"] = calibration.choose_phi(seen).to(device)
            maxima.clear()
        *_, row_maxima = exact.truth(arguments)
        maxima.append(row_maxima.cpu())
        inputs = torch.einsum("bqhd,bkhd->bhqk", arguments["q"].float(), arguments["k_cache"].float())
        inputs *= HEAD_DIM**-0.5
        lowest, highest = min(lowest, inputs.min().item()), max(highest, inputs.max().item())
        if step < CALIBRATION_STEPS:
            continue
        for name in policies:
            how = {"carried_phi": carried} if name == "carried phi" else {"phi": phi[name]}
            exact.check(ops.decode_attention(**arguments, **how, fallback_count=counts[name]))
    rows = torch.stack(maxima)  # [steps, batch, q_heads]
    distances = {
        "fixed phi": (rows - phi["fixed phi"].cpu()).abs(),
        "carried phi": carried_distance(rows),
        "hopeless phi": (rows - phi["hopeless phi"].cpu()).abs(),
    }
    return {
        "memory": walk.memory,
        "step": walk.step,
        "inputs": [round(lowest, 1), round(highest, 1)],
        "steps": steps,
        "rows": rows.numel(),
        **{name: summary(int(counts[name].item()), distances[name]) for name in policies},
        "results within tolerance": exact.results,
        "largest error, of what is allowed": round(exact.worst, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1100, help="tokens per story; a chat gets a quarter")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps on inputs as wide as OPT's")
    parser.add_argument("--output", help="default: bench/results/phi_<device>.json")
    options = parser.parse_args()

    wide = {name: opt_like(walk, options.steps, options.device) for name, walk in WALKS.items()}
    for name, result in wide.items():
        print(f"{name}: {result}")
    results = {"demo model": demo(options.device, options.tokens), "inputs as wide as OPT's": wide}
    device = torch.device(options.device).type
    measure.save(options.output or f"bench/results/phi_{device}.json", results)


if __name__ == "__main__":
    main()
