"""The report of `flashdecpp info`: the build, the devices, and which kernels run and why."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path

import torch

import flashdecpp
from flashdecpp import _C, _threads, ops
from flashdecpp._gpu_support import gfx_target, gpu_code, gpu_problem
from flashdecpp._library import LIBRARIES, cpu_instruction_set, gpu_library
from flashdecpp.tuning import TableSet, find_tables
from flashdecpp.tuning.device import device_name, gpu_properties
from flashdecpp.tuning.table import DTYPES, Shape, TableError, check_sizes

_NATIVE_HEAD_DIMS = (64, 96, 128, 192, 256)
# x86-64's instruction sets that have kernels of their own, and which flags of /proc/cpuinfo each needs
# besides those of the sets before it.
_X86_ISAS = {
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "avx512_amx": {"amx_tile", "amx_bf16"},
}
_MAX_ROWS = 1024  # choices are listed up to this M


def lines(
    shapes: Sequence[Shape] = (), dtype: str | None = None, attention: Sequence[_C.AttentionProblem] = ()
) -> Iterator[str]:
    """Yields the report line by line, including linear's implementations for weights of these shapes and
    decode_attention's choices on a GPU.

    dtype: of the weights; defaults to bfloat16 on the CPU and float16 on a GPU. Raises TableError for a dtype
        that linear does not support and for sizes out of range.
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
    yield from _cpu_lines(cpu_instruction_set(), build["cpu_isas"].split(", "))
    yield from _gpu_lines()
    yield ""
    yield "Kernels"
    yield from _kernel_lines()
    yield ""
    yield "Tables of linear(auto)"
    yield from _table_lines(shapes, dtype)
    if attention:
        yield ""
        yield "Choices of decode_attention"
        yield from _attention_lines(attention)


def parse_attention(text: str) -> list[_C.AttentionProblem]:
    """Parses calls such as "8,1,32,8,128,4096,16", separated by semicolons.

    The numbers are batch, q_len, q_heads, kv_heads, head_dim, max_len, and block_size for a paged cache.
    """
    problems = []
    for call in text.split(";"):
        if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9}){5,6}\s*", call, re.ASCII):
            raise ValueError(
                "--attention must be batch,q_len,q_heads,kv_heads,head_dim,max_len or these and block_size, "
                f"such as '8,1,32,8,128,4096,16', got {reprlib.repr(call)}"
            )
        batch, q_len, q_heads, kv_heads, head_dim, max_len, *block_size = map(int, call.split(","))
        for valid, wanted in (
            (batch > 0, "a batch above 0"),
            (0 < q_len <= _C.MAX_NEW_TOKENS, f"a q_len of 1 to {_C.MAX_NEW_TOKENS}"),
            (kv_heads > 0 and q_heads > 0 and q_heads % kv_heads == 0, "q_heads a multiple of kv_heads"),
            (q_heads <= _C.MAX_QUERY_GROUP * kv_heads, f"at most {_C.MAX_QUERY_GROUP} q_heads per KV head"),
            (
                0 < head_dim <= _C.MAX_HEAD_DIM and head_dim % 8 == 0,
                f"a head_dim that is a multiple of 8 up to {_C.MAX_HEAD_DIM}",
            ),
        ):
            if not valid:
                raise ValueError(f"--attention must have {wanted}, got {call.strip()}")
        problems.append(
            _C.AttentionProblem(
                batch=batch,
                q_len=q_len,
                q_heads=q_heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                capacity=max_len,
                block_size=block_size[0] if block_size else 0,
            )
        )
    return problems


def _attention_lines(problems: Sequence[_C.AttentionProblem]) -> Iterator[str]:
    """Each GPU's choices for 16-bit caches; an H100's if there is no GPU."""
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count())
        gpus = {f"cuda:{index}": gpu_properties(torch.device("cuda", index)) for index in indices}
    else:
        gpus = {"no GPU here, as on": _C.nvidia_device("an H100", 90, 132, 228 << 10)}
    for where, gpu in gpus.items():
        yield f"  {where} {gpu}"
        for problem in problems:
            yield f"    [{problem}] -> {_C.choose_attention(problem, gpu)}"


def _cpu_lines(running: str, built: Sequence[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[str]:
    yield f"  cpu: {torch.get_num_threads()} threads, kernels for {running}"
    yield f"    threads: {_threads.explanation()}"
    yield f"    waiting for each other: {_threads.waiting_policy()}"
    best = best_instruction_set(cpuinfo)
    if best is not None and best not in built and not os.environ.get("FLASHDECPP_CPU_ISA"):
        yield f"    this processor has {best}, which the library was not built for (only {', '.join(built)}):"
        yield "    `FLASHDECPP_CPU_ISAS=native pip install --force-reinstall --no-deps .` adds it"


def best_instruction_set(cpuinfo: Path) -> str | None:
    """The best of an x86-64 processor that has kernels; None for the baseline and other processors."""
    try:
        features = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return None
    flags = set() if features is None else set(features[1].split())
    usable = list(takewhile(lambda isa: _X86_ISAS[isa] <= flags, _X86_ISAS))
    return usable[-1] if usable else None


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
        if gpu_library().loaded:
            if problem := gpu_problem(index):
                yield f"    {problem}"
            elif gpu_code(index) == "jit":
                yield "    the library has only PTX for it, which the driver compiles on first use (JIT)"
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
        elif device.has_tma:
            yield "    cuda: loads by TMA where block_size is a multiple of 16, else by cp.async"
        else:
            yield "    cuda: loads by cp.async"
        points = _C.default_inflection_points(device)
        flat = f"flat_gemm below {points.m2}, " if points.m2 > points.m1 else ""
        yield f"  linear(auto) on a GPU: gemv below M = {points.m1}, {flat}blas above"
        yield "    (the rule for shapes that no table has; K not a multiple of 8 and float32 go to blas)"
    yield "  linear(auto) on the CPU: own kernel for small M, blas above (csrc/heuristics/cpu.h)"
    yield "  quantized_linear: decoded in registers on the CPU, from 32 rows on in dequantized strips;"
    streamed = _C.MAX_STREAMED_ROWS
    yield f"    on a GPU decoded in registers for up to {streamed} rows of float16 or bfloat16 x, else"
    yield "    dequantize + blas (also for K not a multiple of 16, or weight rows not 16-byte aligned)"


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
    """A line such as "bfloat16 [576, 1536]: gemv from M = 1 to 64, blas from M = 65 (default rule)"."""
    dtype = dtype or ("bfloat16" if device.type == "cpu" else "float16")
    row = torch.empty(k, dtype=getattr(torch, dtype), device=device)
    weight = row.as_strided((n, k), (0, 1))
    choices = [(ops.linear_choice(row.expand(m, k), weight), m) for m in range(1, _MAX_ROWS + 1)]
    ranges = []
    for impl, group in groupby(choices, key=lambda choice: choice[0]):
        rows = [m for _, m in group]
        ranges.append(f"{impl} from M = {rows[0]}" + ("" if rows[-1] == _MAX_ROWS else f" to {rows[-1]}"))
    table = found.tables.get(device_name(device))
    profile = table.find(dtype, n, k) if table else None
    source = f"measured up to M = {profile.m[-1]}" if profile else "default rule"
    return f"{dtype} [{n}, {k}]: {', '.join(ranges)} ({source})"
