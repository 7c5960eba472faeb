"""Translates csrc/cuda for AMD with torch's own hipify: python hipify.py CSRC DEST TORCH.

DEST becomes a copy of csrc whose hip/ also holds the translated files of cuda/. csrc/hip itself is written by
hand; only its includes of cuda/ are redirected to the translated files. cuda/nvidia, which has no counterpart
on AMD, is left out. Files whose text does not change keep their timestamps, so nothing is recompiled for
them. TORCH is the package's folder, because pip's isolated builds hide torch from import.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

SOURCES = (".cu", ".cuh", ".h")


def translate(csrc: Path, work: Path) -> None:
    """Fills `work`, which must not exist yet."""
    from torch.utils.hipify.hipify_python import hipify

    ignore = shutil.ignore_patterns("nvidia", "cpu", "*.py", "*.sh")
    shutil.copytree(csrc, work, ignore=ignore)
    with contextlib.redirect_stderr(io.StringIO()):
        results = hipify(
            project_directory=str(work),
            output_directory=str(work),
            includes=[str(work / "cuda" / "*")],
            header_include_dirs=[str(work)],
            extensions=SOURCES,
            header_extensions=(".cuh", ".h"),
            hip_clang_launch=True,  # <<<>>> stays
            is_pytorch_extension=True,
            show_progress=False,
        )
    written = {Path(result.hipified_path) for result in results.values() if result.hipified_path}
    by_hand = {work / "hip" / path.relative_to(csrc / "hip") for path in (csrc / "hip").rglob("*")}
    if clash := written & by_hand:
        sys.exit(f"flashdecpp: csrc/cuda and csrc/hip both have {', '.join(sorted(p.name for p in clash))}")
    for path in (path for path in by_hand if path.is_file()):
        path.write_text(path.read_text().replace('#include "cuda/', '#include "hip/'))
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
