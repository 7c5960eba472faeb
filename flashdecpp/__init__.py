"""FlashDecoding++ for PyTorch: decode attention with a unified maximum, flat GEMM, GEMV and their switch.

Four ways in:

- ``flashdecpp.ops`` (or ``torch.ops.flashdecpp``): the ops, for your own model; ``flashdecpp.quantize_`` to
  run its linear layers in 8 or 4 bits
- ``flashdecpp.accelerate``: a model of transformers, run through the ops
- ``flashdecpp.LLM``: the model runner
- ``python -m flashdecpp --help``: the command line
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from flashdecpp import _interrupt as _interrupt
from flashdecpp import _library as _library
from flashdecpp import dispatch, ops
from flashdecpp.ops import check
from flashdecpp.quantization import QuantizedLinear, quantize_

if TYPE_CHECKING:
    from flashdecpp.integrations.transformers import accelerate
    from flashdecpp.runner import (
        LLM,
        Completion,
        Guide,
        ModelError,
        OutOfMemory,
        Piece,
        SamplingParams,
        Stats,
        TokenLogprob,
    )

__version__ = metadata.version("flashdecpp")
__all__ = [
    "LLM",
    "Completion",
    "Guide",
    "ModelError",
    "OutOfMemory",
    "Piece",
    "QuantizedLinear",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "accelerate",
    "check",
    "ops",
    "quantize_",
]

dispatch.install()


def __getattr__(name: str) -> object:
    # These bring transformers along, which takes seconds to import: only for those who use them.
    if name == "accelerate":
        from flashdecpp.integrations.transformers import accelerate

        return accelerate
    if name in __all__:
        from flashdecpp import runner

        return getattr(runner, name)
    raise AttributeError(f"module 'flashdecpp' has no attribute {name!r}")
