"""Model files that are corrupt or of another kind are named in a one-line error, or read correctly."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_files import fuzz
from runner_models import save_model
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_safetensors
from transformers import AutoModelForCausalLM

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading.json_files import read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
UP, DOWN, HEAD = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "lm_head.weight",
)
EMBED = "model.embed_tokens.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    save_model(root / "apart", **sizes)
    save_model(root / "tied", **sizes, tie_word_embeddings=True)
    return {name: root / name for name in ("apart", "tied")}


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    """A copy that a test may corrupt."""
    return shutil.copytree(originals["apart"], tmp_path / "model")


@pytest.fixture
def tied(originals, tmp_path) -> Path:
    return shutil.copytree(originals["tied"], tmp_path / "tied")


@pytest.fixture(scope="module")
def expected(originals) -> list[int]:
    return tokens_of(originals["apart"])


def tokens_of(model: Path) -> list[int]:
    llm = LLM(model, device="cpu", dtype="float32")
    return llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids


def theirs(model: Path) -> list[int]:
    """The tokens that transformers generates."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=258)
    return out[0, 3:].tolist()


def refused(model: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        LLM(model, device="cpu", dtype="float32")
    assert len(str(caught.value).splitlines()) == 1


def rewrite(folder: Path, change: Callable[[State], Any]) -> Path:
    """Changes the tensors of model.safetensors; `change` returns new ones or edits them."""
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(change(state) or state, path, {"format": "pt"})
    return folder


def to_torch(folder: Path, change: Callable[[State], Any] = dict, **options: Any) -> Path:
    """Replaces model.safetensors by pytorch_model.bin."""
    path = folder / "model.safetensors"
    torch.save(change(load_file(path)), folder / "pytorch_model.bin", **options)
    path.unlink()
    return folder


# ------------------------------------------------------------------------------ headers of safetensors files


def write_header(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[start:])


def read_header(folder: Path) -> dict[str, Any]:
    data = (folder / "model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def shifted(first: int, last: int) -> Callable[[dict], dict]:
    return lambda entry: (
        entry | {"data_offsets": [entry["data_offsets"][0] + first, entry["data_offsets"][1] + last]}
    )


def without(key: str) -> Callable[[dict], dict]:
    return lambda entry: {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    "change",
    {
        "fewer bytes": shifted(0, -64),
        "more bytes": shifted(-64, 0),
        "a byte off": shifted(1, 1),
        "over another": shifted(64, 64),
        "before the data": lambda entry: entry | {"data_offsets": [-8, 6136]},
        "backwards": lambda entry: entry | {"data_offsets": entry["data_offsets"][::-1]},
        "beyond 64 bits": lambda entry: entry | {"data_offsets": [0, 2**70]},
        "half the size": lambda entry: entry | {"dtype": "F16"},
        "another shape": lambda entry: entry | {"shape": [48, 31]},
        "a shape that overflows": lambda entry: entry | {"shape": [2**40, 2**40]},
        "fractions": lambda entry: entry | {"shape": [48.0, 32.0]},
        "no list": lambda entry: entry | {"shape": 5},
        "no shape": without("shape"),
        "no dtype": without("dtype"),
        "no offsets": without("data_offsets"),
        "no object": lambda entry: 5,
        "null": lambda entry: None,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_named(folder, change):
    header = read_header(folder)
    header[UP] = change[1](header[UP])
    write_header(folder, json.dumps(header).encode())
    refused(folder, r"model\.safetensors (is truncated|is not a valid safetensors file).*up_proj")


@pytest.mark.parametrize(
    "header", [b"[1]", b"5", b"null", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"__metadata__": 5}']
)
def test_a_header_of_another_kind_is_refused(folder, header):
    write_header(folder, header)
    refused(folder, r"model\.safetensors is not a (valid )?safetensors file")


def test_a_duplicate_name_is_refused(folder):
    first, second = (json.dumps(read_header(folder)[name]) for name in (UP, DOWN))
    header = json.dumps(read_header(folder))
    write_header(folder, header.replace(f'"{DOWN}": {second}', f'"{UP}": {second}').encode())
    refused(folder, r"model\.safetensors is not a valid safetensors file")
    assert first != second


def test_weights_at_odd_addresses_are_read(folder, expected):
    """The format requires no alignment: the header may have any length, and a tensor a single byte."""
    for spaces in range(1, 4):
        write_header(folder, json.dumps(read_header(folder)).encode().rstrip() + b" " * spaces)
        assert tokens_of(folder) == expected


def test_a_header_that_would_take_forever_is_not_read(folder):
    entry = json.dumps({"dtype": "F32", "shape": [], "data_offsets": [0, 0]})
    write_header(folder, ("{" + ",".join(f'"{i}":{entry}' for i in range(750_000)) + "}").encode())
    begin = time.process_time()
    refused(folder, "more than 2097152 lists and objects")
    assert time.process_time() - begin < 5


# ------------------------------------------------------------------------------------- which file counts


def split(folder: Path, weights: State, name: str = "model.safetensors") -> Path:
    """Splits the weights into two files with an index. Returns their names."""
    half = len(weights) // 2
    stem, suffix = name.rsplit(".", 1)
    index = {}
    for number, names in enumerate((list(weights)[:half], list(weights)[half:]), start=1):
        part = f"{stem}-{number:05}-of-00002.{suffix}"
        state = {key: weights[key] for key in names}
        save_file(state, folder / part, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            state, folder / part
        )
        index |= dict.fromkeys(names, part)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("better", ["model.safetensors", "parts", "pytorch_model.bin"])
def test_files_are_chosen_in_the_order_of_transformers(folder, better):
    """Files further down the list hold other weights."""
    right = load_file(folder / "model.safetensors")
    wrong = {name: tensor.flip(0) for name, tensor in right.items()}
    if better != "model.safetensors":
        (folder / "model.safetensors").unlink()
    if better == "pytorch_model.bin":
        torch.save(right, folder / better)
    else:
        split(folder, right if better == "parts" else wrong)
        torch.save(wrong, folder / "pytorch_model.bin")
    split(folder, wrong, "pytorch_model.bin")
    assert tokens_of(folder) == theirs(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_of_missing_files_is_ignored_next_to_a_whole_file(folder, expected, name):
    if name == "pytorch_model.bin":
        to_torch(folder)
    index = {"weight_map": {HEAD: f"{name}-gone"}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    assert tokens_of(folder) == expected


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "", ".", "..", "x\0"]
)
def test_an_index_must_stay_in_its_folder(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "x")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    weight_map = {UP: "part.safetensors", DOWN: name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, r"index\.json names .* which is not a file of its folder")


def test_shards_in_a_subfolder_and_through_links_load(folder, expected):
    """As in the Hugging Face cache, whose snapshots are links to blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "0123")
    (folder / "below").mkdir()
    (folder / "below" / "part.safetensors").symlink_to("../../blobs/0123")
    index = {"weight_map": {UP: "below/part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tokens_of(folder) == expected


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "5",
        "{",
        "[" * 100_000,
        "{}",
        *(json.dumps({"weight_map": m}) for m in ([], 5, {"a": 5}, {"a": []})),
    ],
)
def test_an_index_of_another_kind_is_refused(folder, index):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, r"model\.safetensors\.index\.json (is not|must hold)")


# ------------------------------------------------------------------------------ files that are something else


def becomes_pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS = {
    "a Git LFS pointer.*git lfs pull": lambda path: path.write_bytes(POINTER),
    "a web page.*download it again": lambda path: path.write_bytes(b"<!DOCTYPE html>\n<html></html>"),
    "a pipe or a device": becomes_pipe,
    "a folder": Path.mkdir,
    "a link to a file that isn't there": lambda path: path.symlink_to("nowhere"),
}
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
]
FILES += ["pytorch_model.bin", "phi.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in FILES for kind in KINDS])
def test_stand_ins_for_files_are_named(folder, name, kind):
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    refused(folder, rf"{re.escape(name)} is {kind}")


@pytest.mark.parametrize(
    ("content", "said"),
    {
        "": "is not valid JSON",
        "{": "is not valid JSON",
        "[1]": "must hold an object, got a list",
        "5": "must hold an object, got a number",
        "null": "must hold an object, got null",
        "[" * 100_000: "is not valid JSON: lists and objects within more than 64 others",
        '{"a":' * 65 + "1" + "}" * 65: "is not valid JSON: lists and objects within more than 64 others",
        '{"a": ' + "1" * 5000 + "}": "is not valid JSON",
        "[" + "[]," * (1 << 21) + "[]]": "is not valid JSON: more than 2097152 lists and objects",
    }.items(),
    ids=lambda text: text[:10],
)
def test_one_reader_for_all_json(tmp_path, content, said):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=rf"a\.json {said}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "phi.json"])
def test_json_that_is_too_large_is_not_read(folder, name):
    with (folder / name).open("wb") as file:
        file.truncate(1 << 36)
    refused(folder, f"{name} has 68719476736 bytes, more than the")


def test_names_and_values_of_a_file_stay_on_one_short_line(folder):
    name = f"\x1b[2J\n{'x' * 9999}.qweight"
    rewrite(folder, lambda state: state | {name: state.pop(HEAD)})
    with pytest.raises(ModelError, match=r"is quantized.*\\x1b\[2J\\nxxx") as caught:
        LLM(folder, device="cpu")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100


# -------------------------------------------------------------------------------------- what torch.save wrote


@pytest.mark.parametrize(
    "change",
    {
        "views": lambda state: (
            state | {UP: state[UP].t().contiguous().t(), DOWN: torch.cat([state[DOWN]] * 2)[32:]}
        ),
        "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
        "more than tensors": lambda state: state | {"step": 5, "list": [torch.ones(3)], 5: torch.ones(3)},
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
def test_what_torch_saves_loads(folder, expected, change, older):
    to_torch(folder, change[1], _use_new_zipfile_serialization=not older)
    assert tokens_of(folder) == expected


@pytest.mark.parametrize(
    ("convert", "said"),
    {
        "int8": (lambda x: x.to(torch.int8), "is quantized .*up_proj.* has the dtype int8"),
        "bool": (lambda x: x.bool(), "is quantized .*bool"),
        "float8": (lambda x: x.to(torch.float8_e4m3fn), "is quantized .*float8_e4m3fn"),
        "complex": (lambda x: x.to(torch.complex64), "has the dtype complex64"),
        "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantized .*qint8"),
        "sparse": (lambda x: x.to_sparse(), "up_proj.weight is sparse"),
        "meta": (lambda x: x.to("meta"), "up_proj.weight has no values: .*meta device"),
    }.values(),
    ids=lambda item: item if isinstance(item, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_weights_are_named(folder, convert, said):
    to_torch(folder, lambda state: state | {UP: convert(state[UP])})
    refused(folder, said)


@pytest.mark.parametrize("state", [[torch.ones(3)], None, torch.ones(3), 5], ids=repr)
def test_a_file_without_names_is_refused(folder, state):
    to_torch(folder, lambda _: state)
    refused(folder, rf"pytorch_model\.bin holds a {type(state).__name__}, but must hold tensors by name")


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("this was run",))


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
def test_code_in_a_file_is_never_run(folder, older, capfd):
    to_torch(folder, lambda state: state | {"x": Code()}, _use_new_zipfile_serialization=not older)
    refused(folder, r"pytorch_model\.bin can't be read: Unsupported global: .*print")
    assert "this was run" not in capfd.readouterr().out


def rezip(path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, record in records.items():
            new.writestr(name, change(name, record))


def test_missing_bytes_of_a_torch_file_are_noticed(folder):
    """torch maps the sizes in the pickle without checking those of the archive's records."""
    path = to_torch(folder) / "pytorch_model.bin"
    rezip(path, lambda name, record: record[:-64] if name.endswith("data/3") else record)
    refused(folder, r"pytorch_model\.bin is corrupt")


def test_a_compressed_torch_file_is_refused(folder):
    path = to_torch(folder) / "pytorch_model.bin"
    rezip(path, lambda name, record: record, zipfile.ZIP_DEFLATED)
    refused(folder, r"pytorch_model\.bin is a compressed archive")


# ---------------------------------------------------------------------------------------------- tied weights


def under_the_head(state: State) -> State:
    return {name.replace(EMBED, HEAD): tensor for name, tensor in state.items()}


def test_tied_weights_are_found_under_either_name(tied):
    wanted = tokens_of(tied)
    assert HEAD not in load_file(tied / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    save_safetensors(model, str(tied / "model.safetensors"), {"format": "pt"})
    assert EMBED not in load_file(tied / "model.safetensors")
    assert tokens_of(tied) == wanted == theirs(tied)
    rewrite(tied, lambda state: dict(state))  # without the library's metadata about the other name
    assert tokens_of(tied) == wanted
    to_torch(tied)
    assert tokens_of(tied) == wanted


def test_two_different_weights_are_not_tied(tied):
    wanted = tokens_of(tied)
    rewrite(tied, lambda state: state | {HEAD: state[EMBED].clone()})
    llm = LLM(tied, device="cpu", dtype="float32")
    assert llm.decoder.weights.lm_head is llm.decoder.weights.embed and tokens_of(tied) == wanted
    rewrite(tied, lambda state: state | {HEAD: state[EMBED].flip(0)})
    assert tokens_of(tied) == theirs(tied) != wanted


@pytest.mark.parametrize("lost", [EMBED, HEAD])
def test_weights_that_are_not_tied_are_both_needed(folder, lost):
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if name != lost})
    refused(folder, f"lacks the tensors {lost}")


# ------------------------------------------------------------------------------------------ quantized folders


def gptq(state: State) -> None:
    for name in [name for name in state if "proj" in name]:
        rows, columns = state.pop(name).shape
        part = name.removesuffix("weight")
        state[part + "qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        state[part + "scales"] = torch.ones(1, rows, dtype=torch.float16)


def unknown(state: State) -> None:
    for name in [name for name in state if "proj" in name]:
        state[name + "_in_another_way"] = state.pop(name)


def float8(state: State) -> None:
    for name in [name for name in state if "proj" in name]:
        state[name] = state[name].to(torch.float8_e4m3fn)


def mlx(state: State) -> None:
    for name in [name for name in state if "proj" in name]:
        rows, columns = state[name].shape
        state[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)


@pytest.mark.parametrize(
    ("weights", "sign", "said"),
    [
        (gptq, None, "it has the tensor .*qweight|it has the tensor .*scales"),
        (unknown, "quantize_config.json", r"it has a quantize_config\.json"),
        (unknown, "hf_quant_config.json", r"it has a hf_quant_config\.json"),
        (mlx, None, "tensor .*proj.* has the dtype U32"),
        (float8, None, "tensor .*proj.* has the dtype F8_E4M3"),
    ],
)
def test_quantized_folders_say_so_and_what_to_do(folder, weights, sign, said):
    rewrite(folder, weights)
    if sign is not None:
        (folder / sign).write_text("{}")
    refused(folder, rf"is quantized \({said}.*\); use a .* checkpoint or a GGUF file")


def test_more_layers_than_tensors_are_refused_at_once(folder):
    """And nothing is allocated per layer; see also the configuration's own limits."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 500}))
    refused(folder, "500 layers, more than .* has tensors")


# --------------------------------------------------------------------------------------------- and at random


def test_corrupt_files_are_refused_in_a_line_or_read_correctly():
    """A short run of tests/fuzz_files.py."""
    verdicts, violations = fuzz(seed=1, count=150, progress=False)
    assert violations == []
    assert verdicts["right"] > 15 and verdicts["refused"] > 75
