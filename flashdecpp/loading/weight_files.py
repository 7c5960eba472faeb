"""Finds the weight files of a model folder, the same ones that transformers loads."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from flashdecpp.errors import ModelError

from .json_files import check_file, read_json
from .safetensors import SafetensorsFiles
from .torch_files import TorchFiles
from .weights import WeightSource

# In order of preference; a whole file comes before an index.
FORMATS: dict[str, Callable[[Path, Sequence[Path]], WeightSource]] = {
    "model.safetensors": SafetensorsFiles,
    "pytorch_model.bin": TorchFiles,
}


def open_weights(folder: Path) -> WeightSource:
    """The weights of a folder: of the whole file if it exists, else of the files that an index lists.

    Next to a whole file, an index must be valid but its files need not exist.
    """
    for name, open_files in FORMATS.items():
        index = folder / f"{name}.index.json"
        shards = _shards(index) if index.is_file() else None
        if (folder / name).is_file():
            return open_files(folder, [folder / name])
        if shards is not None:
            missing = [shard for shard in shards if not os.path.exists(folder / shard)]
            if missing:
                some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
                raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} weight files: {some}")
            return open_files(folder, [folder / shard for shard in shards])
    for name in (name for whole in FORMATS for name in (whole, f"{whole}.index.json")):
        if os.path.lexists(folder / name):  # but is not a file
            check_file(folder / name)
    first, second = FORMATS
    raise ModelError(f"{folder} has neither {first} nor {second}, whole or sharded with an index")


def _shards(index: Path) -> list[str]:
    """The names of all files that an index lists, which must be in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} is not a valid index of weight files: it needs a weight_map of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _stays_inside(name):
            raise ModelError(f"{index} names {name!r}, which is not a file of its folder")
    return names


def _stays_inside(name: str) -> bool:
    """Whether a name stays within the folder, on any operating system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    leaves = any(path.anchor or ".." in path.parts for path in paths)
    return bool(paths[0].parts) and not leaves and "\0" not in name
