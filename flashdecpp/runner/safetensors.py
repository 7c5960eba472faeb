"""The safetensors files of a model folder, one or sharded, memory-mapped."""

import json
import mmap
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from flashdecpp.quantization import QuantizedWeight

from .errors import ModelError
from .mapped import map_file, release_pages

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # as the safetensors library


@dataclass(frozen=True)
class _Entry:
    data: mmap.mmap
    offset: int
    nbytes: int
    dtype: torch.dtype


class SafetensorsFolder:
    """The tensors of all files, by name. A WeightSource (weights.py)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, _Entry] = {}
        for path in weight_files(folder, "model.safetensors"):
            self._read_header(path)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view of the map: rows [start, stop) in the file's dtype. Not to be written."""
        entry, shape = self._entries[name], self.shapes[name]
        row = 1
        for size in shape[1:]:
            row *= size
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                entry.data,
                dtype=entry.dtype,
                count=(stop - start) * row,
                offset=entry.offset + start * row * entry.dtype.itemsize,
            )
        return flat.view(stop - start, *shape[1:])

    def format(self, name: str) -> None:
        """Nothing here is quantised."""

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        raise NotImplementedError("no tensor has a format")

    def release(self, name: str) -> None:
        entry = self._entries[name]
        release_pages(entry.data, entry.offset, entry.nbytes)

    def _read_header(self, path: Path) -> None:
        data = map_file(path)
        if len(data) < 8:
            raise ModelError(f"{path} is truncated: it has {len(data)} bytes")
        (length,) = struct.unpack("<Q", data[:8])
        start = 8 + length
        if length > MAX_HEADER:
            raise ModelError(f"{path} is not a safetensors file")
        if start > len(data):
            raise ModelError(
                f"{path} is truncated: its header ends at byte {start}, the file has {len(data)}"
            )
        try:
            header = json.loads(data[8:start])
        except ValueError:
            raise ModelError(f"{path} is not a safetensors file: its header is not JSON") from None
        header.pop("__metadata__", None)
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > len(data):
            raise ModelError(
                f"{path} is truncated: its tensors end at byte {end}, the file has {len(data)}; "
                "download it again"
            )
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                continue  # not a weight; one that the model needs is reported as missing
            begin, stop = entry["data_offsets"]
            self.shapes[name] = tuple(entry["shape"])
            self._entries[name] = _Entry(data, start + begin, stop - begin, DTYPES[entry["dtype"]])


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file `name` of a folder, or all that its index `name`.index.json tells of."""
    index = folder / f"{name}.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{index} is not a valid index of weight files") from None
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing)}"
            )
        return [folder / name for name in names]
    if not (folder / name).exists():
        raise ModelError(f"{folder} has no {name} and no {index.name}")
    return [folder / name]
