"""The kernels of a Mamba2 mixer against the reference, in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowbit.kernels import reference, scan  # noqa: E402
from lowbit.kernels.reference import Scan  # noqa: E402
from lowbit.ssm import CHUNK  # noqa: E402

BATCH, HEADS, P, GROUPS, N = 2, 4, 20, 2, 12
CHANNELS, WIDTH = HEADS * P, HEADS * P + 2 * GROUPS * N


def random_scan(n: int = N, *, rounded: bool = False) -> Scan:
    """Scales that differ from cluster to cluster and group to group; some channels forget at once, some hardly at all."""
    of_x = torch.tensor([0.02, 0.005, 0.01])[torch.arange(CHANNELS) * 3 // CHANNELS]
    of_b_and_c = torch.tensor([0.01, 0.03, 0.02, 0.01]).repeat_interleave(n)
    return Scan(
        A=-torch.tensor([0.05, 0.5, 2.0, 16.0]),
        D=torch.randn(HEADS),
        dt_bias=torch.randn(HEADS),
        scales=torch.cat([of_x, of_b_and_c]),
        state_scale=torch.rand(3, n) * 0.02 + 0.01,
        labels=(torch.arange(CHANNELS) * 3 // CHANNELS).int(),
        groups=GROUPS,
        limits=(0.01, 1.5),
        z_scale=0.02 if rounded else 0.0,
        dt_scale=0.05 if rounded else 0.0,
    )


def codes(*shape: int) -> Tensor:
    """Random int8, the lowest too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must not leave anywhere."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 99, dtype=dtype)


def projected(length: int, *widths: int) -> tuple[Tensor, ...]:
    """Parts of one float16 tensor [BATCH, length, sum of widths], as in_proj makes it, which are not contiguous."""
    return torch.randn(BATCH, length, sum(widths)).half().split(widths, -1)


def near(found: Tensor, wanted: Tensor) -> None:
    """Codes are the same, but one apart where a value lies half way."""
    apart = (found.int() - wanted.int()).abs()
    assert found.dtype == wanted.dtype == torch.int8
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01


@pytest.mark.parametrize("length", [1, 2, 16, 37])
@pytest.mark.parametrize("coded", [True, False])
def test_convolution(length: int, coded: bool) -> None:
    """Of codes and of floats, at fewer tokens than the filter has, a block, and several blocks; what comes before counts."""
    in_scale, scales = 0.03, random_scan().scales
    _, x, _ = projected(length, 5, WIDTH, HEADS)
    x = codes(BATCH, length, WIDTH) if coded else x * 2
    past, weight, bias = codes(BATCH, WIDTH, 4), torch.randn(WIDTH, 4), torch.randn(WIDTH)
    for given, held in ((bias, 0), (None, 5)):
        wanted, after = reference.conv(x, past, weight, given, in_scale, scales, held)
        found, kept = poisoned(BATCH, length, WIDTH, dtype=torch.int8), past.clone()
        scan.conv(x, kept, weight, given, in_scale, scales, held, found)
        near(found, wanted)
        near(kept, after)


@pytest.mark.parametrize(("length", "n", "gated"), [(1, N, True), (64, 70, False), (150, N, True)])
def test_scan(length: int, n: int, gated: bool) -> None:
    """Less than a run, a whole run, some and a part: y, and the state at the last boundary, from a state that is not zero."""
    of = random_scan(n, rounded=gated)
    given, state = codes(BATCH, length, len(of.scales)), codes(BATCH, CHANNELS, n)
    z, _, dt = projected(length, CHANNELS, WIDTH, HEADS)
    z = z if gated else None
    wanted, after = reference.scan(given, dt, z, state, of)
    found, end = poisoned(*wanted.shape), state.clone()
    scan.scan(given, dt, z, end, of, found)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    near(end, after)
    assert length < CHUNK or not torch.equal(after, state)


@pytest.mark.parametrize("gated", [True, False])
def test_steps(gated: bool) -> None:
    """Sequences that hold different numbers of tokens: one fills its run and gets a new state, the other keeps its state."""
    of = random_scan(rounded=gated)
    held = torch.tensor([CHUNK - 1, 17], dtype=torch.int32)
    state, tokens = codes(BATCH, CHANNELS, N), codes(BATCH, CHUNK, CHANNELS + GROUPS * N)
    past, steps = codes(BATCH, WIDTH, 4), torch.randn(BATCH, HEADS, CHUNK)
    for row, count in enumerate(held.tolist()):
        steps[row, :, count:] = float("nan")  # slots not filled yet
    z, conv_in, dt = (part[:, 0] for part in projected(1, CHANNELS, WIDTH, HEADS))
    z = z if gated else None
    how = torch.randn(WIDTH, 4), torch.randn(WIDTH) if gated else None, 0.03
    wanted, after = reference.step(conv_in, dt, z, (past, state, tokens, steps), *how, held, of)
    found, cache = poisoned(*wanted.shape), tuple(part.clone() for part in (past, state, tokens, steps))
    scan.step(conv_in, dt, z, cache, *how, held, of, found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))
    for part, expected in zip(cache[:3], after[:3], strict=True):
        near(part, expected)
    assert torch.equal(cache[1][1], state[1]) and not torch.equal(cache[1][0], state[0])
    assert not torch.equal(cache[0], past) and not torch.equal(cache[2], tokens)
    assert torch.equal(cache[3].nan_to_num(), after[3].nan_to_num())
