"""What needs packages of the extra `runner`, and what to do about one that is missing."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {
    "LLM": ("numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf"),
    "SamplingParams": ("tokenizers",),
    "Guide": ("tokenizers",),
    "accelerate": ("transformers",),
    "the command line": ("typer",),
}


def need(what: str) -> None:
    """Raises an ImportError that says how to install the first package that `what` misses, if any."""
    for package in NEEDED.get(what, ()):
        if find_spec(package) is None:
            raise ImportError(
                f"{what} needs {package}, which is not installed: pip install 'flashdecpp[runner]'",
                name=package,
            )
