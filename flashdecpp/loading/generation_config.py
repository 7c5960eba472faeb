"""How a model asks to be sampled where the user says nothing: generation_config.json, or GGUF's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .settings import Settings


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's own defaults under the names of SamplingParams, whose meaning they have."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 256


# What transformers samples with where the file asks for sampling and names no value of its own
SAMPLED = GenerationDefaults(temperature=1.0, top_k=50)

GGUF_NAMES = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def generation_defaults(settings: Settings) -> GenerationDefaults:
    """Of the values of a generation_config.json. ModelError for one that isn't what it must be.

    As in transformers, only `do_sample` makes the model sample. Without it temperature doesn't count, but
    the other values do: for a user who asks for a temperature.
    """
    if settings.flag("do_sample", False):
        return _read(settings, SAMPLED)
    return replace(_read(settings, GenerationDefaults()), temperature=0.0)


def gguf_generation_defaults(metadata: Mapping[str, Any], source: str) -> GenerationDefaults:
    """Of a GGUF file's metadata, under llama.cpp's keys: a temperature there makes the model sample."""
    return _read(Settings(metadata, source, GGUF_NAMES), GenerationDefaults())


def _read(settings: Settings, absent: GenerationDefaults) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=settings.number("temperature", absent.temperature, low=0.0),
        top_k=settings.integer("top_k", absent.top_k, low=0),
        top_p=settings.number("top_p", absent.top_p, above=0.0, high=1.0),
        min_p=settings.number("min_p", absent.min_p, low=0.0, high=1.0),
        repetition_penalty=settings.number("repetition_penalty", absent.repetition_penalty, above=0.0),
        max_tokens=settings.integer("max_new_tokens", absent.max_tokens),
    )
