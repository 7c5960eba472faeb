"""What a program sets in torch for its own code, and what must not change what the runner computes."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


def undisturbed(device: torch.device, inference: bool) -> AbstractContextManager:
    """Without the caller's autocast, default device and inference mode, whatever they are.

    `inference`: in inference mode, for computing; False: outside of it and without gradients, for what is
    made to be kept, since a tensor of inference mode can't be changed outside of it.
    Entered around work, never around a yield. The default dtype is the whole process's, other threads'
    included, and stays what it is: what is made here has its dtype said.
    """
    kinds = {"cpu", device.type}
    settings = [torch.autocast(kind, enabled=False) for kind in kinds if torch.is_autocast_enabled(kind)]
    if torch.get_default_device() != _CPU:
        settings.append(_CPU)
    settings.append(torch.inference_mode(inference))
    if not inference:
        settings.append(torch.no_grad())
    return settings[0] if len(settings) == 1 else _all_of(settings)


@contextmanager
def _all_of(settings: Sequence[AbstractContextManager]) -> Iterator[None]:
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield
