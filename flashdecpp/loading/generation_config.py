"""A model's sampling defaults, from generation_config.json or GGUF metadata."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config_reader import ConfigReader


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's defaults for the fields of SamplingParams with the same names."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 256


# transformers' defaults if the file asks for sampling without values of its own
SAMPLED = GenerationDefaults(temperature=1.0, top_k=50)

GGUF_NAMES = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def generation_defaults(settings: ConfigReader) -> GenerationDefaults:
    """The defaults in a generation_config.json. Raises a ModelError for a bad value.

    As in transformers, a model samples only with `do_sample`. Without it the file's temperature is ignored;
    its other values apply if the user gives a temperature.
    """
    if settings.flag("do_sample", False):
        return _read(settings, SAMPLED)
    return replace(_read(settings, GenerationDefaults()), temperature=0.0)


def gguf_generation_defaults(metadata: Mapping[str, Any], source: str) -> GenerationDefaults:
    """The defaults in GGUF metadata, under llama.cpp's keys. A temperature there makes the model sample."""
    return _read(ConfigReader(metadata, source, GGUF_NAMES), GenerationDefaults())


def _read(settings: ConfigReader, absent: GenerationDefaults) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=settings.number("temperature", absent.temperature, low=0.0),
        top_k=settings.integer("top_k", absent.top_k, low=0),
        top_p=settings.number("top_p", absent.top_p, above=0.0, high=1.0),
        min_p=settings.number("min_p", absent.min_p, low=0.0, high=1.0),
        repetition_penalty=settings.number("repetition_penalty", absent.repetition_penalty, above=0.0),
        max_tokens=settings.integer("max_new_tokens", absent.max_tokens),
    )
