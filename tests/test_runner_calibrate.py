"""phi: measured as transformers' q and k imply, stored in a file, and without effect on the tokens."""

from __future__ import annotations

import json

import pytest
import torch
from runner_models import random_tokens, save_model
from test_cli import flashdecpp, run
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from flashdecpp import LLM, ModelError, SamplingParams
from flashdecpp.calibration import calibrate as calibration
from flashdecpp.models import decoder as decoder_module
from flashdecpp.models.phi import PERCENTILES, SAFE_WINDOWS, Calibration, phi_path

LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def measured(folder) -> Calibration:
    llm = LLM(folder, device="cpu", dtype="float32", phi="none")
    return calibration.measure(llm, random_tokens(120))


@pytest.fixture
def phi_file(folder, measured):
    path = folder / "phi.json"
    measured.save(path)
    yield path
    path.unlink()


def transformers_inputs(model, module, tokens: list[int], monkeypatch) -> list[torch.Tensor]:
    """The softmax inputs of each layer, [q_heads, tokens, tokens], NaN for masked keys."""
    inputs = []
    attention = module.eager_attention_forward

    def spy(layer, query, key, value, attention_mask, scaling, softcap=None, **rest):
        keys = key.repeat_interleave(query.size(1) // key.size(1), dim=1)
        x = query.double() @ keys.double().transpose(2, 3) * scaling
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        inputs.append(x.masked_fill(attention_mask < 0, torch.nan)[0])
        capped = {} if softcap is None else {"softcap": softcap}
        return attention(layer, query, key, value, attention_mask, scaling=scaling, **capped, **rest)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    return inputs


@pytest.mark.parametrize("chunk", [1024, 32])
@pytest.mark.parametrize(
    ("kind", "module", "overrides"),
    [
        ("llama", modeling_llama, {}),
        ("llama", modeling_llama, {"num_key_value_heads": 1}),
        ("mistral", modeling_mistral, {"sliding_window": 24}),
        ("gemma2", modeling_gemma2, {"attn_logit_softcapping": 5.0}),
        ("gemma3", modeling_gemma3, {}),
    ],
    ids=["llama", "multi-query", "window", "scale-and-cap", "scale"],
)
def test_statistics_are_those_of_the_inputs_of_transformers(
    tmp_path, monkeypatch, kind, module, overrides, chunk
):
    monkeypatch.setattr(decoder_module, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(calibration, "LOGITS_AT_ONCE", 7 * 70 * HEADS)
    model = save_model(tmp_path, kind, **overrides)
    tokens = random_tokens(70, seed=3)
    inputs = transformers_inputs(model, module, tokens, monkeypatch)
    found = calibration.measure(LLM(tmp_path, device="cpu", dtype="float32"), tokens)

    assert found.tokens == 70 and found.phi.shape == (LAYERS, HEADS)
    for layer, x in enumerate(inputs):
        row_maxima = x.nan_to_num(-torch.inf).amax(dim=2)
        close = dict(rtol=1e-4, atol=1e-4, check_dtype=False)
        torch.testing.assert_close(found.minimum[layer], x.nan_to_num(torch.inf).amin(dim=(1, 2)), **close)
        torch.testing.assert_close(found.maximum[layer], row_maxima.amax(dim=1), **close)
        for name in PERCENTILES:
            expected = row_maxima.quantile(float(name) / 100, dim=1)
            torch.testing.assert_close(found.row_maximum[name][layer], expected, **close)
        distance = (row_maxima - found.phi[layer][:, None]).abs()
        for name, width in SAFE_WINDOWS.items():
            surely = [(distance <= width + slack).double().mean(dim=1) for slack in (-1e-3, 1e-3)]
            assert (found.coverage[name][layer] >= surely[0] - 1e-6).all()
            assert (found.coverage[name][layer] <= surely[1] + 1e-6).all()


def test_a_text_beyond_the_context_is_measured_in_chunks(folder):
    tokens = random_tokens(70, seed=3)
    whole = LLM(folder, device="cpu", dtype="float32", max_len=32)
    found = calibration.measure(whole, tokens)
    parts = [calibration.measure(whole, tokens[start : start + 32]) for start in (0, 32, 64)]
    assert found.tokens == 70
    torch.testing.assert_close(found.maximum, torch.stack([part.maximum for part in parts]).amax(dim=0))
    torch.testing.assert_close(found.minimum, torch.stack([part.minimum for part in parts]).amin(dim=0))


def test_phi_is_the_midpoint_of_the_fullest_narrowest_window():
    rows = torch.tensor(
        [
            [0.0, 1.0, 2.0, 30.0, 31.0, 60.0],  # the most maxima
            [-9.0, -1.0, 20.0, 24.0, 40.0, 47.0],  # a tie: the closest together
            [5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
            [0.0, 11.0, 50.0, 100.0, 150.0, 200.0],  # a window includes both ends
        ]
    )
    assert calibration.choose_phi(rows).tolist() == [1.0, 22.0, 5.0, 5.5]
    assert calibration.choose_phi(rows[:, :1]).tolist() == [0.0, -9.0, 5.0, 0.0]


def test_inputs_that_are_not_finite_are_refused(folder):
    llm = LLM(folder, device="cpu", dtype="float32")
    llm.decoder.weights.layers[1].qkv[0, 0] = torch.inf
    with pytest.raises(ModelError, match="softmax inputs of layer 1 are not finite in float32"):
        calibration.measure(llm, random_tokens(8))


def test_a_file_round_trips(tmp_path, measured):
    path = tmp_path / "phi.json"
    measured.save(path)
    loaded = Calibration.load(path)
    assert (loaded.model, loaded.dtype, loaded.tokens) == (measured.model, "float32", 120)
    for name in ("phi", "minimum", "maximum"):
        torch.testing.assert_close(getattr(loaded, name), getattr(measured, name), rtol=0, atol=1e-4)
    for name in ("row_maximum", "coverage"):
        torch.testing.assert_close(getattr(loaded, name), getattr(measured, name), rtol=0, atol=1e-4)
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_text() == path.read_text()
    assert len(path.read_text().splitlines()) == LAYERS + 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "phi.json"]


def test_phi_is_stored_in_the_folder_or_next_to_the_file(tmp_path):
    assert phi_path(tmp_path) == tmp_path / "phi.json"
    assert phi_path(tmp_path / "model.gguf") == tmp_path / "model.gguf.phi.json"


def test_the_runner_uses_it_and_answers_the_same(folder, measured, phi_file):
    prompts = [random_tokens(length, seed=length) for length in (3, 40, 17)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    without = [LLM(folder, device="cpu", dtype="float32", phi=none) for none in ("none", None)]
    expected = [answer.token_ids for answer in without[0].generate(prompts, params)]
    assert all(llm.decoder.phi.layers is None for llm in without)
    assert without[0].stats.softmax == "online softmax"
    for phi in ("auto", phi_file, str(phi_file), list(measured.phi)):
        llm = LLM(folder, device="cpu", dtype="float32", phi=phi)
        torch.testing.assert_close(torch.stack(list(llm.decoder.phi.layers)), measured.phi, rtol=0, atol=1e-4)
        assert [answer.token_ids for answer in llm.generate(prompts, params)] == expected
        assert llm.stats.softmax == "fixed phi"
    llm = LLM(folder, device="cpu", dtype="float32", phi="carry")
    assert [answer.token_ids for answer in llm.generate(prompts, params)] == expected
    assert llm.decoder.phi.layers is None and llm.stats.softmax == "carried phi"


def test_rows_outside_its_window_are_counted(folder, phi_file):
    raw = json.loads(phi_file.read_text())
    raw["layers"][1]["phi"] = [900.0] * HEADS
    phi_file.write_text(json.dumps(raw))
    llm = LLM(folder, device="cpu", dtype="float32")
    llm.generate("hello", SamplingParams(max_tokens=6, ignore_eos=True))
    assert llm.stats.softmax_fallbacks >= 5 * HEADS


def edited(raw: dict, **changes) -> str:
    return json.dumps(raw | changes)


BAD_FILES = {
    "not JSON": (lambda raw: "{", "is not valid JSON"),
    "not text": (lambda raw: b"\xff\xfe\x00", "is not valid JSON"),
    "a list": (lambda raw: "[]", "is no phi file of version 1"),
    "another version": (lambda raw: edited(raw, version=2), "is no phi file of version 1"),
    "no layers": (lambda raw: edited(raw, layers=[]), "lacks what a phi file has"),
    "no phi": (lambda raw: edited(raw, layers=[{}] * 3), "lacks what a phi file has"),
    "text for phi": (lambda raw: edited(raw, layers=[raw["layers"][0] | {"phi": "abcd"}]), "lacks what"),
    "NaN": (lambda raw: edited(raw, layers=[raw["layers"][0] | {"phi": [float("nan")] * 4}]), "lacks what"),
    "uneven": (
        lambda raw: edited(raw, layers=[raw["layers"][0], raw["layers"][1] | {"phi": [1.0]}]),
        "lacks",
    ),
    "phi of two heads": (
        lambda raw: edited(raw, layers=[layer | {"phi": [1.0, 2.0]} for layer in raw["layers"]]),
        "has statistics for other heads",
    ),
    "two layers": (
        lambda raw: edited(raw, layers=raw["layers"][:2]),
        "has phi for 2 layers of 4 heads, but the model has 3 layers of 4",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_clear_error(folder, phi_file, case):
    spoil, message = BAD_FILES[case]
    content = spoil(json.loads(phi_file.read_text()))
    phi_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=rf"phi\.json {message}.*run flashdecpp calibrate again") as caught:
        LLM(folder, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)
    for phi in ("none", "carry"):
        LLM(folder, device="cpu", dtype="float32", phi=phi)


def test_a_missing_file(folder):
    assert LLM(folder, device="cpu", dtype="float32").decoder.phi.layers is None
    with pytest.raises(ModelError, match=r"nowhere\.json can't be read: No such file"):
        LLM(folder, device="cpu", dtype="float32", phi="nowhere.json")


def test_the_command_and_the_runs_after_it(tmp_path):
    save_model(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    model = ("--model", str(tmp_path / "tiny"), "--device", "cpu", "--dtype", "float32")
    result = flashdecpp("calibrate", *model, "--text", str(text), "--tokens", "300")
    assert result.returncode == 0, result.stderr
    assert not result.stderr  # a progress bar is for terminals
    for part in ("tiny in float32: 300 tokens, 3 layers of 4 heads", "widest layer", "worst head"):
        assert part in result.stdout
    for name in SAFE_WINDOWS:
        assert f"of all rows in {name}" in result.stdout
    path = tmp_path / "tiny" / "phi.json"
    assert result.stdout.strip().endswith(f"phi is in {path}")
    assert Calibration.load(path).tokens == 300

    generate = ("generate", "hello", "-n", "8", "--ignore-eos", *model)
    said = {
        "auto": f"fixed phi: 0 softmax fallbacks in {7 * LAYERS * HEADS} rows",
        "carry": f"carried phi: {LAYERS * HEADS} softmax fallbacks in {7 * LAYERS * HEADS} rows",
        "none": "online softmax",
    }
    answers = {phi: run(*generate, "--phi", phi) for phi in said}
    for phi, text in said.items():
        assert text in answers[phi].errors.splitlines()[-1]
        assert answers[phi].output == answers["none"].output

    path.write_text("{")
    assert "phi.json is not valid JSON" in run(*generate).complaint


def test_unwritable_files_are_reported_before_the_work(tmp_path):
    save_model(tmp_path)
    output = tmp_path / "nowhere" / "phi.json"
    result = run("calibrate", "--model", str(tmp_path), "--output", str(output))
    assert f"{output} can't be written" in result.complaint


def test_a_plot_without_matplotlib(monkeypatch, tmp_path, measured):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModelError, match="--plot needs matplotlib: pip install"):
        calibration.plot(measured, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_a_plot_is_a_png(tmp_path, measured):
    pytest.importorskip("matplotlib")
    calibration.plot(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.demo
def test_the_demo_model_answers_the_same_with_its_phi():
    from flashdecpp.calibration.text import TEXT

    llm = LLM("demo", device="cpu", dtype="float32", phi="none")
    found = calibration.measure(llm, llm.tokenizer.encode(TEXT)[:256])
    assert found.coverage["half"].mean() > 0.99 and found.coverage["bfloat16"].mean() > 0.9999
    unified = LLM("demo", device="cpu", dtype="float32", phi=list(found.phi))
    prompts, params = ["The capital of France is", "Once upon a time"], SamplingParams(max_tokens=12)
    expected = [answer.token_ids for answer in llm.generate(prompts, params)]
    assert [answer.token_ids for answer in unified.generate(prompts, params)] == expected
    assert unified.stats.softmax_fallbacks <= 0.001 * 2 * 12 * found.phi.numel()
