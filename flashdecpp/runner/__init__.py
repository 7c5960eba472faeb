"""The model runner: loads a checkpoint and generates text with the ops of this package."""

from .errors import ModelError, OutOfMemory
from .llm import LLM, Completion, Piece, Stats
from .sampling import SamplingParams

__all__ = ["LLM", "Completion", "ModelError", "OutOfMemory", "Piece", "SamplingParams", "Stats"]
