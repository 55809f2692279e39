"""Schemes, scales and codes against slow loops, and against the arithmetic of compressed-tensors."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.formats import FORMATS, FP4_E2M1, FP8_E4M3, Format, integer
from lowbit.qtensor import (
    CHANNEL,
    TENSOR,
    Grid,
    QTensor,
    Spec,
    check_shape,
    dequantize,
    fake_quantize_input,
    find_params,
    parse_scheme,
    quantize,
    spec_from_dict,
    validate,
)

Cell = tuple[slice, slice]
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GROUPS = [CHANNEL, TENSOR, 4, 12]
GRIDS = [
    (integer(2), True),
    (integer(3), False),
    (integer(4), True),
    (integer(4), False),
    (integer(8), False),
    (FP8_E4M3, True),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_grid = pytest.mark.parametrize(
    ("fmt", "symmetric"), GRIDS, ids=[f"{fmt.name}-{'sym' if symmetric else 'asym'}" for fmt, symmetric in GRIDS]
)
each_group = pytest.mark.parametrize("group", GROUPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def weights(rows: int = 6, columns: int = 24, seed: int = 0) -> Tensor:
    """Rows of different sizes, some of one sign, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[:, 5] *= 6
    return w


def cells(shape: tuple[int, int], group: int) -> Iterator[tuple[int, int, Cell]]:
    """Where each scale lies, and the part of the matrix that it is for."""
    rows, columns = shape
    if group == TENSOR:
        yield 0, 0, (slice(0, rows), slice(0, columns))
        return
    size = columns if group == CHANNEL else group
    for row in range(rows):
        for g in range(columns // size):
            yield row, g, (slice(row, row + 1), slice(g * size, (g + 1) * size))


def slow_params(values: list[float], spec: Spec, dtype: torch.dtype) -> tuple[Tensor, int | None]:
    """Scale and zero point of one group, one operation at a time in float32."""
    one = np.float32
    low, high = one(min(0.0, min(values))), one(max(0.0, max(values)))
    sign = one(1)
    if not spec.symmetric:
        scale = (high - low) / one(2**spec.format.bits - 1)
    elif spec.format.kind == "float":
        scale = max(-low, high) / one(448)
    elif spec.format.bits == 8:
        scale = max(-low, high) / (one(255) / one(2))
    else:  # the largest magnitude is the lowest code
        sign, scale = one(-1 if high > -low else 1), max(-low, high) / one(2 ** (spec.format.bits - 1))
    scale = max(scale, one(torch.finfo(dtype).smallest_normal)) * sign if scale > 0 else one(1)
    rounded = torch.tensor(float(scale), dtype=torch.float32).to(dtype)
    if spec.symmetric:
        return rounded, None
    least, most = -(2 ** (spec.format.bits - 1)), 2 ** (spec.format.bits - 1) - 1
    return rounded, int(min(max(np.rint(one(least) - low / one(float(rounded))), least), most))


def nearest_value(x: float, fmt: Format) -> float:
    """The representable value nearest to x, by looking at all of them; of two, either."""
    if fmt.kind == "int":
        return min(range(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1)), key=lambda value: abs(x - value))
    return min(FP8_VALUES[FP8_VALUES.isfinite()].tolist(), key=lambda value: abs(x - value))


# -------------------------------------------------------------------------------------------------------------- schemes
@pytest.mark.parametrize(
    ("text", "fmt", "group", "symmetric", "inputs"),
    [
        ("w4a16", "int4", 128, True, None),
        ("w2a16", "int2", 128, True, None),
        ("w3a16", "int3", 128, True, None),
        ("w5a16", "int5", CHANNEL, True, None),
        ("w8a16", "int8", CHANNEL, True, None),
        ("w8a8", "int8", CHANNEL, True, "int8"),
        ("w4a8", "int4", 128, True, "int8"),
        ("w4a16-g64-asym", "int4", 64, False, None),
        ("w4a16-asym-g64", "int4", 64, False, None),
        ("w4a16-asym", "int4", 128, False, None),
        ("w4a16-sym", "int4", 128, True, None),
        ("w4a16-channel", "int4", CHANNEL, True, None),
        ("w4a16-tensor-asym", "int4", TENSOR, False, None),
        ("w8a16-g1", "int8", 1, True, None),
        ("w8a16-g1024", "int8", 1024, True, None),
        ("w8a8-tensor", "int8", TENSOR, True, "int8"),
        ("w6a8-channel-asym", "int6", CHANNEL, False, "int8"),
        ("fp8", "fp8_e4m3", CHANNEL, True, "fp8_e4m3"),
        ("fp8a16", "fp8_e4m3", CHANNEL, True, None),
        ("fp8-tensor", "fp8_e4m3", TENSOR, True, "fp8_e4m3"),
        ("fp8a16-g32-sym", "fp8_e4m3", 32, True, None),
        ("  W4A16-G32 ", "int4", 32, True, None),
    ],
)
def test_scheme_names(text: str, fmt: str, group: int, symmetric: bool, inputs: str | None) -> None:
    scheme = parse_scheme(text)
    assert scheme.name == text.strip().lower()
    assert scheme.weight == Spec(format=FORMATS[fmt], group=group, symmetric=symmetric)
    if inputs is None:
        assert scheme.input is None
    else:
        assert scheme.input == Spec(format=FORMATS[inputs], dynamic=True)


FP4, INT4 = FP4_E2M1, integer(4)
INPUT8 = Spec(format=FP8_E4M3, dynamic=True)
MX4 = Spec(format=FP4_E2M1, group=32, scale="e8m0")


@pytest.mark.parametrize(
    ("text", "weight", "inputs"),
    [
        ("w4a4-g128-ag128", Spec(format=INT4, group=128), Spec(format=INT4, group=128, dynamic=True)),
        ("w8a8-aasym", Spec(format=integer(8)), Spec(format=integer(8), symmetric=False, dynamic=True)),
        ("w8a8-tensor-astatic", Spec(format=integer(8), group=TENSOR), Spec(format=integer(8), group=TENSOR)),
        ("w8a8-r16", Spec(format=integer(8), rows=16), Spec(format=integer(8), dynamic=True)),
        ("w4a8-g128-two", Spec(format=INT4, group=128, scale="int8"), Spec(format=integer(8), dynamic=True)),
        ("w4a16-pow2", Spec(format=INT4, group=128, scale="e8m0", rule="ceil"), None),
        ("w4a16-pow2-floor", Spec(format=INT4, group=128, scale="e8m0"), None),
        ("fp8-block", Spec(format=FP8_E4M3, group=128, rows=128), replace(INPUT8, group=128)),
        ("fp8-e5m2", Spec(format=FORMATS["fp8_e5m2"]), Spec(format=FORMATS["fp8_e5m2"], dynamic=True)),
        ("fp4", Spec(format=FP4, group=128), INPUT8),
        ("fp4-g32-pow2", Spec(format=FP4, group=32, scale="e8m0", rule="ceil"), INPUT8),
        ("nf4", Spec(format=FORMATS["nf4"], group=64), None),
        (
            "mxfp4",
            Spec(format=FP4, group=32, scale="e8m0"),
            Spec(format=FP4, group=32, scale="e8m0", rule="even", dynamic=True),
        ),
        ("mxfp4a16-ceil-g16", Spec(format=FP4, group=16, scale="e8m0", rule="ceil"), None),
        (
            "mxfp4a8",
            Spec(format=FP4, group=32, scale="e8m0"),
            Spec(format=FP8_E4M3, group=32, scale="e8m0", rule="ceil", dynamic=True),
        ),
        (
            "mxfp6-e3m2-g64",
            Spec(format=FORMATS["fp6_e3m2"], group=64, scale="e8m0"),
            Spec(format=FORMATS["fp6_e3m2"], group=64, scale="e8m0", dynamic=True),
        ),
        (
            "mxint4-ag16",
            Spec(format=FORMATS["mxint4"], group=32, scale="e8m0"),
            Spec(format=FORMATS["mxint4"], group=16, scale="e8m0", dynamic=True),
        ),
        ("nvfp4", Spec(format=FP4, group=16, scale="e4m3"), Spec(format=FP4, group=16, scale="e4m3", dynamic=True)),
        ("nvfp4a16", Spec(format=FP4, group=16, scale="e4m3"), None),
        ("kmeans3", Spec(format=FORMATS["kmeans3"]), None),
        ("bcq2-g64", Spec(format=FORMATS["bcq2"], group=64), None),
    ],
)
def test_scheme_names_of_every_family(text: str, weight: Spec, inputs: Spec | None) -> None:
    scheme = parse_scheme(text)
    assert (scheme.weight, scheme.input) == (weight, inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown scheme ''; examples of schemes: w4a16, "),
        ("int4", "unknown scheme 'int4'"),
        ("w4", "unknown scheme 'w4'"),
        ("w4a", "unknown scheme 'w4a'"),
        ("w4a16g64", "unknown scheme 'w4a16g64'"),
        ("w4a16-", "unknown scheme 'w4a16-'"),
        ("w4a16 -g64", "unknown scheme 'w4a16 -g64'"),
        ("w4a16\n-g64", "unknown scheme"),
        ("fp8a4", "scheme 'fp8a4': activations of fp8 have 8 or 16 bits, not 4"),
        ("fp5", "unknown scheme 'fp5'"),
        ("w-4a16", "unknown scheme 'w-4a16'"),
        ("w1a16", "1-bit integers are not supported; allowed are 2 to 8"),
        ("w9a16", "9-bit integers are not supported"),
        ("w16a16", "16-bit integers are not supported"),
        ("w4a2", "scheme 'w4a2': activations have 3 to 8 bits, or 16 (left float), not 2"),
        ("w8a32", "activations have 3 to 8 bits, or 16 (left float), not 32"),
        ("w4a16-g0", "'g0' is unknown or said twice; examples of schemes: w4a16, "),
        ("w4a16-g064", "'g064' is unknown"),
        ("w4a16-g", "'g' is unknown"),
        ("w4a16-g64x", "'g64x' is unknown"),
        ("w4a16-row", "'row' is unknown"),
        ("w4a16-g64-g32", "'g32' is unknown or said twice"),
        ("w4a16-g64-channel", "'channel' is unknown or said twice"),
        ("w4a16-channel-tensor", "'tensor' is unknown or said twice"),
        ("w4a16-asym-sym", "'sym' is unknown or said twice"),
        ("w4a16-sym-sym", "'sym' is unknown or said twice"),
        ("fp8-asym", "scheme 'fp8-asym': float formats have no zero point; remove -asym"),
        ("mxint4-asym", "mxint has no zero point; remove -asym"),
        ("w4a16-pow2-asym", "power-of-two scales have no zero point; remove -asym"),
        ("mxint1", "mxint has 2 to 8 bits, not 1"),
        ("mxfp4a5", "mxfp has 4, 6 or 8 bits, not 5"),
        ("mxfp4-e5m2", "mxfp4 has no variant e5m2; there are mxfp6-e3m2, mxfp8-e5m2, fp8-e5m2"),
        ("nvfp4a8", "activations of nvfp4 have 4 or 16 bits, not 8"),
        ("nf4a8", "activations of nf4 have 16 bits, not 8"),
        ("kmeans3a8", "inputs of kmeans3 stay float (a16)"),
        ("kmeans3-r2", "a codebook belongs to a channel or a group of it; it goes with -gK and -channel only"),
        ("bcq3-tensor", "a codebook belongs to a channel"),
        ("mxfp4-two", "the scales of this format are e8m0, which -two cannot change"),
        ("w4a16-floor", "-floor is for power-of-two scales only (mx formats, -pow2)"),
        ("w4a16-ag64", "-ag64 is for quantized inputs, and these stay float"),
        ("mxfp4-aasym", "-aasym does not go with inputs whose scales are e8m0"),
        ("nvfp4-ag32", "-ag32 does not go with inputs whose scales are e4m3"),
        ("w8a8-astatic-aasym", "-astatic is one symmetric scale for the tensor; remove -agK and -aasym"),
        ("nvfp4-channel", "e4m3 scales need groups (-gK), one row each"),
        ("w4a8-g128-r2-two", "int8 scales need groups (-gK), one row each"),
        ("w8a8-g128-two", "-two is for integers of up to 4 bits"),
        ("w8a8-tensor-r4", "-tensor is one scale in all; remove -rN"),
    ],
)
def test_scheme_names_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scheme(text)


def test_examples_in_messages_are_schemes() -> None:
    """What a message offers can be used."""
    with pytest.raises(ValueError) as caught:
        parse_scheme("nothing")
    examples = str(caught.value).rpartition(": ")[2].split(", ")
    assert len(examples) > 5
    assert [parse_scheme(example).name for example in examples] == examples


@each_grid
@each_group
@pytest.mark.parametrize("dynamic", [False, True])
def test_spec_survives_its_dict(fmt: Format, symmetric: bool, group: int, dynamic: bool) -> None:
    spec = Spec(format=fmt, group=group, symmetric=symmetric, dynamic=dynamic)
    assert spec_from_dict(spec.to_dict()) == spec


def test_spec_of_unknown_format() -> None:
    fields = Spec(format=integer(4)).to_dict() | {"format": "int9"}
    with pytest.raises(
        ValueError, match="unknown number format 'int9'; known are bcq1, .*, fp4_e2m1, .*, int8, kmeans2, .*, nf4$"
    ):
        spec_from_dict(fields)


@pytest.mark.parametrize(
    ("scheme", "columns", "message"),
    [
        ("w4a16", 192, "groups of 128 do not divide its 192 input columns; use a group of 16, 32, 64 (-gK in the scheme)"),
        ("w4a16-g48", 64, "groups of 48 do not divide its 64 input columns; use a group of 16, 32, 64 (-gK in the scheme)"),
        ("w4a16", 64, "groups of 128 do not divide its 64 input columns; use a group of 16, 32, 64 (-gK in the scheme)"),
        ("w4a16", 100, "groups of 128 do not divide its 100 input columns; use a group of a divisor (-gK in the scheme)"),
    ],
)
def test_groups_that_do_not_fit(scheme: str, columns: int, message: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    ignore = "-channel, or leave it out with --ignore 'model\\.layers\\.0\\.mlp\\.up_proj'"
    with pytest.raises(ValueError) as caught:
        check_shape(name, 8, columns, parse_scheme(scheme))
    assert str(caught.value) == f"{name}: {message}, {ignore}"
    assert re.fullmatch(ignore.split("'")[1], name)


@pytest.mark.parametrize("scheme", ["w4a16-g25", "w4a16-g100", "w4a16-channel", "w4a16-tensor", "fp8"])
def test_groups_that_fit(scheme: str) -> None:
    check_shape("x", 7, 100, parse_scheme(scheme))


# --------------------------------------------------------------------------------------------------------------- scales
@each_grid
@each_group
@each_dtype
def test_find_params(fmt: Format, symmetric: bool, group: int, dtype: torch.dtype) -> None:
    """Every scale and zero point, bit for bit."""
    spec = Spec(format=fmt, group=group, symmetric=symmetric)
    w = weights()
    before = w.clone()
    scale, zero, _ = find_params(w, spec, scale_dtype=dtype)
    assert torch.equal(w, before)
    assert scale.dtype == dtype
    assert scale.shape == {CHANNEL: (6, 1), TENSOR: (1, 1), 4: (6, 6), 12: (6, 2)}[group]
    assert (zero is None) == symmetric
    seen = 0
    for row, column, cell in cells((6, 24), group):
        expected_scale, expected_zero = slow_params(w[cell].flatten().tolist(), spec, dtype)
        assert scale[row, column] == expected_scale
        if zero is not None:
            assert zero.dtype == torch.int8
            assert zero[row, column] == expected_zero
        seen += 1
    assert seen == scale.numel()
    assert zero is None or zero.shape == scale.shape


@each_grid
@each_dtype
def test_groups_of_zeros(fmt: Format, symmetric: bool, dtype: torch.dtype) -> None:
    """Their scale is 1 and they come back as zeros; other groups are as if alone."""
    spec = Spec(format=fmt, group=4, symmetric=symmetric)
    w = weights()
    scale, zero, _ = find_params(w, spec, scale_dtype=dtype)
    w[3, 4:8] = 0
    w[0] = 0
    found, found_zero, _ = find_params(w, spec, scale_dtype=dtype)
    q = quantize(w, Grid(found, found_zero, None), spec)
    validate(q, "w")
    assert (found[0] == 1).all() and found[3, 1] == 1
    back = dequantize(q)
    assert not back[0].any() and not back[3, 4:8].any()
    assert not dequantize(q, dtype)[0].any()
    kept = torch.ones_like(found, dtype=torch.bool)
    kept[0], kept[3, 1] = False, False
    assert torch.equal(found[kept], scale[kept])
    if zero is not None and found_zero is not None:
        assert torch.equal(found_zero[kept], zero[kept])


@each_grid
@each_dtype
def test_tiny_weights_keep_finite_scales(fmt: Format, symmetric: bool, dtype: torch.dtype) -> None:
    """Ranges whose scale would vanish in the stored dtype: the smallest normal scale, or that of a group of zeros."""
    spec = Spec(format=fmt, group=4, symmetric=symmetric)
    w = weights() * 1e-40
    assert w.any(dim=1).all()
    scale, zero, _ = find_params(w, spec, scale_dtype=dtype)
    smallest = torch.finfo(dtype).smallest_normal
    assert ((scale.abs() == smallest) | (scale == 1)).all()
    assert (scale.abs() == smallest).any() and bool((scale < 0).any()) == (symmetric and fmt.bits < 8)
    q = quantize(w, Grid(scale, zero, None), spec)
    validate(q, "w")
    assert (dequantize(q) - w).abs().max() <= smallest / 2


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.sampled_from(GRIDS),
    st.sampled_from([4, CHANNEL, TENSOR]),
    st.sampled_from(DTYPES),
)
def test_nearest_within_half_a_step(values: list[float], grid: tuple[Format, bool], group: int, dtype: torch.dtype) -> None:
    """With the scale as stored, a weight in range errs by half a step; one out of range gets the outermost code."""
    fmt, symmetric = grid
    spec = Spec(format=fmt, group=group, symmetric=symmetric)
    w = torch.tensor(values).view(1, 8)
    scale, zero, _ = find_params(w, spec, scale_dtype=dtype)
    q = quantize(w, Grid(scale, zero, None), spec)
    back = dequantize(q).double()
    for row, column, cell in cells((1, 8), group):
        s = float(scale[row, column])
        z = 0 if zero is None else int(zero[row, column])
        for x, y in zip(w[cell].double().flatten().tolist(), back[cell].flatten().tolist(), strict=True):
            target = x / s + z
            if target >= fmt.max or target <= fmt.min:
                outermost = fmt.max if target > 0 else fmt.min
                assert y == pytest.approx((outermost - z) * s, rel=1e-6)
                # The grid covers the range: symmetric integers up to half a step beyond their largest code, the rest
                # up to what rounding the scale and the zero point took away.
                # and with few bits up to one step beyond the largest code, which the lowest has no counterpart in.
                beyond = 1.0 if symmetric and fmt.bits < 8 else 0.5
                assert abs(x - y) <= abs(s) * (beyond + 2.0**-7 * (fmt.max - fmt.min))
            elif fmt.kind == "int":
                assert abs(x - y) <= abs(s) * (0.5 + 1e-4)
            else:
                assert abs(x - y) <= max(abs(x) / 16, s * 2.0**-10) * (1 + 1e-5)


@each_grid
@each_group
def test_quantize_is_nearest(fmt: Format, symmetric: bool, group: int) -> None:
    """Every code against a search through all values."""
    spec = Spec(format=fmt, group=group, symmetric=symmetric)
    w = weights(rows=4)
    scale, zero, _ = find_params(w, spec, scale_dtype=torch.bfloat16)
    q = quantize(w, Grid(scale, zero, None), spec)
    assert q.codes.shape == w.shape
    assert q.codes.dtype == fmt.code_dtype
    assert (q.scale is scale) and (q.zero is zero) and (q.spec is spec)
    back = dequantize(q).double()
    for row, column, cell in cells((4, 24), group):
        s = float(scale[row, column])
        z = 0 if zero is None else int(zero[row, column])
        for x, y in zip(w[cell].flatten().tolist(), back[cell].flatten().tolist(), strict=True):
            best = (nearest_value(x / s + z, fmt) - z) * s
            assert abs(x - y) <= abs(x - best) + 1e-6 * abs(s) * fmt.max


# --------------------------------------------------------------------------------------------------------------- search
@each_grid
@pytest.mark.parametrize("group", [TENSOR, 12])
@pytest.mark.parametrize(("weighted", "steps"), [(False, 60), (True, 60), (False, 4)])
def test_shrink_search(fmt: Format, symmetric: bool, group: int, weighted: bool, steps: int) -> None:
    """Each group gets a factor that no other beats in its norm, so none is worse than min-max."""
    spec = Spec(format=fmt, group=group, symmetric=symmetric)
    w = weights(rows=4, seed=3)
    importance = torch.linspace(0, 3, 24).square().flip(0) if weighted else None

    def error(params: Grid, cell: Cell) -> float:
        back = dequantize(quantize(w, params, spec)).double()
        delta = (w.double() - back)[cell].abs()
        return float((delta**2.4).sum() if importance is None else (importance[cell[1]] * delta**2).sum())

    found = find_params(w, spec, scale_dtype=torch.bfloat16, shrink_steps=steps, importance=importance)
    plain = find_params(w, spec, scale_dtype=torch.bfloat16)
    # Min-max of the shrunken weights is the shrunken range.
    tried = [find_params(w * (1 - step / 100), spec, scale_dtype=torch.bfloat16) for step in range(steps)]
    better, last = 0, 0
    for row, column, cell in cells((4, 24), group):
        choices = [(float(s[row, column]), None if z is None else int(z[row, column])) for s, z, _ in tried]
        choice = float(found[0][row, column]), None if found[1] is None else int(found[1][row, column])
        assert choice in choices
        last += choice == choices[-1] and choices.count(choice) == 1
        chosen = error(found, cell)
        least = min(error(params, cell) for params in tried)
        assert chosen <= least * (1 + 1e-4)
        assert chosen <= error(plain, cell) * (1 + 1e-6)
        better += chosen < 0.99 * error(plain, cell)
    if fmt.bits == 2 and group != TENSOR:
        assert better > 0
        assert last > 0 or steps > 10


@pytest.mark.parametrize("steps", [0, 1])
def test_no_search(steps: int) -> None:
    spec = Spec(format=integer(3), group=8, symmetric=False)
    plain = find_params(weights(), spec, scale_dtype=torch.float16)
    found = find_params(weights(), spec, scale_dtype=torch.float16, shrink_steps=steps)
    assert found.zero is not None and plain.zero is not None and found.outer is plain.outer is None
    assert torch.equal(found.scale, plain.scale) and torch.equal(found.zero, plain.zero)


def test_search_where_only_one_column_matters() -> None:
    """Its error falls to almost nothing; without a word about importance it does not."""
    spec = Spec(format=integer(2), group=8)
    w = weights(rows=40, columns=8)
    importance = torch.zeros(8)
    importance[2] = 5.0
    errors = []
    for known in (importance, None):
        params = find_params(w, spec, scale_dtype=torch.float32, shrink_steps=95, importance=known)
        errors.append(float((dequantize(quantize(w, params, spec)) - w)[:, 2].square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_search_of_zeros() -> None:
    spec = Spec(format=integer(3), group=8)
    w = weights()
    w[:, 8:16] = 0
    scale, zero, _ = find_params(w, spec, scale_dtype=torch.bfloat16, shrink_steps=20)
    q = quantize(w, Grid(scale, zero, None), spec)
    validate(q, "w")
    assert not dequantize(q)[:, 8:16].any()


# ------------------------------------------------------------------------------------------------------------ dequantize
def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[1, -2, 3, -4]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    zero = torch.tensor([[1, -3]], dtype=torch.int8)
    q = QTensor(codes, scale, zero, Spec(format=integer(4), group=2, symmetric=False))
    assert dequantize(q).tolist() == [[0.0, -1.5, 12.0, -2.0]]
    assert dequantize(q).dtype == torch.float32
    assert dequantize(q, torch.float16).dtype == torch.float16
    whole = QTensor(codes, torch.tensor([[0.25]]), None, Spec(format=integer(4), group=TENSOR))
    assert dequantize(whole).tolist() == [[0.25, -0.5, 0.75, -1.0]]


Layout = Literal["pack-quantized", "int-quantized", "float-quantized"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("fmt", "group", "symmetric", "layout"),
    [
        *[(integer(bits), group, True, "pack-quantized") for bits in (2, 3, 4, 8) for group in (CHANNEL, 32)],
        *[(integer(bits), group, False, "pack-quantized") for bits in (2, 4, 8) for group in (CHANNEL, 32)],
        (integer(8), CHANNEL, True, "int-quantized"),
        (integer(8), TENSOR, True, "int-quantized"),
        (FP8_E4M3, CHANNEL, True, "float-quantized"),
        (FP8_E4M3, TENSOR, True, "float-quantized"),
    ],
)
def test_dequantize_as_compressed_tensors(fmt: Format, group: int, symmetric: bool, layout: Layout, dtype: torch.dtype) -> None:
    """What the library decompresses in the checkpoint's dtype has the same bits."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    spec = Spec(format=fmt, group=group, symmetric=symmetric)
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 0.03
    q = quantize(w, find_params(w, spec, scale_dtype=dtype), spec)
    stored: dict[str, Any] = {"weight_scale": q.scale.reshape(1) if group == TENSOR else q.scale}
    if layout == "pack-quantized":
        stored |= {"weight_packed": pack_to_int32(q.codes, fmt.bits), "weight_shape": torch.tensor(w.shape)}
        if q.zero is not None:
            stored["weight_zero_point"] = pack_to_int32(q.zero, fmt.bits, packed_dim=0)
    else:
        stored["weight"] = q.codes if fmt.kind == "int" else q.codes.view(torch.float8_e4m3fn)
    args = QuantizationArgs(
        num_bits=fmt.bits,
        type=fmt.kind,
        symmetric=symmetric,
        strategy={CHANNEL: "channel", TENSOR: "tensor"}.get(group, "group"),
        group_size=group if group > 0 else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = BaseCompressor.get_value_from_registry(layout).decompress(stored, scheme)["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(dequantize(q, dtype).view(torch.int16), theirs.view(torch.int16))
    assert (theirs.float() - w).abs().max() < 2 * q.scale.float().max() * (1 if fmt.kind == "int" else 16)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec(format=integer(4), group=32), 4 + 16 / 32),
        (Spec(format=integer(4), group=32, symmetric=False), 4 + 16 / 32 + 4 / 32),
        (Spec(format=integer(3), group=CHANNEL), 3 + 16 / 96),
        (Spec(format=FP8_E4M3, group=TENSOR), 8 + 16 / (8 * 96)),
        (Spec(format=integer(8), rows=4), 8 + 16 / (4 * 96)),
    ],
)
def test_bits_per_weight(spec: Spec, expected: float) -> None:
    w = torch.randn(8, 96)
    q = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    assert q.bits_per_weight == pytest.approx(expected)
    wide = quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec)
    assert wide.bits_per_weight == pytest.approx(expected + 16 * wide.scale.numel() / w.numel())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("mxfp4a16", 4 + 8 / 32),
        ("mxfp6a16", 6 + 8 / 32),
        ("mxint4-g16", 4 + 8 / 16),
        ("nvfp4a16", 4 + 8 / 16 + 32 / (8 * 96)),
        ("w4a8-g32-two", 4 + 8 / 32 + 32 / 96),
        ("kmeans3", 3 + 8 * 16 / 96),
        ("bcq3-g32", 3 + 4 * 16 / 32),
    ],
)
def test_bits_per_weight_with_scales_of_8_bits(scheme: str, expected: float) -> None:
    w, spec = torch.randn(8, 96), parse_scheme(scheme).weight
    q = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    assert q.bits_per_weight == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- rows and scales on two levels
@pytest.mark.parametrize("scheme", ["fp8a16-g16-r4", "w4a16-g32-r2-asym", "w8a16-r8", "w8a16-r1", "mxfp4a16-r2"])
def test_blocks_of_rows(scheme: str) -> None:
    """A scale of N rows and K columns is that of one row of all their elements."""
    w, spec = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), parse_scheme(scheme).weight
    size, flat = spec.group_size(64), replace(spec, rows=1, group=CHANNEL)
    grid = find_params(w, spec, scale_dtype=torch.float32)
    q = quantize(w, grid, spec)
    found = dequantize(q)
    assert grid.scale.shape == (8 // spec.rows, 64 // size)
    for r in range(0, 8, spec.rows):
        for c in range(0, 64, size):
            mine = w[r : r + spec.rows, c : c + size]
            alone = mine.reshape(1, -1)
            expected = quantize(alone, find_params(alone, flat, scale_dtype=torch.float32), flat)
            assert grid.scale[r // spec.rows, c // size] == expected.scale
            assert torch.equal(found[r : r + spec.rows, c : c + size], dequantize(expected).view_as(mine))
    assert torch.equal(grid.step(spec, 8), grid.scale.float().repeat_interleave(spec.rows, 0))


def test_one_scale_a_row_or_for_all() -> None:
    """As many rows as there are make one scale a tensor; one makes one a channel (ZeroQuant's groups of rows)."""
    w = torch.randn(8, 64)
    for rows, other in ((1, "w4a16-channel"), (8, "w4a16-tensor")):
        spec, same = Spec(format=integer(4), rows=rows), parse_scheme(other).weight
        grid, twin = (find_params(w, s, scale_dtype=torch.float32) for s in (spec, same))
        assert torch.equal(dequantize(quantize(w, grid, spec)), dequantize(quantize(w, twin, same)))


@pytest.mark.parametrize("scheme", ["w4a8-g16-two", "w4a8-g16-two-asym", "w3a8-g16-two", "w2a8-g16-two-asym"])
def test_two_levels_make_8_bit_integers(scheme: str) -> None:
    """Integer scale times code less zero point is an int8, and that times the row's factor is the weight."""
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(32, 128, generator=generator) * torch.rand(32, 8, generator=generator).repeat_interleave(16, 1) ** 3
    spec = parse_scheme(scheme).weight
    q = quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)
    assert q.scale.dtype == torch.int8 and q.outer is not None and q.outer.shape == (32, 1)
    assert int(q.scale.min()) >= 1
    zero = 0 if q.zero is None else q.zero.int().repeat_interleave(16, 1)
    product = q.scale.int().repeat_interleave(16, 1) * (q.codes.int() - zero)
    assert int(product.abs().max()) <= 127 and int(product.abs().max()) > 64
    assert torch.allclose(product * q.outer, dequantize(q), rtol=1e-6)
    plain = replace(spec, scale="float")
    free = dequantize(quantize(w, find_params(w, plain, scale_dtype=torch.float32), plain))
    most = 1.25 if scheme.startswith("w3") else 1.15  # integer scales have no sign, which few symmetric codes miss
    assert (dequantize(q) - w).norm() < most * (free - w).norm()


# --------------------------------------------------------------------------------------------------------------- inputs
@pytest.mark.parametrize("fmt", [integer(8), FP8_E4M3], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_input(fmt: Format, dtype: torch.dtype) -> None:
    """Token by token, in float32, one operation at a time; a token of zeros stays zeros."""
    x = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    x[1, 3] = 0
    before = x.clone()
    found = fake_quantize_input(x, Spec(format=fmt, dynamic=True))
    assert torch.equal(x, before)
    assert found.dtype == dtype and found.shape == x.shape
    for token, result in zip(x.reshape(-1, 16), found.reshape(-1, 16), strict=True):
        values = [np.float32(value) for value in token.tolist()]
        scale = np.float32(max(abs(value) for value in values)) / np.float32(127 if fmt.kind == "int" else 448)
        if scale == 0:
            assert not result.any()
            continue
        if fmt.kind == "int":
            rounded = [np.rint(value / scale) for value in values]
        else:
            rounded = [np.float32(float(torch.tensor(v / scale).to(torch.float8_e4m3fn).float())) for v in values]
        expected = torch.tensor([float(np.float32(r * scale)) for r in rounded]).to(dtype)
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(format=integer(8)),
        Spec(format=integer(8), group=TENSOR),
        Spec(format=integer(8), dynamic=True, group=TENSOR),
        Spec(format=integer(8), dynamic=True, rows=2),
        Spec(format=FP4_E2M1, dynamic=True, group=16, scale="e4m3"),
    ],
)
def test_fake_quantize_input_refuses(spec: Spec) -> None:
    """Static scales of groups, dynamic ones across tokens, and what needs calibration without it."""
    with pytest.raises(AssertionError):
        fake_quantize_input(torch.ones(2, 32), spec)


# ------------------------------------------------------------------------------------------------------------- validate
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_validate_scales(bad: float, bits: int) -> None:
    """Integers of few bits may have negative scales, and nothing else may."""
    spec = Spec(format=integer(bits), group=2)
    codes = torch.zeros(2, 4, dtype=torch.int8)
    scale = torch.ones(2, 2)
    validate(QTensor(codes, scale, None, spec), "layer.0")
    scale[1, 0] = bad
    with (
        nullcontext()
        if (bad, bits) == (-1.0, 4)
        else pytest.raises(ValueError, match=r"^layer\.0: a scale is zero, not finite")
    ):
        validate(QTensor(codes, scale, None, spec), "layer.0")


def test_validate_codes() -> None:
    scale = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"^w: codes are torch\.uint8, int4 needs torch\.int8"):
        validate(QTensor(torch.zeros(2, 4, dtype=torch.uint8), scale, None, Spec(format=integer(4))), "w")
    with pytest.raises(ValueError, match=r"^w: codes are torch\.int8, fp8_e4m3 needs torch\.uint8"):
        validate(QTensor(torch.zeros(2, 4, dtype=torch.int8), scale, None, Spec(format=FP8_E4M3)), "w")


@pytest.mark.parametrize("bad", [(-9, 0), (8, 0), (0, -9), (0, 8)])
def test_validate_the_range_of_codes_and_zeros(bad: tuple[int, int]) -> None:
    """Four bits are -8 .. 7, whatever fits into a byte; MXINT does not use the lowest."""
    codes, zero = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.int8)
    spec = Spec(format=integer(4), symmetric=False)
    validate(QTensor(codes, torch.ones(2, 1), zero, spec), "w")
    codes[1, 2], zero[1, 0] = bad
    with pytest.raises(ValueError, match=r"^w: a (code|zero point) lies outside -8 \.\. 7, the range of int4"):
        validate(QTensor(codes, torch.ones(2, 1), zero, spec), "w")
    lowest = QTensor(torch.full((2, 4), -8, dtype=torch.int8), torch.ones(2, 1), None, Spec(format=FORMATS["mxint4"]))
    with pytest.raises(ValueError, match=r"^w: a code lies outside -7 \.\. 7"):
        validate(lowest, "w")


@pytest.mark.parametrize(("name", "code"), [("fp8_e4m3", 0x7F), ("fp8_e4m3", 0xFF), ("fp8_e5m2", 0x7C), ("fp8_e5m2", 0xFE)])
def test_validate_codes_that_are_no_numbers(name: str, code: int) -> None:
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    codes[0, 1] = code
    with pytest.raises(ValueError, match=f"^w: a code of {name} is no number"):
        validate(QTensor(codes, torch.ones(2, 1), None, Spec(format=FORMATS[name])), "w")


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-g32",
        "w4a16-g32-asym",
        "w8a16",
        "w4a16-tensor",
        "w4a8-g32-two",
        "fp8",
        "mxfp4",
        "mxint4",
        "nvfp4",
        "nf4",
        "kmeans3",
        "bcq2",
    ],
)
@pytest.mark.parametrize("rows", [slice(1, 2), slice(None)])
def test_rows_of_zeros_have_scales_that_are_valid(scheme: str, rows: slice) -> None:
    """A scale of zero is never written, so that a reader may refuse it."""
    w, spec = torch.randn(3, 64), parse_scheme(scheme).weight
    w[rows] = 0
    for steps in (0, 20):
        spec = replace(spec, group=32) if spec.group > 64 else spec
        q = quantize(w, find_params(w, spec, scale_dtype=torch.float16, shrink_steps=steps), spec)
        validate(q, "w")
        assert not bool(dequantize(q)[rows].any())
