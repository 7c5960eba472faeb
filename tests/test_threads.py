"""The number of threads on the CPU, and how they wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashdecpp import _threads


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch):
    """Without the user's settings, and with torch's threads as they were afterward."""
    for variable in ("OMP_NUM_THREADS", *_threads.WAITING_VARIABLES):
        monkeypatch.setenv(variable, "")  # so that what a test sets is undone
        monkeypatch.delenv(variable)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_waiting_is_short_by_default() -> None:
    _threads.choose_waiting_policy()
    assert {name: os.environ[name] for name in _threads.SHORT_WAITS} == _threads.SHORT_WAITS
    assert "OMP_WAIT_POLICY" not in os.environ
    for name, value in _threads.SHORT_WAITS.items():
        assert f"{name}={value}" in _threads.waiting_policy()


@pytest.mark.parametrize("variable", _threads.WAITING_VARIABLES)
def test_the_users_waiting_policy_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "7")
    _threads.choose_waiting_policy()
    assert {name: os.environ.get(name) for name in _threads.WAITING_VARIABLES if name in os.environ} == {
        variable: "7"
    }
    assert _threads.waiting_policy() == f"{variable}=7"


def test_openmps_default_is_named() -> None:
    assert "default" in _threads.waiting_policy()


def test_the_module_does_not_import_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, _threads.__file__], check=True)


def test_openmp_takes_the_waiting_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp reports the spin count that it read."""
    _threads.choose_waiting_policy()
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    shown = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True
    ).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch uses another OpenMP")
    assert f"GOMP_SPINCOUNT = '{_threads.SHORT_WAITS['GOMP_SPINCOUNT']}'" in shown


def test_an_explicit_count() -> None:
    _threads.use_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("count", [0, -1, 1025, 2**40])
def test_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=f"number of threads must be from 1 to 1024, got {count}"):
        _threads.use_threads(count)


def test_omp_num_threads_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)
    _threads.use_threads(None)
    assert torch.get_num_threads() == 5
    assert _threads.explanation() == "OMP_NUM_THREADS=5"


@pytest.mark.parametrize(
    ("cores", "allowed", "quota", "threads"),
    [
        (8, 16, None, 8),  # two hyperthreads per core
        (8, 3, None, 3),
        (8, 16, 2.0, 2),
        (8, 16, 2.7, 2),
        (8, 16, 0.5, 1),
        (8, 1, 4.0, 1),
    ],
)
def test_the_default_is_the_smallest_limit(
    cores: int, allowed: int, quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_threads, "allowed_cpus", lambda: allowed)
    monkeypatch.setattr(_threads, "cgroup_cpus", lambda: quota)
    torch.set_num_threads(cores)
    _threads.use_threads(None)
    assert torch.get_num_threads() == threads
    assert f"{allowed} CPUs allowed" in _threads.explanation()
    assert ("no CPU quota" if quota is None else f"quota of {quota:g}") in _threads.explanation()


def test_the_affinity_mask_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + (
        "from flashdecpp import _threads; assert _threads.allowed_cpus() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # a quota above the process's own group
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2,
        ),
        # the host's path in a container, where only the top is mounted
        ({"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n3:cpu,cpuacct:/g\n",
                "sys/fs/cgroup/cpu,cpuacct/g/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/g/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "9:cpuset:/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_cgroup_quotas(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    assert _threads.cgroup_cpus(written(tmp_path, files)) == cpus
