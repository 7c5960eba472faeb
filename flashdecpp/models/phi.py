"""Where the unified maximum of the softmax comes from: a file of one phi for every head, or carried along.

phi.json, beside a model, holds what `flashdecpp calibrate` chose and what it was chosen from. Without it
every sequence carries the row maxima of its last step as its next phi. Nothing depends on either for
accuracy: a row that phi doesn't fit falls back. It only saves time.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flashdecpp import _files
from flashdecpp.errors import ModelError

from .config import ModelConfig

VERSION = 1

# How far from phi a row's maximum may be: "half" for float16 on a GPU, "bfloat16" for that on a GPU and for
# any dtype on the CPU. The kernels decide: csrc/cuda/softmax.cuh, csrc/cpu/softmax.h.
SAFE_WINDOWS = {"half": 5.5, "bfloat16": 22.0}
PERCENTILES = ("0.1", "1", "50", "99", "99.9")

Phi = str | Path | Sequence[torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model's softmax inputs over a text; every tensor is float32 [layers, q_heads]."""

    model: str
    dtype: str  # that the model ran in
    tokens: int  # how many were measured: the rows of each head
    phi: torch.Tensor
    minimum: torch.Tensor  # of all inputs
    maximum: torch.Tensor
    row_maximum: dict[str, torch.Tensor]  # by percentile
    coverage: dict[str, torch.Tensor]  # share of the row maxima within a safe window of phi, by window

    def save(self, path: Path) -> None:
        """Writes the file, a line for each layer; all or nothing."""
        head = {"version": VERSION, "model": self.model, "dtype": self.dtype, "tokens": self.tokens}
        layers = ",\n".join(json.dumps(self._layer(index)) for index in range(len(self.phi)))
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(f'{json.dumps(head)[:-1]}, "layers": [\n{layers}\n]}}\n', encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        try:
            raw = _files.read_json(path, object, ModelError)
        except ModelError as error:
            raise ModelError(_advice(str(error))) from None
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise ModelError(_advice(f"{path} is no phi file of version {VERSION}"))
        try:
            layers = raw["layers"]
            loaded = cls(
                model=str(raw["model"]),
                dtype=str(raw["dtype"]),
                tokens=int(raw["tokens"]),
                phi=_stack([layer["phi"] for layer in layers]),
                minimum=_stack([layer["min"] for layer in layers]),
                maximum=_stack([layer["max"] for layer in layers]),
                row_maximum={p: _stack([layer["row_max"][p] for layer in layers]) for p in PERCENTILES},
                coverage={w: _stack([layer["coverage"][w] for layer in layers]) for w in SAFE_WINDOWS},
            )
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            raise ModelError(_advice(f"{path} lacks what a phi file has, or holds other things")) from None
        tables = (loaded.minimum, loaded.maximum, *loaded.row_maximum.values(), *loaded.coverage.values())
        if any(table.shape != loaded.phi.shape for table in tables):
            raise ModelError(_advice(f"{path} has statistics for other heads than it has phi for"))
        return loaded

    def _layer(self, index: int) -> dict[str, Any]:
        def heads(table: torch.Tensor) -> list[float]:
            return [round(value, 4) for value in table[index].tolist()]

        return {
            "phi": heads(self.phi),
            "min": heads(self.minimum),
            "max": heads(self.maximum),
            "row_max": {name: heads(table) for name, table in self.row_maximum.items()},
            "coverage": {name: heads(table) for name, table in self.coverage.items()},
        }


def phi_path(model: Path) -> Path:
    """Where a model's phi lies: in its folder, or beside its GGUF file."""
    return model / "phi.json" if model.is_dir() else model.with_name(model.name + ".phi.json")


def load_phi(
    phi: Phi, model: Path, config: ModelConfig, device: torch.device
) -> Sequence[torch.Tensor] | Literal["carry"] | None:
    """Of what LLM was given: phi [q_heads] of each layer, "carry", or None for the online softmax."""
    if phi is None or phi == "none":
        return None
    if not isinstance(phi, str | Path):
        return phi
    path = phi_path(model) if phi == "auto" else Path(phi).expanduser()
    if phi == "carry" or (phi == "auto" and not os.path.lexists(path)):
        return "carry"
    values = Calibration.load(path).phi
    if values.shape != (config.layers, config.q_heads):
        layers, heads = values.shape
        raise ModelError(
            _advice(
                f"{path} has phi for {layers} layers of {heads} heads, "
                f"but the model has {config.layers} layers of {config.q_heads}"
            )
        )
    return list(values.to(device))


def _stack(rows: list[list[float]]) -> torch.Tensor:
    table = torch.tensor(rows, dtype=torch.float32)
    if table.dim() != 2 or not table.isfinite().all():
        raise ValueError("not a finite number for each head of each layer")
    return table


def _advice(complaint: str) -> str:
    return f"{complaint}; run flashdecpp calibrate again, or go without it (phi carry)"
