"""Where the unified maximum of the softmax comes from: a calibrated file, the sequence itself, or nowhere.

phi.json, next to a model, holds the phi that `flashdecpp calibrate` chose for every head and the statistics
that it chose from. Without it, every sequence carries the row maxima of its last step as its next phi.
Accuracy depends on neither, because a row whose maximum is too far from phi falls back. They only save time.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashdecpp import _files
from flashdecpp._arguments import require
from flashdecpp.errors import ModelError

from .config import ModelConfig

VERSION = 1

# How far a row's maximum may be from phi: "half" for float16 on a GPU, "bfloat16" for bfloat16 on a GPU and
# for any dtype on the CPU. The kernels define these: softmax.cuh and softmax.h in csrc.
SAFE_WINDOWS = {"half": 5.5, "bfloat16": 22.0}
PERCENTILES = ("0.1", "1", "50", "99", "99.9")

Phi = str | Path | Sequence[torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model's softmax inputs over a text; every tensor is float32 [layers, q_heads]."""

    model: str
    dtype: str  # of the measured run
    tokens: int  # measured: the rows of each head
    phi: torch.Tensor
    minimum: torch.Tensor  # of all inputs
    maximum: torch.Tensor
    row_maximum: dict[str, torch.Tensor]  # by percentile
    coverage: dict[str, torch.Tensor]  # fraction of row maxima within phi's safe window, by window

    def save(self, path: Path) -> None:
        """Writes the file atomically, one line per layer."""
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
    """The phi file of a model: in its folder, or next to its GGUF file."""
    return model / "phi.json" if model.is_dir() else model.with_name(model.name + ".phi.json")


@dataclass(frozen=True, eq=False)
class PhiSource:
    """How decode steps get their unified maximum: `carry`, `fixed` or `none`."""

    carried: bool = False  # every sequence brings its own, as Decoder.decode's carried_phi
    layers: Sequence[torch.Tensor] | None = None  # float32 [q_heads] of each layer, for all sequences

    @classmethod
    def carry(cls) -> "PhiSource":
        """Each sequence and head uses the row maximum of its last step."""
        return cls(carried=True)

    @classmethod
    def fixed(cls, layers: Sequence[torch.Tensor]) -> "PhiSource":
        """The same phi for every step: float32 [q_heads] of each layer, on the model's device."""
        return cls(layers=layers)

    @classmethod
    def none(cls) -> "PhiSource":
        """Online softmax."""
        return cls()

    @property
    def softmax(self) -> str:
        """The name of the softmax that decode steps compute."""
        if self.carried:
            return "carried phi"
        return "online softmax" if self.layers is None else "fixed phi"


def find_phi(phi: Phi, model: Path, config: ModelConfig, device: torch.device) -> PhiSource:
    """The source that `LLM(phi=...)` names. ModelError for a file or numbers that don't fit the model."""
    if phi is None or phi == "none":
        return PhiSource.none()
    if not isinstance(phi, str | Path):
        return PhiSource.fixed(_own_phi(phi, config, device))
    path = phi_path(model) if phi == "auto" else Path(phi).expanduser()
    if phi == "carry" or (phi == "auto" and not os.path.lexists(path)):
        return PhiSource.carry()
    values = Calibration.load(path).phi
    if values.shape != (config.layers, config.q_heads):
        layers, heads = values.shape
        raise ModelError(
            _advice(
                f"{path} has phi for {layers} layers of {heads} heads, "
                f"but the model has {config.layers} layers of {config.q_heads}"
            )
        )
    return PhiSource.fixed(list(values.to(device)))


def _own_phi(phi: Sequence[torch.Tensor], config: ModelConfig, device: torch.device) -> list[torch.Tensor]:
    """A caller's phi for each layer, float32 [q_heads] on the device."""
    try:
        layers = [torch.as_tensor(layer, dtype=torch.float32, device=device) for layer in phi]
    except (TypeError, ValueError, RuntimeError):
        layers = []
    fits = len(layers) == config.layers and all(layer.shape == (config.q_heads,) for layer in layers)
    what = f"auto, carry, none, a file, or numbers [{config.q_heads}] for each of {config.layers} layers"
    require(fits and all(layer.isfinite().all() for layer in layers), "phi", what, phi)
    return layers


def _stack(rows: list[list[float]]) -> torch.Tensor:
    table = torch.tensor(rows, dtype=torch.float32)
    if table.dim() != 2 or not table.isfinite().all():
        raise ValueError("not a finite number for each head of each layer")
    return table


def _advice(complaint: str) -> str:
    return f"{complaint}; run flashdecpp calibrate again, or go without it (phi carry)"
