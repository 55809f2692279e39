"""The operators: registered as torch asks for, compiled as a whole, refused on GPUs that are too old."""

import pytest
import torch
from matrices import quantized

from lowbit.kernels import ops
from lowbit.kernels.entry import Prepared, add_rms_norm, linear, prepare
from lowbit.qtensor import parse_scheme
from lowbit.unit import Input


@pytest.fixture(autouse=True)
def specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CPUs, not the interpreted kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def prepared(scheme: str) -> Prepared:
    """A matrix [40, 384]."""
    inputs = parse_scheme(scheme).input
    return prepare(quantized(scheme, 40, 384), inputs=None if inputs is None else Input(inputs), dtype=torch.float16)


def test_operators_are_registered_as_torch_asks_for() -> None:
    """Schemas, fake kernels, and that no input changes."""
    x, bias = torch.randn(2, 3, 384, dtype=torch.float16), torch.randn(40, dtype=torch.float16)
    weight = torch.rand(384, dtype=torch.float16)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    packed = prepared("w4a16-g128-asym").packed
    floats = (x, *packed.tensors.values(), [packed.group, packed.step], packed.format, bias, None)
    torch.library.opcheck(ops.linear_floats, floats, test_utils=checks)
    for fmt, group, symmetric, producer, dtype in (
        ("int8", -1, True, "rms_norm", None),
        ("fp8_e4m3", 128, True, "plain", None),
        ("", -1, True, "gelu", None),
        ("", -1, True, "rms_norm", torch.float32),
    ):
        second = x.clone() if producer == "rms_norm" else None
        for kept in (False, producer == "rms_norm" and bool(fmt)):
            how = (fmt, group, symmetric, None, kept, dtype)
            torch.library.opcheck(ops.rows, (producer, x, second, weight, None, 1e-6, False, *how), test_utils=checks)
    heads = torch.randn(2, 5, 3, 48, dtype=torch.float16).transpose(1, 2)
    torch.library.opcheck(ops.rope, (heads, heads[:, :1], *torch.randn(2, 1, 5, 48)), test_utils=checks)
    cache, seen = torch.randn(2, 2, 3, 5, 48, dtype=torch.float16), torch.rand(1, 5) < 0.7
    for mask in (seen, None):
        torch.library.opcheck(ops.attend, (heads[:, :, :1], *cache[:, :, :3], mask, 0.1), test_utils=checks)
    torch.library.opcheck(
        ops.put, (*(part.clone() for part in cache), *cache[:, :, :, :2], torch.tensor([4, 1])), test_utils=checks
    )
    packed = prepared("w4a8-g128-aasym").packed
    found = ops.rows("plain", x, None, None, None, 0.0, False, "int8", -1, False, None)
    codes = (*found[:3], *packed.tensors.values(), [packed.group, packed.step], packed.format, None, None, torch.float16)
    torch.library.opcheck(ops.linear_codes, codes, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["w4a16-g128", "w8a8", "bcq2-g64"])
def test_compiled_as_a_whole(scheme: str, backend: str) -> None:
    """No graph breaks, and the same result."""
    matrix = prepared(scheme)
    x, weight = torch.randn(2, 384, dtype=torch.float16), torch.rand(384, dtype=torch.float16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        if matrix.inputs is None:
            return linear(x, matrix)
        rows, stream = add_rms_norm(x, x, weight, 1e-6, matrix.inputs)
        return linear(rows, matrix) + stream[:, :40]

    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they lack and what to do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")

    class OnGpu:
        is_cuda, device = True, "cuda"

    with pytest.raises(ValueError, match="T4 has compute capability 7.5, no bfloat16 tensor cores .8.0.*newer GPU"):
        ops._by_kernel(OnGpu())  # type: ignore[arg-type]
    assert not ops._by_triton(OnGpu())  # type: ignore[arg-type]
