"""Copies of GGUF files with changed metadata or tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Type

TYPES = {bool: Type.BOOL, int: Type.INT64, float: Type.FLOAT32, str: Type.STRING}


def edited(
    source: Path,
    target: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Sequence[float] | np.ndarray] | None = None,
) -> Path:
    """A copy of `source` with changed metadata values of any type and extra tensors. None drops a key."""
    reader = gguf.GGUFReader(source)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: field.contents() for key, field in fields.items()} | dict(metadata)
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for key, value in values.items():
        if value is None:
            continue
        kind, *items = (
            [Type.ARRAY, TYPES[type(value[0])]] if isinstance(value, list) else [TYPES[type(value)]]
        )
        if key in fields and key not in metadata:
            kind, *items = fields[key].types
        writer.add_key_value(key, value, kind, *items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, numbers if isinstance(numbers, np.ndarray) else np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
