"""quantized_linear against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Place, quantized, randn
from tolerance import assert_same, compare

from flashdecpp import ops, reference

# bits and group; None is one scale per row.
FORMATS = [(8, None), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128)]
formats = pytest.mark.parametrize(("bits", "group"), FORMATS, ids=str)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@formats
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 130])
def test_rows(any_place, rows, bits, group):
    """Up to 8 rows at once, above 31 through dequantized strips, and many in bfloat16 through the BLAS."""
    compare("quantized_linear", **quantized(any_place, rows, 75, 384, bits=bits, group=group))


@formats
@pytest.mark.parametrize("shape", [(1, 128), (17, 640), (256, 384), (33, 8320), (7, 20480)], ids=str)
def test_shapes(any_place, shape, bits, group):
    """One group or many, K in one pass or several, with and without offsets and bias."""
    for rows in (1, 5, 40):
        for offsets in (False, True):
            arguments = quantized(
                any_place, rows, *shape, bits=bits, group=group, offsets=offsets, bias=rows > 1
            )
            compare("quantized_linear", **arguments)


@pytest.mark.parametrize("k", [1, 7, 31, 33, 65, 100, 577, 4099])
def test_scale_per_row_with_any_k(any_place, k):
    for rows in (1, 6, 40):
        compare("quantized_linear", **quantized(any_place, rows, 21, k, bits=8, group=None, offsets=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k", [32, 96, 160, 416, 1056])
def test_groups_that_leave_vectors_partial(any_place, k, bits):
    for rows in (1, 6, 40):
        compare("quantized_linear", **quantized(any_place, rows, 21, k, bits=bits, offsets=True))


@formats
@pytest.mark.parametrize("scales_dtype", DTYPES, ids=str)
def test_scales_of_any_dtype(any_place, bits, group, scales_dtype):
    arguments = quantized(
        any_place, 3, 40, 256, bits=bits, group=group, offsets=True, scales_dtype=scales_dtype
    )
    compare("quantized_linear", **arguments)


def test_any_strides(any_place):
    """x as any view; spaced rows of weight, scales and offsets."""
    arguments = quantized(any_place, 6, 40, 256, bits=4, offsets=True)
    for name in ("weight", "scales", "offsets"):
        wide = torch.cat((arguments[name], arguments[name]), dim=1)
        arguments[name] = wide[:, : arguments[name].size(1)]
    wide = randn(any_place, 6, 4, 512)
    for x in (wide[..., 256:], wide[..., 3:259], wide[:, 1, :256], wide[::2, 1:3, 32:288]):
        compare("quantized_linear", **arguments | {"x": x})
    for x in (randn(any_place, 256, 5).T, randn(any_place, 256), randn(any_place, 1, 256).expand(3, 256)):
        compare("quantized_linear", **arguments | {"x": x})


@formats
def test_no_rows(any_place, bits, group):
    arguments = quantized(any_place, 2, 40, 128, bits=bits, group=group)
    for shape in ((0, 128), (2, 0, 128)):
        assert ops.quantized_linear(**arguments | {"x": randn(any_place, *shape)}).shape == (*shape[:-1], 40)


@formats
def test_packing_matches_reference(any_place, bits, group):
    """Rows of the identity read out the weight, one number per output, exact in float32."""
    arguments = quantized(any_place, 1, 6, 256, bits=bits, group=group, scales_dtype=torch.float32)
    arguments["scales"] = torch.ones_like(arguments["scales"])
    dense = reference.dequantize(arguments["weight"], arguments["scales"])
    rows = torch.eye(256, device=any_place.device, dtype=any_place.dtype)
    assert_same(ops.quantized_linear(**arguments | {"x": rows}), dense.T.to(any_place.dtype))
    one_by_one = torch.cat([ops.quantized_linear(**arguments | {"x": row[None]}) for row in rows])
    assert_same(one_by_one, dense.T.to(any_place.dtype))


def test_int4_packing():
    """Two weights per byte, 16 apart, packed and unpacked."""
    q = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    packed = reference.pack_int4(q)
    assert packed.shape == (3, 48)
    assert packed[1, 16 + 5] == q[1, 32 + 5] + 16 * q[1, 32 + 21]
    assert torch.equal(reference.unpack_int4(packed), q)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_bit_identical_in_any_batch(bits, group, dtype):
    arguments = quantized(
        Place("cpu", dtype), 31, 50, 3 * 128, bits=bits, group=group, offsets=True, bias=True
    )
    together = ops.quantized_linear(**arguments)
    for rows in (1, 2, 3, 8, 13):
        parts = [ops.quantized_linear(**arguments | {"x": part}) for part in arguments["x"].split(rows)]
        assert_same(torch.cat(parts), together, f"{rows} rows at once")
    halves = {name: arguments[name][20:] for name in ("weight", "scales", "offsets", "bias")}
    assert_same(ops.quantized_linear(**arguments | halves), together[:, 20:], "part of the weight")


@formats
def test_bad_rows_stay_alone(any_place, bits, group):
    arguments = quantized(any_place, 5, 24, 128, bits=bits, group=group, offsets=True)
    arguments["x"][2, 3] = torch.nan
    out = compare("quantized_linear", **arguments)
    assert out.isnan().all(-1).tolist() == [False, False, True, False, False]


@formats
def test_only_the_result_is_rounded(any_place, bits, group):
    """Each output is three times a weight, not three times a rounded weight."""
    arguments = quantized(
        any_place, 1, 24, 256, bits=bits, group=group, offsets=True, scales_dtype=torch.float32
    )
    parts = (arguments[name] for name in ("weight", "scales", "offsets"))
    exact = 3 * reference.dequantize(*parts, compute_dtype=torch.float64)
    rows = 3 * torch.eye(256, device=any_place.device, dtype=any_place.dtype)
    out = torch.cat([ops.quantized_linear(**arguments | {"x": part}) for part in rows.split(16)])
    half_a_unit = torch.finfo(any_place.dtype).eps / 2
    bound = exact.T.abs() * half_a_unit * 1.02 + 1e-5
    assert ((out.double() - exact.T).abs() <= bound).all()


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(any_place, data):
    rows, n, k = (data.draw(st.integers(1, high)) for high in (70, 300, 12))
    bits, group = data.draw(st.sampled_from(FORMATS))
    k = 32 * k if group is None else group * k
    arguments = quantized(
        any_place,
        rows,
        n,
        k,
        bits=bits,
        group=group,
        offsets=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        scales_dtype=data.draw(st.sampled_from(DTYPES)),
    )
    compare("quantized_linear", **arguments)
