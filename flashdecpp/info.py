"""What `flashdecpp info` says: what was built, which devices there are, which kernels will run and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import flashdecpp
from flashdecpp import _C
from flashdecpp._library import LIBRARIES, cpu_instruction_set

_NATIVE_HEAD_DIMS = (64, 96, 128, 192, 256)


def lines() -> Iterator[str]:
    """The report, line by line."""
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


def _gpu_lines() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "  cuda: no GPU that torch can use: the runner uses the CPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = properties.total_memory / 2**30
        yield (
            f"  cuda:{index}: {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {gigabytes:.0f} GiB"
        )
    if not LIBRARIES["cuda"].loaded:
        yield "  cuda: the CUDA op library is not loaded (see above): the runner uses the CPU"


def _kernel_lines() -> Iterator[str]:
    dims = ", ".join(str(dim) for dim in _NATIVE_HEAD_DIMS)
    yield "  decode_attention: online softmax, or the unified maximum where phi is given or carried; rows"
    yield "    outside its safe window are recomputed online and counted in fallback_count"
    yield f"    cuda: head_dim {dims} natively; other multiples of 8 are padded to the next (slower)"
    if torch.cuda.is_available() and LIBRARIES["cuda"].loaded:
        properties = torch.cuda.get_device_properties(0)
        device = _C.DeviceProperties(
            properties.multi_processor_count, 10 * properties.major + properties.minor
        )
        points = _C.default_inflection_points(device)
        flat = f"flat_gemm below {points.m2}, " if points.m2 > points.m1 else ""
        yield f"  linear(auto) on a GPU: gemv below M = {points.m1}, {flat}blas above"
        yield "    (the rule for shapes that nobody profiled; K not a multiple of 8 and float32 go to blas)"
    yield "  linear(auto) on the CPU: own kernel for small M, blas above (csrc/cpu/linear_rule.h)"
