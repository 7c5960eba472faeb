"""A device's table: measured times of linear's implementations and the inflection points derived from them.

A JSON file with a line per shape: dtype, n and k; m1 and m2 (gemv below m1 rows of x, flat_gemm from m1 to
m2, blas from m2 on); the measured numbers of rows `m` and the microseconds `us` of each implementation (null
if not measured), from which m1 and m2 can be derived again; and the date and software of the measurement.
Other keys are ignored.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from flashdecpp._files import JSONError, parse_json, read_small

VERSION = 1
KINDS = ("cuda", "cpu")
DTYPES = ("float32", "float16", "bfloat16")
IMPLS = ("gemv", "flat_gemm", "blas")

# [N, K] of a weight
Shape = tuple[int, int]
LARGEST = 1 << 24  # N or K: far above any weight's


class TableError(ValueError):
    """A table that cannot be used, or a shape that cannot be measured."""


@dataclass(frozen=True)
class Profile:
    """The measurement of one shape. Raises TableError for inconsistent values."""

    dtype: str
    n: int
    k: int
    m1: int
    m2: int
    m: tuple[int, ...]
    us: Mapping[str, tuple[float | None, ...]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        for name in ("n", "k", "m1", "m2"):
            value = getattr(self, name)
            _need(_positive_int(value), name, "an integer above 0", value)
        rising = all(_positive_int(m) for m in self.m) and list(self.m) == sorted(set(self.m))
        _need(len(self.m) > 0 and rising, "m", "rising integers above 0", list(self.m))
        _need(self.m1 <= self.m2, "m2", f"m1 ({self.m1}) or more", self.m2)
        _need(
            bool(self.us) and set(self.us) <= set(IMPLS), "us", f"times of {', '.join(IMPLS)}", list(self.us)
        )
        for impl, times in self.us.items():
            _need(len(times) == len(self.m), f"us.{impl}", f"{len(self.m)} times as m", len(times))
            for time in times:
                valid = time is None or (_number(time) and 0 < time < math.inf)
                _need(valid, f"us.{impl}", "times above 0 or null", time)
        for column, m in enumerate(self.m):
            measured = any(times[column] is not None for times in self.us.values())
            _need(measured, "us", f"a time of some implementation for m = {m}", None)

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.dtype, self.n, self.k)

    def choose(self, m: int) -> str | None:
        """The implementation that linear uses for m rows; None beyond the measured ones."""
        if m > self.m[-1]:
            return None
        return "gemv" if m < self.m1 else "flat_gemm" if m < self.m2 else "blas"


@dataclass(frozen=True)
class Table:
    """The profiles of one device, at most one per shape, sorted by their keys."""

    kind: str  # "cuda" or "cpu"
    device: str  # device.device_name
    profiles: tuple[Profile, ...] = ()

    def __post_init__(self) -> None:
        _need(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", self.kind)
        named = isinstance(self.device, str) and self.device != "" and self.device.isprintable()
        _need(named, "device", "a device's name", self.device)
        keys = [profile.key for profile in self.profiles]
        _need(len(set(keys)) == len(keys), "shapes", "different from each other", keys)
        object.__setattr__(self, "profiles", tuple(sorted(self.profiles, key=lambda profile: profile.key)))

    @property
    def file_name(self) -> str:
        return re.sub("[^a-z0-9]+", "_", self.device.lower()).strip("_") + ".json"

    def find(self, dtype: str, n: int, k: int) -> Profile | None:
        return next((profile for profile in self.profiles if profile.key == (dtype, n, k)), None)

    def merged(self, newer: Table) -> Table:
        """The profiles of both tables. For shapes in both, the newer table's."""
        if (self.kind, self.device) != (newer.kind, newer.device):
            raise TableError(f"tables of {self.device} and of {newer.device} can't be merged")
        profiles = {profile.key: profile for profile in (*self.profiles, *newer.profiles)}
        return Table(self.kind, self.device, tuple(profiles.values()))

    def save(self, path: Path) -> None:
        """Writes the file atomically, with a line per shape."""
        head = json.dumps({"version": VERSION, "kind": self.kind, "device": self.device})
        shapes = ",\n".join(json.dumps(asdict(profile)) for profile in self.profiles)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(f'{head[:-1]}, "shapes": [\n{shapes}\n]}}\n', encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Table:
        """Reads a file. Raises TableError, which names the file and the problem."""
        text = read_small(path, TableError)
        try:
            return cls._of(parse_json(text))
        except TableError as error:
            problem = str(error)
        except JSONError as error:
            problem = f"not valid JSON ({error})"
        raise TableError(f"{path}: {problem}; delete it, and `flashdecpp tune` writes a new one")

    @classmethod
    def _of(cls, raw: Any) -> Table:
        version = raw.get("version") if isinstance(raw, dict) else None
        _need(version == VERSION, "version", str(VERSION), version)
        for name in ("kind", "device", "shapes"):
            _need(name in raw, name, "there", None)
        _need(isinstance(raw["shapes"], list), "shapes", "a list", raw["shapes"])
        profiles = []
        for index, shape in enumerate(raw["shapes"]):
            _need(isinstance(shape, dict), f"shapes[{index}]", "an object", shape)
            try:
                profiles.append(_profile(shape))
            except TableError as error:
                raise TableError(f"shapes[{index}].{error}") from None
        return cls(raw["kind"], raw["device"], tuple(profiles))


def parse_shapes(text: str) -> list[Shape]:
    """ "4096,4096;11008,4096" -> [(4096, 4096), (11008, 4096)], without duplicates."""
    shapes = []
    for pair in text.split(";"):
        match = re.fullmatch(r"\s*([1-9]\d{0,99})\s*,\s*([1-9]\d{0,99})\s*", pair, re.ASCII)
        if match is None:
            example = "4096,4096;11008,4096"
            raise TableError(
                f"--shapes must be pairs N,K of weights [N, K] such as '{example}', got {reprlib.repr(pair)}"
            )
        shapes.append((int(match[1]), int(match[2])))
    check_sizes(shapes)
    return list(dict.fromkeys(shapes))


def check_sizes(shapes: Sequence[Shape]) -> None:
    """Raises TableError for sizes out of range, before anything is allocated."""
    for n, k in shapes:
        if not (0 < n <= LARGEST and 0 < k <= LARGEST):
            raise TableError(f"N and K of a weight must be from 1 to {LARGEST}, got {n},{k}")


def _profile(raw: dict[str, Any]) -> Profile:
    for name in ("dtype", "n", "k", "m1", "m2", "m", "us"):
        _need(name in raw, name, "there", None)
    _need(isinstance(raw["m"], list), "m", "a list", raw["m"])
    us = raw["us"]
    lists = isinstance(us, dict) and all(isinstance(times, list) for times in us.values())
    _need(lists, "us", "a list of times for each implementation", us)
    environment = raw.get("environment", {})
    _need(isinstance(environment, dict), "environment", "an object", environment)
    scalars = {name: raw[name] for name in ("dtype", "n", "k", "m1", "m2")}
    times = {impl: tuple(column) for impl, column in us.items()}
    return Profile(**scalars, m=tuple(raw["m"]), us=times, environment=environment)


def _need(condition: bool, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise TableError(f"{name} must be {wanted}, got {reprlib.repr(got)}")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 62
