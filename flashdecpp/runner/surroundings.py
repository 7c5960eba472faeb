"""What a program sets in torch for its own code, and what must not change what the runner computes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def undisturbed(device: torch.device, inference: bool) -> Iterator[None]:
    """Without the caller's autocast, default device and inference mode, whatever they are.

    `inference`: in inference mode, for computing; False: outside of it and without gradients, for what is
    made to be kept, since a tensor of inference mode can't be changed outside of it.
    Entered around work, never around a yield. The default dtype is the whole process's, other threads'
    included, and stays what it is: what is made here has its dtype said.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        stack.enter_context(torch.inference_mode(inference))
        if not inference:
            stack.enter_context(torch.no_grad())
        yield


_CPU = torch.device("cpu")
