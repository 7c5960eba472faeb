"""Configuration files: values are checked by type and range, errors name the key, and no code is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_files import edited
from runner_models import VOCAB, default_dtype, save_chatglm, save_model
from test_runner_gguf import write_gguf

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.checkpoint import open_checkpoint
from flashdecpp.loading.generation_config import GenerationDefaults
from flashdecpp.models.rope import Rope

EOS = 257
FIVE = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = save_model(folder)
    write_gguf(folder / "m.gguf", model)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A model whose files a test may change."""
    path = tmp_path / "model"
    path.mkdir()
    for file in original.iterdir():
        if file.suffix != ".gguf":
            (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.fixture(scope="module")
def answer(original) -> list[int]:
    return tokens_of(original)


def edit(path: Path, **changes) -> None:
    """... removes a key."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def tokens_of(path: Path | str, params: SamplingParams = FIVE) -> list[int]:
    return LLM(path, device="cpu", dtype="float32").generate("hello", params)[0].token_ids


def refused(path: Path | str, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        LLM(path, device="cpu")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ config.json

SIZES = [
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 10000, got 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers must be .* got -1"),
    ({"num_hidden_layers": 10_000_000}, "num_hidden_layers must be .* got 10000000"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers must be .* got 1000"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers must be .* got '3'"),
    ({"num_hidden_layers": 3.0}, r"num_hidden_layers must be .* got 3\.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be .* got True"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer from 1"),
    ({"num_key_value_heads": [2, 2, 2]}, r"num_key_value_heads must be .* got \[2, 2, 2\]"),
    ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3"),
    ({"num_attention_heads": 0}, "num_attention_heads must be"),
    ({"hidden_size": 0}, "hidden_size must be"),
    ({"hidden_size": -64}, "hidden_size must be"),
    ({"hidden_size": 10**12}, "hidden_size must be an integer from 1 to 2147483647"),
    ({"hidden_size": {"a": 1}}, "hidden_size must be"),
    ({"head_dim": 0}, "head_dim must be"),
    ({"head_dim": 264}, "head_dim must be a multiple of 8 up to 256"),
    ({"intermediate_size": None}, "intermediate_size|tensor .* has the shape"),
    ({"intermediate_size": 96.5}, r"intermediate_size must be .* got 96\.5"),
    ({"vocab_size": 0}, "vocab_size must be"),
    ({"vocab_size": -5}, "vocab_size must be"),
    ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings must be"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rms_norm_eps": 1e308}, "rms_norm_eps must be a number that float32 holds"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be .* at least 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
    ({"layer_types": ["full_attention"]}, r"layer_types.*\(1\)"),
    ({"layer_types": 5}, "layer_types"),
    ({"quantization_config": 3}, "quantization_config must be an object, got 3"),
    ({"quantization_config": {"quant_method": "awq"}}, r"is quanti[sz]ed \(awq\)"),
    ({"quantization": {"bits": 4}}, r"is quanti[sz]ed \(quantization\)"),
    ({"architectures": 5}, "architectures must be a list of class names, got 5"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of class names"),
    ({"architectures": [None]}, r"architectures must be a list of class names, got \[None\]"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of class names"),
    ({"architectures": ["Llama" * 100]}, "is not supported; supported are Llama"),
    ({"architectures": [], "model_type": "mamba"}, "architecture mamba is not supported"),
    ({"architectures": ..., "model_type": ...}, "architecture unknown is not supported"),
    ({"architectures": ..., "model_type": ["llama"]}, "model_type must be a string"),
]


@pytest.mark.parametrize(("changes", "match"), SIZES, ids=lambda value: str(value)[:48])
def test_a_wrong_value_is_named_at_once(folder, changes, match):
    edit(folder / "config.json", **changes)
    started = time.perf_counter()
    refused(folder, match)
    assert time.perf_counter() - started < 10  # ten million layers used to take half a minute


def test_every_layer_must_be_in_the_files(folder):
    edit(folder / "config.json", num_hidden_layers=9999)
    refused(folder, "lacks the tensors model.layers.3|9999 layers")


def test_values_of_a_window_and_of_caps(tmp_path):
    save_model(tmp_path, "gemma2")
    for key, value in (
        ("sliding_window", 0),
        ("sliding_window", "24"),
        ("query_pre_attn_scalar", 0),
        ("attn_logit_softcapping", -1.0),
        ("final_logit_softcapping", float("inf")),
    ):
        before = (tmp_path / "config.json").read_text()
        edit(tmp_path / "config.json", **{key: value})
        refused(tmp_path, key)
        (tmp_path / "config.json").write_text(before)
    kinds = ["sliding_attention", "chunked_attention", "full_attention"]
    edit(tmp_path / "config.json", layer_types=kinds)
    refused(tmp_path, "layer_types")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 0}, "num_layers must be an integer from 1"),
        ({"multi_query_group_num": 0}, "multi_query_group_num must be"),
        ({"layernorm_epsilon": "x"}, "layernorm_epsilon must be a finite number"),
        ({"rope_ratio": 0}, "rope_ratio must be .* above 0"),
        ({"ffn_hidden_size": ...}, "has no ffn_hidden_size"),
    ],
    ids=str,
)
def test_an_error_uses_the_names_of_the_file(tmp_path, changes, match):
    save_chatglm(tmp_path)
    edit(tmp_path / "config.json", **changes)
    refused(tmp_path, match)


def test_without_architectures_the_model_type_counts(folder, answer):
    for architectures in (..., [], None):
        edit(folder / "config.json", architectures=architectures)
        assert tokens_of(folder) == answer


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '"x"', "{", "\ufffe", "[" * 100_000], ids=lambda t: t[:3]
)
def test_files_of_another_kind(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-16-le") if text == "\ufffe" else text.encode())
    refused(folder, name)


def test_pipes_are_not_waited_for(folder):
    for name in ("config.json", "generation_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, f"{name} is a pipe")
        (folder / name).unlink()
        (folder / name).write_bytes(before)


# --------------------------------------------------------------------------------- ends of a sequence


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        (-1, {EOS}),
        (VOCAB, {EOS}),
        (10**9, {EOS}),
        (2**70, {EOS}),
        ([EOS, 99999], {EOS}),
        ([5, -1, 6], {5, 6, EOS}),
        ([], {EOS}),
        (None, {EOS}),
        (0, {0, EOS}),
        ("</s>", None),
        ([None], None),
        ([5.0], None),
        (5.5, None),
        (True, None),
        ({"a": 1}, None),
        ([[5]], None),
    ],
    ids=str,
)
def test_ends_of_a_sequence_are_tokens_of_the_vocabulary(folder, name, eos, expected):
    """Ids outside it are ignored; anything but an id is refused. The tokenizer has 257 as well."""
    for file in ("config.json", "generation_config.json"):
        edit(folder / file, eos_token_id=...)
    edit(folder / name, eos_token_id=eos)
    if expected is None:
        refused(folder, f"{name}: eos_token_id must be a token id or a list")
    else:
        assert open_checkpoint(folder).eos_ids == expected


def test_an_eos_id_of_minus_one_ends_nothing(folder):
    """-1 is not the last token of the vocabulary."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    first = tokens_of(folder)[0]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name][[first, VOCAB - 1]] = state[name][[VOCAB - 1, first]]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    params = SamplingParams(max_tokens=8, temperature=0.0)
    expected = tokens_of(folder, params)
    assert expected[0] == VOCAB - 1
    for eos in (-1, VOCAB, [-1, 10**6]):
        for name in ("config.json", "generation_config.json"):
            edit(folder / name, eos_token_id=eos)
        assert tokens_of(folder, params) == expected


# ------------------------------------------------------------------------- what a model says of itself

SAYS = [
    ({}, GenerationDefaults()),
    ({"do_sample": False, "temperature": 0.6}, GenerationDefaults()),
    ({"temperature": 0.6}, GenerationDefaults()),
    ({"do_sample": True}, GenerationDefaults(temperature=1.0, top_k=50)),
    ({"do_sample": True, "top_k": 0}, GenerationDefaults(temperature=1.0)),
    ({"do_sample": True, "top_k": None, "temperature": None}, GenerationDefaults(temperature=1.0, top_k=50)),
    (
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1}
        | {"repetition_penalty": 1.05, "max_new_tokens": 2048},
        GenerationDefaults(0.7, 20, 0.8, 0.1, 1.05, 2048),
    ),
    # For a user who asks for a temperature
    (
        {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        GenerationDefaults(0.0, 20, 0.8, 0.0, 1.05),
    ),
    ({"do_sample": True, "temperature": 0}, GenerationDefaults(top_k=50)),
    ({"do_sample": True, "no_such_key": [1], "typical_p": 2}, GenerationDefaults(temperature=1.0, top_k=50)),
]


@pytest.mark.parametrize(("says", "expected"), SAYS, ids=lambda value: str(value)[:60])
def test_sampling_defaults_of_a_model(folder, says, expected):
    (folder / "generation_config.json").write_text(json.dumps(says))
    assert open_checkpoint(folder).defaults == expected


def test_a_model_without_sampling_defaults(folder):
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).defaults == GenerationDefaults()


def test_missing_values_default_as_in_transformers():
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    absent = GenerationDefaults(temperature=defaults["temperature"], top_k=defaults["top_k"])
    assert absent == GenerationDefaults(temperature=1.0, top_k=50)
    assert (defaults["top_p"], defaults["repetition_penalty"], defaults["do_sample"]) == (1.0, 1.0, False)


@pytest.mark.parametrize(
    "says",
    [
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"temperature": "0.7"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 2**31},
        {"top_k": -1},
        {"top_k": 20.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": [1.1]},
        {"max_new_tokens": 0},
        {"max_new_tokens": "all"},
    ],
    ids=str,
)
def test_a_wrong_default_is_reported_when_it_is_used(folder, says):
    (folder / "generation_config.json").write_text(json.dumps(says))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelError, match=rf"generation_config\.json: {next(iter(says))} must be .*, got"):
        checkpoint.defaults  # noqa: B018


def test_sampling_defaults_of_a_gguf_file(original, tmp_path):
    says = {"temp": 0.5, "top_k": 30, "top_p": 0.25, "min_p": 0.125, "penalty_repeat": 1.5}
    metadata = {f"general.sampling.{key}": value for key, value in says.items()}
    path = edited(original / "m.gguf", tmp_path / "m.gguf", metadata)
    assert open_checkpoint(path).defaults == GenerationDefaults(0.5, 30, 0.25, 0.125, 1.5)
    assert open_checkpoint(original / "m.gguf").defaults == GenerationDefaults()
    edited(original / "m.gguf", path, {"general.sampling.top_k": "many"})
    with pytest.raises(ModelError, match=r"m\.gguf: general\.sampling\.top_k must be an integer"):
        open_checkpoint(path).defaults  # noqa: B018


# ----------------------------------------------------------------------------------------- GGUF files


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention.head_count": 0}, r"llama\.attention\.head_count must be an integer from 1"),
        ({"attention.head_count_kv": 0}, r"llama\.attention\.head_count_kv must be"),
        ({"attention.head_count_kv": [2, 1, 2]}, r"head_count_kv must be .* got \[2, 1, 2\]"),
        ({"attention.key_length": 0}, "key_length must be"),
        ({"block_count": 0}, "block_count must be"),
        ({"block_count": "3"}, "block_count must be .* got '3'"),
        ({"block_count": 10**9}, "block_count must be|1000000000 layers"),
        ({"block_count": None}, "has no llama.block_count"),
        ({"context_length": 0}, "context_length must be"),
        ({"context_length": "256"}, "context_length must be"),
        ({"context_length": 10**12}, "context_length must be an integer from 1 to 2147483647"),
        ({"embedding_length": True}, "embedding_length must be .* got True"),
        ({"feed_forward_length": 1.5}, "feed_forward_length must be"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon must be a finite number"),
        ({"expert_count": 4}, "mixture-of-experts GGUF files are not supported"),
    ],
    ids=str,
)
def test_a_gguf_files_wrong_value_is_named(original, tmp_path, changes, match):
    metadata = {f"llama.{key}": value for key, value in changes.items()}
    refused(edited(original / "m.gguf", tmp_path / "m.gguf", metadata), match)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.attention.head_count_kv": [2, 2, 2]},
        {"llama.feed_forward_length": [96, 96, 96]},
        {"llama.vocab_size": 259},  # from before the vocabulary was extended
        {"llama.vocab_size": 10**6},
        {"llama.vocab_size": None},
        {"llama.attention.sliding_window": 0},
        {"tokenizer.ggml.eom_token_id": -1},
    ],
    ids=str,
)
def test_equivalent_metadata_of_a_gguf_file(original, tmp_path, changes, answer):
    expected = tokens_of(original / "m.gguf")
    path = edited(original / "m.gguf", tmp_path / "m.gguf", changes)
    assert tokens_of(path) == expected
    assert open_checkpoint(path).eos_ids == {EOS}


def test_gguf_architectures_must_be_names(original, tmp_path):
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].pop("general.architecture")
    writer.add_uint32("general.architecture", 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(path, r"general\.architecture must be a string, got 5")


# ----------------------------------------------------------------------------------------------- names


def cached(folder: Path, cache: Path, name: str = "lab/tiny", revisions: int = 1, main: bool = True) -> Path:
    """The folder in the layout of the Hub's cache: links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for revision in "abcdef"[:revisions]:
        snapshot = repository / "snapshots" / (revision * 40)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = blobs / f"{revision}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    return repository


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache and an unreachable Hub."""
    from huggingface_hub import HfApi, constants

    def unreachable(*_, **__):
        raise OSError(113, "no route to\nhost")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    return tmp_path / "hub"


@pytest.mark.parametrize("revisions", [1, 2])
def test_a_model_of_the_cache_loads_by_name_and_by_folder(folder, cache, answer, revisions):
    repository = cached(folder, cache, revisions=revisions)
    for model in ("lab/tiny", repository, str(repository / "snapshots" / ("a" * 40))):
        llm = LLM(model, device="cpu", dtype="float32")
        assert llm.name == "tiny"
        assert llm.generate("hello", FIVE)[0].token_ids == answer


def test_a_revision_without_a_branch(folder, cache, answer):
    """The cache after a download of a single commit."""
    repository = cached(folder, cache, main=False)
    assert tokens_of("lab/tiny") == tokens_of(repository) == answer


def test_unknown_names(folder, cache, monkeypatch):
    refused(
        "lab/tiny",
        r"^lab/tiny is neither a path nor in the Hugging Face cache.* \(no route to host\)\. "
        "Without a network, run `hf download lab/tiny` on another machine",
    )
    # A few files that another program fetched are not a model.
    repository = cached(folder, cache)
    (repository / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    refused("lab/tiny", "neither a path nor in the Hugging Face cache")
    # A name that looks like a path is treated as one.
    monkeypatch.chdir(folder.parent)
    for path in (
        "nowhere",
        "./lab/tiny",
        "/lab/tiny",
        "lab/tiny/x",
        "model/tiny",
        "lab/tiny.gguf/",
        "x" * 5000,
    ):
        refused(
            path,
            r"does not exist: give a model folder|can't be opened: File name too long|Hugging Face cache",
        )
    refused("model/tiny", "does not exist")


@pytest.mark.parametrize("model", [5, None, b"x", ["a"]], ids=str)
def test_invalid_paths(model):
    refused(model, "model must be a path or a name")


def test_the_hub_refuses(cache, monkeypatch):
    from huggingface_hub import HfApi, errors

    answer = SimpleNamespace(headers={}, request=None, status_code=None)

    def says(error):
        def model_info(*_, **__):
            raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)

    says(errors.RepositoryNotFoundError("404\nnot here", response=answer))
    refused("lab/tiny", "neither a path nor a model on the Hugging Face Hub")
    says(errors.GatedRepoError("403", response=answer))
    refused("lab/tiny", "is gated: accept its terms at https://huggingface.co/lab/tiny")
    says(errors.OfflineModeIsEnabled("offline"))
    refused("lab/tiny", "not in the Hugging Face cache, and HF_HUB_OFFLINE is set")


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub that a download of one model needs."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        commit, path = "b" * 40, self.path.partition("?")[0]
        self.asked.append(self.path)
        content, kind = b"", "application/json"
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/models/lab/tiny/tree/"):
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            entries = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            content = json.dumps(entries).encode()
        elif path.startswith("/api/models/lab/tiny"):
            siblings = [{"rfilename": name} for name in names]
            content = json.dumps({"id": "lab/tiny", "sha": commit, "siblings": siblings}).encode()
        elif path.startswith("/lab/tiny/resolve/"):
            content, kind = (self.folder / path.rpartition("/")[2]).read_bytes(), "application/octet-stream"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "ETag": f'"{abs(hash(path)):x}"',
            "X-Repo-Commit": commit,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def test_a_model_of_the_hub_is_downloaded_once(folder, tmp_path, answer):
    """Only the files that the runner needs are fetched, and then no network is needed."""
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "flax_model.msgpack"):
        (folder / name).write_bytes(b"not needed")
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys, urllib.request
from flashdecpp import LLM, SamplingParams
for load in range(2):
    llm = LLM("lab/tiny", device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
    print(llm.generate("hello", params)[0].token_ids, llm.name)
    urllib.request.urlopen(sys.argv[1] + "/api/models/lab/tiny?loaded").read()
"""
    address = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(key, None)

    command = [sys.executable, "-c", script, address]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == f"{answer} tiny\n" * 2, result.stderr
    first, second = (index for index, path in enumerate(Hub.asked) if path.endswith("?loaded"))
    assert second == first + 1  # no request in between
    fetched = {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "README.md", "flax_model.msgpack"}
    server.shutdown()
    server.server_close()


def test_gguf_files_under_other_names(original, tmp_path):
    expected = tokens_of(original / "m.gguf")
    blob = tmp_path / "sha256-6a0746a1"
    blob.write_bytes((original / "m.gguf").read_bytes())
    assert tokens_of(blob) == expected
    (tmp_path / "link").symlink_to(blob)
    assert tokens_of(tmp_path / "link") == expected


def test_files_that_are_not_models(folder, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    for name in ("m.gguf", "blob"):
        (tmp_path / name).write_text(pointer)
        refused(tmp_path / name, "is a Git LFS pointer.*git lfs pull")
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is a pipe")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "neither a model folder nor a .gguf file")
    refused(folder / "model.safetensors", "neither a model folder nor a .gguf file")
    (folder / "config.json").unlink()
    (folder / "q4.gguf").touch()
    refused(folder, r"has no config\.json, but GGUF files: give the path of one, like q4\.gguf")


# ------------------------------------------------------------------------------------- code of a folder


@pytest.mark.parametrize("known", [True, False])
def test_a_configurations_own_code_is_never_run(folder, tmp_path, monkeypatch, answer, known):
    """Nor is the user asked for permission: standard input may hold prompts."""
    from transformers import dynamic_module_utils

    asked = []
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    marker = tmp_path / "ran"
    (folder / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n"
    )
    changes = {"auto_map": {"AutoConfig": "theirs.TheirConfig"}, "model_type": "theirs"}
    if known:  # by its class, which this package supplies
        edit(folder / "config.json", **changes)
        assert tokens_of(folder) == answer
    else:
        edit(folder / "config.json", **changes, architectures=["TheirForCausalLM"])
        refused(folder, "TheirForCausalLM is not supported")
    assert not marker.exists() and not asked


# ------------------------------------------------------------------------------ torch's own settings


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        Rope(16, 1e4, 64),
        Rope(16, 1e4, 64, "dynamic", {"factor": 4.0}),
        Rope(16, 1e4, 64, "yarn", {"factor": 4.0}),
        Rope(16, 1e4, 64, "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        Rope(16, 1e4, 256, "longrope", LONGROPE),
    ],
    ids=lambda rope: rope.kind,
)
def test_rope_tables_ignore_torch_defaults(rope):
    """Independent of torch's default dtype and device."""
    expected = rope.table(100), rope.prompt_table(100)
    for setting in (default_dtype(torch.bfloat16), default_dtype(torch.float64), torch.device("meta")):
        with setting:
            got = rope.table(100), rope.prompt_table(100)
        for ours, table in zip(got, expected, strict=True):
            assert (ours is None) == (table is None)
            if table is not None:
                assert ours.dtype == torch.float32 and torch.equal(ours, table)
