"""flashdecpp inside transformers: the same tokens as without it, on transformers' caches, without copies."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import transformers
from runner_models import SIZES, make_model, random_tokens, randomize
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import DynamicCache, PreTrainedModel, StaticCache

import flashdecpp
from flashdecpp import ops
from flashdecpp.integrations import transformers as integration
from flashdecpp.integrations.transformers import accelerate, attention_calls, layer_fallbacks, restore

LAYERS = SIZES["num_hidden_layers"]
PROMPT = 21  # exceeds the window and decode_attention's limit of new tokens
WINDOW = 8
Run = tuple[Tensor, Tensor]  # the result of `greedy`


def _gpt_oss() -> PreTrainedModel:
    """Sinks, alternating windows, experts."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    settings = SIZES | dict(head_dim=16, sliding_window=WINDOW, num_local_experts=2, rope_parameters=rope)
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings, num_experts_per_tok=1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    return randomize(model)


def _llama4() -> PreTrainedModel:
    """Chunked attention, which a window cannot express."""
    settings = SIZES | dict(head_dim=16, attention_chunk_size=WINDOW, num_local_experts=2, pad_token_id=258)
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**settings, intermediate_size_mlp=64, no_rope_layers=[1, 1, 0])
    return randomize(transformers.Llama4ForCausalLM(config))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: make_model("llama"),
    "mistral": lambda: make_model("mistral", sliding_window=WINDOW),
    "qwen2": lambda: make_model("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "gemma2": lambda: make_model("gemma2", head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}


def prompts(*paddings: int) -> dict[str, Tensor]:
    """A batch of prompts, left-padded by the given numbers of tokens."""
    ids = torch.tensor([random_tokens(PROMPT, seed) for seed in range(len(paddings))])
    mask = torch.ones_like(ids)
    for row, padding in zip(mask, paddings, strict=True):
        row[:padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: PreTrainedModel, batch: dict[str, Tensor], tokens: int = 12, **options) -> Run:
    """Token ids [batch, tokens] and logits [tokens, batch, vocab]."""
    out = model.generate(
        **batch,
        **options,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=258,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, batch["input_ids"].size(1) :], torch.stack(out.logits)


def assert_same_run(actual: Run, expected: Run) -> None:
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("paddings", [(0, 0), (0, 5, 17)], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens(family, cache, paddings):
    model, batch = FAMILIES[family](), prompts(*paddings)
    options = {"cache_implementation": cache} if cache == "static" else {}
    expected = greedy(model, batch, **options)
    assert_same_run(greedy(accelerate(model), batch, **options), expected)
    assert attention_calls(model) == {"flashdecpp": 11 * LAYERS, "prefill": LAYERS}


def test_beams_and_speculation():
    """Reordered and cropped caches, several new tokens at once."""
    model, batch, one = make_model(), prompts(0, 9), prompts(0)
    draft = make_model(num_hidden_layers=1)
    expected = [greedy(model, batch, num_beams=3), greedy(model, one, assistant_model=draft)]
    accelerate(model)
    assert torch.equal(greedy(model, batch, num_beams=3)[0], expected[0][0])
    assert_same_run(greedy(model, one, assistant_model=draft), expected[1])
    assert set(attention_calls(model)) == {"flashdecpp", "prefill"}


@torch.inference_mode()
@pytest.mark.parametrize("by_layer", [True, False], ids=["windowed-cache", "whole-cache"])
@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_several_new_tokens_and_a_window(family, by_layer):
    """Also with a cache that keeps tokens outside the window."""
    model, batch = FAMILIES[family](), prompts(0, 0)["input_ids"]

    def run() -> Tensor:
        cache = DynamicCache(config=model.config) if by_layer else DynamicCache()
        parts = batch[:, :17], batch[:, 17:20], batch[:, 20:]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)

    expected = run()
    torch.testing.assert_close((accelerate(model), run())[1], expected, atol=1e-4, rtol=1e-4)
    assert attention_calls(model) == {"flashdecpp": 2 * LAYERS, "prefill": LAYERS}


@torch.inference_mode()
@pytest.mark.parametrize("paddings", [(0, 0), (0, 5)], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_the_cache_is_not_copied(kind, paddings, monkeypatch):
    model, batch = accelerate(make_model()), prompts(*paddings)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    model(**batch, past_key_values=cache)
    seen = []

    def spy(q, k_cache, v_cache, *arguments, **options):
        seen.append((k_cache.data_ptr(), v_cache.data_ptr()))
        return decode_attention(q, k_cache, v_cache, *arguments, **options)

    decode_attention = ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", spy)
    mask = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    model(batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    assert seen == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


@pytest.mark.parametrize("paddings", [None, (0, 5)], ids=["whole", "padded"])
@torch.inference_mode()
def test_compiled_whole(paddings):
    """One graph for all steps on a static cache, with the op in every layer."""
    torch._dynamo.reset()
    model, batch = accelerate(make_model()), prompts(*(paddings or (0, 0)))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph.graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def run(step: Callable) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits = [model(**batch, position_ids=positions, past_key_values=cache).logits[:, -1]]
        for i in range(4):
            options = {"position_ids": positions[:, -1:] + i + 1, "past_key_values": cache}
            if paddings is not None:  # padded to the cache's capacity, so its shape stays constant
                options["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 11), value=1)
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                logits.append(step(logits[-1].argmax(-1, keepdim=True), **options).logits[:, -1])
        return torch.stack(logits)

    expected = run(model)
    before = attention_calls(model)
    actual = run(torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    (graph,) = graphs
    assert [node.target for node in graph.nodes].count(ops._decode_attention) == LAYERS
    assert attention_calls(model) - before == {"prefill": LAYERS}


@torch.inference_mode()
def test_fallbacks_in_compiled_code_are_logged(monkeypatch):
    torch._dynamo.reset()
    model, batch = accelerate(make_model("qwen3", head_dim=12)), prompts(0)
    logged = []
    monkeypatch.setattr(integration.logger, "warning_once", logged.append)
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model, fullgraph=True, backend="eager")
    step(batch["input_ids"][:, :1], past_key_values=cache)
    reason = "flashdecpp: attention falls back to transformers' own (head_dim 12 of q, 12 of k and 12 of v)"
    assert set(logged) == {reason}


def test_half_precision_is_as_close_as_without(one_place):
    batch = {name: tensor.to(one_place.device) for name, tensor in prompts(0, 5).items()}
    tokens = torch.tensor([random_tokens(8, 5), random_tokens(8, 6)], device=one_place.device)

    @torch.inference_mode()
    def run(model: PreTrainedModel) -> Tensor:
        out = model(**batch)
        mask, logits = batch["attention_mask"], []
        for token in tokens.T:
            mask = nn.functional.pad(mask, (0, 1), value=1)
            out = model(token[:, None], attention_mask=mask, past_key_values=out.past_key_values)
            logits.append(out.logits.float())
        return torch.cat(logits, 1)

    exact = make_model().to(one_place.device)
    half = make_model().to(one_place.device, one_place.dtype)
    truth = run(exact)
    theirs = (run(half) - truth).square().mean().sqrt()
    assert (run(accelerate(half)) - truth).square().mean().sqrt() <= 1.5 * theirs
    assert attention_calls(half) == {"flashdecpp": 8 * LAYERS, "prefill": LAYERS}


def test_by_name():
    """As accepted by from_pretrained and from_config, also for submodels."""
    config = make_model().config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashdecpp").eval()
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    assert_same_run(greedy(model, prompts(0, 5)), greedy(twin, prompts(0, 5)))
    assert attention_calls(model)["flashdecpp"] == 11 * LAYERS


# -------------------------------------------------------------------------------------------------- fallbacks


def _one_step(model: PreTrainedModel, new_tokens: int = 1, **options) -> set[str]:
    """Compares a step to the same step without flashdecpp; returns the reasons why attention fell back."""
    batch = prompts(0, 5)
    mask = nn.functional.pad(batch["attention_mask"], (0, new_tokens), value=1)

    def run() -> Tensor:
        with torch.no_grad():
            cache = model(**batch).past_key_values
        step = {"input_ids": batch["input_ids"][:, :new_tokens], "attention_mask": mask} | options
        return model(**step, past_key_values=cache).logits

    expected = run()
    torch.testing.assert_close((accelerate(model), run())[1], expected, atol=1e-4, rtol=1e-4)
    return set(attention_calls(model)) - {"flashdecpp", "prefill"}


@torch.no_grad()
def test_fallbacks_give_their_reason():
    assert _one_step(make_model()) == set()
    given_or_padding = {"mask: given by the caller, or padding with several new tokens"}
    assert _one_step(make_model(), new_tokens=3) == given_or_padding
    full = torch.rand(2, 1, 1, PROMPT + 1) > 0.5
    full[..., -1] = True
    assert _one_step(make_model(), attention_mask=full) == given_or_padding
    assert _one_step(make_model(), output_attentions=True) == {"output_attentions"}
    assert _one_step(make_model("qwen3", head_dim=12)) == {"head_dim 12 of q, 12 of k and 12 of v"}
    groups = {"hidden_size": 68, "head_dim": 8, "num_attention_heads": 17, "num_key_value_heads": 1}
    assert _one_step(make_model("qwen3", **groups)) == {"17 query heads over 1 KV heads"}


def test_a_mask_that_the_model_changed_is_refused():
    q = torch.rand(1, 4, 1, 16)
    description = integration.mask(1, 1, 8, q_offset=7)
    with pytest.raises(ValueError, match="must be boolean, floating-point or unmodified"):
        integration.attention(nn.Identity(), q, q, q, nn.functional.pad(description, (0, 7)))


def test_training_is_unchanged():
    assert _one_step(make_model()) == {"gradients are needed: use torch.no_grad()"}
    batch = prompts(0, 3)
    batch["input_ids"] = batch["input_ids"][:, :12]  # within decode_attention's limit
    batch["attention_mask"] = batch["attention_mask"][:, :12]
    gradients = []
    for model in make_model(), accelerate(make_model()):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keys", [1, 2, 9])
def test_a_description_is_equivalent_to_its_mask(keys):
    torch.manual_seed(keys)
    visible = torch.rand(5, 1, 1, keys) > 0.5
    description = integration._describe_visible(visible[:, 0, 0])
    assert torch.equal(integration._boolean(description, 1, keys), visible)


@pytest.mark.parametrize("window", [0, 3])
def test_a_description_is_equivalent_to_its_mask_function(window):
    masking = transformers.masking_utils
    function = masking.sliding_window_causal_mask_function(window) if window else masking.causal_mask_function
    sizes = dict(batch_size=2, q_length=4, kv_length=12, q_offset=5, mask_function=function)
    expected = masking.sdpa_mask(**sizes, allow_is_causal_skip=False)
    assert torch.equal(integration._boolean(integration.mask(**sizes), 4, 12), expected)


# ---------------------------------------------------------------------------------------- accelerate, restore


def test_accelerate_replaces_linear_layers_and_norms_and_restore_undoes_it(monkeypatch):
    model, batch = make_model(), prompts(0)
    state, expected = model.state_dict(), greedy(model, batch)
    assert flashdecpp.accelerate(model) is model
    assert model.state_dict().keys() == state.keys()
    calls = []
    for name in ("linear", "rms_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **k: (calls.append(name), op(*a, **k))[1])
    assert_same_run(greedy(model, batch, tokens=1), (expected[0][:, :1], expected[1][:1]))
    assert calls.count("linear") == 7 * LAYERS + 1
    assert calls.count("rms_norm") == 2 * LAYERS + 1

    assert restore(accelerate(model)) is model
    calls.clear()
    before = attention_calls(model)
    assert_same_run(greedy(model, batch), expected)
    assert not calls
    assert attention_calls(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_other_norms_are_left_alone():
    model = accelerate(FAMILIES["gemma2"]())
    assert not any("forward" in vars(m) for m in model.modules() if type(m).__name__ == "Gemma2RMSNorm")


def test_models_that_cannot_be_accelerated():
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        accelerate(nn.Linear(8, 8))
    falcon = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=9
    )
    with pytest.raises(ValueError, match="FalconForCausalLM does not"):
        accelerate(transformers.FalconForCausalLM(falcon))


# ---------------------------------------------------------- copies, and layers that others have changed


def logits(model: nn.Module) -> Tensor:
    """Logits of the last of 21 tokens and of one more step, [2, vocab]."""
    ids = prompts(0)["input_ids"]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        return torch.cat(
            [out.logits[:, -1], model(ids[:, :1], past_key_values=out.past_key_values).logits[:, -1]]
        )


def saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replicated(model: PreTrainedModel) -> PreTrainedModel:
    """As DataParallel replicates a model on each device: shallowly, with its own tensors put in."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for original, replica in replicas.items():
        replica._modules = {name: replicas[child] for name, child in original._modules.items()}
        for name, parameter in original._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return replicas[model]


COPIES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "replica": replicated,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_stays_accelerated_and_uses_its_own_weights(how, monkeypatch):
    model = accelerate(make_model())
    expected = logits(model)
    twin = COPIES[how](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls = []
    linear, norm = ops.linear, ops.rms_norm
    monkeypatch.setattr(ops, "linear", lambda *a: (calls.append("linear"), linear(*a))[1])
    monkeypatch.setattr(ops, "rms_norm", lambda *a, **k: (calls.append("norm"), norm(*a, **k))[1])
    assert torch.equal(logits(twin), expected)
    assert calls.count("linear") == 2 * (7 * LAYERS + 1)
    assert calls.count("norm") == 2 * (2 * LAYERS + 1)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_restore_works_on_a_copy_and_leaves_the_original(how):
    model = accelerate(make_model())
    expected = logits(model)
    twin = restore(COPIES[how](model))
    assert {type(m) for m in twin.modules()} == {type(m) for m in make_model().modules()}
    assert twin.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(twin), expected, atol=1e-4, rtol=1e-4)
    before = attention_calls(model)
    logits(model)
    assert attention_calls(model) - before == {"flashdecpp": LAYERS, "prefill": LAYERS}


def test_another_process_runs_a_pickled_model(tmp_path):
    """A fresh process, as with multiprocessing's spawn."""
    model = accelerate(make_model())
    torch.save({"model": model, "expected": logits(model)}, tmp_path / "model.pt")
    code = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
assert "flashdecpp" in sys.modules
with torch.no_grad():
    step = saved["model"](torch.tensor(eval(sys.argv[2])), use_cache=True)
torch.testing.assert_close(step.logits[:, -1], saved["expected"][:1])
"""
    ids = prompts(0)["input_ids"].tolist()
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(ids)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_accelerated_model_is_saved_like_the_original(tmp_path):
    make_model().save_pretrained(tmp_path / "before")
    accelerate(make_model()).save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


class Opaque(Tensor):
    """A weight whose layout only its own library knows, like torchao's: F.linear works, data_ptr doesn't."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Opaque:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].values, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(f"no {function} of an opaque weight")


def make_opaque(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(Opaque(layer.weight.detach()), requires_grad=False)


@pytest.mark.parametrize("first", ["opaque", "accelerate"])
def test_a_tensor_subclass_weight_keeps_its_forward(first):
    """Whether it became one before or after accelerate."""
    model, expected = make_model(), logits(make_model())
    for step in (first, *({"opaque", "accelerate"} - {first})):
        if step == "accelerate":
            accelerate(model)
        else:
            for layer in model.model.layers:
                make_opaque(layer.mlp.up_proj)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    ((reason, count),) = layer_fallbacks(model).items()
    assert "Opaque" in reason and count == 2 * LAYERS


def _weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


def _shifted(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output + 1)


def _replaced(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


OTHERS: dict[str, Callable[[nn.Linear], object]] = {
    "weight_norm": _weight_norm,
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "hook": _shifted,
    "forward": _replaced,
    "transposed": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().T.contiguous().T)
    ),
    "float64": lambda layer: layer.double().register_forward_pre_hook(lambda m, x: (x[0].double(),)),
}


@pytest.mark.parametrize("accelerated_first", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_other_changes_to_a_layer_still_apply(other, accelerated_first):
    plain, model = make_model(), make_model()
    OTHERS[other](plain.lm_head)
    if accelerated_first:
        accelerate(model)
    OTHERS[other](model.lm_head)
    torch.testing.assert_close(logits(accelerate(model)), logits(plain), atol=1e-4, rtol=1e-4)


class Wrapped(nn.Module):
    """An adapter's model, such as PEFT's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model


def test_a_model_inside_an_adapter():
    model = make_model()
    wrapped = Wrapped(model)
    expected = logits(model)
    assert accelerate(wrapped) is wrapped
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert attention_calls(wrapped) == {"flashdecpp": LAYERS, "prefill": LAYERS}
    restore(wrapped)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.lm_head) is nn.Linear


def test_missing_weights():
    """Without any weights, a model gives shapes; with some missing, torch's own linear gives garbage."""
    with torch.device("meta"):
        model = make_model()
    assert logits(accelerate(model)).is_meta
    model = make_model()
    model.lm_head.to("meta")
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        logits(accelerate(model))


def test_autocast_gives_the_same_results_as_without():
    model, ids = make_model(), prompts(0)["input_ids"]
    results = []
    for run in (lambda: model, lambda: accelerate(model)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cache = run()(ids, use_cache=True).past_key_values
            results.append(model(ids[:, :1], past_key_values=cache).logits)
    assert results[1].dtype == results[0].dtype == torch.bfloat16
    assert torch.equal(results[1], results[0])
    assert "autocast" in attention_calls(model) and "autocast" in layer_fallbacks(model)


def test_only_the_bias_is_trained():
    """As in adapters that train only biases."""
    gradients = []
    for model in (make_model("qwen2"), accelerate(make_model("qwen2"))):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("layers.2.self_attn.q_proj.bias"))
        ids = prompts(0)["input_ids"]
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[2].self_attn.q_proj.bias.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["forward", "torch.func"])
def test_derivatives_of_a_layer(mode):
    """Derivatives that requires_grad does not reveal."""
    results = []
    for model in (make_model().requires_grad_(False), accelerate(make_model().requires_grad_(False))):
        step = nn.Sequential(model.model.norm, model.model.layers[0].mlp.gate_proj)
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64)
        if mode == "forward":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, x.flip(0))
                results.append(torch.autograd.forward_ad.unpack_dual(step(dual)).tangent)
        else:
            results.append(torch.func.grad(lambda y, step=step: step(y).square().sum())(x))
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0])


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("without", integration.__file__)
    with pytest.raises(ImportError, match="needs a recent transformers"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.demo
def test_the_demo_model_gives_the_same_tokens():
    from flashdecpp import LLM
    from flashdecpp.models.to_transformers import to_transformers

    llm = LLM("demo", device="cpu", dtype="float32")
    model = to_transformers(llm.decoder, torch.float32).eval()
    ids = [llm.tokenizer.encode(text) for text in ("The capital of France is", "def fibonacci(n):")]
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
    }
    expected = greedy(model, batch, tokens=24)
    actual = greedy(accelerate(model), batch, tokens=24)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-3, rtol=1e-3)
