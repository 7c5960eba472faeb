"""Thousands of corrupted model files, through every loader: a right result or a one-line ModelError.

Each case starts from an intact model in one of its forms (a folder of safetensors, of indexed shards or of
torch.save files; a GGUF file), corrupts one file, loads the model and generates two tokens. Violations are
any other error, a crash, different tokens that the change can't explain, and more time or memory than loading
takes. To rerun a case by its number, pass --count 1 --first NUMBER with the same seed.

    python tests/fuzz_files.py [--count 5000] [--seed 1] [--first 0]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10  # of CPU time, for one case
HANGS = 300  # wall-clock seconds before giving up on a case; the machine may be shared
MEGABYTES = 512  # that a case may use on top of the process's own
ADDRESS_SPACE = 8 << 30  # on top of the process's own; larger allocations fail at once

DEEP = "[" * 100_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
# Replacements for a JSON value
VALUES: list[Any] = [None, True, False, -1, 0, 1, 2, 7, 2**31, 2**40, 2**63, 2**70, 10**400, 0.5, -0.0]
VALUES += [
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "1",
    "\ud800",
    "../x",
    "/x",
    "a\nb",
    "x" * 100_000,
]
VALUES += [[], {}, [None], [1, 2], ["x"], {"a": 1}, [[[]]], [0] * 100_000, 4096, 10**6, 10**7, "@deep"]
# Replacements for a whole file
CONTENTS = [b"", b"\0", b"[]", b"5", b"null", b'"x"', b"{}", b"{", b"\xff\xfe{\0}\0", POINTER, DEEP.encode()]
CONTENTS += [b"<!DOCTYPE html><html></html>", b'{"a":' * 500 + b"1" + b"}" * 500, b"\0" * 100_000]


# ------------------------------------------------------------------------------------------------ corruptions


@dataclass(frozen=True)
class Case:
    path: Path  # the model
    what: str  # the change made to it
    same: bool  # whether the model, if it still loads, must give the intact one's tokens


Spoil = Callable[[random.Random, Path], tuple[str, bool]]  # -> Case.what, Case.same


def bytes_changed(
    rng: random.Random, data: bytes, first: int = 0, last: int | None = None
) -> tuple[bytes, str]:
    """Flips, inserts, drops or repeats some bytes of data[first:last], or truncates there."""
    last = len(data) if last is None else min(last, len(data))
    at = rng.randrange(first, max(first + 1, last))
    count = rng.choice((1, 1, 2, 4, 8, 64))
    kind = rng.choice(("flip", "flip", "flip", "set", "insert", "drop", "repeat", "end"))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(count):
            place = rng.randrange(first, max(first + 1, last))
            if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), f"{count} bits flipped in bytes {first} to {last}"
    new = {
        "set": data[:at] + bytes([rng.choice((0, 255, 128, 1))]) * count + data[at + count :],
        "insert": data[:at] + rng.randbytes(count) + data[at:],
        "drop": data[:at] + data[at + count :],
        "repeat": data[: at + count] + data[at:],
        "end": data[:at],
    }
    return new[kind], f"{kind}, {count} bytes at {at}"


def json_changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy with one value somewhere in it replaced, dropped or renamed."""
    root = {"": json.loads(json.dumps(value))}
    places = [(holder, key, path) for holder, key, path in _places(root, "")]
    holder, key, path = rng.choice(places)
    kind = rng.choice(
        ("replace", "replace", "replace", "replace", "drop", "rename", "text", "repeat", "wrap")
    )
    if kind == "drop" and path:
        del holder[key]
    elif kind == "rename" and path and isinstance(holder, dict):
        holder[key + "x"] = holder.pop(key)
    elif kind == "repeat" and isinstance(holder[key], list | str):
        holder[key] = holder[key] * 3
    elif kind == "text":
        holder[key] = json.dumps(holder[key])
    elif kind == "wrap":
        holder[key] = [holder[key]]
    else:
        kind, holder[key] = "replace", rng.choice(VALUES)
    now = repr(holder.get(key) if isinstance(holder, dict) else None)[:40]
    return root.get(""), f"{kind} {path or 'all'}: {now}"


def json_text(value: Any) -> str:
    return json.dumps(value).replace('"@deep"', "[" * 5000 + "]" * 5000)


def _places(holder: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items)[:300]:
        yield holder, key, f"{path}.{key}".lstrip(".")
        if isinstance(value, dict | list):
            yield from _places(value, f"{path}.{key}")


def spoil_json(name: str, *, same: bool = False) -> Spoil:
    def spoil(rng: random.Random, folder: Path) -> tuple[str, bool]:
        path = folder / name
        data = path.read_bytes()
        if rng.random() < 0.75:
            value, what = json_changed(rng, json.loads(data))
            path.write_text(json_text(value))
            return f"{name}: {what}", same
        changed, what = bytes_changed(rng, data)
        path.write_bytes(changed)
        return f"{name}: {what}", False

    return spoil


def spoil_kind(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Replaces a file with other content, a folder, a pipe or a link."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.unlink()
    kind = rng.choice(("content", "content", "folder", "pipe", "nowhere", "loop", "device", "missing"))
    if kind == "content":
        content = rng.choice(CONTENTS)
        path.write_bytes(content)
        kind = repr(content[:20])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"nowhere": "nowhere", "loop": path.name, "device": "/dev/zero"}[kind])
    return f"{path.name} becomes {kind}", False


def spoil_safetensors(rng: random.Random, folder: Path) -> tuple[str, bool]:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.6:
        header, what = json_changed(rng, json.loads(data[8:start]))
        text = json_text(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
        return f"{path.name}: header, {what}", True
    if rng.random() < 0.2:
        path.write_bytes(
            struct.pack("<Q", rng.choice((0, 1, start, 2**27, 2**40, 2**63, 2**64 - 1))) + data[8:]
        )
        return f"{path.name}: another length of the header", True
    last = start if rng.random() < 0.6 else None
    changed, what = bytes_changed(rng, data, last=last)
    path.write_bytes(changed)
    return f"{path.name}: {what}", False


def spoil_torch(rng: random.Random, folder: Path) -> tuple[str, bool]:
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    if rng.random() < 0.3:
        return _spoil_state(rng, path)
    if rng.random() < 0.4:
        changed, what = bytes_changed(rng, data)
        path.write_bytes(changed)
        return f"{path.name}: {what}", False
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        chosen = rng.choice(["data.pkl"] * 3 + [Path(name).name for name in old.namelist()])
        for name in old.namelist():
            record = old.read(name)
            if Path(name).name == chosen:
                record, what = bytes_changed(rng, record)
            new.writestr(name, record)
    return f"{path.name}: {chosen}, {what}", False


def _spoil_state(rng: random.Random, path: Path) -> tuple[str, bool]:
    import torch

    state = torch.load(path, weights_only=True)
    name = rng.choice(sorted(state))
    values = {
        "int8": lambda x: x.to(torch.int8),
        "bool": lambda x: x.bool(),
        "complex": lambda x: x.to(torch.complex64),
        "float8": lambda x: x.to(torch.float8_e4m3fn),
        "sparse": lambda x: x.to_sparse(),
        "meta": lambda x: x.to("meta"),
        "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
        "expanded": lambda x: x[:1].expand(x.shape),
        "a part": lambda x: x[:-1],
        "a scalar": lambda x: x.sum(),
        "a list": lambda x: x.tolist(),
        "float64": lambda x: x.double(),
        "a parameter": lambda x: torch.nn.Parameter(x),
    }
    kind = rng.choice(sorted(values))
    state[name] = values[kind](state[name])
    older = rng.random() < 0.3 and kind != "float8"
    torch.save(state, path, _use_new_zipfile_serialization=not older)
    return f"{path.name}: {name} becomes {kind}{', in the older format' * older}", kind != "expanded"


# GGUF: value type -> struct format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def spoil_gguf(rng: random.Random, folder: Path) -> tuple[str, bool]:
    path = folder / "model.gguf"
    data = path.read_bytes()
    values, tensors, start = read_gguf(path)
    kind = rng.choice(("value", "value", "value", "tensor", "tensor", "counts", "header", "header", "bytes"))
    same = False
    if kind == "header":
        changed, what = bytes_changed(rng, data, last=start)
    elif kind == "bytes":
        changed, what = bytes_changed(rng, data)
    else:
        counts = [len(tensors), len(values)]
        if kind == "value":
            what = _spoil_value(rng, values)
            counts[1] = len(values)
        elif kind == "tensor":
            what, same = _spoil_tensor(rng, tensors)
        else:
            place = rng.randrange(2)
            counts[place] = rng.choice((0, counts[place] - 1, counts[place] + 1, 2**31, 2**63, 2**64 - 1))
            what = f"counts of tensors and values {counts}"
        changed = gguf_bytes(values, tensors, counts) + data[start:]
    path.write_bytes(changed)
    return f"{path.name}: {what}", same


def _spoil_value(rng: random.Random, values: list[list[Any]]) -> str:
    place = rng.randrange(len(values))
    entry = values[place]
    kind = rng.choice(("replace", "replace", "replace", "drop", "twice", "alignment", "deep", "huge"))
    if kind == "drop":
        del values[place]
    elif kind == "twice":
        values.append(entry)
    elif kind == "alignment":
        values.append(["general.alignment", 4, rng.choice((0, 1, 3, 8, 64, 2**31))])
    elif kind == "deep":
        entry[1:] = [9, struct.pack("<IQ", 9, 1) * rng.choice((3, 1000, 100_000))]
    elif kind == "huge":
        entry[1:] = [9, struct.pack("<IQ", rng.choice((0, 6, 8, 9)), rng.choice((2**24, 2**40, 2**63)))]
    else:
        entry[1], entry[2] = rng.choice(
            (
                (4, rng.choice((0, 1, 3, 2**16, 10**7, 2**31))),
                (5, -1),
                (10, rng.choice((0, 2**40, 2**64 - 1))),
                (6, rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30, 0.5))),
                (7, True),
                (8, rng.choice(("", "x", "2", "\0", "{{ x", "{% for i in range(9) %}", "x" * 100_000))),
                (9, (4, rng.choice(([], [0], [2, 2], [1, 2], [4] * 1000)))),
                (9, (8, rng.choice(([], ["x"], ["a b"], [""] * 272)))),
                (99, b""),
            )
        )
    return f"{kind} {entry[0]}: {entry[1]}, {repr(entry[2])[:40]}"


def _spoil_tensor(rng: random.Random, tensors: list[list[Any]]) -> tuple[str, bool]:
    entry = rng.choice(tensors)
    kind = rng.choice(("name", "twice", "dims", "dims", "type", "offset", "offset"))
    if kind == "name":
        entry[0] = rng.choice(("", "x\ny", entry[0] + "x", "\0"))
    elif kind == "twice":
        entry[0] = rng.choice(tensors)[0] + "x"
    elif kind == "dims":
        choices = ([], [0], [2**63], [2**32, 2**32], [1] * 5, [1] * 1000, [*entry[1], 1], [entry[1][0] + 1])
        entry[1] = list(rng.choice(choices))
    elif kind == "type":
        entry[2] = rng.choice([kind for kind in (*range(45), 2**31) if kind != entry[2]])
    else:
        entry[3] = rng.choice((entry[3] + 1, entry[3] + 32, entry[3] - 32, 2**40, 2**63, 2**64 - 32)) % 2**64
    # Nothing follows the last tensor, so it may shrink undetected.
    return f"{kind} of tensor {entry}"[:120], entry is not tensors[-1]


def read_gguf(path: Path) -> tuple[list[list[Any]], list[list[Any]], int]:
    """[key, type, value] of the metadata, [name, dims, type, offset] of the tensors, where data begins."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = []
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            contents = field.contents()
            array = field.types[0] == 9
            values.append([key, int(field.types[0]), (int(field.types[1]), contents) if array else contents])
    tensors = [
        [t.name, [int(n) for n in t.shape], int(t.tensor_type), int(t.data_offset - reader.data_offset)]
        for t in reader.tensors
    ]
    return values, tensors, int(reader.data_offset)


def gguf_bytes(values: list[list[Any]], tensors: list[list[Any]], counts: list[int]) -> bytes:
    """The bytes before the weights."""

    def text(string: str) -> bytes:
        data = string.encode()
        return struct.pack("<Q", len(data)) + data

    def packed(kind: int, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if kind == 8:
            return text(value)
        if kind == 9:
            item, items = value
            return struct.pack("<IQ", item, len(items)) + b"".join(packed(item, each) for each in items)
        return struct.pack("<" + SCALARS[kind], value)

    parts = [b"GGUF", struct.pack("<IQQ", 3, *counts)]
    parts += [text(key) + struct.pack("<I", kind) + packed(kind, value) for key, kind, value in values]
    for name, dims, kind, offset in tensors:
        parts += [
            text(name),
            struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
            struct.pack("<IQ", kind, offset),
        ]
    data = b"".join(parts)
    alignment = next((v for key, kind, v in values if key == "general.alignment" and kind == 4 and v), 32)
    return data + b"\0" * (-len(data) % min(alignment, 1 << 20))


# The model, the corruption and its frequency, for a folder with phi.json and one without.
CASES: list[tuple[str, Spoil, int]] = [
    ("folder", spoil_safetensors, 6),
    ("folder", spoil_json("config.json"), 6),
    ("folder", spoil_json("generation_config.json"), 2),
    ("folder", spoil_json("tokenizer.json"), 4),
    ("folder", spoil_json("tokenizer_config.json"), 2),
    ("folder", spoil_json("phi.json"), 2),
    ("folder", spoil_kind, 2),
    ("parts", spoil_safetensors, 2),
    ("parts", spoil_json("model.safetensors.index.json", same=True), 3),
    ("parts", spoil_kind, 1),
    ("torch", spoil_torch, 5),
    ("torch", spoil_kind, 1),
    ("gguf", spoil_gguf, 8),
    ("gguf", spoil_kind, 1),
]


def spoiled(seed: int, number: int, models: Path, target: Path) -> Case:
    """Case `number`: a corrupted copy of one of the models, in `target`."""
    rng = random.Random(f"{seed}, {number}")
    model, spoil, _ = rng.choices(CASES, [often for *_, often in CASES])[0]
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(models / model, target)
    what, same = spoil(rng, target)
    return Case(target / "model.gguf" if model == "gguf" else target, f"{model}, {what}", same)


# --------------------------------------------------------------------------------------------------- outcomes


def make_models(root: Path) -> None:
    """One tiny Llama in every form."""
    import torch
    from runner_models import save_model
    from safetensors.torch import load_file
    from test_runner_gguf import write_gguf

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=64)
    model = save_model(root / "folder", **sizes)
    save_model(root / "parts", shard="40KB", **sizes)
    shutil.copytree(root / "folder", root / "torch")
    (root / "torch" / "model.safetensors").unlink()
    torch.save(load_file(root / "folder" / "model.safetensors"), root / "torch" / "pytorch_model.bin")
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "model.gguf", model)
    calibrate(root / "folder")


def calibrate(folder: Path) -> None:
    """Writes phi.json, so that loading reads it."""
    import torch

    from flashdecpp.models.phi import PERCENTILES, SAFE_WINDOWS, Calibration

    numbers = torch.zeros(1, 4)
    Calibration(
        *("tiny", "float32", 10, numbers, numbers, numbers),
        dict.fromkeys(PERCENTILES, numbers),
        dict.fromkeys(SAFE_WINDOWS, numbers),
    ).save(folder / "phi.json")


def tokens_of(model: Path) -> list[int]:
    from flashdecpp import LLM, SamplingParams

    llm = LLM(model, device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    return llm.generate("hi", params)[0].token_ids


def judge(case: Case, expected: list[int]) -> tuple[str, str]:
    """ "right", "refused" or "wrong", and the details."""
    from flashdecpp import ModelError

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {2 * SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    begin, before = time.process_time(), reset_peak()
    try:
        tokens = tokens_of(case.path)
        verdict, said = "right", str(tokens)
        if case.same and tokens != expected:
            verdict, said = "wrong", f"{tokens} instead of {expected}"
    except ModelError as error:
        verdict, said = "refused", str(error)
        if len(said.splitlines()) != 1 or not said.strip():
            verdict = "wrong"
    except BaseException as error:
        verdict, said = "wrong", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, megabytes = time.process_time() - begin, (peak() - before) >> 20
    if verdict != "wrong" and seconds > SECONDS:
        verdict, said = "wrong", f"{seconds:.1f} s until: {said}"
    if verdict != "wrong" and megabytes > MEGABYTES:
        verdict, said = "wrong", f"{megabytes} MB until: {said}"
    return verdict, said


def reset_peak() -> int:
    """The bytes this process has resident; peak() counts from here (on Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def work(seed: int, models: Path) -> None:
    """A worker: one number per line on stdin, one verdict per line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for anything libraries print
    expected = {name: tokens_of(path) for name, path in whole(models).items()}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            case = spoiled(seed, int(line), models, Path(folder) / "model")
            verdict, said = judge(case, expected[case.what.partition(",")[0]])
        print(json.dumps([verdict, case.what, said[:1000]]), file=answers, flush=True)


def whole(models: Path) -> dict[str, Path]:
    names = ("folder", "parts", "torch", "gguf")
    return {name: models / name / "model.gguf" if name == "gguf" else models / name for name in names}


class Worker:
    """A process that judges cases, restarted when a case kills or hangs it."""

    def __init__(self, seed: int, models: Path) -> None:
        self._command = [sys.executable, __file__, "--worker", str(models), "--seed", str(seed)]
        self._process: subprocess.Popen[str] | None = None

    def judge(self, number: int) -> tuple[str, str, str]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
            )
        self._process.stdin.write(f"{number}\n")
        readable, _, _ = select.select([self._process.stdout], [], [], HANGS)
        line = self._process.stdout.readline() if readable else ""
        if line:
            return tuple(json.loads(line))
        self.close()
        return "wrong", "?", "hangs" if not readable else "ended the process"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fuzz(seed: int, count: int, first: int = 0, *, progress: bool = True) -> tuple[Counter[str], list[str]]:
    """The number of cases per outcome, and a line for each violation."""
    from tqdm import tqdm

    verdicts: Counter[str] = Counter()
    violations = []
    with tempfile.TemporaryDirectory() as models:
        make_models(Path(models))
        worker = Worker(seed, Path(models))
        try:
            for number in tqdm(
                range(first, first + count), desc="files", file=sys.stderr, disable=not progress
            ):
                verdict, what, said = worker.judge(number)
                verdicts[verdict] += 1
                if verdict == "wrong":
                    violations.append(f"--seed {seed} --first {number} --count 1: {what}: {said}")
        finally:
            worker.close()
    return verdicts, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.seed, options.worker)
    verdicts, violations = fuzz(options.seed, options.count, options.first)
    for violation in violations:
        print(violation)
    print(
        f"{options.count} spoiled files: {verdicts['right']} loaded and answered, {verdicts['refused']} were "
        f"refused in a line, {verdicts['wrong']} violations"
    )
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
