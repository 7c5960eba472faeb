"""Drives CMake for pip and decides which op libraries to build. The rest is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_CUDA_ARCHITECTURES = ["80-real", "90a-real"]
# GPU generations by name, as torch's own builds define them
CUDA_GENERATIONS = {
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
DEFAULT_HIP_ARCHITECTURES = ["gfx90a", "gfx942", "gfx1100"]


def torch_folder() -> Path | None:
    """torch's folder in the target environment; pip's isolated builds hide it from import."""
    candidates = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for folder in candidates:
        if (torch := Path(folder) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return torch.parents[3]
    return None


def tool(name: str, remedy: str) -> str:
    """Full path of a build tool. Exits with a hint on how to get it if it is missing."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        sys.exit(f"flashdecpp: {name} was not found; {remedy}")
    return path


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(path) for path in candidates if path.exists()), shutil.which("nvcc"))


def present_gpus() -> list[str]:
    """Compute capabilities of this machine's supported NVIDIA GPUs, such as ["9.0"]."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return sorted({name for name in found if re.fullmatch(r"\d+\.\d", name) and not too_old(name)})
    except (OSError, subprocess.CalledProcessError):
        return []


def listed(variable: str) -> list[str]:
    """The entries of an environment variable, separated by semicolons, commas or whitespace."""
    return [entry for entry in re.split(r"[;,\s]+", os.environ.get(variable, "")) if entry]


def capabilities(entries: list[str]) -> list[str]:
    """Expands generation names in torch's notation: "Ampere" -> "8.0", "8.6+PTX"."""
    return [part for entry in entries for part in CUDA_GENERATIONS.get(entry, entry).split(";")]


def too_old(capability: str) -> bool:
    return int(capability.partition(".")[0]) < 8


def cmake_architectures(capabilities: list[str]) -> list[str]:
    """CMake's names for torch's notation: "9.0" -> "90a-real"; "8.6+PTX" -> "86-real", "86-virtual".

    Skips those before 8.0, which container images list for all libraries alike.
    """
    names = []
    for capability in capabilities:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", capability)
        if match is None:
            sys.exit(
                f"flashdecpp: TORCH_CUDA_ARCH_LIST has {capability!r}; write such as '8.0;9.0', '8.6+PTX' "
                "or 'Hopper'"
            )
        if too_old(capability):
            continue
        number, specific = match[1] + match[2], match[3]
        names.append(f"{number}{specific or ('a' if number == '90' else '')}-real")
        if match[4]:
            names.append(f"{number}{specific}-virtual")
    if not names:
        sys.exit(
            f"flashdecpp: TORCH_CUDA_ARCH_LIST has {', '.join(capabilities)}; "
            "the kernels need 8.0 (Ampere) or newer"
        )
    return list(dict.fromkeys(names))


def without(left_out: list[str]) -> str:
    return f" without {', '.join(left_out)}, which the kernels don't run on" if left_out else ""


def cuda_choice() -> tuple[list[str], str]:
    """CMake options for CUDA, and a sentence explaining them."""
    switch = os.environ.get("FLASHDECPP_CUDA", "")
    if switch == "0":
        return ["-DFLASHDECPP_CUDA=OFF"], "cuda: not built, FLASHDECPP_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        if switch == "1":
            sys.exit("flashdecpp: FLASHDECPP_CUDA=1 but nvcc was not found; install it or set CUDA_HOME")
        return [
            "-DFLASHDECPP_CUDA=OFF"
        ], "cuda: not built, no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    if asked := capabilities(listed("TORCH_CUDA_ARCH_LIST")):
        architectures = cmake_architectures(asked)
        why = "TORCH_CUDA_ARCH_LIST" + without([capability for capability in asked if too_old(capability)])
    elif gpus := present_gpus():
        architectures, why = cmake_architectures(gpus), "the GPU of this machine"
    else:
        architectures = DEFAULT_CUDA_ARCHITECTURES
        why = "no GPU here and TORCH_CUDA_ARCH_LIST not set, so the default"
    options = [
        "-DFLASHDECPP_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
    ]
    return options, f"cuda: built for {', '.join(architectures)} ({why}) with {nvcc}"


def find_rocm() -> tuple[Path, str] | None:
    """ROCm's folder and its compiler (clang, or hipcc, which calls it)."""
    homes = [
        os.environ.get("ROCM_PATH"),
        os.environ.get("ROCM_HOME"),
        os.environ.get("HIP_PATH"),
        "/opt/rocm",
    ]
    names = ("bin/amdclang++", "llvm/bin/clang++", "lib/llvm/bin/clang++", "bin/hipcc")
    for home in (Path(home) for home in (*homes, "/opt/rocm") if home):
        if (home / "include" / "hip" / "hip_runtime.h").exists():
            compiler = next((str(home / name) for name in names if (home / name).exists()), None)
            if compiler is not None:
                return home, compiler
    return None


def present_amd_gpus() -> list[str]:
    """Targets of this machine's supported AMD GPUs, such as ["gfx942"]."""
    for name in ("amdgpu-arch", "rocm_agent_enumerator"):
        for program in (name, f"/opt/rocm/bin/{name}", f"/opt/rocm/llvm/bin/{name}"):
            try:
                found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
            except (OSError, subprocess.CalledProcessError):
                continue
            return sorted({target for target in found if hip_target(target)})
    return []


def hip_target(name: str) -> bool:
    """Whether the kernels support the target's matrix instructions (CDNA2, CDNA3, RDNA3)."""
    return re.fullmatch(r"(gfx90a|gfx942|gfx11\d\d)(:\w+[+-])*", name) is not None


def hip_choice() -> tuple[list[str], str]:
    """CMake options for HIP, and a sentence explaining them."""
    off = ["-DFLASHDECPP_HIP=OFF"]
    switch = os.environ.get("FLASHDECPP_HIP", "")
    if switch == "0":
        return off, "hip: not built, FLASHDECPP_HIP=0"
    rocm = find_rocm()
    if rocm is None:
        if switch == "1":
            sys.exit("flashdecpp: FLASHDECPP_HIP=1 but ROCm was not found; install it or set ROCM_PATH")
        return off, "hip: not built, no ROCm in ROCM_PATH or in /opt/rocm"
    home, compiler = rocm
    if asked := listed("PYTORCH_ROCM_ARCH"):
        targets = [target for target in asked if hip_target(target)]
        why = "PYTORCH_ROCM_ARCH" + without([target for target in asked if not hip_target(target)])
        if not targets:
            sys.exit(
                f"flashdecpp: PYTORCH_ROCM_ARCH has {', '.join(asked)}; "
                "the kernels need gfx90a, gfx942 or gfx11xx"
            )
    elif gpus := present_amd_gpus():
        targets, why = gpus, "the GPU of this machine"
    else:
        targets = DEFAULT_HIP_ARCHITECTURES
        why = "no GPU here and PYTORCH_ROCM_ARCH not set, so the default"
    options = [
        "-DFLASHDECPP_HIP=ON",
        f"-DFLASHDECPP_HIP_COMPILER={compiler}",
        f"-DFLASHDECPP_HIP_FLAGS=--rocm-path={home}",
        f"-DFLASHDECPP_HIP_ARCHITECTURES={';'.join(targets)}",
    ]
    return options, f"hip: built for {', '.join(targets)} ({why}) with {compiler}"


class CMakeBuild(build_ext):
    """Builds all libraries in CMakeLists.txt into the package folder (in place for an editable install)."""

    def run(self) -> None:
        torch = torch_folder()
        if torch is None:
            sys.exit("flashdecpp: torch >= 2.10 was not found; pip install torch, then try again")
        cmake = tool("cmake", "pip install 'cmake>=3.25'")
        ninja = tool("ninja", "pip install ninja")
        compiler = os.environ.get("CXX")
        if compiler is None and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            sys.exit("flashdecpp: no C++ compiler was found; install g++ (apt install g++) or set CXX")
        cpu_isas = "|".join(listed("FLASHDECPP_CPU_ISAS")) or "all"
        cuda_options, cuda_reason = cuda_choice()
        hip_options, hip_reason = hip_choice()
        reasons = f"cpu: always built; {cuda_reason}; {hip_reason}"
        print(f"flashdecpp builds {reasons}", flush=True)

        output = ROOT / "flashdecpp" if self.inplace else Path(self.build_lib).resolve() / "flashdecpp"
        build = ROOT / "build" / sysconfig.get_config_var("SOABI") / ("inplace" if self.inplace else "wheel")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFLASHDECPP_TORCH_DIR={torch}",
            f"-DFLASHDECPP_OUTPUT={output}",
            f"-DFLASHDECPP_CPU_ISAS={cpu_isas}",
            f"-DFLASHDECPP_BUILD_REASONS={reasons}",
            *cuda_options,
            *hip_options,
        ]
        jobs = os.environ.get("MAX_JOBS")
        for command in (configure, [cmake, "--build", str(build), *(["-j", jobs] if jobs else [])]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError:
                sys.exit(f"flashdecpp: {' '.join(command[:2])} failed; the first error above says why")


setup(
    ext_modules=[Extension("flashdecpp._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_folder() else ["torch>=2.10"],
)
