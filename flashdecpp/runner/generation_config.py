"""How a model asks to be sampled: what its generation_config.json says, where the user says nothing."""

from dataclasses import dataclass

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


def generation_defaults(settings: Settings) -> GenerationDefaults:
    """Of the values of a generation_config.json. Raises ModelError for one that isn't what it must be.

    As in transformers, only `do_sample` makes the model sample. Without it temperature doesn't count, but
    the other values do: for a user who asks for a temperature.
    """
    sampled = settings.flag("do_sample", False)
    absent = SAMPLED if sampled else GenerationDefaults()
    temperature = settings.number("temperature", absent.temperature, low=0.0)
    return GenerationDefaults(
        temperature=temperature if sampled else 0.0,
        top_k=settings.integer("top_k", absent.top_k, low=0),
        top_p=settings.number("top_p", absent.top_p, above=0.0, high=1.0),
        min_p=settings.number("min_p", absent.min_p, low=0.0, high=1.0),
        repetition_penalty=settings.number("repetition_penalty", absent.repetition_penalty, above=0.0),
        max_tokens=settings.integer("max_new_tokens", absent.max_tokens),
    )
