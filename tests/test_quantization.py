"""Rounding weights to 8 and 4 bits, and models with quantized linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import flashdecpp
from flashdecpp import quantize_
from flashdecpp.quantization import QuantizedLinear, QuantizedWeight, quantize

FORMATS = [(8, None), (8, 64), (4, None), (4, 32), (4, 64), (4, 128)]
formats = pytest.mark.parametrize(("bits", "group"), FORMATS, ids=str)
both = pytest.mark.parametrize("symmetric", [True, False])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values; some rows' groups are shifted off zero, of one sign, or constant."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[1] += 1.0
    x[2] = x[2].abs() + 0.1
    x[3] = -x[2]
    x[4] = 0.0
    x[5] = 0.37
    return x


def groups_of(x: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    return x.unflatten(1, (-1, x.size(1) // (quantized.scales.numel() // x.size(0))))


@formats
@both
def test_the_error_is_half_a_step(bits, group, symmetric):
    x = weights(24, 256)
    quantized = quantize(x, bits, group, symmetric)
    step = quantized.scales.view(24, -1).abs()[:, :, None]
    error = groups_of((quantized.dense() - x).abs(), quantized)
    assert (error <= step / 2 + 1e-6).all()

    grouped = groups_of(x, quantized)
    largest, smallest = grouped.amax(2, keepdim=True), grouped.amin(2, keepdim=True)
    half = 2 ** (bits - 1)
    if symmetric:
        magnitude, other = torch.maximum(largest, -smallest), torch.minimum(largest, -smallest)
        expected = torch.maximum(magnitude / half, other / (half - 1))
    else:
        expected = (largest - smallest) / (2**bits - 1)
    torch.testing.assert_close(step, expected)
    assert (quantized.offsets is None) == symmetric


@formats
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_scales_add_no_more_than_their_own_rounding(bits, group, symmetric, dtype):
    x = weights(24, 256)
    quantized = quantize(x, bits, group, symmetric, scales_dtype=dtype)
    assert quantized.scales.dtype == dtype
    step = quantized.scales.float().view(24, -1).abs()[:, :, None]
    # The range is 2^bits steps and begins at an offset; each may be off by a rounding at the ends.
    ends = groups_of(x, quantized).abs().amax(2, keepdim=True) + 2**bits * step
    error = groups_of((quantized.dense() - x).abs(), quantized)
    assert (error <= step / 2 + torch.finfo(dtype).eps * ends + 1e-6).all()


@both
def test_representable_numbers_are_kept(symmetric):
    """Requantizing gives the same values, so saving and loading adds no error."""
    for bits, group in FORMATS:
        once = quantize(weights(8, 256), bits, group, symmetric).dense()
        again = quantize(once, bits, group, symmetric).dense()
        torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)


def test_sizes():
    """Bits per weight, with float16 scales: 8, 4.5 and, with offsets, 5."""
    x = torch.randn(64, 1024).half()
    for bits, group, symmetric, expected in (
        (8, None, True, 8 + 16 / 1024),
        (4, 32, True, 4.5),
        (4, 32, False, 5),
    ):
        quantized = quantize(x, bits, group, symmetric)
        assert quantized.nbytes * 8 / x.numel() == expected
        assert (quantized.bits, quantized.shape) == (bits, (64, 1024))


def test_bad_weights():
    x = torch.randn(8, 100)
    for arguments, message in (
        ((x, 4), "weight must have a K that is a multiple of 32, got 100"),
        ((x, 5), "bits must be 8 or 4, got 5"),
        ((x, 8, 48), "group_size must be 32, 64, 128 or None, got 48"),
        ((x[0], 8), r"weight must be \[N, K\] .* got torch.float32 of shape \(100,\)"),
        ((x.int(), 8), r"weight must be .* got torch.int32"),
        ((x.clone().fill_(torch.nan), 8), "weight must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(*arguments)


class Model(nn.Module):
    """Linear layers of every kind: nested, with and without bias, with a K that fits no group, and tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
        )
        self.odd = nn.Linear(64, 40, bias=False)
        self.back = nn.Linear(40, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        x = x + self.back(self.odd(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.lm_head(x)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


@pytest.mark.parametrize(
    ("bits", "left"), [(8, ["lm_head"]), (4, ["back", "lm_head"])], ids=["8 bits", "4 bits"]
)
@both
@torch.no_grad()
def test_model_matches_its_rounded_weights(bits, left, symmetric):
    tokens = torch.arange(40).view(4, 10)
    quantized, dense = model(), model()
    assert quantize_(quantized, bits, symmetric=symmetric) == left
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            rounded = QuantizedWeight(layer.weight, layer.scales, layer.offsets).dense()
            dense.get_submodule(name).weight.copy_(rounded)
    assert isinstance(quantized.layers[1][2], QuantizedLinear)
    assert quantized.lm_head.weight is quantized.embed.weight
    torch.testing.assert_close(quantized(tokens), dense(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_other_dtypes_and_compile(dtype):
    tokens = torch.arange(40).view(4, 10)
    layers = model(dtype).layers[0]
    quantize_(layers, 4, 64)
    x = model(dtype).embed(tokens)
    assert layers[0].scales.dtype == dtype
    expected = layers(x)
    assert expected.dtype == dtype
    torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), expected)


@both
@torch.no_grad()
def test_state_dict(symmetric):
    """The state is complete, and loads into a model that was quantized the same way."""
    tokens = torch.arange(40).view(4, 10)
    first, second = model(), model()
    for parameter in second.parameters():
        parameter.mul_(0.5)
    for each in (first, second):
        quantize_(each, 4, 32, symmetric, skip=("odd",))
    assert type(first.odd) is nn.Linear
    names = {name for name in first.state_dict() if name.startswith("layers.0.0.")}
    parts = {"weight", "scales", "bias"} | (set() if symmetric else {"offsets"})
    assert names == {f"layers.0.0.{part}" for part in parts}
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens), second(tokens))
    with pytest.raises(RuntimeError, match="scales"):
        model().load_state_dict(first.state_dict())


def test_to_changes_only_floats():
    layer = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, 4)
    packed = layer[0].weight.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer[0].weight, packed)
    assert (layer[0].scales.dtype, layer[0].bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "in_features=64, out_features=32, bits=4, group=32, symmetric=True, bias=True" in repr(layer)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_reach_the_input(bits):
    """And any trained layers before it, with the rounded weight's gradients."""
    layer = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, bits)
    x, gradients = torch.randn(5, 64), []
    for weight in (None, layer[0].quantized.dense()):
        leaf = x.clone().requires_grad_()
        out = layer(leaf) if weight is None else nn.functional.linear(leaf, weight, layer[0].bias)
        out.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(leaf), layer(x))


class Marked(torch.Tensor):
    """Any subclass may pack its numbers in ways that only its library knows."""


def _set_weight(change) -> Callable[[nn.Linear], object]:
    return lambda layer: setattr(
        layer, "weight", nn.Parameter(change(layer.weight.data), requires_grad=False)
    )


LEFT: dict[str, Callable[[nn.Linear], object]] = {
    "subclass": _set_weight(lambda w: w.as_subclass(Marked)),
    "meta": lambda layer: layer.to("meta"),
    "float64": lambda layer: layer.double(),
    "sparse": _set_weight(lambda w: w.to_sparse_csr()),
    "hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: output),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: None),
    "forward": lambda layer: setattr(layer, "forward", layer.forward),
    "parametrization": nn.utils.parametrizations.weight_norm,
    "empty": lambda layer: layer.__init__(64, 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LEFT)
def test_foreign_layers_are_left(kind):
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    LEFT[kind](layers[1])
    before = layers[1]
    left = quantize_(layers)
    assert layers[1] is before
    assert isinstance(layers[0], QuantizedLinear)
    assert left == (["1"] if type(before) is nn.Linear else [])


def test_shared_layer_stays_shared():
    layer = nn.Linear(64, 64)
    layers = nn.Sequential(layer, nn.GELU(), layer)
    expected = layers(x := torch.randn(3, 64))
    assert quantize_(layers) == []
    assert layers[0] is layers[2] and isinstance(layers[0], QuantizedLinear)
    assert (layers(x) - expected).abs().max() < 0.05


def test_non_finite_weight_is_named_and_nothing_is_replaced():
    layers = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    layers[1][0].weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"1\.0\.weight must be finite"):
        quantize_(layers)
    assert type(layers[0]) is nn.Linear


def test_skip_accepts_a_single_name():
    """It isn't treated as a sequence of letters."""
    layers = nn.ModuleDict({"head": nn.Linear(64, 64), "d": nn.Linear(64, 64)})
    assert quantize_(layers, skip="head") == ["head"]


def test_accelerated_model_can_be_quantized():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = flashdecpp.accelerate(transformers.LlamaForCausalLM(config).eval())
    assert quantize_(model) == []
    assert isinstance(model.lm_head, QuantizedLinear)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (torch.empty(64, 64, device="meta"), "holds its numbers, got a Tensor on meta"),
        (torch.randn(64, 64).as_subclass(Marked), "holds its numbers, got a Marked"),
        (torch.randn(64, 0), r"\[N, K\].*\(64, 0\)"),
    ],
    ids=["meta", "subclass", "empty"],
)
def test_unreadable_weights(weight, what):
    with pytest.raises(ValueError, match=what):
        quantize(weight)


def test_bad_models_and_bits():
    with pytest.raises(ValueError, match=r"module must hold the nn\.Linear layers"):
        quantize_(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        quantize_(model(), 2)
    assert flashdecpp.quantize_ is quantize_
