"""Models of the Hugging Face Hub, from the local cache or downloaded into it."""

import re
from pathlib import Path

from flashdecpp.errors import ModelError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # organization/model

# The files that a model is loaded from. Subfolders of a repository hold other formats.
FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
SAFETENSORS, TORCH = "model*.safetensors", "pytorch_model*.bin"
SHARD = re.compile(r"-\d+-of-(?P<count>\d+)\.")


def is_name(model: str) -> bool:
    """Whether it looks like organization/model, and not like a path whose first folder exists."""
    return NAME.fullmatch(model) is not None and not Path(model).parent.exists()


def fetch(name: str) -> Path:
    """The folder of a model by its name. Does not use the network if the cache has all its files."""
    from huggingface_hub import constants  # late: slow to import, and only needed for names

    cached = snapshot(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}")
    return cached if cached is not None and _is_whole(cached) else _download(name)


def snapshot(folder: Path) -> Path | None:
    """The snapshot in a cache folder models--organization--name: that of the main branch when it was last
    fetched, else the only one."""
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    if main.is_file() and (found := snapshots / main.read_text(errors="replace").strip()).is_dir():
        return found
    revisions = [path for path in snapshots.iterdir() if path.is_dir()] if snapshots.is_dir() else []
    return revisions[0] if len(revisions) == 1 else None


def name_of(folder: Path) -> str:
    """The name of a model folder, which for one of the cache is that of its repository."""
    for path in (folder, *folder.parents[:2]):
        if path.name.startswith("models--"):
            return path.name.rpartition("--")[2]
    return folder.name


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has all weight files, and not just a few files that another program fetched."""
    for pattern in (SAFETENSORS, TORCH):
        if files := [path for path in folder.glob(pattern) if path.exists()]:  # not a dangling link
            shards = [match for path in files if (match := SHARD.search(path.name))]
            return not shards or len(shards) == int(shards[0]["count"])
    return False


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        files = [file.rfilename for file in HfApi().model_info(name).siblings or ()]
        weights = SAFETENSORS if any(Path(file).match(SAFETENSORS) for file in files) else TORCH
        if not any(Path(file).match(weights) for file in files):
            raise ModelError(
                f"{name} on the Hugging Face Hub has neither {SAFETENSORS} nor {TORCH}{_advice(files)}"
            )
        return Path(snapshot_download(name, allow_patterns=[*FILES, weights], ignore_patterns=["*/*"]))
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and run hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{name} is neither a path nor a model on the Hugging Face Hub; a private one needs hf auth login"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(f"{name} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set") from None
    except Exception as error:  # connection, server or disk
        reason = re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split())) or type(error).__name__
        raise ModelError(
            f"{name} is neither a path nor in the Hugging Face cache, and can't be downloaded ({reason}). "
            f"Without a network, run `hf download {name}` on another machine and give the path of its folder"
        ) from error


def _advice(files: list[str]) -> str:
    ggufs = [file for file in files if file.endswith(".gguf")]
    return f", but GGUF files: download one and give its path, like {ggufs[0]}" if ggufs else ""
