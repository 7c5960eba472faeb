"""Rotary scaling: as in transformers for folders, as in llama.cpp for GGUF files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import edited
from runner_models import random_tokens, runner_logits, save_model, transformers_logits
from test_runner_gguf import write_gguf

from flashdecpp import LLM, ModelError, SamplingParams

SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.0 + 0.9 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def load(path: Path, **options) -> LLM:
    return LLM(path, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy that a test may change."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def logits_of_both(
    folder: Path, prompt: list[int], following: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return runner_logits(load(folder), prompt, following), transformers_logits(model, prompt, following)


# ------------------------------------------------------------------------------------------- folders

SCALINGS = {
    "original length at the top": (
        {"rope_type": "yarn", "factor": 4.0},
        {"original_max_position_embeddings": 64},
    ),
    "the top counts more": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 64},
    ),
    "llama3, the top counts more": (
        LLAMA3 | {"original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 64},
    ),
    "yarn without an original length": ({"rope_type": "yarn", "factor": 4.0}, {}),
    "yarn's own numbers": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
            "beta_fast": 8,
            "beta_slow": 2.0,
            "truncate": False,
        },
        {},
    ),
    "yarn's magnitudes": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
        {},
    ),
    "a fraction that plain frequencies ignore": ({"rope_type": "default", "partial_rotary_factor": 0.5}, {}),
    "null is not there": ({"rope_type": "linear", "factor": 2.0, "beta_fast": None, "type": None}, {}),
    "numbers that do not concern the kind": ({"rope_type": "default", "factor": "x"}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SCALINGS)
def test_a_folders_scaling_is_that_of_transformers(folder, case):
    scaling, top = SCALINGS[case]
    edit_config(folder, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling, **top)
    ours, theirs = logits_of_both(folder, random_tokens(90, seed=1), random_tokens(4, seed=2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


WRONG = [
    ({"rope_type": "linear", "factor": "4.0"}, r"factor must be a finite number above 0, got '4\.0'"),
    ({"rope_type": "linear", "factor": 0}, "factor must be a finite number above 0, got 0"),
    ({"rope_type": "linear", "factor": -2.0}, "factor must be .* above 0"),
    ({"rope_type": "linear", "factor": True}, "factor must be .* got True"),
    ({"rope_type": "linear", "factor": float("inf")}, "factor must be a finite number"),
    ({"rope_type": "dynamic", "factor": 1e300}, "factor must be a number that float32 holds"),
    ({"rope_type": "dynamic", "factor": 1e30}, r"a context of \d+ tokens is more than"),
    ({"rope_type": "dynamic", "factor": 1e9}, "a context of 256000000000 tokens is more than"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": [32]}, "beta_fast must be a finite number"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate must be true or false"),
    (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
        "original_max_position_embeddings must be an integer from 2",
    ),
    (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor 1"),
    (LLAMA3 | {"low_freq_factor": None}, "has no low_freq_factor"),
    ({"rope_type": "default", "rope_theta": "10000"}, "rope_theta must be a finite number above 1"),
    ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta must be a finite number above 1"),
    ({"rope_type": "default", "partial_rotary_factor": 9.0}, "partial_rotary_factor must be .* at most 1"),
    (
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.2},
        "even number .* got 3",
    ),
    ({"rope_type": ["linear"], "factor": 2.0}, "rope_type must be a string"),
    ({"rope_type": "spiral"}, "'spiral' is not supported, only default, linear"),
    (
        {"rope_type": "longrope", "short_factor": SHORT[1:], "long_factor": LONG},
        "short_factor must be a list of 8 finite numbers above 0",
    ),
    (
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [0.0] * 8},
        "long_factor must be a list of 8 finite numbers above 0",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scaling", "match"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named(folder, scaling, match):
    scaling = {"rope_theta": 10000.0} | scaling
    edit_config(folder, rope_parameters=scaling)
    with pytest.raises(ModelError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", [5, [1], "linear"], ids=str)
def test_an_unknown_scaling_is_refused(folder, scaling):
    edit_config(folder, rope_parameters=scaling)
    with pytest.raises(ModelError, match="rope"):
        load(folder)


def test_a_million_positions_of_dynamic_scaling_load_at_once(folder):
    """The table of rotations is computed without a loop over positions."""
    edit_config(
        folder,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        max_position_embeddings=250_000,
    )
    started = time.perf_counter()
    llm = load(folder)
    assert llm.max_len == 1_000_000
    assert time.perf_counter() - started < 20  # a loop takes minutes


def test_positions_that_exceed_memory_are_refused(folder, monkeypatch):
    from flashdecpp.models import decoder

    edit_config(folder, max_position_embeddings=10**9)
    monkeypatch.setattr(decoder, "available_bytes", lambda device: 10**9)
    with pytest.raises(ModelError, match=r"rotary tables of 1000000000 positions need .* lower max_len"):
        load(folder)
    assert load(folder, max_len=100).max_len == 100
    edit_config(folder, max_position_embeddings=10**12)
    with pytest.raises(ModelError, match="max_position_embeddings must be an integer from 1 to 2147483647"):
        load(folder)


# ------------------------------------------------------------------------- answers that cross a boundary


def save_phi3(folder: Path):
    """Short factors up to 64 tokens, long ones above."""
    scaling = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    return save_model(folder, "phi3", original_max_position_embeddings=64, rope_scaling=scaling)


@torch.no_grad()
def transformers_answer(model, prompt: list[int], count: int) -> list[int]:
    """The tokens that transformers' generate appends, greedily and without an end of sequence."""
    ids = torch.tensor([prompt])
    options = {"eos_token_id": None, "bad_words_ids": [[257]], "pad_token_id": 258}
    out = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


ON = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)
LENGTHS = (30, 41, 50, 62, 63, 64, 65, 66, 90)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    """The folder, prompts with lengths on both sides of 64 tokens, and transformers' answer to each."""
    folder = tmp_path_factory.mktemp("phi3")
    model = save_phi3(folder)
    prompts = [random_tokens(length, seed=length, below=256) for length in LENGTHS]
    answers = [transformers_answer(model, prompt, 24) for prompt in prompts]
    return folder, prompts, answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 2},
        {"prefill_chunk": 16},
        {"prefix_cache": False},
        {"cache_tokens": 192},  # sequences wait in the host's memory
    ],
    ids=str,
)
def test_longrope_answers_equal_those_of_transformers(phi3, options):
    """Several at once, each of which crosses the boundary at its own step or not at all."""
    folder, prompts, answers = phi3
    llm = load(folder, **options)
    got = [answer.token_ids for answer in llm.generate(prompts, ON)]
    assert got == answers
    assert (llm.stats.preemptions > 0) == ("cache_tokens" in options)
    # Again with a filled prefix cache, and one by one.
    assert [answer.token_ids for answer in llm.generate(prompts[::-1], ON)] == answers[::-1]
    assert [llm.generate([prompt], ON)[0].token_ids for prompt in prompts[:3]] == answers[:3]
    assert [piece.token_id for piece in llm.stream(prompts[2], ON) if piece.token_id is not None] == answers[
        2
    ]


def test_each_sample_of_a_prompt_crosses_the_boundary(phi3):
    folder, prompts, answers = phi3
    llm = load(folder, max_batch=3)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0, n=5)
    assert [answer.token_ids for answer in llm.generate([prompts[2]], params)] == [answers[2]] * 5
    assert llm.stats.peak_blocks <= llm.stats.cache_blocks


def test_an_answer_that_ends_at_the_boundary(phi3):
    """Its last token has been chosen, so no further step is computed."""
    folder, prompts, answers = phi3
    llm = load(folder)
    for count in (1, 2, 3):
        params = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0)
        assert llm.generate([prompts[3]], params)[0].token_ids == answers[3][:count]


def test_keys_of_another_model_with_longrope_stay(tmp_path):
    """transformers recomputes them for Phi-3 only."""
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
    model = save_model(tmp_path, rope_parameters=scaling | {"original_max_position_embeddings": 64})
    prompts = [random_tokens(length, seed=length) for length in (55, 64, 65)]
    expected = [transformers_answer(model, prompt, 24) for prompt in prompts]
    assert [answer.token_ids for answer in load(tmp_path).generate(prompts, ON)] == expected


@pytest.mark.parametrize("prompt_length", [55, 64, 65, 100])
def test_dynamic_answers_equal_those_of_transformers(tmp_path, prompt_length):
    """Every step has its own frequencies; a prompt has those of its length."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = save_model(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    prompt = random_tokens(prompt_length, seed=prompt_length)
    expected = transformers_answer(model, prompt, 24)
    llm = load(tmp_path)
    both = llm.generate([random_tokens(20), prompt], ON)
    assert both[1].token_ids == expected
    assert llm.generate([prompt], ON)[0].token_ids == expected  # found in the cache


# ---------------------------------------------------------------------------------------- GGUF files


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    return path


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
HF_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default"}
# GGUF keys and the equivalent values of a folder
MEANINGS = {
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
    "a factor without a type": ({"rope.scaling.factor": 4.0}, LINEAR),
    "an integer": ({"rope.scaling.factor": 4}, LINEAR),
    "the older key": ({"rope.scale_linear": 4.0}, LINEAR),
    "the newer key counts": ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, LINEAR),
    "a factor of 0": ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, DEFAULT),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, DEFAULT),
    "yarn": (YARN, HF_YARN),
    "yarn's attention factor": (
        YARN | {"rope.scaling.attn_factor": 0.5},
        HF_YARN | {"attention_factor": 0.5 * 1.1386294361119891},  # 0.1 ln 4 + 1
    ),
    "yarn's betas": (
        YARN | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
        HF_YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "yarn's multiplier": (
        YARN | {"rope.scaling.yarn_log_multiplier": 0.5},
        HF_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "yarn that extrapolates nothing": (
        YARN | {"rope.scaling.yarn_ext_factor": 0.0, "rope.scaling.yarn_attn_factor": 1.0},
        LINEAR,
    ),
    "a factor that extrapolates": (
        {"rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 1.0}
        | {"rope.scaling.original_context_length": 64},
        HF_YARN,
    ),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_a_gguf_files_scaling_is_that_of_a_folder(file, folder, case):
    keys, scaling = MEANINGS[case]
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    path = edited(file, folder / "m.gguf", metadata)
    edit_config(folder, rope_parameters={"rope_theta": 1e4} | scaling)
    prompt, following = random_tokens(90, seed=1), random_tokens(4, seed=2)
    plain = runner_logits(load(file), prompt, following)
    ours, same = (runner_logits(load(each, max_len=256), prompt, following) for each in (path, folder))
    torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-4)
    assert (scaling is DEFAULT) == torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_len", [64, 256])
def test_a_gguf_files_longrope_goes_by_the_context(file, folder, max_len):
    """llama.cpp chooses the factors once per session, by the maximum length of its sequences."""
    metadata = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}
    metadata["rope.scaling.attn_factor"] = 1.2
    tensors = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
    metadata = {f"llama.{key}": value for key, value in metadata.items()}
    llm = load(edited(file, folder / "m.gguf", metadata, tensors), max_len=max_len)
    factors = SHORT if max_len == 64 else LONG
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    edit_config(folder, rope_parameters=scaling | {"attention_factor": 1.2})
    prompt, following = random_tokens(40, seed=1), random_tokens(max_len // 4, seed=2)
    _, theirs = logits_of_both(folder, prompt, following[:20])
    torch.testing.assert_close(runner_logits(llm, prompt, following[:20]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "tensors", "match"),
    [
        ({"rope.scaling.type": "spiral"}, {}, "'spiral' is not supported, only none, linear, yarn, longrope"),
        ({"rope.scaling.factor": "4"}, {}, r"llama\.rope\.scaling\.factor must be a finite number"),
        ({"rope.scaling.factor": -1.0}, {}, r"llama\.rope\.scaling\.factor must be .* at least 0, got -1"),
        ({"rope.scaling.factor": float("nan")}, {}, "must be a finite number"),
        ({"rope.freq_base": "10000"}, {}, r"llama\.rope\.freq_base must be a finite number above 1"),
        ({"rope.freq_base": 0.0}, {}, "freq_base must be"),
        ({"rope.dimension_count": 0}, {}, "dimension_count must be an integer from 1 to 16, got 0"),
        ({"rope.dimension_count": 7}, {}, "even number of dimensions"),
        ({"rope.scaling.type": "longrope"}, {}, r"rope_factors_short\.weight must have the shape \(8,\)"),
        ({}, {"rope_freqs.weight": np.ones(8, np.int8)}, r"rope_freqs\.weight has the type I8"),
        ({}, {"rope_freqs.weight": [1.0] * 7}, r"rope_freqs\.weight must have the shape \(8,\), got \(7,\)"),
        (
            {},
            {"rope_freqs.weight": [1.0] * 7 + [0.0]},
            r"rope_freqs\.weight must hold finite numbers above 0",
        ),
    ],
    ids=lambda value: str(value)[:36],
)
def test_a_gguf_files_wrong_value_is_named(file, tmp_path, metadata, tensors, match):
    metadata = {f"llama.{key}": value for key, value in metadata.items()}
    with pytest.raises(ModelError, match=match) as caught:
        load(edited(file, tmp_path / "m.gguf", metadata, tensors))
    assert "\n" not in str(caught.value)
