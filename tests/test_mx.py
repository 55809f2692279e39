"""Microscaling formats against the slow transcription of their specification in mx_spec.py, value for value."""

import mx_spec
import pytest
import torch
from torch import Tensor

from lowbit.formats import FORMATS, Format
from lowbit.qtensor import Spec, dequantize, fake_quantize_input, find_params, parse_scheme, quantize, validate

ELEMENTS = ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8", "mxint6", "mxint4"]
RULES = ["floor", "even", "ceil"]


def spec(name: str, rule: str = "floor", group: int = 32, dynamic: bool = False) -> Spec:
    return Spec(format=FORMATS[name], group=group, scale="e8m0", rule=rule, dynamic=dynamic)  # type: ignore[arg-type]


def blocks(name: str) -> Tensor:
    """[n, 32]: random ones of many sizes, powers of two and their neighbours, tops of binades, ties, zeros, the tiny."""
    generator = torch.Generator().manual_seed(0)
    top = FORMATS[name].max
    rows = [torch.randn(32, generator=generator) * 10.0**k for k in range(-8, 9)]
    for peak in (
        1.0,
        2.0,
        3.0,
        4.0,
        6.0,
        7.0,
        7.75,
        1.9999999,
        2.0000002,
        448.0,
        464.0,
        480.0,
        0.75,
        top,
        top * 1.06,
        top * 1.5,
    ):
        row = torch.rand(32, generator=generator) * peak
        row[3] = peak
        rows += [row, -row]
    ties = torch.arange(32) / 4 - 4.0  # between the values of every format, some exactly halfway
    rows += [ties, ties / 3, torch.zeros(32), torch.full((32,), 1e-30), torch.full((32,), 2.0**-120)]
    sparse = torch.zeros(32)
    sparse[7] = -5.0
    return torch.stack([*rows, sparse])


def round_trip(w: Tensor, given: Spec) -> Tensor:
    return dequantize(quantize(w, find_params(w, given, scale_dtype=torch.bfloat16), given))


@pytest.mark.parametrize("name", ELEMENTS)
def test_values(name: str) -> None:
    """Every code that is a number decodes to the specified value and encodes to itself; the extremes are those of the table."""
    fmt: Format = FORMATS[name]
    codes = mx_spec.values(name)
    stored = torch.tensor(list(codes), dtype=torch.int16).to(fmt.code_dtype)
    expected = torch.tensor([float(value) for value in codes.values()])
    assert torch.equal(fmt.decode(stored), expected)
    assert torch.equal(fmt.encode(expected)[expected != 0], stored[expected != 0])
    positive = [value for value in codes.values() if value > 0]
    assert fmt.max == max(positive)
    table = {
        "fp8_e5m2": (57344, 2**-16, 15), "fp8_e4m3": (448, 2**-9, 8), "fp6_e3m2": (28, 2**-4, 4),
        "fp6_e2m3": (7.5, 2**-3, 2), "fp4_e2m1": (6, 0.5, 2), "mxint8": (127, 1, 6),
    }  # fmt: skip
    if name in table:
        assert (float(max(positive)), float(min(positive)), fmt.top_exponent) == table[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_blocks(name: str, rule: str) -> None:
    """Value for value, signs of zeros aside, for weights and for inputs."""
    w = blocks(name)
    expected = torch.tensor([mx_spec.convert(row.tolist(), name, rule) for row in w])
    assert torch.equal(round_trip(w, spec(name, rule)), expected)
    assert torch.equal(fake_quantize_input(w, spec(name, rule, dynamic=True)), expected)


@pytest.mark.parametrize("group", [16, 64, 128])
@pytest.mark.parametrize("name", ["fp4_e2m1", "mxint4", "fp8_e4m3"])
def test_other_block_sizes(name: str, group: int) -> None:
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 256)
    parts = w.reshape(-1, group)
    expected = torch.tensor([mx_spec.convert(row.tolist(), name) for row in parts]).view(3, 256)
    assert torch.equal(round_trip(w, spec(name, group=group)), expected)


@pytest.mark.parametrize("name", ELEMENTS)
def test_scale_is_a_power_of_two_that_follows_the_block(name: str) -> None:
    """Twice the block has the same codes and the next exponent; stored as E8M0."""
    w = blocks(name)[:40]
    w = w[w.abs().amax(1) > 1e-20]
    first, second = (quantize(x, find_params(x, spec(name), scale_dtype=torch.bfloat16), spec(name)) for x in (w, w * 2))
    assert torch.equal(first.codes, second.codes) and first.scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(first.scale.view(torch.uint8) + 1, second.scale.view(torch.uint8))
    assert torch.equal(2.0 ** (first.scale.view(torch.uint8).float() - 127), first.scale.float())


@pytest.mark.parametrize("name", ELEMENTS)
def test_search_tries_the_neighbours(name: str) -> None:
    """No block is worse than with any rule, half or double scale of floor included, and some are better."""
    w = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    given = spec(name)
    searched = quantize(w, find_params(w, given, scale_dtype=torch.bfloat16, shrink_steps=3, importance=torch.ones(32)), given)
    errors = (dequantize(searched) - w).square().sum(1)
    plain = (round_trip(w, given) - w).square().sum(1)
    assert bool((errors <= plain).all())
    if name in ("fp4_e2m1", "mxint4", "fp6_e2m3"):
        assert bool((errors < plain).any())
        doubled = (round_trip(w * 0.5, given) * 2 - w).square().sum(1)
        assert torch.equal(plain, doubled)  # a power of two less: the same codes


# Normalised mean squared errors of blocks of 32 Gaussian or Laplacian values, from an independent implementation.
NMSE = {
    ("fp4_e2m1", "floor"): 1.323e-2, ("fp4_e2m1", "even"): 1.253e-2, ("fp4_e2m1", "ceil"): 1.333e-2,
    ("fp6_e2m3", "floor"): 8.05e-4, ("fp6_e2m3", "even"): 7.97e-4, ("fp6_e2m3", "ceil"): 8.02e-4,
    ("fp6_e3m2", "floor"): 2.905e-3, ("fp6_e3m2", "even"): 2.786e-3,
    ("fp8_e4m3", "floor"): 8.60e-4, ("fp8_e4m3", "even"): 7.62e-4, ("fp8_e4m3", "ceil"): 7.04e-4,
    ("mxint8", "floor"): 6.83e-5, ("mxint6", "floor"): 1.093e-3, ("mxint4", "floor"): 1.757e-2, ("mxint4", "ceil"): 2.072e-2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), NMSE, ids=lambda value: value)
def test_errors_on_gaussian_values(name: str, rule: str) -> None:
    w = torch.randn(4096, 512, generator=torch.Generator().manual_seed(3))
    found = float((round_trip(w, spec(name, rule)) - w).square().mean() / w.square().mean())
    assert found == pytest.approx(NMSE[name, rule], rel=0.01)


def test_four_or_six() -> None:
    """NVFP4: the search contains the scale whose largest element becomes 4; a group is built where that is exact."""
    given = parse_scheme("nvfp4a16").weight
    group = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, 3.0, 2.0, 1.0])
    w = torch.cat([group, torch.full((16,), 6.0)]).unsqueeze(0)  # the second group fixes the tensor's scale
    plain, searched = (
        quantize(w, find_params(w, given, scale_dtype=torch.bfloat16, shrink_steps=steps), given) for steps in (0, 9)
    )
    assert torch.equal(dequantize(searched), w)
    assert not torch.equal(dequantize(plain), w)
    assert 1.4 < float(searched.scale.float()[0, 0] / plain.scale.float()[0, 0]) < 1.6


@pytest.mark.parametrize("largest", [3e-6, 0.02, 1.0, 777.0])
def test_nvfp4_scales(largest: float) -> None:
    """E4M3 under a power of two for the tensor; every scale fits, with room for the search; errors are within half a step."""
    given = parse_scheme("nvfp4a16").weight
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    w *= largest / w.abs().max()
    q = quantize(w, find_params(w, given, scale_dtype=torch.bfloat16), given)
    assert q.outer is not None and q.outer.shape == (1, 1) and q.scale.dtype == torch.float8_e4m3fn
    assert float(torch.frexp(q.outer).mantissa) == 0.5
    assert float(q.scale.float().max()) * 1.5 <= 448 < 2 * 1.6 * 1.5 * float(q.scale.float().max())
    step = (q.scale.float() * q.outer).repeat_interleave(16, 1)
    assert bool(((dequantize(q) - w).abs() <= step * 1.0 + 0.04 * w.abs()).all())
    shared = find_params(w, given, scale_dtype=torch.bfloat16, largest=4 * largest)
    assert float(shared.outer) == 4 * float(q.outer)  # type: ignore[arg-type]


def test_the_transcription_itself() -> None:
    """By hand: 2^floor(log2 7.5) = 4 is the largest exponent of FP4, so the scale is 1 and 7.5 saturates."""
    assert mx_spec.convert([7.5, 0.25, 0.75, -2.5, 5.0], "fp4_e2m1") == [6.0, 0.0, 1.0, -2.0, 4.0]
    assert mx_spec.convert([7.5, 0.25, 0.75, -2.5, 5.0], "fp4_e2m1", "even") == [8.0, 0.0, 1.0, -2.0, 4.0]
    assert mx_spec.convert([7.5, 0.25], "fp4_e2m1", "ceil") == [8.0, 0.0]
    assert mx_spec.convert([127.0, 63.5], "mxint8") == [127.0, 64.0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp6", "mxfp8", "mxfp8-floor", "mxint8", "nvfp4", "w8a8-ag32", "w8a8-ag32-aasym", "fp8"]
)
def test_an_overflow_spoils_its_block(name: str, bad: float) -> None:
    """All that shares a scale with an infinity or a NaN is NaN (microxcaling: the shared exponent is); nothing else is."""
    given = parse_scheme(name).input
    assert given is not None
    x = torch.randn(3, 64)
    clean = fake_quantize_input(x, given, 4.0)
    spoilt = x.clone()
    spoilt[1, 5] = bad
    found = fake_quantize_input(spoilt, given, 4.0)
    size = given.group_size(64)
    assert bool(found[1, :size].isnan().all())
    found[1, :size] = clean[1, :size]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp6a16", "mxfp8", "mxint8", "nvfp4", "w4a16-g32", "w4a16-g32-asym", "fp8", "kmeans3"]
)
def test_weights_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    scheme = parse_scheme(name)
    w = torch.randn(4, 64)
    w[2, 40] = bad
    q = quantize(w, find_params(w, scheme.weight, scale_dtype=torch.bfloat16), scheme.weight)
    with pytest.raises(ValueError, match="proj: .* not finite"):
        validate(q, "proj")
