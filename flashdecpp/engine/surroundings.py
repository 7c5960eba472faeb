"""Shields the runner from torch settings that the calling program makes for its own code."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")


def undisturbed(device: torch.device, inference: bool) -> AbstractContextManager[Any]:
    """A context without the caller's autocast, default device and inference mode.

    inference: True for computing. False turns inference mode and gradients off, for tensors that are kept,
        since those created in inference mode cannot be modified outside of it.

    Do not yield inside it. The default dtype belongs to the whole process and is left alone, so tensors
    created inside must name their dtype.
    """
    types = {"cpu", device.type}
    settings: list[AbstractContextManager[Any]] = [
        torch.autocast(type, enabled=False) for type in types if torch.is_autocast_enabled(type)
    ]
    if torch.get_default_device() != _CPU:
        settings.append(_CPU)
    settings.append(torch.inference_mode(inference))
    if not inference:
        settings.append(torch.no_grad())
    return settings[0] if len(settings) == 1 else _all_of(settings)


@contextmanager
def _all_of(settings: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield
