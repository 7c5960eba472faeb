"""The safetensors files of a model folder, memory-mapped."""

import math
import mmap
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flashdecpp._files import JSONError, parse_json
from flashdecpp.errors import ModelError
from flashdecpp.quantization import QuantizedWeight

from .mapped import map_file, release_pages
from .quantized_files import quantized

# The dtypes of weights. Others belong to indices, masks and quantized weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # the safetensors library's limit


@dataclass(frozen=True)
class _Entry:
    data: mmap.mmap
    offset: int
    nbytes: int
    dtype: str


class SafetensorsFiles:
    """The tensors of several files as a WeightSource. A later file's tensor wins, as in transformers."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.path = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, _Entry] = {}
        for path in files:
            self._read_header(path)

    def check(self, name: str) -> None:
        """Raises a ModelError for integers and for floats of 8 bits or fewer."""
        dtype = self._entries[name].dtype
        if dtype not in DTYPES:
            raise ModelError(quantized(self.path, f"tensor {name} has the dtype {dtype}"))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in the file's dtype: a view of the mapped file that must not be written."""
        entry, shape = self._entries[name], self.shapes[name]
        dtype = DTYPES[entry.dtype]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        offset = entry.offset + start * row_bytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            values = torch.frombuffer(
                entry.data, dtype=torch.uint8, count=(stop - start) * row_bytes, offset=offset
            )
        if offset % dtype.itemsize:  # the format allows unaligned tensors, kernels do not
            values = values.clone()
        return values.view(dtype).view(stop - start, *shape[1:])

    def format(self, name: str) -> None:
        """None: no tensor of these files is quantized."""

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
            header = parse_json(data[8:start])
        except JSONError as error:
            raise ModelError(f"{path} is not a safetensors file: its header is not JSON ({error})") from None
        try:
            with safe_open(path, "numpy"):  # the library checks every name, dtype, size and offset
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(_what_is_wrong(path, header, len(data) - start, error)) from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, stop = entry["data_offsets"]
            self.shapes[name] = tuple(entry["shape"])
            self._entries[name] = _Entry(data, start + begin, stop - begin, entry["dtype"])


def _what_is_wrong(path: Path, header: Any, nbytes: int, error: Exception) -> str:
    """Why the library refused a file, naming the tensor, which the library does not always do."""
    reason = str(error).removeprefix("Error while deserializing header: ")
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            if not _fits(entry):
                return f"{path} is not a valid safetensors file: tensor {name}: {reason}"
            beyond = entry["data_offsets"][1] - nbytes
        except (KeyError, TypeError, ValueError):
            return f"{path} is not a valid safetensors file: tensor {name}: {reason}"
        if beyond > 0:
            return f"{path} is truncated: tensor {name} ends {beyond} bytes after it; download it again"
    return f"{path} is not a valid safetensors file: {reason}"


def _fits(entry: dict[str, Any]) -> bool:
    """Whether a tensor's byte range has the size of its shape and dtype."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES.get(entry["dtype"])
    if len(shape) > 8 or not all(isinstance(size, int) and 0 <= size < 1 << 63 for size in shape):
        return False
    return begin >= 0 and (dtype is None or math.prod(shape) * dtype.itemsize == end - begin)
