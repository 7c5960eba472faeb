"""How linear picks an implementation: its tables, how their points are derived and found, and their use."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import timeit
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runner_models import SIZES, save_model
from strategies import Place, randn
from test_cli import flashdecpp, run
from tolerance import compare

from flashdecpp import _C, ops, tuning
from flashdecpp._library import install_linear_table
from flashdecpp.loading.checkpoint import open_checkpoint
from flashdecpp.tuning import Table, TableError, find_tables, tuner
from flashdecpp.tuning.device import device_name
from flashdecpp.tuning.table import IMPLS, Profile, parse_shapes
from flashdecpp.tuning.tuner import ROWS, SWITCH_WORTH, inflection_points

CPU = torch.device("cpu")
BF16 = int(_C.DType.bfloat16)


def profile(n: int, k: int, m1: int, m2: int, *, dtype: str = "bfloat16", last: int = 128) -> Profile:
    times = {impl: (1.0, 2.0) for impl in IMPLS}
    return Profile(dtype, n, k, m1, m2, (1, last), times, {"date": "2026-01-01"})


# ------------------------------------------------------------------------------------- lookup in C++


def points(tables: _C.LinearTables, device: str, dtype: _C.DType, n: int, k: int, m: int) -> tuple | None:
    found = tables.find(device, dtype, n, k, m)
    return found and (found.m1, found.m2)


def test_a_hit_requires_device_dtype_and_shape() -> None:
    tables = _C.LinearTables()
    tables.install("here", [_C.LinearRow(BF16, 64, 32, 3, 9, 128), _C.LinearRow(BF16, 32, 64, 5, 6, 16)])
    assert points(tables, "here", _C.DType.bfloat16, 64, 32, 1) == (3, 9)
    assert points(tables, "here", _C.DType.bfloat16, 32, 64, 1) == (5, 6)
    for miss in (
        ("there", _C.DType.bfloat16, 64, 32),
        ("here", _C.DType.float16, 64, 32),
        ("here", _C.DType.bfloat16, 65, 32),
        ("here", _C.DType.bfloat16, 64, 33),
    ):
        assert points(tables, *miss, 1) is None


def test_a_table_is_silent_beyond_the_measured_rows() -> None:
    tables = _C.LinearTables()
    tables.install("here", [_C.LinearRow(BF16, 64, 32, 3, 9, 128)])
    assert points(tables, "here", _C.DType.bfloat16, 64, 32, 128) == (3, 9)
    assert points(tables, "here", _C.DType.bfloat16, 64, 32, 129) is None


def test_a_new_table_replaces_only_its_own_devices_table() -> None:
    tables = _C.LinearTables()
    for device, m1 in (("here", 2), ("there", 3), ("here", 4)):
        tables.install(device, [_C.LinearRow(BF16, 64, 32, m1, 9, 128)])
    assert points(tables, "here", _C.DType.bfloat16, 64, 32, 1) == (4, 9)
    assert points(tables, "there", _C.DType.bfloat16, 64, 32, 1) == (3, 9)
    tables.install("there", [])
    assert points(tables, "there", _C.DType.bfloat16, 64, 32, 1) is None


@given(keys=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)), unique=True))
def test_every_row_is_found_whatever_their_order(keys: list[tuple[int, int, int]]) -> None:
    tables = _C.LinearTables()
    tables.install("here", [_C.LinearRow(*key, index + 1, 100, 128) for index, key in enumerate(keys)])
    for dtype in (_C.DType.float32, _C.DType.float16, _C.DType.bfloat16):
        for n in range(1, 10):
            for k in range(1, 10):
                key = (int(dtype), n, k)
                expected = (keys.index(key) + 1, 100) if key in keys else None
                assert points(tables, "here", dtype, n, k, 1) == expected


def test_lookup_time_is_negligible() -> None:
    """With 20 devices of 10,000 shapes each, called from Python; the bound suits any machine."""
    tables = _C.LinearTables()
    rows = [_C.LinearRow(BF16, n, 64, 3, 9, 128) for n in range(1, 10_001)]
    for index in range(20):
        tables.install(f"device {index}", rows)
    best = min(
        timeit.repeat(
            lambda: tables.find("device 19", _C.DType.bfloat16, 5_000, 64, 1), number=1_000, repeat=20
        )
    )
    assert best / 1_000 < 20e-6


# ---------------------------------------------------------------------------------------- linear uses them


@pytest.fixture
def install(one_place: Place):
    """Installs profiles in place of this machine's own table, which is restored afterwards."""
    device = torch.device(one_place.device)
    key = (device.type, "cpu" if device.type == "cpu" else torch.cuda.get_device_name())

    def put(*profiles: Profile) -> None:
        install_linear_table(*key, tuning.rows(Table(device.type, key[1], profiles)))

    yield put
    put()
    tuning.install()


def call(place: Place, m: int, n: int, k: int) -> dict:
    return {"x": randn(place, m, k), "weight": randn(place, n, k, seed=1)}


def runs_blas(function, **arguments) -> bool:
    with torch.profiler.profile() as profiler:
        function(**arguments)
    return "aten::linear" in {event.key for event in profiler.key_averages()}


def test_the_choice_changes_at_the_points(one_place, install):
    install(profile(96, 64, m1=3, m2=9), profile(64, 96, m1=1, m2=1))
    chosen = {m: ops.linear_choice(**call(one_place, m, 96, 64)) for m in (1, 2, 3, 8, 9, 128)}
    assert list(chosen.values()) == ["gemv", "gemv", "flat_gemm", "flat_gemm", "blas", "blas"]
    assert ops.linear_choice(**call(one_place, 1, 64, 96)) == "blas"


def test_without_a_profile_the_default_rule_applies(one_place, install):
    """A different shape or dtype, or more rows than were measured."""
    arguments = [call(one_place, m, 96, 64) for m in (1, 16, 17, 300)]
    install()
    rule = [ops.linear_choice(**a) for a in arguments]
    install(profile(96, 56, 1, 1), profile(88, 64, 1, 1), profile(96, 64, 1, 1, dtype="float16"))
    assert [ops.linear_choice(**a) for a in arguments] == rule
    install(profile(96, 64, 17, 17, last=16))
    assert [ops.linear_choice(**a) for a in arguments] == ["gemv", "gemv", *rule[2:]]


@pytest.mark.parametrize("m", [1, 5, 40])
def test_linear_runs_the_chosen_implementation(one_place, install, m):
    arguments = call(one_place, m, 96, 64)
    for points in ((129, 129), (1, 129), (1, 1)):
        install(profile(96, 64, *points))
        compare("linear", **arguments)
        assert runs_blas(ops.linear, **arguments) == (points == (1, 1))


def test_explicit_implementations_ignore_the_table(one_place, install):
    install(profile(96, 64, 1, 1))
    assert not runs_blas(ops.linear, **call(one_place, 1, 96, 64), impl="gemv")
    install(profile(96, 64, 129, 129))
    assert runs_blas(ops.linear, **call(one_place, 1, 96, 64), impl="blas")


def test_compiled_code_chooses_at_run_time(one_place, install):
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    arguments = call(one_place, 2, 96, 64)
    for points in ((129, 129), (1, 1), (129, 129)):
        install(profile(96, 64, *points))
        assert runs_blas(compiled, **arguments) == (points == (1, 1))


on_a_gpu = pytest.mark.parametrize(
    "one_place", [pytest.param(Place("cuda", torch.bfloat16), marks=pytest.mark.gpu)], indirect=True
)


@on_a_gpu
def test_a_gpu_uses_the_table_only_where_its_kernels_can_run(install, one_place):
    install(profile(96, 60, 129, 129), profile(96, 64, 129, 129), profile(96, 64, 129, 129, dtype="float32"))
    assert ops.linear_choice(**call(one_place, 1, 96, 60)) == "blas"
    assert ops.linear_choice(**call(Place("cuda", torch.float32), 1, 96, 64)) == "blas"
    assert ops.linear_choice(randn(one_place, 1, 64), randn(one_place, 96, 65)[:, 1:]) == "blas"


@on_a_gpu
def test_a_cuda_graph_keeps_the_captured_choice(install, one_place):
    arguments = call(one_place, 2, 96, 64)
    install(profile(96, 64, 129, 129))
    expected = ops.linear(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linear(**arguments)
    install(profile(96, 64, 1, 1))
    graph.replay()
    assert torch.equal(out, expected)


def test_linear_choice_validates_like_linear():
    with pytest.raises(ValueError, match="weight must have K 64 as x"):
        ops.linear_choice(torch.ones(1, 64), torch.ones(3, 65))


# ------------------------------------------------------------------------------------- points from times


def chosen(m1: int, m2: int, m: int) -> str:
    return "gemv" if m < m1 else "flat_gemm" if m < m2 else "blas"


def loss(us: dict, m1: int, m2: int, rows=ROWS) -> float:
    """Relative slowdown over the fastest implementation, summed over the rows."""
    total = 0.0
    for i, m in enumerate(rows):
        impl = chosen(m1, m2, m)
        taken = us[impl][i] if impl in us else None
        total += (taken or math.inf) / min(times[i] for times in us.values() if times[i]) - 1
    return total


def curves(m1: float, m2: float, slope: float = 0.5) -> dict[str, list[float]]:
    """gemv and flat_gemm cross at m1, flat_gemm and blas at m2."""
    flat = [100.0] * len(ROWS)
    gemv = [100.0 * (m / m1) ** slope for m in ROWS]
    blas = [100.0 * (m2 / m) ** slope for m in ROWS]
    return {"gemv": gemv, "flat_gemm": flat, "blas": blas}


def test_points_of_clean_curves() -> None:
    assert inflection_points(ROWS, curves(2.9, 15.9)) == (3, 16)
    assert inflection_points(ROWS, curves(1.9, 23.9)) == (2, 24)


def test_points_between_measured_rows_lie_where_the_lines_cross() -> None:
    us = {"gemv": [10.0, 20.0, 60.0], "blas": [30.0, 30.0, 40.0]}
    assert inflection_points([1, 4, 16], us) == (8, 8)  # 20 + 40/12 (m - 4) = 30 + 10/12 (m - 4) at m = 8
    us["gemv"][2] = 41.0
    assert inflection_points([1, 4, 16], us) == (15, 15)


@pytest.mark.parametrize(
    ("fastest", "expected"), [("gemv", (129, 129)), ("flat_gemm", (1, 129)), ("blas", (1, 1))]
)
def test_the_fastest_everywhere_gets_all_rows(fastest: str, expected: tuple) -> None:
    us = {impl: [9.0 if impl == fastest else 10.0] * len(ROWS) for impl in IMPLS}
    assert inflection_points(ROWS, us) == expected


def test_ties_go_to_blas_and_avoid_a_switch() -> None:
    assert inflection_points(ROWS, {impl: [10.0] * len(ROWS) for impl in IMPLS}) == (1, 1)
    hardly = {"gemv": [9.95] + [11.0] * 13, "flat_gemm": [10.0] * 14, "blas": [10.0] * 14}
    assert inflection_points(ROWS, hardly) == (1, 1)
    clearly = hardly | {"gemv": [9.7] + [11.0] * 13}
    assert inflection_points(ROWS, clearly) == (2, 2)


def test_one_outlier_moves_no_point() -> None:
    for impl, index in (("gemv", 0), ("flat_gemm", 5), ("blas", 12)):
        us = curves(2.9, 15.9)
        us[impl][index] *= 1.2
        assert inflection_points(ROWS, us) == (3, 16)


def test_unmeasured_implementations_are_never_chosen() -> None:
    us = {"gemv": [1.0, 1.0, None, None], "flat_gemm": [3.0, 3.0, 3.0, 3.0], "blas": [None, 9.0, 4.0, 2.0]}
    assert inflection_points([1, 2, 8, 16], us) == (3, 12)
    us = {"gemv": [1.0, 1.0, 1.0, None], "blas": [None, 9.0, 4.0, 2.0]}
    assert inflection_points([1, 2, 8, 16], us) == (9, 9)
    us = {"gemv": [1.0, 9.0, None, None], "blas": [None, None, 4.0, 2.0]}
    assert inflection_points([1, 2, 8, 16], us) == (8, 8)


@given(
    m1=st.floats(0.6, 100),
    wider=st.floats(1, 30),
    slope=st.floats(0.1, 1),
    noise=st.lists(st.floats(-0.03, 0.03), min_size=42, max_size=42),
)
@example(m1=3.0, wider=1.0, slope=0.1, noise=[0.0] * 42)
def test_noisy_times_cost_no_more_than_the_noise(m1, wider, slope, noise) -> None:
    """Judged by the true times, the points are in order and close to optimal."""
    true = curves(m1, m1 * wider, slope)
    noisy = {
        impl: [time * (1 + noise[14 * i + j]) for j, time in enumerate(true[impl])]
        for i, impl in enumerate(IMPLS)
    }
    found = inflection_points(ROWS, noisy)
    assert 1 <= found[0] <= found[1] <= ROWS[-1] + 1
    edges = [*ROWS, ROWS[-1] + 1]
    best = min(loss(true, a, b) for b in edges for a in edges if a <= b)
    # Where the two differ, each true time is at most 0.06 / 0.97 further behind than it appeared.
    assert loss(true, *found) - best <= 2 * SWITCH_WORTH + (1 + best) * len(ROWS) * 2 * 0.062


@given(rows=st.lists(st.integers(1, 300), min_size=1, max_size=8, unique=True).map(sorted), data=st.data())
def test_points_of_any_times_are_optimal(rows, data) -> None:
    times = st.one_of(st.none(), st.floats(0.1, 1e4))
    us = {impl: data.draw(st.lists(times, min_size=len(rows), max_size=len(rows))) for impl in IMPLS[:2]}
    us["blas"] = data.draw(st.lists(st.floats(0.1, 1e4), min_size=len(rows), max_size=len(rows)))
    m1, m2 = inflection_points(rows, us)
    assert Profile("float16", 8, 8, m1, m2, tuple(rows), {i: tuple(t) for i, t in us.items()}).m2 == m2

    def cost(a: int, b: int) -> float:
        return loss(us, a, b, rows) + SWITCH_WORTH * (len({chosen(a, b, m) for m in rows}) - 1)

    edges = [*rows, rows[-1] + 1]
    best = min(cost(a, b) for b in edges for a in edges if a <= b)
    assert cost(m1, m2) <= best * (1 + 1e-9) + 1e-9


# --------------------------------------------------------------------------------------------------- files


def table(*profiles: Profile, kind: str = "cuda", device: str = "NVIDIA H100 80GB HBM3") -> Table:
    return Table(kind, device, profiles)


def test_a_saved_table_round_trips(tmp_path: Path) -> None:
    times = {"gemv": (1.5, None), "flat_gemm": (2.0, 2.25), "blas": (3.0, 2.0)}
    first = Profile("float16", 4096, 4096, 2, 8, (1, 8), times, {"driver": "580.1"})
    written = table(first, profile(8, 16, 1, 1))
    path = tmp_path / written.file_name
    written.save(path)
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    assert Table.load(path) == written
    assert len(path.read_text().splitlines()) == 2 + len(written.profiles)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_later_versions_may_add_fields_to_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table(profile(8, 16, 1, 1)).save(path)
    raw = json.loads(path.read_text())
    raw["shapes"][0]["flat_gemm"] = [{"m": 16, "tile": 1, "splits": 4}]
    path.write_text(json.dumps(raw))
    assert Table.load(path) == table(profile(8, 16, 1, 1))


def test_merged_keeps_all_and_prefers_the_newer() -> None:
    old, new = (
        table(profile(8, 8, 1, 2), profile(16, 8, 3, 4)),
        table(profile(8, 8, 5, 6), profile(8, 24, 7, 8)),
    )
    merged = old.merged(new)
    assert [(p.n, p.k, p.m1) for p in merged.profiles] == [(8, 8, 5), (8, 24, 7), (16, 8, 3)]
    assert merged.find("bfloat16", 16, 8).m2 == 4
    assert merged.find("float16", 16, 8) is None
    with pytest.raises(TableError, match="NVIDIA H100 80GB HBM3 and of another can't be merged"):
        old.merged(table(device="another"))


BAD = {
    "version must be 1, got 2": lambda raw: raw | {"version": 2},
    "version must be 1, got None": lambda raw: [raw],
    "kind must be one of cuda, cpu, got 'tpu'": lambda raw: raw | {"kind": "tpu"},
    "device must be a device's name, got 3": lambda raw: raw | {"device": 3},
    r"device must be a device's name, got '\\ud800'": lambda raw: raw | {"device": "\ud800"},
    "device must be there": lambda raw: {name: raw[name] for name in ("version", "kind", "shapes")},
    "shapes must be a list": lambda raw: raw | {"shapes": {}},
    r"shapes\[0\] must be an object, got 5": lambda raw: raw | {"shapes": [5]},
    "shapes must be different": lambda raw: raw | {"shapes": raw["shapes"] * 2},
}
BAD_SHAPES = {
    "dtype must be one of float32, float16, bfloat16, got 'int8'": {"dtype": "int8"},
    "n must be an integer above 0, got 0": {"n": 0},
    "k must be an integer above 0, got 1.5": {"k": 1.5},
    "m1 must be an integer above 0, got True": {"m1": True},
    r"m2 must be m1 \(5\) or more, got 4": {"m1": 5, "m2": 4},
    r"m must be rising integers above 0, got \[4, 1\]": {"m": [4, 1]},
    r"m must be rising integers above 0, got \[\]": {"m": []},
    "m must be a list, got 3": {"m": 3},
    "us must be times of gemv, flat_gemm, blas": {"us": {"magic": [1, 2]}},
    "us must be a list of times": {"us": {"blas": 3}},
    "us.blas must be 2 times as m, got 1": {"us": {"blas": [1]}},
    "us.blas must be times above 0 or null, got -1": {"us": {"blas": [1, -1]}},
    "us.blas must be times above 0 or null, got nan": {"us": {"blas": [1, math.nan]}},
    "us must be a time of some implementation for m = 128": {"us": {"blas": [1, None]}},
    "environment must be an object": {"environment": 1},
}


@pytest.mark.parametrize("problem", [*BAD, *BAD_SHAPES])
def test_the_error_names_the_bad_file_and_the_problem(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "table.json"
    table(profile(8, 16, 1, 1)).save(path)
    raw = json.loads(path.read_text())
    if problem in BAD:
        raw = BAD[problem](raw)
    else:
        raw["shapes"][0] |= BAD_SHAPES[problem]
        problem = rf"shapes\[0\].{problem}"
    path.write_text(json.dumps(raw))
    with pytest.raises(TableError, match=rf"table\.json: {problem}.*`flashdecpp tune` writes a new one"):
        Table.load(path)


def test_the_error_names_a_file_that_is_missing_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no\.json can't be read: No such file"):
        Table.load(tmp_path / "no.json")
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(TableError, match=r"table\.json: not valid JSON"):
        Table.load(tmp_path / "table.json")


def test_shapes_on_the_command_line() -> None:
    assert parse_shapes("8,16; 24 , 8;8,16") == [(8, 16), (24, 8)]
    for wrong in ("", "8", "8,", "8x16", "8,16;", "0,8", "-8,8"):
        with pytest.raises(TableError, match="--shapes must be pairs N,K"):
            parse_shapes(wrong)


@pytest.mark.parametrize("size", [1 << 50, (1 << 24) + 1])
def test_implausible_weight_sizes_are_refused(size: int) -> None:
    """Before any tensor is allocated."""
    from flashdecpp import info

    said = "N and K of a weight must be from 1 to 16777216"
    for text in (f"{size},8", f"8,{size}"):
        with pytest.raises(TableError, match=said):
            parse_shapes(text)
    for shape in ((size, 8), (8, size), (size, size), (0, 8), (8, -1)):
        with pytest.raises(TableError, match=said):
            list(info.lines([shape]))
    with pytest.raises(TableError, match="must be pairs N,K"):
        parse_shapes("1" + "0" * 5000 + ",8")


@pytest.mark.parametrize(
    "content",
    {
        "deep": "[" * 100_000,
        "a pointer": "version https://git-lfs.github.com/spec/v1\n",
        "long values": json.dumps({"version": "x" * 100_000}),
        "a folder": None,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_corrupt_file_is_reported_in_one_short_line(tmp_path: Path, content) -> None:
    path = tmp_path / "a.json"
    path.mkdir() if content[1] is None else path.write_text(content[1])
    found = find_tables([tmp_path])
    assert found.tables == {} and len(found.problems) == 1
    (problem,) = found.problems
    assert str(path) in problem and "\n" not in problem and len(problem) < 500


def test_a_pipe_among_the_tables_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert "is a pipe or a device" in find_tables([tmp_path]).problems[0]


def test_the_users_table_wins_over_the_shipped_one(tmp_path: Path) -> None:
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir(), user.mkdir()
    table(profile(8, 8, 1, 2), profile(16, 8, 3, 4)).save(shipped / "h100.json")
    table(profile(8, 8, 5, 6)).save(user / "mine.json")
    table(profile(8, 8, 7, 7), device="another").save(user / "other.json")
    (user / "bad.json").write_text("[]")
    found = find_tables([shipped, user, tmp_path / "nowhere"])
    assert found.tables["NVIDIA H100 80GB HBM3"] == table(profile(8, 8, 5, 6), profile(16, 8, 3, 4))
    assert found.files["NVIDIA H100 80GB HBM3"] == [shipped / "h100.json", user / "mine.json"]
    assert set(found.tables) == {"NVIDIA H100 80GB HBM3", "another"}
    assert len(found.problems) == 1 and "bad.json" in found.problems[0]


def test_without_a_home_folder_only_shipped_tables_are_used(monkeypatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert find_tables() == find_tables([tuning.shipped_folder()])
    with pytest.raises(OSError, match="no home folder; set FLASHDECPP_CACHE"):
        tuning.user_folder()


def test_in_the_home_folder_of_another_user_only_shipped_tables_are_used(monkeypatch) -> None:
    glob = Path.glob

    def forbidden(path: Path, pattern: str) -> Iterator[Path]:
        if path == tuning.user_folder():
            raise PermissionError(13, "Permission denied", str(path))
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", forbidden)
    assert find_tables() == find_tables([tuning.shipped_folder()])


def test_shipped_tables_are_valid_and_reproducible() -> None:
    found = find_tables([tuning.shipped_folder()])
    assert found.problems == []
    for shipped in found.tables.values():
        for p in shipped.profiles:
            assert inflection_points(p.m, p.us) == (p.m1, p.m2)


# ---------------------------------------------------------------------------------- measuring and finding


def test_tune_measures_this_machine(one_place) -> None:
    device = torch.device(one_place.device)
    measured = tuner.tune([(64, 48), (32, 64), (32, 50)], one_place.dtype, device, rows=(1, 4, 16))
    assert (measured.kind, measured.device) == (device.type, device_name(device))
    assert [(p.n, p.k) for p in measured.profiles] == [(32, 50), (32, 64), (64, 48)]
    for p in measured.profiles:
        assert (p.dtype, p.m) == ("bfloat16", (1, 4, 16))
        impls = {"gemv", "blas"} if device.type == "cpu" else {"blas"} if p.k == 50 else set(IMPLS)
        assert set(p.us) == impls
        assert inflection_points(p.m, p.us) == (p.m1, p.m2)
        assert {"date", "flashdecpp", "torch"} <= set(p.environment)
    for line, p in zip(tuner.report(measured), measured.profiles, strict=True):
        assert f"bfloat16 [{p.n}, {p.k}]" in line


def test_a_shape_that_does_not_fit_is_refused_before_measuring() -> None:
    with pytest.raises(TableError, match=r"measuring \[8, 1099511627776\] needs .* GB are free"):
        tuner.tune([(8, 8), (8, 1 << 40)], torch.bfloat16, CPU)


def test_a_models_shapes_are_those_of_its_packed_weights(tmp_path: Path) -> None:
    save_model(tmp_path)
    hidden, ffn, vocab = (SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    expected = [(2 * hidden, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn), (vocab, hidden)]
    assert open_checkpoint(tmp_path).plan.linear_shapes == expected


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


ASK = "import torch as t, flashdecpp; print(flashdecpp.ops.linear_choice(t.ones(1, 48), t.ones(64, 48)))"


def test_tables_tuned_on_the_command_line_apply_to_later_runs(tmp_path: Path) -> None:
    cache = {"FLASHDECPP_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    tune = ("tune", "--device", "cpu", "--dtype", "float32", "--shapes")
    first = flashdecpp(*tune, "64,48", "--plot", str(tmp_path / "plot.png"), **cache)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (path,) = (tmp_path / "tables").iterdir()
    assert str(path) in first.stdout and "float32 [64, 48]: " in first.stdout
    assert Table.load(path).profiles[0].m == ROWS

    second = flashdecpp(*tune, "40,8", **cache)
    assert second.returncode == 0, second.stderr
    both = Table.load(path)
    assert [(p.n, p.k) for p in both.profiles] == [(40, 8), (64, 48)]

    for m1, impl in ((1, "blas"), (129, "gemv")):
        forced = replace(both.find("float32", 64, 48), m1=m1, m2=m1)
        both.merged(Table(both.kind, both.device, (forced,))).save(path)
        assert in_new_process(ASK, **cache).stdout.strip() == impl
        shown = flashdecpp("info", "--shapes", "64,48;3,3", "--dtype", "float32", **cache).stdout
        assert f"2 shapes in {path}" in shown
        assert f"float32 [64, 48]: {impl} from M = 1" in shown and "(measured up to M = 128)" in shown
        assert "float32 [3, 3]: gemv from M = 1 (default rule)" in shown
    another_cpu = flashdecpp("info", "--shapes", "64,48", FLASHDECPP_CPU_ISA="baseline", **cache).stdout
    assert "none, so the rule above" in another_cpu and "(default rule)" in another_cpu


def test_tuning_for_a_model_into_a_given_file(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    output = tmp_path / "mine.json"
    result = flashdecpp(
        *("tune", "--model", str(tmp_path / "model"), "--device", "cpu", "--output", str(output)),
        FLASHDECPP_CACHE=str(tmp_path / "cache"),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    assert {p.dtype for p in Table.load(output).profiles} == {"bfloat16"}
    assert len(Table.load(output).profiles) == 5
    assert not (tmp_path / "cache").exists()


def test_a_bad_table_only_warns_and_tuning_gives_the_remedy(tmp_path: Path) -> None:
    cache = {"FLASHDECPP_CACHE": str(tmp_path)}
    path = tmp_path / "tables" / Table("cpu", device_name(CPU)).file_name
    path.parent.mkdir()
    path.write_text("{}")
    result = in_new_process(ASK, **cache)
    assert result.stdout.strip() == "gemv"
    assert f"UserWarning: flashdecpp: {path}: version must be 1" in result.stderr
    assert f"not used: {path}" in flashdecpp("info", **cache).stdout
    refused = flashdecpp("tune", "--shapes", "8,8", "--device", "cpu", **cache)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith("delete it, and `flashdecpp tune` writes a new one")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give either --model or --shapes, not both"),
        (("--shapes", "8,8", "--model", "demo"), "not both"),
        (("--shapes", "8"), "--shapes must be pairs N,K"),
        (("--shapes", "8,8", "--device", "cpu", "--dtype", "int8"), "dtype on cpu must be one of"),
        (("--shapes", "8,8", "--output", "/nowhere/table.json"), "/nowhere/table.json can't be written"),
        (("--model", "/nowhere"), "/nowhere does not exist"),
    ],
)
def test_errors_say_what_to_do(arguments: tuple[str, ...], problem: str) -> None:
    assert problem in run("tune", *arguments).complaint


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHDECPP_CACHE", str(tmp_path / "file"))
    complaint = run("tune", "--shapes", "8,8", "--device", "cpu").complaint
    assert f"{tmp_path / 'file' / 'tables'} is not a writable folder" in complaint


def test_info_refuses_a_dtype_that_linear_lacks() -> None:
    result = run("info", "--shapes", "8,8", "--dtype", "int8")
    assert "--dtype must be one of float32, float16, bfloat16" in result.complaint
