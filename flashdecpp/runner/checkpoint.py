"""Opens a model: everything that can be wrong with it is found here, before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from .chatglm_tokenizer import ChatGLMTokenizer
from .config import ModelConfig, config_from_directory, config_from_gguf
from .demo import fetch_demo
from .errors import ModelError
from .gguf import GGUFFile
from .gguf_tokenizer import GGUFTokenizer
from .safetensors import SafetensorsFolder
from .tokenizer import BaseTokenizer, FolderTokenizer
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

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset((*self.config.eos_ids, *self.tokenizer.eos_ids))


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
    config = config_from_directory(path)
    source = _open_weights(path)
    plan = plan_weights(config, config.architecture.names, source)
    return Checkpoint(path.resolve().name, path, config, _open_tokenizer(path, config), source, plan)


def _open_tokenizer(folder: Path, config: ModelConfig) -> BaseTokenizer:
    """transformers'; those of ChatGLM2 and ChatGLM3 aren't there any more."""
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
    return Checkpoint(path.stem, path, config, GGUFTokenizer(file.metadata), file, plan)
