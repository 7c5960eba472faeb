"""When every CTA of a decode step's layer ran: a table and a picture of who waits for whom.

Needs a CUDA library whose kernels stamp their times (they are a little slower for it):

    cmake -S . -B build/timeline -G Ninja -DFLASHDECPP_CUDA=ON -DFLASHDECPP_PYTHON=OFF \\
        -DFLASHDECPP_TIMELINE=ON -DFLASHDECPP_OUTPUT=$PWD/flashdecpp
    cmake --build build/timeline --target flashdecpp_cuda
    python bench/timeline.py --model llama-2-7b --batch 1 --context 1024
    python bench/timeline.py --draw bench/results/timeline_h200.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from dataclasses import replace
from pathlib import Path

import measure
import torch
from runner import MODELS, Subject, random_weights

import flashdecpp
from flashdecpp.models.decoder import Decoder
from flashdecpp.models.phi import PhiSource

KERNELS = ("norm", "gemv", "rotary", "attention")  # TimelineOf in csrc/cuda/timeline.h
WORDS = 8  # of a TimelineRecord
CAPACITY, LAYERS, LAYER, STEPS = 1 << 18, 6, 3, 8


@torch.inference_mode()
def record(model: str, batch: int, context: int) -> list[dict]:
    """The CTAs of one layer in the middle of a step: kernel, index in the step, SM, and times in us."""
    config = MODELS[model]
    config = replace(config, layers=LAYERS, ropes=config.ropes[:LAYERS], windows=config.windows[:LAYERS])
    weights = random_weights(config, torch.float16, "cuda")
    decoder = Decoder(config, weights, config.context, PhiSource.carry())
    running = Subject(decoder, context + 256, 1.0).batch(batch, context)
    library = ctypes.CDLL(str(Path(flashdecpp.__file__).parent / "lib/libflashdecpp_cuda.so"))
    buffer = torch.zeros(2 + CAPACITY * WORDS, dtype=torch.int64, device="cuda")
    best: list[dict] = []
    for step in range(STEPS):
        buffer.zero_()
        buffer[1] = CAPACITY
        torch.cuda.synchronize()
        if step == 2:  # the graph has been captured
            error = library.flashdecpp_set_timeline(ctypes.c_void_p(buffer.data_ptr()))
            if error:
                raise SystemExit(f"timeline: the buffer could not be set, CUDA error {error}")
        running.read(running.step())
        torch.cuda.synchronize()
        if step > 2:
            count = int(buffer[0])
            rows = buffer[2 : 2 + count * WORDS].view(count, WORDS).cpu().tolist()
            ctas = middle_layer(rows)
            if not best or length(ctas) < length(best):
                best = ctas
    library.flashdecpp_set_timeline(None)
    return best


def middle_layer(rows: list[list[int]]) -> list[dict]:
    """The records of one layer, from its first kernel to the first of the next."""
    ctas = []
    for head, *stamps in rows:
        kernel, sm, cta = (head & 0xFFFFFFFF) >> 16, head & 0xFFFF, head >> 32
        ctas.append({"kernel": KERNELS[kernel], "sm": sm, "cta": cta, "ns": stamps})
    ctas.sort(key=lambda c: c["ns"][0])
    # A kernel starts when all CTAs of the one before have: a launch is a run of distinct CTAs of a kernel.
    launches: list[dict] = []
    for cta in ctas:
        last = launches[-1] if launches else None
        if last is None or last["kernel"] != cta["kernel"] or cta["cta"] in last["seen"]:
            last = {"kernel": cta["kernel"], "seen": set(), "ctas": []}
            launches.append(last)
        last["seen"].add(cta["cta"])
        last["ctas"].append(cta)
    attentions = [i for i, x in enumerate(launches) if x["kernel"] == "attention"]
    begin, end = attentions[LAYER - 1] - 1, attentions[LAYER] + 1
    zero = min(c["ns"][0] for x in launches[begin:end] for c in x["ctas"])
    return [
        {
            "launch": index,
            "kernel": launch["kernel"],
            "cta": c["cta"],
            "sm": c["sm"],
            "us": [round((ns - zero) / 1e3, 3) if ns else None for ns in c["ns"]],
        }
        for index, launch in enumerate(launches[begin:end])
        for c in launch["ctas"]
    ]


def length(ctas: list[dict]) -> float:
    return max(c["us"][-1] for c in ctas)


def summary(ctas: list[dict]) -> list[dict]:
    """A row per launch: when its CTAs started, stopped waiting, and ended."""
    rows = []
    for index in sorted({c["launch"] for c in ctas}):
        own = [c for c in ctas if c["launch"] == index]
        row = {"kernel": own[0]["kernel"], "ctas": len(own)}
        for i, name in enumerate(("start", "ready", "released", "mark 3", "mark 4", "mark 5", "end")):
            times = [c["us"][i] for c in own if c["us"][i] is not None]
            if times:
                row[name] = [min(times), round(statistics.median(times), 2), max(times)]
        rows.append(row)
    return rows


def draw(results: dict, path: Path) -> None:
    """A line per SM and launch; a CTA is pale while it waits for the kernel before it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(KERNELS, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(len(results), figsize=(14, 5 * len(results)), squeeze=False)
    for axis, (name, result) in zip(axes[:, 0], results.items(), strict=True):
        for c in result["ctas"]:
            start, released, end = c["us"][0], c["us"][2] or c["us"][0], c["us"][-1]
            y, color = c["sm"] + 0.4 * (c["launch"] % 2), colors[c["kernel"]]
            axis.hlines(y, start, released, color=color, alpha=0.25, linewidth=1)
            axis.hlines(y, released, end, color=color, linewidth=1)
        axis.set(title=name, xlabel="us", ylabel="SM")
        handles = [plt.Line2D([], [], color=color, label=kernel) for kernel, color in colors.items()]
        axis.legend(handles=handles, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--draw", help="only draw what a file of results holds")
    parser.add_argument("--output", help="default: bench/results/timeline_h200.json")
    options = parser.parse_args()
    if options.draw:
        return draw(
            json.loads(Path(options.draw).read_text())["results"], Path(options.draw).with_suffix(".png")
        )
    ctas = record(options.model, options.batch, options.context)
    rows = summary(ctas)
    for row in rows:
        print(row)
    name = f"{options.model}, {options.batch} x {options.context}"
    path = Path(options.output or "bench/results/timeline_h200.json")
    measure.save(path, {name: {"launches": rows, "ctas": ctas}})


if __name__ == "__main__":
    main()
