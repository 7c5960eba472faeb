"""Between host and device without waiting: through pinned memory, in the order of the stream."""

from collections.abc import Sequence

import torch


def upload(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values on the device. What is launched next sees it; the host goes on at once."""
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def host_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of the host that is copied from and to the device without waiting; with anything in it."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class Readback:
    """Numbers on their way to the host, up to `size` of them at a time."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = host_tensor((size,), dtype, device)
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._shape = torch.Size((0,))

    def start(self, values: torch.Tensor) -> None:
        self._shape = values.shape
        self._host[: values.numel()].view(values.shape).copy_(values, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> list:
        """The values as nested lists."""
        if self._done is not None:
            self._done.synchronize()
        return self._host[: self._shape.numel()].view(self._shape).tolist()
