"""Reads the header of a GGUF file: its metadata and the location of every tensor.

The header is not trusted: counts and sizes are checked against the file's size and the limits below before
anything is allocated. The `gguf` package's own reader checks little and takes seconds for a vocabulary of
50,000 tokens.
"""

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flashdecpp._arguments import shown
from flashdecpp.errors import ModelError

from .mapped import map_file

MAGIC = b"GGUF"
# GGUF value type -> struct format; 8 is a string and 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Far above any model's: vocabularies have up to 300,000 tokens, each with a score, a type and merges.
MAX_BYTES = 256 << 20  # of the header
MAX_VALUES = 1 << 22  # of the metadata, elements of arrays included
MAX_ARRAY_DEPTH = 4
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4  # ggml has no more

REQUIRED: Final = object()  # in place of a default
_KINDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
_LISTS = {int: "integers", float: "finite numbers", str: "strings", bool: "true and false"}


class Metadata(dict[str, Any]):
    """The metadata of a file. `typed` and `listed` check the type of a value."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def typed(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key, which must be of `kind`: int, float, str or bool. An integer counts as a float.

        Raises a ModelError that names the key for another value, and for a missing key without a default.
        """
        if key not in self:
            if default is REQUIRED:
                raise ModelError(f"{self.path} has no {key}")
            return default
        value = self[key]
        if not _is(value, kind):
            raise ModelError(f"{self.path}: {key} must be {_KINDS[kind]}, got {shown(value)}")
        return kind(value)

    def listed(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """As `typed`, for a list whose values are all of `kind`."""
        if key not in self:
            return self.typed(key, kind, default)
        values = self[key]
        if not isinstance(values, list) or not all(_is(value, kind) for value in values):
            raise ModelError(f"{self.path}: {key} must be a list of {_LISTS[kind]}, got {shown(values)}")
        return values


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: contiguous rows of `row_bytes`. The rows of a vector are its elements."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int  # from the start of the file
    row_bytes: int
    nbytes: int


class Header:
    """The header of a file, with a map of the whole file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path)
        cursor = _Cursor(self.data, path)
        if cursor.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path} is not a GGUF file")
        (version,) = cursor.unpack("I")
        if version not in (2, 3):
            big = version != 0 and version & 0xFFFF == 0
            what = "a big-endian GGUF file" if big else f"GGUF version {version}"
            raise ModelError(f"{path} is {what}; little-endian ones of version 2 and 3 are supported")
        tensors, values = cursor.unpack("QQ")
        if tensors > MAX_TENSORS:
            raise ModelError(f"{path} is not a valid GGUF file: it claims to have {tensors} tensors")
        self.metadata = Metadata(path)
        cursor.count(values)
        for _ in range(values):
            key = cursor.string()
            if key in self.metadata:
                raise ModelError(f"{path} has the key {key} twice")
            self.metadata[key] = cursor.value(cursor.unpack("I")[0])
        self.tensors = self._read_tensors(cursor, tensors)

    def _read_tensors(self, cursor: "_Cursor", count: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = cursor.string()
            if name in tensors:
                raise ModelError(f"{self.path} has the tensor {name} twice")
            (dimensions,) = cursor.unpack("I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ModelError(
                    f"{self.path}: tensor {name} has {dimensions} dimensions, but must have "
                    f"1 to {MAX_DIMENSIONS}"
                )
            shape = cursor.unpack(f"{dimensions}Q")[::-1]  # GGUF stores the fastest dimension first
            tensors[name] = self._tensor(name, shape, *cursor.unpack("IQ"))
        return self._located(tensors, cursor.position)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if 0 in shape:
            raise ModelError(f"{self.path}: tensor {name} of shape {shape} is empty")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ModelError(f"{self.path}: tensor {name} has the unknown type {kind}") from None
        if shape[-1] % block:
            raise ModelError(f"{self.path}: tensor {name} of shape {shape} is not whole blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        row_bytes = block_bytes if len(shape) == 1 else shape[-1] // block * block_bytes
        return TensorInfo(shape, GGMLQuantizationType(kind), offset, row_bytes, nbytes)

    def _located(self, tensors: dict[str, TensorInfo], table_end: int) -> dict[str, TensorInfo]:
        """The tensors with offsets in the file. As in llama.cpp, they must follow each other without gaps."""
        alignment = self.metadata.typed("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: general.alignment must be a power of two, got {alignment}")
        start = end = -(-table_end // alignment) * alignment
        located = {}
        for name, tensor in tensors.items():
            offset = -(-end // alignment) * alignment
            if start + tensor.offset != offset:
                raise ModelError(
                    f"{self.path}: tensor {name} must be at offset {offset - start}, right after the one "
                    f"before it, but is at {tensor.offset}"
                )
            end = offset + tensor.nbytes
            if end > len(self.data):
                raise ModelError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, "
                    f"the file has {len(self.data)}; download it again"
                )
            located[name] = replace(tensor, offset=offset)
        return located


class _Cursor:
    """Reads GGUF's little-endian values in sequence."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position, self.values = data, path, 0, 0

    def read(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ModelError(f"{self.path} is truncated: its header goes beyond its {len(self.data)} bytes")
        if end > MAX_BYTES:
            raise ModelError(
                f"{self.path} is not a valid GGUF file: its header has more than {MAX_BYTES} bytes"
            )
        start, self.position = self.position, end
        return self.data[start:end]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self.read(struct.calcsize(layout)))

    def string(self) -> str:
        return self.read(self.unpack("Q")[0]).decode("utf-8", errors="replace")

    def strings(self, count: int) -> list[str]:
        """Vocabularies and merges are a header's bulk: no call per string but the two that read it."""
        data, end, limit = self.data, self.position, min(len(self.data), MAX_BYTES)
        length = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            start = end = end + 8
            if end <= limit:
                end += length(data, start - 8)[0]
            if end > limit:
                self.position = start
                self.read(end - start)  # raises
            texts.append(data[start:end].decode("utf-8", errors="replace"))
        self.position = end
        return texts

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                raise ModelError(f"{self.path}: a metadata value nests arrays more than {depth} deep")
            item, count = self.unpack("IQ")
            self.count(count)
            if item in SCALARS:
                return list(self.unpack(f"{count}{SCALARS[item]}"))
            if item == STRING:
                return self.strings(count)
            return [self.value(item, depth + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise ModelError(f"{self.path}: a metadata value has the unknown type {kind}")
        return self.unpack(SCALARS[kind])[0]

    def count(self, values: int) -> None:
        """Adds to the number of metadata values. Raises a ModelError beyond MAX_VALUES."""
        self.values += values
        if self.values > MAX_VALUES:
            raise ModelError(
                f"{self.path} is not a valid GGUF file: it claims more than {MAX_VALUES} metadata values"
            )
