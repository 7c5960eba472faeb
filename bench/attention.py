"""decode_attention compared with its alternatives on one GPU.

Every shape is checked against flashdecpp.reference before it is timed. Times are medians of CUDA-graph
replays, rotating through enough KV to miss L2; `fraction` is the KV's bytes over that time, relative to
read_ceiling_gbs; `over_best_peer` is the time of the fastest peer on a shape, in any layout, over ours with
the unified maximum.

    python bench/attention.py [--groups main,ragged | all] [--peers none] [--output FILE.json]
    python bench/attention.py --quick        # ten shapes, no peers, nothing written
    python bench/attention.py --dry-run      # tiny shapes on the CPU, to test the script itself

FlashInfer and FlashAttention-3 are included if installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import measure
import torch
from attention_peers import PEERS, Call, installed
from attention_shapes import GROUPS, QUICK, Group, Inputs, Shape
from attention_summary import summary
from torch import Tensor

from flashdecpp import ops, reference

REPLAYS = 20
MIN_CALLS = 4  # per graph, to amortize the few microseconds of its launch
Timer = Callable[[list[Callable[[], object]]], float]


def our_calls(inputs: Inputs) -> dict[str, Call]:
    """decode_attention in both layouts, with the unified maximum and, as an ablation, the online one."""

    def call(i: int, layout: str, phi: Tensor | None) -> Tensor:
        k, v = getattr(inputs, layout)(i)
        table = inputs.block_table if layout == "paged" else None
        return ops.decode_attention(inputs.q, k, v, inputs.seq_lens, table, phi=phi, **inputs.options)[0]

    return {
        f"{layout} {name}": partial(call, layout=layout, phi=phi)
        for layout in inputs.layouts
        if layout != "head_major"
        for name, phi in (("online", None), ("unified", inputs.phi))
    }


def expected(inputs: Inputs, layout: str) -> Tensor:
    """The reference result for set 0."""
    k, v = getattr(inputs, layout)(0)
    if layout == "head_major":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    table = inputs.block_table if layout == "paged" else None
    return reference.decode_attention(inputs.q, k, v, inputs.seq_lens, table, **inputs.options)[0]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The largest error over the largest value; infinite if either is not finite."""
    error = (actual.float() - truth.float()).abs().max() / truth.float().abs().max()
    return error.item() if error.isfinite() else torch.inf


def fallbacks(inputs: Inputs) -> int:
    """The number of rows recomputed with the unified maximum, which its timings should not include."""
    count = torch.zeros(1, dtype=torch.int32, device=inputs.q.device)
    ops.decode_attention(
        inputs.q,
        *inputs.paged(0),
        inputs.seq_lens,
        inputs.block_table,
        phi=inputs.phi,
        fallback_count=count,
        **inputs.options,
    )
    return count.item()


def measure_shape(shape: Shape, peers: list[str], device: str, timer: Timer) -> dict:
    """Checks and times every contestant on one shape."""
    inputs = Inputs(shape, device)
    truth: dict[str, Tensor] = {}
    row: dict = {
        **asdict(shape),
        "kv_bytes": shape.kv_bytes,
        "sets": inputs.sets,
        "fallbacks": 0,
        "us": {},
        "error": {},
        "refused": {},
    }
    # Allow for a few roundings of the result and of the softmax weights.
    allowed = 8 * torch.finfo(inputs.q.dtype).eps

    def contest(name: str, layout: str, make: Callable[[], Call], checked: bool = True) -> None:
        try:
            call = make()
            if checked:
                if layout not in truth:
                    truth[layout] = expected(inputs, layout)
                call(0)  # state left by one call must not corrupt the next
                error = relative_error(call(0), truth[layout])
                row["error"][name] = float(f"{error:.2g}")
                if error > allowed:
                    raise ArithmeticError(f"wrong: relative error {error:.2g}, allowed {allowed:.2g}")
            calls = [partial(call, i) for i in range(inputs.sets)]
            row["us"][name] = round(timer(calls * -(-MIN_CALLS // inputs.sets)), 2)
        except Exception as error:  # peers may raise anything
            row["refused"][name] = (str(error).strip() or repr(error)).splitlines()[0][:160]
            print(f"    {name}: {row['refused'][name]}", flush=True)

    for name, call in our_calls(inputs).items():
        contest(name, name.split()[0], lambda call=call: call)
    if "paged unified" in row["us"]:
        row["fallbacks"] = fallbacks(inputs)
    for name in peers:
        _, layout, make = PEERS[name]
        if layout in inputs.layouts:
            # No peer supports fp8 scales per head, so their results differ.
            contest(name, layout, partial(make, inputs), checked=not shape.fp8)
    return row


def measure_group(name: str, group: Group, peers: list[str], device: str, timer: Timer) -> Iterator[dict]:
    if group.kernels not in (None, os.environ.get("FLASHDECPP_GPU_KERNELS")):
        yield from measure_elsewhere(name, group, device)
        return
    names = [peer for peer in peers if peer.startswith(group.peers)] if group.peers else []
    for shape in group.shapes:
        with torch.no_grad():
            row = measure_shape(shape if device == "cuda" else shape.shrunk(), names, device, timer)
        yield {"group": name, "shape": str(shape), **row}


def measure_elsewhere(name: str, group: Group, device: str) -> list[dict]:
    """Measures a group in a new process: the library reads FLASHDECPP_GPU_KERNELS only once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "rows.json")
        command = [sys.executable, __file__, "--groups", name, "--peers", "none", "--output", str(output)]
        dry_run = ["--dry-run"] if device == "cpu" else []
        environment = {**os.environ, "FLASHDECPP_GPU_KERNELS": str(group.kernels)}
        # Failures are recorded in the rows, and main() reports them.
        subprocess.run([*command, *dry_run], env=environment, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())["results"]["shapes"]


def derive(row: dict, ceiling_gbs: float) -> dict:
    """Adds the figures derived from a row's times."""
    floor = row["kv_bytes"] / ceiling_gbs / 1e3
    ours = {name: us for name, us in row["us"].items() if name not in PEERS}
    peers = {name: us for name, us in row["us"].items() if name in PEERS}
    best = min(peers, key=peers.__getitem__, default=None)
    unified = {
        layout: ours[f"{layout} unified"] for layout in ("paged", "contiguous") if f"{layout} unified" in ours
    }
    return {
        **row,
        "floor_us": round(floor, 2),
        "fraction": {name: round(floor / us, 3) for name, us in ours.items()},
        "best_peer": best,
        "over_best_peer": {
            layout: round(peers[best] / us, 3) for layout, us in unified.items() if best is not None
        },
    }


def progress(row: dict) -> str:
    """One line per row: ours with the unified maximum, the best peer, and its time over ours."""
    parts = []
    for layout in ("paged", "contiguous"):
        name = f"{layout} unified"
        if name in row["us"]:
            parts.append(f"{layout} {row['us'][name]:.1f} us, {row['fraction'][name]:.2f} of the ceiling")
    if row["best_peer"]:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["over_best_peer"].values())
        parts.append(f"{row['best_peer']} {row['us'][row['best_peer']]:.1f} us: {ratios}")
    return f"{row['group']}: {row['shape']}: " + "; ".join(parts)


def call_once_us(calls: list[Callable[[], object]]) -> float:
    """The timer for dry runs."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6 / len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="main", help=f"some of {','.join(GROUPS)}, or all")
    parser.add_argument("--peers", default="sdpa,flashinfer,fa3", help="names or their beginnings, or none")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--output", help="default: bench/results/attention_h100.json; none of a quick or dry run"
    )
    options = parser.parse_args()

    groups = {"quick": QUICK} if options.quick else GROUPS
    if not options.quick and options.groups != "all":
        unknown = set(options.groups.split(",")) - set(GROUPS)
        if unknown:
            parser.error(
                f"--groups must be among {', '.join(GROUPS)}, or all; got {', '.join(sorted(unknown))}"
            )
        groups = {name: GROUPS[name] for name in options.groups.split(",")}
    output = options.output
    if output is None and not (options.quick or options.dry_run):
        output = "bench/results/attention_h100.json"

    device = "cpu" if options.dry_run else "cuda"
    timer = call_once_us if options.dry_run else partial(measure.graph_median_us, replays=REPLAYS)
    ceiling = 1.0 if options.dry_run else measure.read_ceiling_gbs()
    print(f"read ceiling {ceiling:.0f} GB/s", flush=True)
    torch.manual_seed(0)
    wanted = [] if options.quick or options.peers == "none" else options.peers.split(",")
    peers = installed(wanted)

    rows: list[dict] = []
    for name, group in groups.items():
        for row in measure_group(name, group, peers, device, timer):
            rows.append(derive(row, ceiling))
            print(progress(rows[-1]), flush=True)
        if output:  # after every group, so that an interrupted run keeps its results
            measure.save(
                Path(output), {"read_ceiling_gbs": round(ceiling), "summary": summary(rows), "shapes": rows}
            )
    for line, value in summary(rows).items():
        print(f"{line:58} {value}")
    failed = [row["shape"] for row in rows if any(name not in PEERS for name in row["refused"])]
    if failed:
        sys.exit(f"decode_attention was wrong or failed on {', '.join(failed)}")


if __name__ == "__main__":
    main()
