"""How fast the kernels are on a GPU, at the shapes of known models, beside cuBLAS, the hardware's bounds and other packages.

Times are medians of replays of a CUDA graph, whose launches go over as many copies of the weights as exceed twice the L2 cache.
The floor is bytes over the read bandwidth or operations over the rate of a large product, both measured in the same run.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.kernels.entry import Prepared, linear, prepare, reason_against
from lowbit.page import save_figure
from lowbit.qtensor import QTensor, find_params, parse_scheme, quantize
from lowbit.unit import Input

DEVICE = "cuda"
# in, out of the products of a block as models run them: q, k, v as one, o, gate and up as one, down
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-7b": ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)),
    "llama-13b": ((5120, 15360), (5120, 5120), (5120, 27648), (13824, 5120)),
    "llama-70b": ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
    "bert-base": ((768, 2304), (768, 768), (768, 3072), (3072, 768)),
    "bert-large": ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)),
}
SCHEMES = ("w4a16-g128", "w8a8")
ROWS = (1, 16, 256, 2048)


# ------------------------------------------------------------------------------------------------------------------ times


def time_of(launches: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median microseconds of one of the launches, run one after the other in a CUDA graph."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[3:])


def copies_of(nbytes: int) -> int:
    """How many copies exceed twice the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-2 * cache // nbytes) + 1)


def ceilings() -> dict[str, float]:
    """Bytes read a second ("bytes"), read and written by a copy ("copy"), and float16 operations a second ("operations")."""
    big = torch.randn(2**28, device=DEVICE)
    read = time_of([lambda: big.sum()] * 4)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.float16) for _ in range(2))
    product = time_of([lambda: a @ b] * 4)
    other = torch.empty_like(big)
    copy = time_of([lambda: other.copy_(big)] * 4)
    return {"bytes": big.nbytes / read * 1e6, "copy": 2 * big.nbytes / copy * 1e6, "operations": 2 * 8192**3 / product * 1e6}


def floor_of(matrix: Prepared, m: int, limits: dict[str, float]) -> float:
    """Microseconds that a product with m rows takes at least; codes are multiplied at twice the rate of floats."""
    out, inner = matrix.shape
    rate = limits["operations"] * (1 if matrix.inputs is None else 2)
    return max((matrix.nbytes + 2 * m * (inner + out)) / limits["bytes"], 2 * m * inner * out / rate) * 1e6


# ------------------------------------------------------------------------------------------------------------------- ours


def dtype_of(scheme: str) -> torch.dtype:
    """What a scheme is timed in."""
    return torch.bfloat16 if scheme == "fp8" else torch.float16


def quantized(scheme: str, out: int, inner: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> QTensor:
    """A random matrix, quantized."""
    spec = parse_scheme(scheme).weight
    w = torch.randn(out, inner, device=device) / inner**0.5
    return quantize(w, find_params(w, spec, scale_dtype=dtype), spec)


def prepared(scheme: str, out: int, inner: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Prepared:
    """The same, laid out."""
    inputs = parse_scheme(scheme).input
    given = None if inputs is None else Input(inputs)
    return prepare(quantized(scheme, out, inner, dtype, device), inputs=given, dtype=dtype, device=device)


def copies(matrix: Prepared) -> list[Prepared]:
    """As many as exceed twice the L2 cache."""
    return [matrix, *(matrix.to("cpu").to(DEVICE) for _ in range(copies_of(matrix.nbytes) - 1))]


# ------------------------------------------------------------------------------------------------------------------ peers


def cublas(m: int, inner: int, out: int) -> float:
    """Microseconds of a float16 product."""
    weights = [torch.randn(out, inner, device=DEVICE, dtype=torch.float16) for _ in range(copies_of(2 * out * inner))]
    x = torch.randn(m, inner, device=DEVICE, dtype=torch.float16)
    return time_of([partial(torch.matmul, x, w.T) for w in weights])


def tinygemm(m: int, inner: int, out: int) -> float:
    """Microseconds of PyTorch's int4 kernel (bfloat16, groups of 128)."""
    codes = torch.randint(0, 256, (out, inner // 2), device=DEVICE, dtype=torch.uint8)
    words = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inner // 128, out, 2, device=DEVICE, dtype=torch.bfloat16)
    many = [words.clone() for _ in range(copies_of(words.nbytes))]
    x = torch.randn(m, inner, device=DEVICE, dtype=torch.bfloat16)
    return time_of([partial(torch._weight_int4pack_mm, x, w, 128, scales) for w in many])


def int_mm(m: int, inner: int, out: int) -> float:
    """Microseconds of PyTorch's int8 product alone, without scales."""
    many = [torch.ones(out, inner, device=DEVICE, dtype=torch.int8) for _ in range(copies_of(out * inner))]
    x = torch.ones(m, inner, device=DEVICE, dtype=torch.int8)
    return time_of([partial(torch._int_mm, x, w.T) for w in many])


def scaled_mm(m: int, inner: int, out: int) -> float:
    """Microseconds of PyTorch's E4M3 product with a scale for each row and output, bfloat16 out."""
    kind = torch.float8_e4m3fn
    many = [torch.ones(out, inner, device=DEVICE).to(kind) for _ in range(copies_of(out * inner))]
    x, a, b = torch.ones(m, inner, device=DEVICE).to(kind), torch.ones(m, 1, device=DEVICE), torch.ones(1, out, device=DEVICE)
    how: dict[str, Any] = {"scale_a": a, "scale_b": b, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return time_of([partial(torch._scaled_mm, x, w.T, **how) for w in many])


def gemlite(m: int, inner: int, out: int) -> float:
    """Microseconds of gemlite's int4 kernel, where that is installed (ImportError otherwise)."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(4, 128, inner, out, DType.FP16, DType.FP16)
    scales = torch.rand(out * inner // 128, 1, device=DEVICE, dtype=torch.float16)
    layer.pack(torch.randint(0, 16, (out, inner), device=DEVICE, dtype=torch.uint8), scales, torch.full_like(scales, 8))
    x = torch.randn(m, inner, device=DEVICE, dtype=torch.float16)
    return time_of([partial(each, x) for each in [layer, *(deepcopy(layer) for _ in range(copies_of(out * inner // 2) - 1))]])


def torchao(m: int, inner: int, out: int) -> float:
    """Microseconds of torchao's int8 linear with inputs quantized for each row, where that is installed."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = [nn.Linear(inner, out, bias=False, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies_of(out * inner))]
    quantize_(nn.ModuleList(layers), Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(m, inner, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        return time_of([partial(layer, x) for layer in layers])


def timed(peer: Callable[[int, int, int], float], m: int, inner: int, out: int) -> dict[str, float]:
    """Microseconds of a peer by its name; none where it is not installed or does not take the shape, which is said."""
    try:
        return {peer.__name__: peer(m, inner, out)}
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError) as error:
        print(f"{peer.__name__} {m} x {inner} x {out}: {str(error)[:100]!r}", file=sys.stderr)
        return {}


def peers_of(scheme: str) -> list[Callable[[int, int, int], float]]:
    """What does the work of a scheme elsewhere; cuBLAS does that of any in float16."""
    parsed = parse_scheme(scheme)
    if parsed.input is not None:
        return [cublas, scaled_mm] if parsed.input.format.kind == "float" else [cublas, int_mm, torchao]
    return [cublas, tinygemm, gemlite] if parsed.weight.format.bits == 4 else [cublas]


# -------------------------------------------------------------------------------------------------------------------- run


def bench_kernels(
    *, models: Sequence[str] = tuple(SHAPES), schemes: Sequence[str] = SCHEMES, rows: Sequence[int] = ROWS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time products of random matrices; inputs that a scheme quantizes are quantized in the time.

    Args:
        models: names in SHAPES. rows: of inputs.

    Returns:
        "device", "limits" (see `ceilings`), and "rows": "model", "scheme", "inner", "out", "rows", "bytes", and microseconds:
        "lowbit", "floor", and of each peer that is installed and takes the shape, by its name.

    Raises:
        ValueError: there is no GPU, or a model or scheme is unknown or has no kernel.
    """
    unknown = [name for name in models if name not in SHAPES]
    if unknown:
        raise ValueError(f"no shapes of {unknown[0]!r}; there are those of {', '.join(SHAPES)}")
    for scheme in schemes:
        reason = reason_against(parse_scheme(scheme))
        if reason is not None:
            raise ValueError(f"{scheme}: {reason}")
    if not torch.cuda.is_available():
        raise ValueError("kernels are timed on a GPU, and torch sees none here; on a CPU they run as their specification only")
    torch.manual_seed(0)
    limits = ceilings()
    found: list[dict[str, Any]] = []
    jobs = [(model, *shape, scheme) for model in models for shape in SHAPES[model] for scheme in schemes]
    beside: dict[tuple[Any, ...], dict[str, float]] = {}
    for done, (model, inner, out, scheme) in enumerate(jobs, 1):
        matrix = prepared(scheme, out, inner, dtype_of(scheme), DEVICE)
        many = copies(matrix)
        for m in rows:
            x = torch.randn(m, inner, device=DEVICE, dtype=matrix.dtype)
            row: dict[str, Any] = {"model": model, "scheme": scheme, "inner": inner, "out": out, "rows": m}
            row |= {"bytes": matrix.nbytes + 2 * m * (inner + out), "floor": floor_of(matrix, m, limits)}
            row["lowbit"] = time_of([partial(linear, x, w) for w in many])
            for peer in peers_of(scheme):
                at = (peer.__name__, m, inner, out)
                if at not in beside:
                    beside[at] = timed(peer, m, inner, out)
                row |= beside[at]
            found.append(row)
        if progress is not None:
            progress("timing", done, len(jobs))
    return {"device": torch.cuda.get_device_name(0), "limits": limits, "rows": found}


def peer_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The peers that were timed at all."""
    names = [peer.__name__ for peer in (cublas, tinygemm, gemlite, int_mm, torchao, scaled_mm)]
    return [name for name in names if any(name in row for row in rows)]


def plot_kernels(result: dict[str, Any], path: str) -> None:
    """Write a roofline picture: operations a second against operations for each byte, under the measured bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    limits, rows = result["limits"], result["rows"]
    marks = "os^vD*"
    for row in rows:
        row["intensity"] = 2 * row["rows"] * row["inner"] * row["out"] / row["bytes"]
    for i, scheme in enumerate(dict.fromkeys(row["scheme"] for row in rows)):
        for name, fill in (("lowbit", "full"), ("cublas", "none")):
            points = [row for row in rows if row["scheme"] == scheme and name in row]
            speeds = [row["intensity"] * row["bytes"] / row[name] * 1e6 for row in points]
            x = [row["intensity"] for row in points]
            axes.loglog(x, speeds, marks[i % len(marks)], fillstyle=fill, label=f"{scheme}, {name}")
    least, most = (end(row["intensity"] for row in rows) for end in (min, max))
    line = [least / 2 * (4 * most / least) ** (i / 99) for i in range(100)]
    for factor, style, name in ((1, "k--", "float16"), (2, "k:", "int8, twice float16")):
        bound = [min(x * limits["bytes"], factor * limits["operations"]) for x in line]
        axes.loglog(line, bound, style, label=f"bound, {name}")
    axes.set_xlabel("operations for each byte of quantized weights, inputs and outputs")
    axes.set_ylabel("operations a second")
    axes.set_title(result["device"])
    axes.legend(fontsize="small")
    save_figure(figure, path)
