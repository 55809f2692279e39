"""GPTQ against the float64 textbook, code by code, and against the quantity that it claims to minimise."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import textbook
import torch
from torch import Tensor

import lowbit.methods.gptq as module
from lowbit.arch import Block, Linear
from lowbit.methods.gptq import Solution, gptq, gptq_weight, refined, shift
from lowbit.qtensor import CHANNEL, TENSOR, QTensor, Spec, dequantize, find_params, parse_scheme, quantize
from lowbit.unit import Unit

Order = Literal["natural", "activation"]
ORDERS: tuple[Order, ...] = ("natural", "activation")
COLUMNS, ROWS, DAMPING = 384, 8, 0.01  # three blocks of 128 columns
SCHEMES = (
    "w2a16-g32",
    "w2a16-g128-asym",
    "w3a16-g128",
    "w3a16-channel-asym",
    "w4a16-g128-asym",
    "w4a16-g96",  # groups that end inside a block
    "w4a16-tensor",
    "w4a16-g32-asym",
    "w8a16-channel",
    "w8a16-tensor-asym",
    "w8a16-g128",
    "fp8",
    "fp8a16-g128",
    "fp8-tensor",
)
TIE = 1e-4  # in steps: closer than this to halfway between two values, float32 may round to the other one


def spec_of(scheme: str) -> Spec:
    """The spec of the weights."""
    return parse_scheme(scheme).weight


# -------------------------------------------------------------------------------------------------------------- problems
def problem(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and the Gram matrix of correlated inputs, some columns far larger than others, in no order."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * 0.98 ** torch.arange(columns)[:, None]
    x = torch.randn(tokens, columns, generator=generator) @ mixing + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[: columns // 16]] *= 5
    return w, (x.T @ x / tokens).contiguous()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian plus `damping` times the mean of its diagonal, float64."""
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def nearest(w: Tensor, spec: Spec) -> QTensor:
    """Rounded to nearest."""
    return quantize(w, find_params(w, spec, scale_dtype=torch.bfloat16), spec)


def loss(w: Tensor, q: QTensor, hessian: Tensor) -> float:
    """The quadratic loss of a quantized matrix."""
    return textbook.quadratic_loss(w, dequantize(q), hessian)


def solve(w: Tensor, hessian: Tensor, spec: Spec, **options: Any) -> Solution:
    """`gptq_weight` with scales in bfloat16, which must leave its arguments as they are."""
    before = w.clone(), hessian.clone()
    solution = gptq_weight(w, hessian, spec, **({"scale_dtype": torch.bfloat16} | options))
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])
    return solution


# ----------------------------------------------------------------------------------------------- the textbook's answer
def grid_values(spec: Spec) -> Tensor:
    """Every value of a format in ascending order, float64."""
    if spec.format.kind == "int":
        half = 2 ** (spec.format.bits - 1)
        return torch.arange(-half, half, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()].unique()


def values_of(q: QTensor) -> Tensor:
    """The values that the codes of a quantized matrix stand for, before scale and zero point, float64."""
    if q.spec.format.kind == "int":
        return q.codes.double()
    return q.codes.view(torch.float8_e4m3fn).double()


def slow_grid(w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Min-max scale (rounded to bfloat16) and zero point of every single weight [out, in], by the textbook's groups."""
    least, most = float(grid_values(spec)[0]), float(grid_values(spec)[-1])

    def rule(part: Tensor) -> tuple[Tensor, Tensor]:
        if spec.group == TENSOR:
            part = part.reshape(1, -1).expand(len(part), -1)
        low, high = part.amin(dim=1).clamp(max=0), part.amax(dim=1).clamp(min=0)
        width = torch.maximum(-low, high) * 2 if spec.symmetric else high - low
        scale = (width / (most - least)).bfloat16().float()
        if spec.symmetric and spec.format.bits < 8:  # the largest magnitude is the lowest code
            scale = (torch.where(high > -low, -high, -low) / -least).bfloat16().float()
        return scale, torch.zeros_like(scale) if spec.symmetric else (least - low / scale).round().clamp(least, most)

    group = None if spec.group in (CHANNEL, TENSOR) else spec.group
    scale, zero = textbook.group_params(w, group, rule)
    size = group or w.shape[1]
    return scale.repeat_interleave(size, 1).double(), zero.repeat_interleave(size, 1).double()


@dataclass
class Compared:
    """One matrix solved by lowbit and by the textbook: values before scale and zero point, and how many were ties."""

    w: Tensor
    solution: Solution
    ours: Tensor
    expected: Tensor
    expected_weights: Tensor
    ties: int


def compare(
    w: Tensor, hessian: Tensor, schemes: tuple[str, ...], order: Order, *, damping: float = DAMPING
) -> dict[str, Compared]:
    """Solve w under several schemes, and once by the textbook with the matrices of all schemes on top of each other.

    A code is the place of its value in the format. Where the textbook's value before rounding is closer than TIE to halfway
    between two, it takes lowbit's choice of these two and goes on from there.
    """
    rows, columns = w.shape
    solutions = {scheme: solve(w, hessian, spec_of(scheme), damping=damping, order=order) for scheme in schemes}
    ours = {scheme: values_of(solution.q) for scheme, solution in solutions.items()}
    grids = {scheme: grid_values(spec_of(scheme)) for scheme in schemes}
    parameters = [slow_grid(w, spec_of(scheme)) for scheme in schemes]
    scales, zeros = (torch.cat(parts) for parts in zip(*parameters, strict=True))
    # The textbook gives a dead column the diagonal 1 before it takes the mean, lowbit leaves it out of the sum.
    diagonal = hessian.double().diagonal().clone()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = 1
    visits = range(columns)
    if order == "activation":
        visits = sorted(visits, key=lambda j: (-float(diagonal[j]), j))
    next_column, next_visit = iter(range(columns)), iter(visits)
    ties = dict.fromkeys(schemes, 0)

    def find(part: Tensor) -> tuple[Tensor, Tensor]:
        j = next(next_column)
        return scales[:, j], zeros[:, j]

    def quantize(column: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        j = next(next_visit)
        target = column / scale + zero
        codes, values = torch.empty_like(target), torch.empty_like(target)
        for number, scheme in enumerate(schemes):
            part = slice(number * rows, (number + 1) * rows)
            grid, x, own = grids[scheme], target[part], ours[scheme][:, j].contiguous()
            middle, gap = (grid[1:] + grid[:-1]) / 2, grid.diff()
            place = torch.bucketize(x, middle)
            distance, closest = (x[:, None] - middle).abs().min(dim=1)
            tie = distance < TIE * gap[closest]
            chosen = torch.searchsorted(grid, own)
            tie &= (chosen == closest) | (chosen == closest + 1)
            ties[scheme] += int((tie & (chosen != place)).sum())
            codes[part] = torch.where(tie, chosen, place).double()
            values[part] = grid[codes[part].long()]
        return codes, scale * (values - zero)

    codes, _, _, weights = textbook.gptq_textbook(
        w.repeat(len(schemes), 1),
        hessian,
        bits=0,
        symmetric=True,
        group=1,
        damping=damping * mean / float(diagonal.mean()),
        find_params=find,
        order="natural" if order == "natural" else "descending",
        quantize=quantize,
    )
    out = {}
    for number, scheme in enumerate(schemes):
        part = slice(number * rows, (number + 1) * rows)
        expected = grids[scheme][codes[part]]
        out[scheme] = Compared(w, solutions[scheme], ours[scheme], expected, weights[part], ties[scheme])
    return out


@functools.cache
def large(order: Order) -> tuple[dict[str, Compared], Tensor]:
    """All schemes on one problem, and its Hessian."""
    w, hessian = problem(ROWS, COLUMNS, tokens=1500)
    return compare(w, hessian, SCHEMES, order), hessian


each_order = pytest.mark.parametrize("order", ORDERS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@each_order
@each_scheme
def test_textbook(order: Order, scheme: str) -> None:
    """The same codes, but for the choice between two values where float32 cannot tell which is nearer."""
    found = large(order)[0][scheme]
    assert torch.equal(found.ours, found.expected)
    assert found.ties <= 3
    assert torch.allclose(dequantize(found.solution.q).double(), found.expected_weights, rtol=1e-6, atol=1e-9)
    assert found.solution.damping == DAMPING
    assert found.solution.q.codes.dtype == spec_of(scheme).format.code_dtype
    assert found.solution.q.codes.is_contiguous()


@each_order
@each_scheme
def test_objective(order: Order, scheme: str) -> None:
    """The sum of squared errors that the solver adds up is the quadratic loss of the damped Hessian."""
    compared, hessian = large(order)
    found = compared[scheme]
    expected = loss(found.w, found.solution.q, damped(hessian, DAMPING))
    assert found.solution.objective == pytest.approx(expected, rel=1e-4)


@each_order
@each_scheme
def test_better_than_nearest(order: Order, scheme: str) -> None:
    """The grid is that of rounding to nearest, most codes are its codes, and the loss is smaller by a good part."""
    compared, hessian = large(order)
    found, spec = compared[scheme], spec_of(scheme)
    rounded = nearest(found.w, spec)
    q = found.solution.q
    assert q.spec == spec
    assert torch.equal(q.scale, rounded.scale) and q.scale.dtype == torch.bfloat16
    assert (q.zero is None) == (rounded.zero is None) == spec.symmetric
    if q.zero is not None and rounded.zero is not None:
        assert torch.equal(q.zero, rounded.zero)
    assert loss(found.w, q, hessian) < 0.3 * loss(found.w, rounded, hessian)


def test_orders_differ() -> None:
    """The order of the visits matters, so the tests above tell them apart; at few bits activation order is better."""
    losses: dict[Order, float] = {}
    for order in ORDERS:
        compared, hessian = large(order)
        losses[order] = sum(loss(compared[s].w, compared[s].solution.q, hessian) for s in SCHEMES if s[:2] in ("w2", "w3"))
    assert losses["activation"] < 0.8 * losses["natural"]
    assert not torch.equal(large("activation")[0]["w4a16-g96"].ours, large("natural")[0]["w4a16-g96"].ours)


def test_activation_order_is_the_default() -> None:
    found = large("activation")[0]["w3a16-g128"]
    hessian = large("activation")[1]
    assert torch.equal(solve(found.w, hessian, spec_of("w3a16-g128")).q.codes, found.solution.q.codes)


# -------------------------------------------------------------------------------------------------------- other Hessians
@each_order
def test_dead_columns(order: Order) -> None:
    """Inputs that are always zero: their weights count for the grid, are rounded to nearest, and move no other weight."""
    w, hessian = problem(ROWS, 160, tokens=600, seed=1)
    dead = [0, 7, 64, 127, 128, 159]
    hessian[dead] = 0
    hessian[:, dead] = 0
    w[:, 7] = 9.0  # the largest of its group
    alive = torch.ones(160, dtype=torch.bool)
    alive[dead] = False
    schemes = ("w3a16-g32", "w4a16-g80-asym", "fp8")
    for scheme, found in compare(w, hessian, schemes, order).items():
        assert torch.equal(found.ours[:, alive], found.expected[:, alive])
        rounded = nearest(w, spec_of(scheme))
        assert torch.equal(found.solution.q.scale, rounded.scale)
        assert torch.equal(found.solution.q.codes[:, dead], rounded.codes[:, dead])
        assert not torch.equal(found.solution.q.codes[:, alive], rounded.codes[:, alive])
        assert found.solution.damping == DAMPING


def test_objective_with_dead_columns() -> None:
    """It is the quadratic loss of the damped Hessian here too."""
    w, hessian = problem(ROWS, 160, tokens=600, seed=1)
    hessian[[3, 80]] = 0
    hessian[:, [3, 80]] = 0
    solution = solve(w, hessian, spec_of("w3a16-g32"))
    assert solution.objective == pytest.approx(loss(w, solution.q, damped(hessian, DAMPING)), rel=1e-4)


@each_order
def test_fewer_tokens_than_columns(order: Order) -> None:
    """A singular Hessian is what damping is for: no escalation, and the textbook's codes."""
    w, hessian = problem(ROWS, 160, tokens=40, seed=2)
    for found in compare(w, hessian, ("w2a16-g32", "w4a16-channel-asym"), order, damping=0.05).values():
        assert torch.equal(found.ours, found.expected)
        assert found.ties <= 3
        assert found.solution.damping == 0.05
        expected = loss(w, found.solution.q, damped(hessian, 0.05))
        assert found.solution.objective == pytest.approx(expected, rel=1e-3)


@each_order
@pytest.mark.parametrize("scheme", ["w2a16-g16", "w4a16-g48-asym", "w8a16-channel", "fp8-tensor"])
def test_independent_inputs(order: Order, scheme: str) -> None:
    """With a diagonal Hessian there is nothing to compensate: rounding to nearest, bit for bit."""
    w = torch.randn(5, 144, generator=torch.Generator().manual_seed(3))
    hessian = torch.diag(torch.rand(144, generator=torch.Generator().manual_seed(4)) + 0.1)
    solution = solve(w, hessian, spec_of(scheme), order=order)
    rounded = nearest(w, spec_of(scheme))
    assert torch.equal(solution.q.codes, rounded.codes)
    assert solution.objective == pytest.approx(loss(w, rounded, damped(hessian, DAMPING)), rel=1e-4)


def test_scaled_hessian() -> None:
    """The number of tokens in the sum does not matter."""
    w, hessian = problem(4, 144, tokens=300, seed=5)
    plain = solve(w, hessian, spec_of("w3a16-g48"))
    scaled = solve(w, hessian * 1024, spec_of("w3a16-g48"))
    assert torch.equal(plain.q.codes, scaled.q.codes)
    assert scaled.objective == pytest.approx(1024 * plain.objective)


def test_rows_are_independent() -> None:
    """Each output is solved as if alone."""
    w, hessian = problem(6, 144, tokens=300, seed=6)
    together = solve(w, hessian, spec_of("w3a16-g48-asym")).q.codes
    for row in range(6):
        assert torch.equal(solve(w[row : row + 1], hessian, spec_of("w3a16-g48-asym")).q.codes, together[row : row + 1])


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_block_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Lazy updates change when the work is done, not what is found."""
    w, hessian = problem(4, 144, tokens=300, seed=7)
    expected = solve(w, hessian, spec_of("w3a16-g48"))
    monkeypatch.setattr(module, "_BLOCK", block)
    found = solve(w, hessian, spec_of("w3a16-g48"))
    assert torch.equal(found.q.codes, expected.q.codes)
    assert found.objective == pytest.approx(expected.objective, rel=1e-4)


def test_float32_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What matrices of more than 4096 columns get: the objective is still what it claims to be."""
    w, hessian = problem(ROWS, 256, tokens=1000, seed=8)
    spec = spec_of("w4a16-g64")
    factor, dtypes = torch.linalg.cholesky_ex, []

    def watched(matrix: Tensor, **keywords: Any) -> Any:
        dtypes.append(matrix.dtype)
        return factor(matrix, **keywords)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)
    monkeypatch.setattr(module, "_FLOAT64_COLUMNS", 256)
    expected = solve(w, hessian, spec)
    monkeypatch.setattr(module, "_FLOAT64_COLUMNS", 255)
    found = solve(w, hessian, spec)
    assert dtypes == [torch.float64, torch.float32]
    assert found.objective == pytest.approx(expected.objective, rel=1e-2)
    assert found.objective == pytest.approx(loss(w, found.q, damped(hessian, DAMPING)), rel=1e-3)
    assert (found.q.codes == expected.q.codes).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_dtype_and_search(dtype: torch.dtype) -> None:
    """Scales are stored as asked, ranges shrunken where it helps the columns that matter, and errors are those of that grid."""
    w, hessian = problem(4, 144, tokens=300, seed=9)
    spec = spec_of("w2a16-g48-asym")
    solution = solve(w, hessian, spec, scale_dtype=dtype, shrink_steps=60)
    scale, zero, _ = find_params(w, spec, scale_dtype=dtype, shrink_steps=60, importance=hessian.diagonal())
    assert solution.q.zero is not None and zero is not None
    assert torch.equal(solution.q.scale, scale) and torch.equal(solution.q.zero, zero)
    assert not torch.equal(scale, find_params(w, spec, scale_dtype=dtype)[0])
    assert solution.objective == pytest.approx(loss(w, solution.q, damped(hessian, DAMPING)), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- damping
def indefinite(columns: int, least: float, seed: int = 0) -> Tensor:
    """A symmetric matrix whose least eigenvalue is -`least` times the mean of its diagonal, which is 1."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5
    values[0] = 0
    values *= (columns + least) / values.sum()
    values[0] = -least
    return (basis * values @ basis.T).float()


@pytest.mark.parametrize(
    ("least", "used"), [(0.0, 0.01), (0.005, 0.01), (0.05, 0.1), (0.5, 1.0), (5.0, 10.0)], ids=lambda value: f"{value:g}"
)
@each_order
def test_damping_grows(least: float, used: float, order: Order) -> None:
    """Tenfold until the matrix is positive definite; the value is reported, and is the one that was used."""
    w = torch.randn(4, 40, generator=torch.Generator().manual_seed(10))
    hessian = indefinite(40, least)
    solution = solve(w, hessian, spec_of("w4a16-g8"), damping=0.01, order=order)
    assert solution.damping == pytest.approx(used, rel=1e-12)
    assert solution.objective == pytest.approx(loss(w, solution.q, damped(hessian, used)), rel=1e-3)


@pytest.mark.parametrize("least", [20.0, 1e6])
def test_damping_is_bounded(least: float) -> None:
    """After a thousandfold it is an error that names the layer and says what to do."""
    w = torch.randn(4, 40)
    with pytest.raises(ValueError) as caught:
        solve(w, indefinite(40, least), spec_of("w4a16-g8"), damping=0.01, name="layers.3.up_proj")
    message = str(caught.value)
    assert message.startswith("layers.3.up_proj: the Hessian is not positive definite even with damping 10")
    assert "calibration rows" in message and "rtn for this layer" in message


@pytest.mark.parametrize("columns", [64, 160])
def test_damping_that_is_lost_in_rounding(columns: int) -> None:
    """Inputs of one direction only, whose float32 Gram matrix has eigenvalues a little below 0."""
    generator = torch.Generator().manual_seed(11)
    x, w = 100 * torch.randn(1, columns, generator=generator), torch.randn(4, columns, generator=generator)
    hessian = x.T @ x
    solution = solve(w, hessian, spec_of("w4a16-g8"), damping=1e-8)
    assert 1e-7 * 0.99 < solution.damping < 1e-5 * 1.01
    assert solution.objective == pytest.approx(loss(w, solution.q, damped(hessian, solution.damping)), rel=1e-2)
    # Of all the outputs' freedom one direction counts: next to nothing is lost.
    assert loss(w, solution.q, hessian) < 1e-4 * loss(w, nearest(w, spec_of("w4a16-g8")), hessian)


def test_nan() -> None:
    w, hessian = problem(4, 40, tokens=100)
    hessian[3, 5] = hessian[5, 3] = float("nan")
    with pytest.raises(ValueError, match="^w: the Hessian is not positive definite"):
        solve(w, hessian, spec_of("w4a16-g8"), name="w")


# ---------------------------------------------------------------------------------------------------- the least of all
@each_order
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (3, False)])
def test_between_the_optimum_and_nearest(order: Order, symmetric: bool, bits: int) -> None:
    """On rows so short that every choice of codes can be tried: never below the least loss, mostly below nearest."""
    columns = 12 // bits
    spec = Spec(format=spec_of(f"w{bits}a16").format, group=CHANNEL, symmetric=symmetric)
    offset = 0 if symmetric else 2 ** (bits - 1)
    losses: list[tuple[float, float, float]] = []
    for seed in range(30):
        w, hessian = problem(1, columns, tokens=columns + 2, seed=seed)
        scale, zero, _ = find_params(w, spec, scale_dtype=torch.bfloat16)
        shift = torch.zeros(1) if zero is None else zero[0].double() + offset

        def find(part: Tensor, scale: Tensor = scale, shift: Tensor = shift) -> tuple[Tensor, Tensor]:
            return scale[:, 0].double(), shift.double()

        _, best = textbook.best_of_exhaustive(w, hessian, bits=bits, symmetric=symmetric, group=None, find_params=find)
        solution = solve(w, hessian, spec, damping=1e-4, order=order)
        least, found = textbook.quadratic_loss(w, best, hessian), loss(w, solution.q, hessian)
        assert found >= least * (1 - 1e-5)
        losses.append((least, found, loss(w, nearest(w, spec), hessian)))
    optimal, ours, rounded = (torch.tensor(part) for part in zip(*losses, strict=True))
    assert (ours <= rounded * (1 + 1e-6)).float().mean() > 0.7
    assert ours.sum() < 0.95 * rounded.sum()
    assert ours.log().mean() < rounded.log().mean() - 0.1
    assert (ours <= optimal * (1 + 1e-5)).any()


# --------------------------------------------------------------------------------------------------------- asymmetry
def mismatched(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [8, 64], inputs X of the quantized model and X' of the float one: X' and an error that follows it in part."""
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    noise = torch.randn(300, 64, generator=generator)
    return torch.randn(8, 64, generator=generator), 0.85 * theirs + 0.2 * noise, theirs


def test_shift_solves_least_squares() -> None:
    """W + W D H^-1 is what torch.linalg.lstsq finds for Q X^T = W X'^T."""
    w, x, theirs = mismatched(0)
    hessian, cross = x.T @ x, (theirs - x).T @ x
    expected = torch.linalg.lstsq(x.double(), (theirs @ w.T).double()).solution.T
    torch.testing.assert_close((w + w @ shift(hessian, cross, 1e-9)).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32-asym", "mxfp4a16", "kmeans3"])
def test_asymmetry_aims_at_the_float_model(scheme: str) -> None:
    """|Q X^T - W X'^T|^2 falls with it, clearly; with none it is gptq to the bit."""
    losses: dict[float, float] = {}
    for strength in (0.0, 0.5, 1.0):
        losses[strength] = 0.0
        for seed in range(4):
            w, x, theirs = mismatched(seed)
            hessian = x.T @ x
            unit = Given({"a": scheme}, {"a": w}, {"a": hessian}, {"a": (theirs - x).T @ x})
            gptq(unit, asymmetry=strength)
            plain = Given({"a": scheme}, {"a": w}, {"a": hessian})
            gptq(plain)
            assert torch.equal(unit.assigned["a"].codes, plain.assigned["a"].codes) == (strength == 0)
            q = dequantize(unit.assigned["a"])
            losses[strength] += float((x @ q.T - theirs @ w.T).square().sum())
    assert losses[1.0] < losses[0.5] < losses[0.0] and losses[1.0] < 0.8 * losses[0.0]


def test_asymmetry_without_counterparts() -> None:
    """Experts: a warning, and gptq without it."""
    w, x, _ = mismatched(0)
    unit = Given({"a": "w4a16-g32"}, {"a": w}, {"a": x.T @ x}, {"a": None})
    plain = Given({"a": "w4a16-g32"}, {"a": w}, {"a": x.T @ x})
    gptq(unit, asymmetry=0.25)
    gptq(plain)
    assert torch.equal(unit.assigned["a"].codes, plain.assigned["a"].codes)
    assert unit.records["a"].warnings == [
        "not every token reaches this layer, so its inputs in the float model cannot be told: no asymmetry"
    ]
    with pytest.raises(ValueError, match="asymmetry compares with the float block"):
        gptq(unit, asymmetry=0.25, sequential=True)


@pytest.mark.parametrize("scheme", ["kmeans2", "kmeans3-g16", "bcq2-g32", "bcq3-g16"])
def test_codebooks(scheme: str) -> None:
    """The values are those found for the weights; column by column the codes make the outputs' error less."""
    w, hessian = problem(8, 64, tokens=200, seed=12)
    spec = spec_of(scheme)
    solution = gptq_weight(w, hessian, spec, scale_dtype=torch.float32, shrink_steps=15)
    grid = find_params(w, spec, scale_dtype=torch.float32, shrink_steps=15, importance=hessian.diagonal())
    assert torch.equal(solution.q.scale, grid.scale) and solution.q.codes.dtype == torch.uint8
    rounded = quantize(w, grid, spec)
    assert loss(w, solution.q, hessian) < 0.95 * loss(w, rounded, hessian)
    diagonal = torch.diag(hessian.diagonal())
    independent = gptq_weight(w, diagonal, spec, scale_dtype=torch.float32, shrink_steps=15).q
    assert torch.equal(independent.codes, rounded.codes)


BLOCKS = ("mxfp4a16", "mxfp6a16", "mxfp8a16", "mxint4a16", "mxint3a16-g16", "mxfp4a16-even", "mxfp4a16-ceil", "nvfp4a16", "nf4",
          "fp8a16-block", "w4a16-g32-two", "w4a16-g32-two-asym", "w4a16-r4", "fp4a16-g32-pow2")  # fmt: skip


@pytest.mark.parametrize("scheme", BLOCKS)
def test_block_formats(scheme: str) -> None:
    """Grids of every kind stay those of rounding to nearest, and the columns together do far better than alone."""
    w, hessian = problem(128 if scheme == "fp8a16-block" else 16, 256, tokens=700, seed=13)
    spec = spec_of(scheme)
    solution = gptq_weight(w, hessian, spec, scale_dtype=torch.bfloat16)
    rounded = nearest(w, spec)
    assert torch.equal(solution.q.scale.float(), rounded.scale.float()) and solution.q.scale.dtype == rounded.scale.dtype
    if rounded.outer is not None and solution.q.outer is not None:
        assert torch.equal(solution.q.outer, rounded.outer)
    assert (solution.q.outer is None) == (rounded.outer is None)
    assert loss(w, solution.q, hessian) < 0.4 * loss(w, rounded, hessian)
    expected = loss(w, solution.q, damped(hessian, DAMPING))
    assert solution.objective == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", ["mxfp4a16", "mxint4a16", "mxint3a16-g16", "w3a16-g32-asym"])
def test_scales_on_entry(scheme: str) -> None:
    """Each group's scales are of the columns as the groups before left them: their best values, given those groups' codes."""
    w, hessian = problem(32, 256, tokens=700, seed=14)
    spec = spec_of(scheme)
    q = gptq_weight(w, hessian, spec, scale_dtype=torch.float32, order="natural", scales="entry").q
    done, full = dequantize(q).double(), damped(hessian, DAMPING)
    static = find_params(w, spec, scale_dtype=torch.float32).scale
    for start in range(0, 256, spec.group):
        rest = w.double()
        if start:
            cross, own = full[:start, start:], full[start:, start:]
            rest = torch.cat([done[:, :start], rest[:, start:] + (w.double() - done)[:, :start] @ cross @ own.inverse()], 1)
        expected = find_params(rest[:, start : start + spec.group].float(), spec, scale_dtype=torch.float32)
        assert torch.allclose(q.scale[:, start // spec.group].float(), expected.scale[:, 0].float(), rtol=1e-4)
    assert not torch.equal(q.scale.float(), static.float())


def test_joint_rounding() -> None:
    """A group is rounded at once, at the values that are best for what the groups before it became."""
    w, hessian = problem(6, 256, tokens=700, seed=15)
    spec = spec_of("mxint4a16")
    solution = gptq_weight(w, hessian, spec, scale_dtype=torch.float32, order="natural", scales="entry", joint=True)
    done, full = dequantize(solution.q).double(), damped(hessian, DAMPING)
    for start in range(0, 256, 32):
        rest = w.double()[:, start:]
        if start:
            cross, own = full[:start, start:], full[start:, start:]
            rest = rest + (w.double() - done)[:, :start] @ cross @ own.inverse()
        step = solution.q.scale[:, start // 32 : start // 32 + 1].double()
        ratio = rest[:, :32] / step
        sure = (ratio - ratio.floor() - 0.5).abs() > 1e-3
        expected = ratio.round().clamp(spec.format.min, spec.format.max) * step
        assert torch.equal(done[:, start : start + 32][sure], expected[sure])
    assert solution.objective == pytest.approx(loss(w, solution.q, full), rel=1e-3)


def test_joint_rounding_counts_each_update_once() -> None:
    """The algorithm as it is printed moves the columns after a block twice and loses most of what it gains."""
    spec = spec_of("mxint4a16")
    found, printed, rounded = 0.0, 0.0, 0.0
    for seed in range(3):
        w, hessian = problem(8, 128, tokens=400, seed=seed)
        found += loss(
            w,
            gptq_weight(w, hessian, spec, scale_dtype=torch.float32, order="natural", scales="entry", joint=True).q,
            hessian,
        )
        rounded += loss(w, nearest(w, spec), hessian)
        u = torch.linalg.cholesky(damped(hessian, DAMPING).inverse(), upper=True)
        rest, parts = w.double().clone(), []
        for start in range(0, 128, 32):
            mine = slice(start, start + 32)
            q = quantize(rest[:, mine].float(), find_params(rest[:, mine].float(), spec, scale_dtype=torch.float32), spec)
            error = (rest[:, mine] - dequantize(q).double()) @ u[mine, mine].inverse()
            parts.append(dequantize(q))
            for _ in range(2):
                rest[:, start + 32 :] -= error @ u[mine, start + 32 :]
        delta = w.double() - torch.cat(parts, 1).double()
        printed += float((delta @ hessian.double() * delta).sum())
    assert found < 0.6 * rounded
    assert printed > 1.5 * found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "entry"}, 'scales = "entry" needs order = "natural"'),
        ({"joint": True}, 'joint = true needs scales = "entry"'),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(cast(Any, None), **options)


@pytest.mark.parametrize("scheme", ["w4a16-channel", "nvfp4a16", "kmeans3-g32", "w4a16-r4"])
def test_scales_that_cannot_be_chosen_on_entry(scheme: str) -> None:
    w, hessian = problem(8, 128, tokens=200)
    with pytest.raises(ValueError, match="weight: scales chosen on entry need groups that divide 128 columns"):
        gptq_weight(w, hessian, spec_of(scheme), scale_dtype=torch.float32, order="natural", scales="entry")


# ------------------------------------------------------------------------------------------------------------ refinement
REFINED = (
    *("w2a16-g32", "w3a16-g32-asym", "w4a16-channel", "w4a16-tensor", "w4a16-g32-r4"),
    *("fp4a16-g32", "nvfp4a16", "kmeans2-g32", "bcq2-g32"),
)


def slowly_refined(w: Tensor, hessian: Tensor, q: QTensor, ours: QTensor) -> QTensor:
    """One round in float64: scales by least squares row by row, then the best of all values for one weight after the other.
    Where two values are as good, it takes that of `ours`."""
    spec, size = q.spec, q.spec.group_size(w.shape[1])
    metric, root = hessian.double(), torch.linalg.cholesky(hessian.double()).T  # e H e^T = |root e^T|^2
    if spec.scale == "float" and spec.rows == 1 and spec.group != TENSOR and not spec.format.codebook:
        units = dequantize(QTensor(q.codes, torch.ones_like(q.scale).float(), q.zero, spec)).double()
        scale = q.scale.clone()
        for row in range(len(w)):
            parts = torch.block_diag(*units[row].split(size)).T  # [in, groups]
            best = torch.linalg.lstsq(root @ parts, (root @ w[row].double())[:, None]).solution[:, 0].to(scale.dtype)
            errors = [root @ (w[row].double() - parts @ each.double()) for each in (best, q.scale[row])]
            scale[row] = best if errors[0].norm() < errors[1].norm() else q.scale[row]
        q = QTensor(q.codes, scale, q.zero, spec)
    every = 2**spec.format.bits
    least = every // 2 if q.codes.dtype == torch.int8 else 0  # what to add to the codes of integers
    values = dequantize(q).double()
    codes = q.codes.clone()
    choices = []
    for code in range(every):
        each = torch.full_like(q.codes, code - least)
        choices.append(dequantize(QTensor(each, q.scale, q.zero, spec, q.outer)).double())
    for j in range(w.shape[1]):
        losses = []
        for choice in choices:
            error = w.double() - values
            error[:, j] = w[:, j].double() - choice[:, j]
            losses.append((error @ metric * error).sum(1))
        best = torch.stack(losses).argmin(0)
        own = ours.codes[:, j].long() + least
        picked = torch.stack(losses).gather(0, torch.stack([best, own]))
        best = torch.where(picked[1] <= picked[0] * (1 + 1e-6), own, best)
        codes[:, j] = (best - least).to(codes.dtype)
        values[:, j] = torch.stack(choices)[best, torch.arange(len(w)), j]
    return QTensor(codes, q.scale, q.zero, spec, q.outer)


@pytest.mark.parametrize("scheme", REFINED)
def test_refinement(scheme: str) -> None:
    """One round is that of the slow reference; it lowers the objective, and so do more, until no weight has a better value."""
    w, hessian = problem(8, 160, tokens=400, seed=20)  # two blocks of columns
    start = solve(w, hessian, spec_of(scheme), shrink_steps=3).q
    objective = damped(hessian, DAMPING)
    once = refined(w, hessian, start, damping=DAMPING, rounds=1)
    expected = slowly_refined(w, objective, start, once)
    assert torch.equal(once.codes, expected.codes)
    assert torch.allclose(once.scale.float(), expected.scale.float(), rtol=2**-7)  # a bit of bfloat16
    assert (once.zero is None) == (start.zero is None) and (
        once.zero is None or torch.equal(once.zero, cast(Tensor, start.zero))
    )
    often = refined(w, hessian, start, damping=DAMPING, rounds=8)
    losses = [loss(w, q, objective) for q in (start, once, often)]
    assert losses[1] < 0.99 * losses[0] and losses[2] <= losses[1]
    assert torch.equal(refined(w, hessian, start, damping=DAMPING, rounds=0).codes, start.codes)


def test_refinement_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of some rows at a time are those of all, and a group of zeros keeps its own."""
    w, hessian = problem(8, 96, tokens=200, seed=21)
    w[:, 32:64] = 0
    start = solve(w, hessian, spec_of("w3a16-g32-asym")).q
    expected = refined(w, hessian, start, damping=DAMPING, rounds=1)
    assert not torch.equal(expected.scale, start.scale) and bool(expected.scale.isfinite().all())
    monkeypatch.setattr(module, "_SYSTEMS", 27)
    found = refined(w, hessian, start, damping=DAMPING, rounds=1)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


# ------------------------------------------------------------------------------------------------------------ the method
class Given(Unit):
    """A unit whose weights and Gram matrices are given."""

    def __init__(
        self,
        schemes: dict[str, str],
        weights: dict[str, Tensor],
        grams: dict[str, Tensor],
        crosses: dict[str, Tensor | None] | None = None,
    ) -> None:
        linears = tuple(
            Linear(
                name=name,
                tensor=f"{name}.weight",
                param=f"{name}.weight",
                index=None,
                rows=(0, len(w)),
                transposed=False,
                stacked=False,
                out_features=w.shape[0],
                in_features=w.shape[1],
                shares=name,
            )
            for name, w in weights.items()
        )
        arch = SimpleNamespace(param=lambda linear: weights[linear.name], device=torch.device("cpu"))
        block = Block(index=0, name="block", tensors=(), linears=linears)
        parsed = {name: parse_scheme(scheme) for name, scheme in schemes.items()}
        super().__init__(cast(Any, arch), block, parsed, cast(Any, None), torch.bfloat16)
        self.grams = grams
        self.crosses = crosses or {}
        self.asked: list[bool] = []

    def gram(self, linear: Linear, *, sequential: bool = False) -> Tensor:
        """The given matrix."""
        self.asked.append(sequential)
        return self.grams[linear.name]

    def cross(self, linear: Linear) -> Tensor | None:
        """The given matrix."""
        return self.crosses[linear.name]


def test_method() -> None:
    """Every linear of the unit with its own scheme and Gram matrix, and the options of the step."""
    w, hessian = problem(8, 64, tokens=200, seed=12)
    other, other_hessian = problem(4, 96, tokens=200, seed=13)
    schemes = {"a": "w3a16-g32", "b": "w4a16-g16-asym"}
    options: dict[str, Any] = {"damping": 0.02, "order": "natural", "shrink_steps": 30}
    unit = Given(schemes, {"a": w, "b": other, "float": w}, {"a": hessian, "b": other_hessian})
    gptq(unit, **options, sequential=True)
    assert unit.asked == [True, True]
    assert set(unit.assigned) == {"a", "b"}
    for name, weight, gram in (("a", w, hessian), ("b", other, other_hessian)):
        expected = solve(weight, gram, spec_of(schemes[name]), **options).q
        assert torch.equal(unit.assigned[name].codes, expected.codes)
        assert torch.equal(unit.assigned[name].scale, expected.scale)
        record = unit.records[name]
        assert (record.method, record.damping, record.warnings) == ("gptq", 0.02, [])
    for name in unit.assigned:
        assert unit.records[name].error != unit.records[name].error_rtn


@pytest.mark.parametrize(
    ("scheme", "steps"), [("w2a16-g32", 20), ("w3a16-g32-asym", 20), ("w4a16-g32", 0), ("w8a16-channel", 0), ("fp8", 0)]
)
def test_method_by_default(scheme: str, steps: int) -> None:
    """Damping of 0.01, activation order, a range search below 4 bits, all linears of the block still float."""
    w, hessian = problem(8, 64, tokens=200, seed=12)
    unit = Given({"a": scheme}, {"a": w}, {"a": hessian})
    gptq(unit)
    expected = solve(w, hessian, spec_of(scheme), damping=0.01, order="activation", shrink_steps=steps)
    assert torch.equal(unit.assigned["a"].codes, expected.q.codes)
    assert torch.equal(unit.assigned["a"].scale, expected.q.scale)
    assert (unit.records["a"].damping, unit.asked) == (0.01, [False])
    without = Given({"a": scheme}, {"a": w}, {"a": hessian})
    gptq(without, shrink_steps=0)
    assert torch.equal(without.assigned["a"].scale, nearest(w, spec_of(scheme)).scale)


def test_method_refines() -> None:
    """What the solver found, refined, is what the unit gets; by default it is not."""
    w, hessian = problem(8, 64, tokens=200, seed=12)
    solved = solve(w, hessian, spec_of("w3a16-g32"), shrink_steps=20).q
    found = []
    for options in ({}, {"refine": 2}):
        unit = Given({"a": "w3a16-g32"}, {"a": w}, {"a": hessian})
        gptq(unit, **options)
        expected = refined(w, hessian, solved, damping=DAMPING, rounds=options.get("refine", 0))
        found.append(unit.assigned["a"])
        assert torch.equal(found[-1].codes, expected.codes) and torch.equal(found[-1].scale, expected.scale)
    assert not torch.equal(found[0].codes, found[1].codes) and not torch.equal(found[0].scale, found[1].scale)


def test_method_warns() -> None:
    """Of damping that had to grow, and of a layer that no token reached, which alone is rounded to nearest."""
    generator = torch.Generator().manual_seed(14)
    weights = {name: torch.randn(4, 40, generator=generator) for name in ("grown", "unreached", "fine")}
    grams = {"grown": indefinite(40, 0.05), "unreached": torch.zeros(40, 40), "fine": indefinite(40, 0.0)}
    unit = Given(dict.fromkeys(weights, "w4a16-g8"), weights, grams)
    gptq(unit)
    grown, unreached, fine = (unit.records[name] for name in ("grown", "unreached", "fine"))
    assert (grown.method, grown.damping) == ("gptq", pytest.approx(0.1))
    assert len(grown.warnings) == 1 and grown.warnings[0].startswith("damping raised from 0.01 to 0.1")
    assert (unreached.method, unreached.damping) == ("rtn (fallback from gptq)", None)
    assert len(unreached.warnings) == 1 and "no calibration token reached this layer" in unreached.warnings[0]
    assert torch.equal(unit.assigned["unreached"].codes, nearest(weights["unreached"], spec_of("w4a16-g8")).codes)
    assert (fine.method, fine.damping, fine.warnings) == ("gptq", 0.01, [])


def test_method_names_the_linear_it_cannot_solve() -> None:
    unit = Given({"up": "w4a16-g8"}, {"up": torch.randn(4, 40)}, {"up": indefinite(40, 1e4)})
    with pytest.raises(ValueError, match="^up: the Hessian is not positive definite"):
        gptq(unit)
    assert not unit.assigned
