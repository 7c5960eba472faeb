"""The model runner: loads a checkpoint and generates text with the ops of this package."""

from .errors import ModelError, OutOfMemory
from .guides import Guide
from .llm import LLM, Completion, Piece, Stats
from .logprobs import TokenLogprob
from .sampling import SamplingParams

__all__ = [
    "LLM",
    "Completion",
    "Guide",
    "ModelError",
    "OutOfMemory",
    "Piece",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
]
