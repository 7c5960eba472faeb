"""Opens a model and finds everything that is wrong with it before its weights are loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

from flashdecpp.errors import ModelError
from flashdecpp.models.config import ModelConfig

from . import hub
from .chatglm_tokenizer import ChatGLMTokenizer
from .demo import fetch_demo
from .generation_config import GenerationDefaults, generation_defaults, gguf_generation_defaults
from .gguf import GGUFFile
from .gguf_config import config_from_gguf
from .gguf_tokenizer import GGUFTokenizer
from .hf_config import config_from_directory, read_generation_config
from .json_files import check_file, check_small_files
from .tokenizer import BaseTokenizer, FolderTokenizer
from .weight_files import open_weights
from .weights import Plan, WeightSource, plan_weights


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be loaded: its configuration, tokenizer and a plan for its weights."""

    name: str
    path: Path  # the folder or the file
    config: ModelConfig
    tokenizer: BaseTokenizer
    source: WeightSource
    plan: Plan
    read_defaults: Callable[[], GenerationDefaults]

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """The model's sampling defaults, read on first use. Raises a ModelError for a bad value."""
        return self.read_defaults()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens of the vocabulary that end a sequence."""
        named = (*self.config.eos_ids, *self.tokenizer.eos_ids)
        return frozenset(token for token in named if 0 <= token < self.config.vocab)


def open_checkpoint(model: str | PathLike[str]) -> Checkpoint:
    """Opens "demo", a Hugging Face folder, a model of the Hugging Face Hub by its name, or a GGUF file.

    A folder may be one of the Hub's cache. GGUF files are recognized by their content.
    """
    if not isinstance(model, str | PathLike):
        raise ModelError(f"model must be a path or a name, got {model!r}")
    try:
        path = _locate(model)
        return _open_folder(path) if path.is_dir() else _open_gguf(path)
    except OSError as error:  # path too long, folder not readable, disk failure
        raise ModelError(f"{model} can't be opened: {error.strerror or error}") from error


def _locate(model: str | PathLike[str]) -> Path:
    """The folder or GGUF file that `model` stands for."""
    if str(model) == "demo":
        return fetch_demo()
    try:
        path = Path(model).expanduser()
    except RuntimeError:
        raise ModelError(f"{model} is not a path: there is no such home folder") from None
    if path.is_dir():
        return hub.snapshot(path) or path
    if GGUFFile.is_gguf(path) or (path.suffix == ".gguf" and path.exists()):
        return path
    if path.exists():
        check_file(path)  # a better message for a pipe or a Git LFS pointer
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    if hub.is_name(str(model)):
        return hub.fetch(str(model))
    raise ModelError(f"{model} does not exist: give a model folder, a .gguf file or 'demo'")


def _open_folder(path: Path) -> Checkpoint:
    check_small_files(path)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs and not (path / "config.json").exists():
        raise ModelError(f"{path} has no config.json, but GGUF files: give the path of one, like {ggufs[0]}")
    generation = read_generation_config(path)
    config = config_from_directory(path, generation)
    source = open_weights(path)
    plan = plan_weights(config, config.architecture.names, source)
    tokenizer = _open_tokenizer(path, config)
    defaults = partial(generation_defaults, generation)
    return Checkpoint(hub.name_of(path.absolute()), path, config, tokenizer, source, plan, defaults)


def _open_tokenizer(folder: Path, config: ModelConfig) -> BaseTokenizer:
    """The tokenizer through transformers, which no longer has those of ChatGLM2 and ChatGLM3."""
    if config.architecture.in_transformers or (folder / "tokenizer.json").exists():
        return FolderTokenizer(folder)
    return ChatGLMTokenizer(folder)


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = config_from_gguf(file)
    architecture = config.architecture
    plan = plan_weights(config, architecture.gguf_names, file, architecture.gguf_interleaved_qk)
    defaults = partial(gguf_generation_defaults, file.metadata, str(path))
    return Checkpoint(path.stem, path, config, GGUFTokenizer(file.metadata), file, plan, defaults)
