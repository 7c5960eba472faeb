"""Translates csrc/cuda for AMD with torch's own hipify: python hipify.py CSRC DEST TORCH.

DEST becomes a copy of csrc whose hip/ also holds the files of cuda/, translated; csrc/hip itself is written
by hand and copied as it is. What only NVIDIA machines have (*_sm80*, *_sm90*, tensor copies, mma.sync) is
left out. Files whose text stays keep their time, so that nothing is compiled again for them. TORCH is the
package's folder: pip's isolated builds hide it from import.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import shutil
import sys
import tempfile
from pathlib import Path

NVIDIA = (
    "*_sm[0-9]*",
    "*_tensor.cu*",
    "*_staged.cu",
    "*_map.h",
    "*_nvidia.h",
    "quantized_gemv.cu",
    "quantized_linear_kernel.cuh",
)
SOURCES = (".cu", ".cuh", ".h")


def for_nvidia(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in NVIDIA)


def translate(csrc: Path, work: Path) -> None:
    """Fills `work`, which must not exist yet."""
    from torch.utils.hipify.hipify_python import hipify

    ignore = shutil.ignore_patterns(*NVIDIA, "cpu", "*.py", "*.sh")
    shutil.copytree(csrc, work, ignore=ignore)
    with contextlib.redirect_stderr(io.StringIO()):
        results = hipify(
            project_directory=str(work),
            output_directory=str(work),
            includes=[str(work / "cuda" / "*")],
            extensions=SOURCES,
            header_extensions=(".cuh", ".h"),
            hip_clang_launch=True,  # <<<>>> stays
            is_pytorch_extension=True,
            show_progress=False,
        )
    written = {Path(result.hipified_path) for result in results.values() if result.hipified_path}
    by_hand = {work / "hip" / path.name for path in (csrc / "hip").iterdir()}
    if clash := written & by_hand:
        sys.exit(f"flashdecpp: csrc/cuda and csrc/hip both have {', '.join(sorted(p.name for p in clash))}")
    shutil.rmtree(work / "cuda")


def update(source: Path, dest: Path) -> None:
    """Makes dest the same as source; leaves what is the same alone."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [path for path in dest.rglob("*") if path.is_file()]:
        if path.relative_to(dest) not in wanted:
            path.unlink()
    for name in wanted:
        text = (source / name).read_bytes()
        if not (dest / name).exists() or (dest / name).read_bytes() != text:
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            (dest / name).write_bytes(text)


def main(csrc: str, dest: str, torch: str) -> None:
    sys.path.append(str(Path(torch).parent))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve() / "csrc"
        translate(Path(csrc).resolve(), work)
        update(work, Path(dest))


if __name__ == "__main__":
    main(*sys.argv[1:])
