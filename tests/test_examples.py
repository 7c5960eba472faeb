"""The examples are run, and what they compute is compared with an independent computation."""

from __future__ import annotations

import runpy
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from runner_models import save_model
from torch import Tensor

from flashdecpp.integrations.transformers import attention_calls

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where the examples run: they take a GPU wherever torch says that there is one."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


def example(name: str, run_name: str = "example") -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'example("{path.stem}"' not in here] == []


def assert_greedy(tokens: list[int], exact: Tensor, plain: Tensor) -> None:
    """Each token is the best by its row of `exact` [tokens, vocab], or as near as half precision can tell.

    A logit may be off by twice the error of `plain`, the same in plain low-precision torch; so may the best.
    """
    chosen = exact.gather(1, torch.tensor(tokens, device=exact.device)[:, None])[:, 0]
    assert (exact.amax(1) - chosen).max() <= 2 * 2 * (plain.float() - exact).abs().max()


# ----------------------------------------------------------------------------------------- decoder.py


def decoder_logits(decoder: SimpleNamespace, model: object, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """[len(tokens), vocab] of decoder.py's model, in plain torch: no cache, all tokens at once."""
    weights = {name: weight.to(dtype) for name, weight in model.weights.items()}
    count, dim = len(tokens), decoder.HEAD_DIM
    angles = torch.outer(torch.arange(count), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    turn = torch.polar(torch.ones_like(angles), angles).to(model.embed.device)[:, None]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.size(-1),), weight.float(), 1e-6).to(dtype)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        pairs = torch.complex(first.contiguous(), second.contiguous()) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1).to(dtype)

    stream = model.embed.to(dtype)[tokens]
    for i in range(decoder.LAYERS):
        qkv = normed(stream, model.norms[i, 0]) @ weights["qkv"][i].T
        q, k, v = qkv.unflatten(1, (-1, dim)).split((decoder.Q_HEADS, *2 * (decoder.KV_HEADS,)), dim=1)
        q, k, v = (x.transpose(0, 1)[None] for x in (rotated(q), rotated(k), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        stream = stream + out[0].transpose(0, 1).flatten(1) @ weights["o"][i].T
        gate, up = (normed(stream, model.norms[i, 1]) @ weights["gate_up"][i].T).chunk(2, dim=1)
        stream = stream + (F.silu(gate.float()) * up.float()).to(dtype) @ weights["down"][i].T
    return stream @ model.lm_head.to(dtype).T


PROMPTS = [[5, 900, 17], list(range(200, 240))]  # one piece of the prefill, and three
STEPS = 20


def generated(decoder: SimpleNamespace, device: str, dtype: torch.dtype) -> tuple[object, list[list[int]]]:
    torch.manual_seed(0)
    with torch.device(device):
        model = decoder.Decoder(dtype)
        return model, decoder.generate(model, PROMPTS, STEPS).tolist()


def test_decoder_is_greedy_in_float32():
    decoder = example("decoder")
    model, answers = generated(decoder, "cpu", torch.float32)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = list(prompt)
        for _ in range(STEPS):
            tokens.append(decoder_logits(decoder, model, tokens, torch.float32)[-1].argmax().item())
        assert answer == tokens[len(prompt) :]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoder_is_greedy_on_a_gpu(dtype):
    decoder = example("decoder")
    model, answers = generated(decoder, "cuda", dtype)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = prompt + answer[:-1]
        exact, plain = (decoder_logits(decoder, model, tokens, d)[-STEPS:] for d in (torch.float32, dtype))
        assert_greedy(answer, exact, plain)


def test_decoder_runs_as_a_script(device, capsys):
    example("decoder", "__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("[[") and printed.count(",") == 2 * 24 - 1


# ---------------------------------------------------------------------------------------- generate.py


def test_generate(device, tmp_path, capsys):
    theirs = save_model(tmp_path)
    rounded = deepcopy(theirs).bfloat16()
    answers = example("generate").main(str(tmp_path))
    printed = capsys.readouterr().out
    assert len(answers) == 3
    for answer in answers:
        tokens = answer.prompt_token_ids + answer.token_ids
        exact, plain = next_logits(theirs, tokens), next_logits(rounded, tokens)
        first = len(answer.prompt_token_ids) - 1
        assert_greedy(answer.token_ids, exact[first:-1], plain[first:-1])
        assert f"{answer.prompt!r} -> {answer.text!r}" in printed
    assert "carried phi" in printed and "tokens/s" in printed


@torch.inference_mode()
def next_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


# ------------------------------------------------------------------------------ transformers_dropin.py


def test_transformers_dropin(device, capsys):
    before, after, model = example("transformers_dropin").main()
    assert before.shape == after.shape == (1, 37 + 24)
    if device == "cpu":  # in half precision two tokens may be as good
        assert torch.equal(before, after)
    calls = attention_calls(model)
    assert calls == {"prefill": 2, "flashdecpp": 2 * 23}
    assert not any("flashdecpp_original" in vars(type(module)) for module in model.modules())  # restored
    printed = capsys.readouterr().out
    assert f"the same as transformers alone: {torch.equal(before, after)}" in printed
    assert "layers that ran as before: {}" in printed


# --------------------------------------------------------------------------------- quantized_linear.py


def test_quantized_linear(device):
    torch.manual_seed(0)
    quantized_linear, dtype = example("quantized_linear"), torch.float16
    errors = quantized_linear.one_layer(device, dtype)
    # A weight's error is even over a step, of which 2^bits cover the 5 to 7 deviations of its group
    for (bits, group_size), error in errors.items():
        assert 4 / 2**bits / 12**0.5 < error < 8 / 2**bits / 12**0.5, (bits, group_size)
    before, after, left = quantized_linear.one_model(device, dtype)
    assert left == ["4"]
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


def test_quantized_linear_runs_as_a_script(device, capsys):
    example("quantized_linear", "__main__")
    assert "int4, group 32: error 0.0" in capsys.readouterr().out
