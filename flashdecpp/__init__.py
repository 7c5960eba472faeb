"""FlashDecoding++ for PyTorch: decode attention with a unified maximum, flat GEMM, GEMV and their switch.

Four ways in:

- ``flashdecpp.ops`` (or ``torch.ops.flashdecpp``): the ops, for your own model; ``flashdecpp.quantize_`` to
  run its linear layers in 8 or 4 bits
- ``flashdecpp.accelerate``: a model of transformers, run through the ops
- ``flashdecpp.LLM``: the model runner
- ``python -m flashdecpp --help``: the command line
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

from flashdecpp import _interrupt as _interrupt
from flashdecpp import _library as _library
from flashdecpp import ops, tuning
from flashdecpp.errors import ModelError, OutOfMemory
from flashdecpp.ops import check
from flashdecpp.quantization import QuantizedLinear, quantize_

if TYPE_CHECKING:
    from flashdecpp.engine.block_pool import BlockPool
    from flashdecpp.engine.guides import Guide
    from flashdecpp.engine.llm import LLM
    from flashdecpp.engine.logprobs import TokenLogprob
    from flashdecpp.engine.results import Completion, Piece, Stats
    from flashdecpp.engine.sampling import SamplingParams
    from flashdecpp.integrations.transformers import accelerate
    from flashdecpp.models.kv_cache import KVCache

__version__ = metadata.version("flashdecpp")
__all__ = [
    "LLM",
    "BlockPool",
    "Completion",
    "Guide",
    "KVCache",
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

tuning.install()

# Imported on first use: most of these bring transformers along, which takes seconds to import.
_HOMES = {
    "LLM": "flashdecpp.engine.llm",
    "BlockPool": "flashdecpp.engine.block_pool",
    "Completion": "flashdecpp.engine.results",
    "Guide": "flashdecpp.engine.guides",
    "KVCache": "flashdecpp.models.kv_cache",
    "Piece": "flashdecpp.engine.results",
    "SamplingParams": "flashdecpp.engine.sampling",
    "Stats": "flashdecpp.engine.results",
    "TokenLogprob": "flashdecpp.engine.logprobs",
    "accelerate": "flashdecpp.integrations.transformers",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flashdecpp' has no attribute {name!r}")
