"""Between host and device without waiting: through pinned memory, in the order of the stream."""

from collections.abc import Sequence

import torch


def upload(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values on the device. What is launched next sees it; the host goes on at once."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class Readback:
    """Tokens on their way to the host: int64, up to `size` of them at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None
        self._count = 0

    def start(self, tokens: torch.Tensor) -> None:
        self._count = tokens.numel()
        self._host[: self._count].copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        return self._host[: self._count].tolist()
