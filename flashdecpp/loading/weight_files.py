"""Which files of a model folder hold its weights: what transformers would take."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from flashdecpp.errors import ModelError

from .json_files import check_file, read_json
from .safetensors import SafetensorsFiles
from .torch_files import TorchFiles
from .weights import WeightSource

# In this order, each before its index.
FORMATS = {"model.safetensors": SafetensorsFiles, "pytorch_model.bin": TorchFiles}


def open_weights(folder: Path) -> WeightSource:
    """The weights of a folder: of a whole file where there is one, else of all that an index tells of.

    An index beside a whole file may be of parts that are gone, but not of another kind.
    """
    for name, source in FORMATS.items():
        index = folder / f"{name}.index.json"
        parts = _parts(index) if index.is_file() else None
        if (folder / name).is_file():
            return source(folder, [folder / name])
        if parts is not None:
            missing = [part for part in parts if not os.path.exists(folder / part)]
            if missing:
                some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
                raise ModelError(f"{folder} lacks {len(missing)} of {len(parts)} weight files: {some}")
            return source(folder, [folder / part for part in parts])
    for name in (name for whole in FORMATS for name in (whole, f"{whole}.index.json")):
        if os.path.lexists(folder / name):  # but is no file
            check_file(folder / name)
    first, second = FORMATS
    raise ModelError(f"{folder} has no {first} and no {second}, whole or with an index of parts")


def _parts(index: Path) -> list[str]:
    """The names of all files that an index tells of, which must be in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} is not a valid index of weight files: it needs a weight_map of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _stays_inside(name):
            raise ModelError(f"{index} names {name!r}, which is not a file of its folder")
    return names


def _stays_inside(name: str) -> bool:
    """Whether a name, on any system, is of a file in the folder or below it."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    leaves = any(path.anchor or ".." in path.parts for path in paths)
    return bool(paths[0].parts) and not leaves and "\0" not in name
