"""Opens a model: everything that can be wrong with it is found here, before its weights are loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from .config import ModelConfig
from .demo import fetch_demo
from .errors import ModelError
from .generation_config import GenerationDefaults, generation_defaults, gguf_generation_defaults
from .gguf import GGUFFile
from .gguf_config import config_from_gguf
from .hf_config import config_from_directory, generation_settings
from .safetensors import SafetensorsFolder
from .tokenizer import BaseTokenizer, ChatGLMTokenizer, FolderTokenizer, GGUFTokenizer
from .torch_files import TorchFolder
from .weights import Plan, WeightSource, plan_weights


@dataclass(frozen=True)
class Checkpoint:
    name: str
    path: Path  # the folder or the file
    config: ModelConfig
    tokenizer: BaseTokenizer
    source: WeightSource
    plan: Plan
    read_defaults: Callable[[], GenerationDefaults]

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """How the model asks to be sampled. ModelError for a bad value: only who wants them meets it."""
        return self.read_defaults()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens of the vocabulary that end a sequence."""
        named = (*self.config.eos_ids, *self.tokenizer.eos_ids)
        return frozenset(token for token in named if 0 <= token < self.config.vocab)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """`model`: "demo", a Hugging Face folder, or a GGUF file."""
    path = fetch_demo() if str(model) == "demo" else Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ModelError(f"{model} does not exist: give a model folder, a .gguf file or 'demo'")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    return _open_gguf(path)


def _open_folder(path: Path) -> Checkpoint:
    generation = generation_settings(path)
    config = config_from_directory(path, generation)
    source = _open_weights(path)
    plan = plan_weights(config, config.architecture.names, source)
    tokenizer = _open_tokenizer(path, config)
    defaults = partial(generation_defaults, generation)
    return Checkpoint(path.resolve().name, path, config, tokenizer, source, plan, defaults)


def _open_tokenizer(folder: Path, config: ModelConfig) -> BaseTokenizer:
    """transformers'; that of ChatGLM2 isn't there any more."""
    if config.architecture.in_transformers or (folder / "tokenizer.json").exists():
        return FolderTokenizer(folder)
    return ChatGLMTokenizer(folder)


def _open_weights(folder: Path) -> WeightSource:
    """safetensors; where there are none, what torch.save wrote."""
    if any(folder.glob("pytorch_model.bin*")) and not any(folder.glob("model.safetensors*")):
        return TorchFolder(folder)
    return SafetensorsFolder(folder)


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = config_from_gguf(file)
    architecture = config.architecture
    plan = plan_weights(config, architecture.gguf_names, file, architecture.gguf_interleaved_qk)
    defaults = partial(gguf_generation_defaults, file.metadata, str(path))
    return Checkpoint(path.stem, path, config, GGUFTokenizer(file.metadata), file, plan, defaults)
