"""The pytorch_model.bin files of a model folder, one or sharded, memory-mapped: what older models have."""

from pathlib import Path

import torch

from flashdecpp.quantization import QuantizedWeight

from .errors import ModelError
from .safetensors import weight_files


class TorchFolder:
    """The tensors of all files, by name. A WeightSource (weights.py)."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in weight_files(folder, "pytorch_model.bin"):
            try:
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch raises many kinds for a bad file
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(f"{path} can't be read: {reason}") from error
            self._tensors |= {name: value for name, value in state.items() if torch.is_tensor(value)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view of the map: rows [start, stop) in the file's dtype."""
        return self._tensors[name][start:stop]

    def format(self, name: str) -> None:
        """Nothing here is quantised."""

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        raise NotImplementedError("no tensor has a format")

    def release(self, name: str) -> None:
        """The pages of a file can be reclaimed at any time; torch has no way to drop them earlier."""
