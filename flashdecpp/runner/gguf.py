"""A GGUF file: its metadata, and its tensors memory-mapped and dequantised a few rows at a time.

The `gguf` package's own reader takes seconds for a 50,000 token vocabulary; its dequantisation is used.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashdecpp.quantization import QuantizedWeight

from .errors import ModelError
from .formats import Format
from .mapped import map_file, release_pages

# GGUF value type -> struct format; 8 is a string and 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# GGUF's types whose blocks ops.quantized_linear knows: 32 weights behind a scale and, with offsets, a minimum
FORMATS = {
    "Q4_0": Format(4, 32, stored=True),
    "Q4_1": Format(4, 32, offsets=True, stored=True),
    "Q8_0": Format(8, 32, stored=True),
}


@dataclass(frozen=True)
class _Entry:
    offset: int  # from the start of the file
    nbytes: int
    row_bytes: int
    quantisation: Any  # gguf.GGMLQuantizationType


class GGUFFile:
    """The tensors of one GGUF file, by name. A WeightSource (weights.py)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        cursor = _Cursor(self._map, path)
        if cursor.take(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        version, tensor_count, metadata_count = cursor.unpack("IQQ")
        if version not in (2, 3):
            raise ModelError(f"{path} is GGUF version {version}; 2 and 3 are supported")
        self.metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.unpack("I")[0])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, _Entry] = {}
        self._read_tensor_table(cursor, tensor_count)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """float32 rows [start, stop) of a tensor."""
        from gguf.quants import dequantize

        # dequantize returns float32 as it is: a view of the (read-only) map, which torch must not have.
        values = dequantize(self._raw_rows(name, start, stop), self._entries[name].quantisation)
        values = values.reshape(stop - start, *self.shapes[name][1:])
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def format(self, name: str) -> Format | None:
        return FORMATS.get(self._entries[name].quantisation.name)

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop) as they are stored, bit for bit: each block's scale, minimum and weights."""
        format = self.format(name)
        blocks = torch.from_numpy(self._raw_rows(name, start, stop).copy())
        blocks = blocks.unflatten(1, (self.shapes[name][-1] // format.group, -1))
        numbers, weight = blocks.tensor_split((4 if format.offsets else 2,), dim=2)
        numbers = numbers.contiguous().view(torch.float16)
        weight = weight.flatten(1)
        return QuantizedWeight(
            weight if format.bits == 4 else weight.view(torch.int8),
            numbers[:, :, 0].contiguous(),
            numbers[:, :, 1].contiguous() if format.offsets else None,
        )

    def _raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        entry = self._entries[name]
        offset, count = entry.offset + start * entry.row_bytes, (stop - start) * entry.row_bytes
        return np.frombuffer(self._map, np.uint8, count, offset).reshape(stop - start, entry.row_bytes)

    def release(self, name: str) -> None:
        entry = self._entries[name]
        release_pages(self._map, entry.offset, entry.nbytes)

    def _read_tensor_table(self, cursor: "_Cursor", count: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        entries = []
        for _ in range(count):
            name = cursor.string()
            (dimensions,) = cursor.unpack("I")
            shape = cursor.unpack(f"{dimensions}Q")[::-1]  # GGUF stores the fastest dimension first
            quantisation, offset = cursor.unpack("IQ")
            entries.append((name, shape, quantisation, offset))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.position // alignment) * alignment
        for name, shape, number, offset in entries:
            try:
                quantisation = GGMLQuantizationType(number)
            except ValueError:
                raise ModelError(f"{self.path}: tensor {name} has the unknown type {number}") from None
            block, block_bytes = GGML_QUANT_SIZES[quantisation]
            if shape[-1] % block:
                raise ModelError(
                    f"{self.path}: tensor {name} of shape {shape} is not whole blocks of {block}"
                )
            row_bytes = shape[-1] // block * block_bytes
            count_rows = int(np.prod(shape[:-1], dtype=np.int64))
            if len(shape) == 1:  # a vector: its elements are its rows
                count_rows, row_bytes = shape[0] // block, block_bytes
                if block != 1:
                    raise ModelError(f"{self.path}: the vector {name} is quantised, which is not supported")
            nbytes = count_rows * row_bytes
            if start + offset + nbytes > len(self._map):
                raise ModelError(
                    f"{self.path} is truncated: tensor {name} ends at byte {start + offset + nbytes}, "
                    f"the file has {len(self._map)}; download it again"
                )
            self.shapes[name] = shape
            self._entries[name] = _Entry(start + offset, nbytes, row_bytes, quantisation)


class _Cursor:
    """Reads GGUF's little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ModelError(f"{self.path} is truncated: its header goes beyond its {len(self.data)} bytes")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        return self.take(self.unpack("Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.unpack("IQ")
            if item in SCALARS:
                return list(self.unpack(f"{count}{SCALARS[item]}"))
            return [self.value(item) for _ in range(count)]
        if kind not in SCALARS:
            raise ModelError(f"{self.path}: a metadata value has the unknown type {kind}")
        return self.unpack(SCALARS[kind])[0]
