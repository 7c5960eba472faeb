"""The pytorch_model.bin files of older models, memory-mapped if possible."""

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashdecpp.errors import ModelError
from flashdecpp.quantization import QuantizedWeight

from .json_files import check_file
from .quantized_files import quantized


class TorchFiles:
    """The tensors of several files as a WeightSource. A later file's tensor wins."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.path = folder
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            self._tensors |= _load(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def check(self, name: str) -> None:
        """Raises a ModelError unless the tensor is a plain one of floats of 16 bits or more."""
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise ModelError(f"{self.path}: tensor {name} has no values: it was saved from the meta device")
        if tensor.layout is not torch.strided:
            raise ModelError(
                f"{self.path}: tensor {name} is sparse ({tensor.layout}), which is not supported"
            )
        if tensor.is_quantized or not tensor.is_floating_point() or tensor.itemsize < 2:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(quantized(self.path, f"tensor {name} has the dtype {dtype}"))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in the file's dtype: a view of the mapped file."""
        return self._tensors[name][start:stop]

    def format(self, name: str) -> None:
        """None: no tensor of these files is quantized."""

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        raise NotImplementedError("no tensor has a format")

    def release(self, name: str) -> None:
        """Does nothing: torch cannot drop pages early, and the system reclaims them when it needs to."""


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name. weights_only refuses files that contain code."""
    check_file(path)
    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        records = _records(path) if zipfile.is_zipfile(path) else None
        state: Any = torch.load(path, map_location="cpu", mmap=records is not None, weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # torch raises many types of error for a bad file
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # the text before it is advice
        reason = (said.partition(". Please")[0].splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} can't be read: {reason}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, but must hold tensors by name")
    plain = (torch.Tensor, torch.nn.Parameter)  # no subclasses
    tensors = {
        name: value.detach()
        for name, value in state.items()
        if isinstance(name, str) and type(value) in plain
    }
    if records is not None and not _are_records([x for x in tensors.values() if _is_plain(x)], records):
        raise ModelError(f"{path} is corrupt: the sizes of its tensors are not those of their bytes")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _records(path: Path) -> dict[int, int]:
    """Offset and size, in bytes, of every record of an archive that torch.save wrote."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{path} is a compressed archive, which torch.save doesn't write")
            file.seek(record.header_offset + 26)  # the lengths of the name and of the extra field
            records[file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))] = record.file_size
    return records


def _are_records(tensors: Sequence[torch.Tensor], records: dict[int, int]) -> bool:
    """Whether every tensor's storage, a slice of the mapped file, is a record. torch does not check."""
    storages = {
        storage.data_ptr(): storage.nbytes() for x in tensors if (storage := x.untyped_storage()).nbytes()
    }
    first = min(storages, default=0)
    return any(
        all(records.get(address - first + offset) == nbytes for address, nbytes in storages.items())
        for offset in records
    )
