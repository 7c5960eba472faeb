"""A GGUF model, in one file or split into several, memory-mapped and dequantized a few rows at a time.

gguf_header.py reads the header; the `gguf` package dequantizes.
"""

import re
from pathlib import Path

import numpy as np
import torch

from flashdecpp.errors import ModelError
from flashdecpp.quantization import QuantizedWeight

from .formats import Format
from .gguf_header import MAGIC, Header
from .mapped import release_pages

# GGUF types that ops.quantized_linear runs: blocks of a scale, a minimum if there are offsets, and 32 weights
FORMATS = {
    "Q4_0": Format(4, 32, stored=True),
    "Q4_1": Format(4, 32, offsets=True, stored=True),
    "Q8_0": Format(8, 32, stored=True),
}
PART = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFFile:
    """The tensors of a GGUF file, or of all files of a split model, as a WeightSource.

    path: the file, or any of the files NAME-00001-of-0000N.gguf. `metadata` is that of the first one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        headers = _read_headers(path)
        self.metadata = headers[0].metadata
        self._headers = {name: header for header in headers for name in header.tensors}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: header.tensors[name].shape for name, header in self._headers.items()
        }
        if len(self.shapes) != sum(len(header.tensors) for header in headers):
            raise ModelError(f"{path}: parts of the model have tensors of the same name")

    @staticmethod
    def is_gguf(path: Path) -> bool:
        """Whether the path is that of a GGUF file, by its first bytes and whatever its name."""
        try:
            if not path.is_file():
                return False
            with path.open("rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except (OSError, ValueError):
            return False

    def check(self, name: str) -> None:
        """Raises a ModelError if the gguf package cannot dequantize the tensor."""
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        tensor = self._headers[name].tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        if len(tensor.shape) == 1 and block != 1:
            raise ModelError(f"{self.path}: the vector {name} is quantized, which is not supported")
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {name} has the type {tensor.kind.name}, "
                "which the gguf package doesn't dequantize"
            ) from None

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor in float32."""
        from gguf.quants import dequantize

        # dequantize returns float32 tensors as views of the read-only map, which torch does not support.
        values = dequantize(self._raw_rows(name, start, stop), self._headers[name].tensors[name].kind)
        values = values.reshape(stop - start, *self.shapes[name][1:])
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def format(self, name: str) -> Format | None:
        return FORMATS.get(self._headers[name].tensors[name].kind.name)

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop), with the bits of each block's scale, minimum and weights as stored."""
        format = FORMATS[self._headers[name].tensors[name].kind.name]
        blocks = torch.from_numpy(self._raw_rows(name, start, stop).copy())
        blocks = blocks.unflatten(1, (format.groups(self.shapes[name][-1]), -1))
        numbers, weight = blocks.tensor_split((4 if format.offsets else 2,), dim=2)
        numbers = numbers.contiguous().view(torch.float16)
        weight = weight.flatten(1)
        return QuantizedWeight(
            weight if format.bits == 4 else weight.view(torch.int8),
            numbers[:, :, 0].contiguous(),
            numbers[:, :, 1].contiguous() if format.offsets else None,
        )

    def release(self, name: str) -> None:
        header = self._headers[name]
        release_pages(header.data, header.tensors[name].offset, header.tensors[name].nbytes)

    def _raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        header = self._headers[name]
        tensor = header.tensors[name]
        offset, count = tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes
        return np.frombuffer(header.data, np.uint8, count, offset).reshape(stop - start, -1)


def _read_headers(path: Path) -> list[Header]:
    """The file's header, or those of all files in order if the model is split."""
    given = Header(path)
    count = given.metadata.typed("split.count", int, 1)
    if count <= 1:
        return [given]
    name = PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        number = given.metadata.typed("split.no", int) + 1
        raise ModelError(
            f"{path} is part {number} of {count}: it must be called NAME-{number:05}-of-{count:05}.gguf, "
            "and the others likewise, in the same folder"
        )
    paths = [path.with_name(f"{name['prefix']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(f"{path.parent} lacks {len(missing)} of the model's {count} parts: {some}")
    parts = [given if part == path else Header(part) for part in paths]
    for number, part in enumerate(parts):
        if (part.metadata.typed("split.no", int), part.metadata.typed("split.count", int)) != (number, count):
            raise ModelError(f"{part.path} is not part {number + 1} of {count}, as its name says")
    return parts
