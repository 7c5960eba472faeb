"""FlashDecoding++ for PyTorch: decode attention with a unified maximum, flat GEMM, GEMV and a model runner.

The ops, for your own model:

- `ops`: attention, linear layers and sampling of decode steps, also as ``torch.ops.flashdecpp``
- `check`: a debugging aid that raises for lengths and block ids which `ops.decode_attention` would clamp
- `BlockPool`: hands out the blocks of a paged KV cache
- `KVCache`: paged key and value tensors of every layer of a model

A model of your own or of transformers, made faster in place:

- `quantize_`: replaces a model's linear layers by 8-bit or 4-bit ones
- `QuantizedLinear`: the layer that `quantize_` puts in place of `nn.Linear`
- `accelerate`: runs a transformers model's attention, linear layers and RMSNorms through the ops

The model runner:

- `LLM`: loads a checkpoint and generates text
- `SamplingParams`: how tokens are chosen and when an answer ends
- `Completion`: the answer to a prompt
- `Piece`: a chunk of a streamed answer
- `Stats`: counts, times and memory of the last call
- `TokenLogprob`: a token's log-probability, and those of the likeliest alternatives
- `Guide`: protocol of a grammar that masks the tokens that may come next
- `ModelError`: a checkpoint, prompt or setting that cannot be used
- `OutOfMemory`: the ModelError raised when weights or KV cache do not fit into the free memory

``flashdecpp --help`` (or ``python -m flashdecpp --help``) describes the command line.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

from flashdecpp import _clone

__path__ = _clone.built_folders(__path__)

from flashdecpp import _interrupt, _requirements
from flashdecpp.errors import ModelError, OutOfMemory

if TYPE_CHECKING:
    from flashdecpp import ops
    from flashdecpp.engine.block_pool import BlockPool
    from flashdecpp.engine.guides import Guide
    from flashdecpp.engine.llm import LLM
    from flashdecpp.engine.logprobs import TokenLogprob
    from flashdecpp.engine.results import Completion, Piece, Stats
    from flashdecpp.engine.sampling import SamplingParams
    from flashdecpp.integrations.transformers import accelerate
    from flashdecpp.models.kv_cache import KVCache
    from flashdecpp.ops import check
    from flashdecpp.quantization import QuantizedLinear, quantize_

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

# Imported on first use: some of these import transformers, which takes seconds, and all of them torch.
_MODULES = {
    "LLM": "flashdecpp.engine.llm",
    "BlockPool": "flashdecpp.engine.block_pool",
    "Completion": "flashdecpp.engine.results",
    "Guide": "flashdecpp.engine.guides",
    "KVCache": "flashdecpp.models.kv_cache",
    "Piece": "flashdecpp.engine.results",
    "QuantizedLinear": "flashdecpp.quantization",
    "SamplingParams": "flashdecpp.engine.sampling",
    "Stats": "flashdecpp.engine.results",
    "TokenLogprob": "flashdecpp.engine.logprobs",
    "accelerate": "flashdecpp.integrations.transformers",
    "check": "flashdecpp.ops",
    "quantize_": "flashdecpp.quantization",
}


def _start() -> None:
    """Imports torch, registers torch.ops.flashdecpp and installs the tables of linear(auto)."""
    from flashdecpp import ops, tuning  # noqa: F401

    tuning.install()


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name == "ops":
            return import_module("flashdecpp.ops")
        if name in _MODULES:
            _requirements.need(name)
            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module 'flashdecpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not, without the submodules that happen to be loaded."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if not _interrupt.is_command_line():  # which starts when a command runs, since --help needs no torch
    _start()
