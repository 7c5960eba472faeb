"""Drives CMake for pip. build_support decides which op libraries to build; the rest is in pyproject.toml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))

from build_support import cuda, environment, hip, progress  # noqa: E402


class CMakeBuild(build_ext):
    """Builds all libraries in CMakeLists.txt into the package folder (in place for an editable install)."""

    def run(self) -> None:
        torch = environment.need_torch()
        cmake = environment.need_cmake()
        ninja = environment.tool("ninja", "pip install ninja")
        environment.need_compiler()
        jobs = environment.max_jobs()
        cpu_isas = "|".join(environment.listed("FLASHDECPP_CPU_ISAS")) or "native"
        gpus = [cuda.choose(torch), hip.choose(torch)]

        output = ROOT / "flashdecpp" if self.inplace else Path(self.build_lib).resolve() / "flashdecpp"
        build = ROOT / "build" / sysconfig.get_config_var("SOABI") / ("inplace" if self.inplace else "wheel")
        build.mkdir(parents=True, exist_ok=True)
        self._configure(
            [
                *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DFLASHDECPP_TORCH_DIR={torch.folder}",
                f"-DFLASHDECPP_OUTPUT={output}",
                f"-DFLASHDECPP_CPU_ISAS={cpu_isas}",
                f"-DFLASHDECPP_BUILD_REASONS={'; '.join(choice.reason for choice in gpus)}",
                *(option for choice in gpus for option in choice.options),
            ]
        )
        forget_unfinished(build, ninja)
        if sources := progress.steps(build, ninja):
            targets = sum(len(choice.targets) for choice in gpus)
            print(progress.announce(sources, targets, progress.available_cores()), flush=True)
        command = [cmake, "--build", str(build), *(["-j", str(jobs)] if jobs else [])]
        try:
            subprocess.run(command, check=True, env={**os.environ, "NINJA_STATUS": "[%f/%t, %e s] "})
        except subprocess.CalledProcessError:
            sys.exit(f"flashdecpp: {' '.join(command[:2])} failed; the first error above says why")

    def _configure(self, command: list[str]) -> None:
        """Runs CMake. Shows what it chose to build, and the rest of its output only if it fails."""
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            print(result.stdout, flush=True)
            sys.exit("flashdecpp: CMake failed; the first error above says why")
        for line in result.stdout.splitlines():
            if line.startswith("-- flashdecpp builds "):
                reasons = line.removeprefix("-- flashdecpp builds ").split("; ")
                print("flashdecpp builds", *reasons, sep="\n  ", flush=True)


def forget_unfinished(build: Path, ninja: str) -> None:
    """Deletes objects whose headers ninja doesn't know, which a killed build can leave: never out of date."""
    known = subprocess.run([ninja, "-C", str(build), "-t", "deps"], capture_output=True, text=True).stdout
    for target in re.findall(r"^(\S.*?): #deps 0,", known, re.MULTILINE):
        (build / target).unlink(missing_ok=True)


setup(ext_modules=[Extension("flashdecpp._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
