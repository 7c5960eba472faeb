"""A/B of decode steps on one GPU: RMSNorm inside the GEMV against RMSNorm as a launch of its own.

Both ways take turns in one process, three rounds of the median step time of bench/runner.py each.

    python bench/norm_in_gemv.py --output bench/results/norm_in_gemv_h200.json
"""

from __future__ import annotations

import argparse
import gc
import statistics

import measure
import torch
from runner import MODELS, Subject, random_weights

from flashdecpp.models import decoder
from flashdecpp.models.decoder import Decoder

CASES = [(1, 128), (1, 1024), (2, 1024), (4, 1024), (8, 1024)]
ROUNDS = 3
fused = Decoder._linear


def unfused(self, x, weight, bias=None, norm=None, activation=None):
    if norm is not None:
        x = self._norm(x, norm)
    return decoder._linear(x, weight, bias, activation=activation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    options = parser.parse_args()
    ceiling = measure.read_ceiling_gbs()
    results: dict = {"read_ceiling_gbs": round(ceiling), "models": {}}
    for name in ("llama-2-7b", "llama-3-8b"):
        weights = random_weights(MODELS[name], torch.float16, "cuda")
        subject = Subject(Decoder(MODELS[name], weights, 16384), 16384, ceiling * 1e9)
        rows = results["models"][name] = []
        for batch, context in CASES:
            times: dict[str, list[float]] = {"in the GEMV": [], "own launch": []}
            for _ in range(ROUNDS):
                for way, function in zip(times, (fused, unfused), strict=True):
                    Decoder._linear = function
                    times[way].append(subject.step_ms(batch, context)["ms"])
            rows.append(
                {"batch": batch, "context": context}
                | {way: {"ms": statistics.median(t), "all": t} for way, t in times.items()}
            )
            print(name, rows[-1], flush=True)
        del weights, subject
        gc.collect()
        torch.cuda.empty_cache()
    if options.output:
        measure.save(options.output, results)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
