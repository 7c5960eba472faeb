"""Converts prompts in types of Python, numpy, torch and transformers to texts and lists of token ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from flashdecpp._arguments import is_integer, shown
from flashdecpp.errors import ModelError

# A text or token ids: a list, a tuple, an array, a 1-D tensor, or the output of a transformers tokenizer
Prompt = str | Iterable[int] | Mapping[str, Any]

KIND = "a text or token ids"


def read_prompts(prompts: Prompt | Iterable[Prompt]) -> list[str | list[int]]:
    """Reads one prompt or several. Raises a ModelError for anything else.

    Two-dimensional arrays and tensors hold a prompt per row. A mapping such as transformers' BatchEncoding
    stands for its input_ids, without those that its attention_mask excludes.
    """
    if isinstance(prompts, str):
        return [str(prompts)]
    if isinstance(prompts, Mapping):
        return [*_encoded(prompts)]
    values = _values(prompts, "prompts", f"{KIND}, or several of these")
    if values and (_token(values[0]) is not None):
        return [token_ids("prompt", values)]
    return [read_prompt(value, f"prompts[{index}]") for index, value in enumerate(values)]


def read_prompt(prompt: Prompt, name: str = "prompt") -> str | list[int]:
    """Reads a single prompt."""
    if isinstance(prompt, str):
        return str(prompt)
    if isinstance(prompt, Mapping):
        rows = _encoded(prompt, name)
    elif getattr(prompt, "ndim", 1) == 2:  # as tokenizers return tensors
        rows = [token_ids(name, row) for row in _values(prompt, name, KIND)]
    else:
        return token_ids(name, prompt)
    if len(rows) != 1:
        raise ModelError(f"{name} must be one prompt, got {len(rows)}")
    return rows[0]


def token_ids(name: str, values: Iterable[int], what: str = KIND) -> list[int]:
    """Token ids as ints. Raises a ModelError unless they are an iterable of integers."""
    ids = []
    for value in _values(values, name, what):
        token = _token(value)
        if token is None:
            raise ModelError(f"{name} must be {what}, which are integers, got {shown(value)} among them")
        ids.append(token)
    return ids


def _encoded(encoding: Mapping[str, Any], name: str = "prompts") -> list[list[int]]:
    """The prompts in a tokenizer's output."""
    if "input_ids" not in encoding:
        raise ModelError(f"{name} must be {KIND}, got a mapping without input_ids: {shown(dict(encoding))}")
    rows = _rows(encoding["input_ids"], f"{name}['input_ids']")
    if encoding.get("attention_mask") is None:
        return rows
    masks = _rows(encoding["attention_mask"], f"{name}['attention_mask']")
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ModelError(f"{name} must have input_ids and an attention_mask of the same shape")
    return [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _rows(values: Any, name: str) -> list[list[int]]:
    """One row of integers or several."""
    values = _values(values, name, "token ids, or several rows of them")
    if values and _token(values[0]) is not None:
        return [token_ids(name, values)]
    return [token_ids(f"{name}[{index}]", row) for index, row in enumerate(values)]


def _values(values: Any, name: str, what: str) -> Sequence[Any]:
    """The elements of an iterable. Arrays and tensors are converted at once."""
    if hasattr(values, "tolist") and getattr(values, "ndim", 0) > 0:
        return values.tolist()
    scalar = isinstance(values, (str, bytes, bytearray, memoryview, Mapping)) or hasattr(values, "ndim")
    if scalar or not isinstance(values, Iterable):
        raise ModelError(f"{name} must be {what}, got {shown(values)}")
    return list(values)


def _token(value: Any) -> int | None:
    """An integer of Python, numpy or torch (a 0-D tensor) as an int; None for anything else."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    return int(value) if is_integer(value) else None
