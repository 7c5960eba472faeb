"""Kernels of the HIP library: code objects, instructions, and register and LDS usage.

python tests/hip_code.py            writes the report that tests/test_hip_library.py compares
python tests/hip_code.py NAME ...   the main loop (the one with the most matrix products or loads) of every
                                    kernel whose name contains NAME
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "flashdecpp/lib/libflashdecpp_hip.so"
REPORT = ROOT / "tests/data/hip_resources.txt"
BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"


@dataclass(frozen=True)
class Target:
    """Limits of a compute unit, or of a pair of them on RDNA."""

    name: str
    registers: int  # per lane, shared by the warps of a SIMD unit
    step: int  # granularity of register allocation
    warps: int  # per SIMD unit, at most
    shared: int  # bytes of LDS
    simds: int


TARGETS = {
    "gfx90a": Target("MI210", 512, 8, 8, 64 << 10, 4),
    "gfx942": Target("MI300X", 512, 8, 8, 64 << 10, 4),
    "gfx1100": Target("RX 7900 XTX", 1536, 24, 16, 128 << 10, 4),
}
INSTRUCTIONS = {
    "matrix": r"v_(mfma|wmma)_\w+",
    "load128": r"global_load_(dwordx4|b128)",
    "lds_read": r"ds_(read|load)\w*",
    "lds_write": r"ds_(write|store)\w*",
    "permute": r"(ds_b?permute\w*|v_permlane\w*)",
    "scratch": r"scratch_\w+|buffer_(load|store)_dword\w* v\d+, off, s\[",
}


@dataclass(frozen=True)
class Kernel:
    target: str
    name: str  # without namespaces
    vgprs: int  # including AGPRs, which come from the same registers
    sgprs: int
    vgpr_spills: int
    scratch: int  # bytes per lane
    static_shared: int
    threads: int
    warp: int
    counts: Counter[str]  # by name in INSTRUCTIONS, and "all"

    @cached_property
    def family(self) -> str:
        return re.match(r"\w+", self.name)[0]

    @cached_property
    def shared(self) -> int:
        return self.static_shared + dynamic_shared(self.name)

    @property
    def warps(self) -> float:
        """Resident warps per SIMD unit, by registers and LDS."""
        target = TARGETS[self.target]
        by_registers = min(target.warps, target.registers // (-(-self.vgprs // target.step) * target.step))
        block_warps = self.threads / self.warp
        blocks = min(by_registers * target.simds // block_warps, target.shared // max(self.shared, 1))
        return blocks * block_warps / target.simds


def dynamic_shared(name: str) -> int:
    """Dynamic shared memory in bytes: SharedMemory::kBytes of tile.cuh, FlatGemm::kSharedBytes."""
    if match := re.search(r"AttentionTile<\w+, (\w+), (\d+), CtaShape<(\d+), (\d+), \d+, (\d+)>", name):
        element = 1 if match[1] == "float8" else 2
        dims, warps, stages, scratch_rows = map(int, match.groups()[1:])
        stages_bytes = stages * 2 * 16 * (dims + 16 // element) * element
        return warps * (stages_bytes + 16 * (dims + 8) * 2 + scratch_rows * (dims + 8) * 4)
    if match := re.search(r"flat_gemm_kernel<\w+, (\d), \w+>", name):
        text = (ROOT / "csrc/heuristics/linear.h").read_text()
        table = re.search(r"kFlatTiles\[\] = \{(.*?)\n\};", text, re.DOTALL)[1]
        tile = re.findall(r"\{([^}]*)\}", table)[int(match[1])].split(",")
        block_m, block_n, block_k, _, _, stages = map(int, tile[:6])
        stage = (block_m + block_n) * (block_k + 8) * 2
        return min(stages, (64 << 10) // stage, 2) * stage  # 2: kMaxStages of arch_amd.h
    return 0


def tool(name: str) -> str:
    """Path of an LLVM tool: next to the compiler that built the library, or on PATH."""
    compiler = ROOT / "build/hip-toolchain/compiler"
    folders = [Path(compiler.read_text().strip()).resolve().parent] if compiler.exists() else []
    found = [str(f / name) for f in folders if (f / name).exists()] + [
        shutil.which(f"{name}-19"),
        shutil.which(name),
    ]
    path = next((path for path in found if path), None)
    if path is None:
        raise FileNotFoundError(f"LLVM's {name} was not found")
    return path


def code_objects(library: Path) -> dict[str, list[bytes]]:
    """Code objects by target, one for each source file."""
    data, found, at = library.read_bytes(), {}, 0
    while (at := data.find(BUNDLE, at)) >= 0:
        (count,), entry = struct.unpack_from("<Q", data, at + len(BUNDLE)), at + len(BUNDLE) + 8
        for _ in range(count if count < 64 else 0):
            offset, size, length = struct.unpack_from("<QQQ", data, entry)
            name = data[entry + 24 : entry + 24 + length].decode()
            entry += 24 + length
            if name.startswith("hip") and size:
                found.setdefault(name.rpartition("--")[2], []).append(data[at + offset : at + offset + size])
        at += len(BUNDLE)
    return found


def short(names: list[str]) -> list[str]:
    text = subprocess.run(
        [tool("llvm-cxxfilt")], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short_names = []
    for line in text:
        line = re.sub(r"flashdecpp::|arch::|\(anonymous namespace\)::|^void ", "", line).replace(
            "__half", "half"
        )
        line = line.replace("__hip_bfloat16", "bfloat16").replace("(DType)", "")
        line = re.sub(r", \w+Stages<.*>>$", ">", re.sub(r"\([^()]*\)$", "", line))  # these repeat the tile
        short_names.append(line)
    return short_names


def kernels(library: Path = LIBRARY) -> list[Kernel]:
    found = []
    for target, objects in code_objects(library).items():
        for code in objects:
            with tempfile.NamedTemporaryFile(suffix=".co") as file:
                file.write(code)
                file.flush()
                found += kernels_of(target, file.name)
    return sorted(found, key=lambda kernel: (list(TARGETS).index(kernel.target), kernel.name))


def kernels_of(target: str, path: str) -> list[Kernel]:
    def output(*command: str) -> str:
        return subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout

    notes = output(tool("llvm-readelf"), "--notes").partition("amdhsa.kernels:")[2]
    listing = output(
        tool("llvm-objdump"), "-d", "--no-show-raw-insn", "--no-leading-addr", f"--mcpu={target}"
    )
    parts = re.split(r"\n<(\w+)>:\n", listing)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    entries = [entry for entry in re.split(r"\n  - (?=\.)", notes) if ".symbol:" in entry]
    names = [re.search(r"\.name: +(\w+)", entry)[1] for entry in entries]
    result = []
    for entry, symbol, name in zip(entries, names, short(names), strict=True):
        number = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)\n", entry + "\n")}
        body = bodies[symbol]
        counts = Counter({key: len(re.findall(rf"\t({regex})", body)) for key, regex in INSTRUCTIONS.items()})
        counts["all"] = len(re.findall(r"\n\t", body))
        result.append(
            Kernel(
                target=target,
                name=name,
                vgprs=number["vgpr_count"],
                sgprs=number["sgpr_count"],
                vgpr_spills=number["vgpr_spill_count"],
                scratch=number["private_segment_fixed_size"],
                static_shared=number["group_segment_fixed_size"],
                threads=number["max_flat_workgroup_size"],
                warp=number["wavefront_size"],
                counts=counts,
            )
        )
    return result


LOOP = {
    "matrix": r"v_(mfma|wmma)",
    "valu": r"v_(?!mfma|wmma)",
    "salu": r"s_(?!waitcnt|nop|barrier)",
    "load128": r"global_load_(dwordx4|b128)",
    "other loads": r"global_load_(?!dwordx4|b128)",
    "lds": r"ds_(?!b?permute)",
    "permute": r"ds_b?permute",
    "scratch": r"scratch_|buffer_",
}


def hot_loops(target: str, code: bytes, wanted: list[str]) -> Iterator[str]:
    """Instruction counts of one iteration; an upper bound, as rarely taken branches are included."""
    with tempfile.NamedTemporaryFile(suffix=".co") as file:
        file.write(code)
        file.flush()
        command = [tool("llvm-objdump"), "-d", f"--mcpu={target}", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n[0-9a-f]+ <(\w+)>:\n", listing)
    for name, body in zip(short(parts[1::2]), parts[2::2], strict=True):
        if not any(want in name for want in wanted):
            continue
        # instruction, its address, its branch target as an offset in the kernel
        lines = re.findall(r"\t(\S+).*// ([0-9A-F]+):[^<\n]*(?:<\w+\+0x([0-9a-f]+)>)?", body)
        code_at = [(int(address, 16), op, to) for op, address, to in lines]
        begin = code_at[0][0]
        back = [(begin + int(to, 16), at) for at, op, to in code_at if "branch" in op and to]
        loops = []
        for first, last in ((first, last) for first, last in back if first < last):
            ops = [op for at, op, _ in code_at if first <= at <= last]
            loops.append(
                (
                    Counter({key: sum(bool(re.match(p, op)) for op in ops) for key, p in LOOP.items()}),
                    len(ops),
                )
            )
        key = "matrix" if any(counts["matrix"] for counts, _ in loops) else "load128"
        counts, size = max(loops, key=lambda loop: (loop[0][key], -loop[1]))
        yield f"{target} {name}: {size} instructions, " + ", ".join(
            f"{n} {k}" for k, n in counts.items() if n
        )


def compiler() -> str:
    command = [tool("llvm-objdump"), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"LLVM version \S+", version)[0]


def report(found: list[Kernel]) -> str:
    """One line per kernel and target."""
    fields = ("VGPR", "SGPR", "spills", "scratch", "LDS", "threads", "warps", "code")
    counted = [name for name in INSTRUCTIONS if name != "scratch"]
    rows = [("target", *fields, *counted, "kernel")]
    for k in found:
        needs = (k.vgprs, k.sgprs, k.vgpr_spills, k.scratch, k.shared, k.threads, k.warps, k.counts["all"])
        rows.append((k.target, *needs, *(k.counts[name] for name in counted), k.name))
    lines = ["".join(f"{value!s:>10}" for value in row[:-1]) + f"  {row[-1]}" for row in rows]
    return "\n".join([f"{compiler()}; written by python tests/hip_code.py", *lines]) + "\n"


if __name__ == "__main__":
    if wanted := sys.argv[1:]:
        for target, objects in code_objects(LIBRARY).items():
            for code in objects:
                for line in hot_loops(target, code, wanted):
                    print(line)
    else:
        REPORT.write_text(report(kernels()))
        print(f"wrote {REPORT}")
