"""The pytorch_model.bin files of a model folder, memory-mapped where they can be: what older models have."""

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
    """The tensors of all files, by name; of a name that several have, the last file's. A WeightSource
    (weights.py).
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.path = folder
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            self._tensors |= _load(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def check(self, name: str) -> None:
        """A ModelError where the tensor isn't a plain one, of floats of 16 bits or more."""
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
        """A view of the map: rows [start, stop) in the file's dtype."""
        return self._tensors[name][start:stop]

    def format(self, name: str) -> None:
        """Nothing here is quantized."""

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        raise NotImplementedError("no tensor has a format")

    def release(self, name: str) -> None:
        """The pages of a file can be reclaimed at any time; torch has no way to drop them earlier."""


def _load(path: Path) -> dict[str, torch.Tensor]:
    """What the file holds by name. It can't be code: weights_only refuses that."""
    check_file(path)
    try:
        # What torch wrote before 1.6 is no zip archive and can't be mapped.
        records = _records(path) if zipfile.is_zipfile(path) else None
        state: Any = torch.load(path, map_location="cpu", mmap=records is not None, weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # torch raises many kinds for a bad file
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # what stands before is advice
        reason = (said.partition(". Please")[0].splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} can't be read: {reason}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, but must hold tensors by name")
    plain = (torch.Tensor, torch.nn.Parameter)  # subclasses are none that a weight is read from
    tensors = {
        name: value.detach()
        for name, value in state.items()
        if isinstance(name, str) and type(value) in plain
    }
    if records is not None and not _are_records([x for x in tensors.values() if _is_plain(x)], records):
        raise ModelError(f"{path} is spoiled: it has other sizes for its tensors than for their bytes")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def _records(path: Path) -> dict[int, int]:
    """Where the records of an archive that torch.save wrote begin, and their sizes, in bytes."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{path} is a compressed archive, which torch.save doesn't write")
            file.seek(record.header_offset + 26)  # of the name's and the extra field's length
            records[file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))] = record.file_size
    return records


def _are_records(tensors: Sequence[torch.Tensor], records: dict[int, int]) -> bool:
    """Whether the storages of tensors, parts of one map of the file, are records: torch doesn't look."""
    storages = {
        storage.data_ptr(): storage.nbytes() for x in tensors if (storage := x.untyped_storage()).nbytes()
    }
    first = min(storages, default=0)
    return any(
        all(records.get(address - first + offset) == nbytes for address, nbytes in storages.items())
        for offset in records
    )
