"""Copies between host and device without waiting: through pinned memory, in the order of the stream."""

from collections.abc import Sequence
from typing import Any

import torch


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values on the device. The next launch sees it; the host does not wait."""
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def host_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialized host memory that is copied from and to the device without waiting."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class HostCopy:
    """Up to `size` numbers on their way from the device to the host."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = host_tensor((size,), dtype, device)
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._shape = torch.Size((0,))

    def start(self, values: torch.Tensor) -> None:
        self._shape = values.shape
        self._host[: values.numel()].view(values.shape).copy_(values, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> list[Any]:
        """The values as nested lists."""
        if self._done is not None:
            self._done.synchronize()
        return self._host[: self._shape.numel()].view(self._shape).tolist()
