"""What `flashdecpp info` says: what was built, which devices there are, which kernels will run and why."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

import flashdecpp
from flashdecpp import _C, ops
from flashdecpp._library import LIBRARIES, cpu_instruction_set, gpu_library
from flashdecpp.tuning import TableSet, find_tables
from flashdecpp.tuning.device import device_name, gfx_target, gpu_properties
from flashdecpp.tuning.table import DTYPES, Shape, TableError, check_sizes

_NATIVE_HEAD_DIMS = (64, 96, 128, 192, 256)
_MOST_ROWS = 1024  # up to which choices are looked up


def lines(shapes: Sequence[Shape] = (), dtype: str | None = None) -> Iterator[str]:
    """The report, line by line; with what linear takes for weights of these shapes.

    dtype: of the shapes; None is bfloat16 on the CPU and float16 on a GPU. Raises TableError for another than
        linear has, and for sizes that no weight has.
    """
    check_sizes(shapes)
    if dtype is not None and dtype not in DTYPES:
        raise TableError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    build = _C.build_info()
    yield f"flashdecpp {flashdecpp.__version__}, torch {torch.__version__}"
    yield ""
    yield "Built"
    for reason in build["reasons"].split("; "):
        yield f"  {reason}"
    yield f"  compilers: {build['cxx']}" + (f", {build['cuda_compiler']}" if build["cuda_compiler"] else "")
    yield ""
    yield "Loaded"
    for library in LIBRARIES.values():
        yield f"  {library.name}: " + ("yes" if library.loaded else f"no, {library.problem}")
    yield ""
    yield "Devices"
    yield f"  cpu: {torch.get_num_threads()} threads, kernels for {cpu_instruction_set()}"
    yield from _gpu_lines()
    yield ""
    yield "Kernels"
    yield from _kernel_lines()
    yield ""
    yield "Tables of linear(auto)"
    yield from _table_lines(shapes, dtype)


def _gpu_lines() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "  cuda: no GPU that torch can use: the runner uses the CPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = properties.total_memory / 2**30
        if target := gfx_target(torch.device("cuda", index)):
            kind, units = f"{target}, waves of {properties.warp_size}", "compute units"
        else:
            kind, units = f"capability {properties.major}.{properties.minor}", "multiprocessors"
        yield (
            f"  cuda:{index}: {properties.name}, {kind}, {properties.multi_processor_count} {units}, "
            f"{gigabytes:.0f} GiB"
        )
    if not gpu_library().loaded:
        name = gpu_library().name
        yield f"  cuda: the {name} op library is not loaded (see above): the runner uses the CPU"


def _kernel_lines() -> Iterator[str]:
    dims = ", ".join(str(dim) for dim in _NATIVE_HEAD_DIMS)
    yield "  decode_attention: online softmax, or the unified maximum if phi is given or carried; rows"
    yield "    outside its safe window stay exact, in the same launch, and are counted in fallback_count"
    yield f"    cuda: head_dim {dims} natively; other multiples of 8 are padded to the next (slower)"
    if torch.cuda.is_available() and gpu_library().loaded:
        device = gpu_properties(torch.device("cuda", 0))
        if gfx_target(torch.device("cuda", 0)):
            yield "    cuda: loads through registers"
        elif device.arch == 90 and os.environ.get("FLASHDECPP_GPU_KERNELS") != "generic":
            yield "    cuda: loads by tensor copies where block_size is a multiple of 16, else by staged ones"
        else:
            yield "    cuda: loads by staged copies, as on older GPUs"
        points = _C.default_inflection_points(device)
        flat = f"flat_gemm below {points.m2}, " if points.m2 > points.m1 else ""
        yield f"  linear(auto) on a GPU: gemv below M = {points.m1}, {flat}blas above"
        yield "    (the rule for shapes that no table has; K not a multiple of 8 and float32 go to blas)"
    yield "  linear(auto) on the CPU: own kernel for small M, blas above (csrc/cpu/linear_rule.h)"
    yield "  quantized_linear: decoded in registers on the CPU, from 32 rows on in dequantised strips;"
    yield "    on a GPU decoded in registers for up to 48 rows of float16 or bfloat16 x, else"
    yield "    dequantise + blas (also for K not a multiple of 16, or weight rows not 16-byte aligned)"


def _table_lines(shapes: Sequence[Shape], dtype: str | None) -> Iterator[str]:
    found = find_tables()
    for problem in found.problems:
        yield f"  not used: {problem}"
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and gpu_library().loaded:
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        table = found.tables.get(device_name(device))
        if table is None:
            what = "none, so the rule above; `flashdecpp tune` measures one"
        else:
            files = " and ".join(str(path) for path in found.files[table.device])
            what = f"{len(table.profiles)} shapes in {files}"
        yield f"  {device}, {device_name(device)}: {what}"
        for n, k in shapes:
            yield f"    {_choice_line(found, device, n, k, dtype)}"


def _choice_line(found: TableSet, device: torch.device, n: int, k: int, dtype: str | None) -> str:
    """Such as "bfloat16 [576, 1536]: gemv from M = 1 to 64, blas from M = 65 (default rule)"."""
    dtype = dtype or ("bfloat16" if device.type == "cpu" else "float16")
    row = torch.empty(k, dtype=getattr(torch, dtype), device=device)
    weight = row.as_strided((n, k), (0, 1))
    choices = [(ops.linear_choice(row.expand(m, k), weight), m) for m in range(1, _MOST_ROWS + 1)]
    ranges = []
    for impl, group in groupby(choices, key=lambda choice: choice[0]):
        rows = [m for _, m in group]
        ranges.append(f"{impl} from M = {rows[0]}" + ("" if rows[-1] == _MOST_ROWS else f" to {rows[-1]}"))
    table = found.tables.get(device_name(device))
    profile = table.find(dtype, n, k) if table else None
    source = f"measured up to M = {profile.m[-1]}" if profile else "default rule"
    return f"{dtype} [{n}, {k}]: {', '.join(ranges)} ({source})"
