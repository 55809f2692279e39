"""The kernels on a GPU: checked against the specification first, then timed beside what PyTorch has.

    python benchmarks/kernels.py --part check|floats|others|codes|rows|binary [--sweep]

Each part takes a few minutes and writes its own file; the table of all parts that are there goes into the section `kernels`.

check: every scheme, dtype, and odd shapes, outputs poisoned by NaN, the same bits twice; without a GPU on small shapes, by
the specification or, with TRITON_INTERPRET=1, by the interpreted kernels. Times: CUDA graphs of launches over as many copies of
the weights as exceed twice the L2 cache, the median of replays; the floor is bytes over the read bandwidth, or operations over
the rate of a large product, both measured in that run. --sweep also times other configurations and says which are best. The
exit status is 1 if a check fails or a bar is missed.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sections import RESULTS, ROOT, describe, environment, keep
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from lowbit import kernel_bench
from lowbit.kernel_bench import (
    ceilings,
    copies,
    copies_of,
    cublas,
    dtype_of,
    floor_of,
    gemlite,
    int_mm,
    scaled_mm,
    time_of,
    timed,
    tinygemm,
)
from lowbit.kernels import binary, codes, entry, reference, weight_only
from lowbit.kernels.entry import Prepared, linear
from lowbit.kernels.packed import unpack
from lowbit.kernels.weight_only import Config
from lowbit.qtensor import parse_scheme
from lowbit.report import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824), (8192, 28672)]  # in, out
ROWS = [1, 4, 16, 64, 256, 2048]
CHECKS = [
    *("w2a16-g32", "w2a16-g64-asym", "w3a16-g128", "w3a16-g64-asym", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128"),
    *("w4a16-g128-asym", "w4a16-channel", "w4a16-g128-two", "w8a16-g128", "w8a16-channel-asym", "w8a16-g32", "mxfp4a16"),
    *("nvfp4a16", "mxfp8a16", "fp8a16", "bcq1", "bcq2", "bcq3", "bcq4"),
    *("w8a8", "w8a8-aasym", "w8a8-ag128", "fp8", "fp8-block", "w4a8", "w4a8-channel", "w4a8-g128-asym", "w4a8-g128-two"),
    *("w4a8-g32", "w4a8-g32-asym", "w4a8-ag32"),
]
SHAPES_OF_CHECKS = [
    *((1, 256, 1024), (1, 640, 1408), (2, 128, 128), (5, 1024, 640)),
    *((17, 384, 1408), (64, 384, 2048), (130, 640, 4096), (300, 256, 896)),
]
PRODUCERS: dict[str, tuple[int, Callable[..., Any]]] = {  # bytes an element with int8 codes and 16-bit floats; the producer
    "add_rms_norm": (7, lambda x, y, w: entry.add_rms_norm(x, y, w, 1e-6)),
    "layer_norm": (3, lambda x, y, w: entry.layer_norm(x, w, w, 1e-5)),
    "silu_mul": (5, lambda x, y, w: entry.silu_mul(x, y)),
    "gelu": (3, lambda x, y, w: entry.gelu(x)),
    "plain": (3, lambda x, y, w: entry.plain(x)),
}
SWEEP = {
    1: [Config(8, n, s, n // 32, p, k) for n in (64, 128) for s in (1, 2, 4, 8) for p in (3, 4) for k in (1, 2, 4, 8)],
    4: [Config(8, n, s, n // 32, p, k) for n in (64, 128) for s in (1, 2, 4, 8) for p in (3, 4) for k in (1, 2)],
    16: [Config(16 * k, n, s, 4, p, k) for n in (64, 128) for s in (1, 2, 4, 8) for p in (3, 4) for k in (1, 2)],
    64: [Config(m, n, s, stages=p) for m in (32, 64) for n in (64, 128) for s in (1, 2, 4, 8) for p in (3, 5)],
    256: [Config(m, n, s, w, p) for m in (64, 128, 256) for n in (64, 128) for s in (1, 2, 4) for w, p in ((4, 3), (8, 4))],
    8192: [Config(m, n, 1, w, p) for m in (128, 256) for n in (128, 256) for w in (4, 8) for p in (3, 4)],
}
SWEEP_OF_TABLES = [Config(1, n, s, w) for n, w in ((64, 2), (128, 4), (256, 4), (256, 8)) for s in (1, 2, 3, 4, 6, 8, 12, 16)]
SWEEP_OF_CODES = {
    16: [Config(16, n, s, stages=p) for n in (64, 128) for s in (1, 2, 4, 8) for p in (4, 6)],
    64: [Config(m, n, s, stages=p) for m in (32, 64) for n in (64, 128) for s in (1, 2, 4) for p in (3, 5)],
    256: [Config(m, n, s, w, p) for m in (64, 128) for n in (64, 128) for s in (1, 2) for w, p in ((4, 4), (8, 4))],
    8192: [Config(m, n, 1, w, p) for m, n, w in ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)) for p in (3, 4)],
}
UNFIT = (RuntimeError, AssertionError, OutOfResources, PTXASError, CompilationError)  # what a configuration may raise


def prepared(scheme: str, out: int, inner: int, dtype: torch.dtype = torch.float16) -> Prepared:
    """A random matrix, laid out."""
    return kernel_bench.prepared(scheme, out, inner, dtype, DEVICE)


def in_parallel(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """Results in order; on a GPU by many processes, because compiling is what takes the time and its cache is on disk."""
    if DEVICE == "cpu":
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def check() -> list[dict[str, Any]]:
    """Relative errors of every scheme, dtype and a few shapes; a row that is wrong is not "right"."""
    dtypes = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
    rows = []
    for row in in_parallel(checked, [(scheme, dtype) for dtype in dtypes for scheme in CHECKS]):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows + check_rows() + check_floats()


def checked(job: tuple[str, torch.dtype]) -> dict[str, Any]:
    """The worst relative error of a scheme with a dtype; what does not run is infinitely wrong, and says why."""
    scheme, dtype = job
    try:
        worst, same = worst_of(scheme, dtype)
    except Exception as error:  # one kernel that does not compile must not hide how the others do
        return {"scheme": scheme, "dtype": str(dtype), "error": float("inf"), "right": False, "reason": str(error)[:500]}
    most = 1e-3 if dtype == torch.float16 else 8e-3
    return {"scheme": scheme, "dtype": str(dtype), "error": worst, "right": worst < most and same}


def worst_of(scheme: str, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest relative error over shapes, and whether the same input gave the same bits."""
    torch.manual_seed(0)
    worst, same = 0.0, True
    for m, out, inner in SHAPES_OF_CHECKS if DEVICE == "cuda" else [(1, 128, 256), (3, 128, 256)]:
        inner = inner // 128 * 128
        matrix = prepared(scheme, out, inner, dtype)
        x = torch.randn(m, inner, device=DEVICE, dtype=dtype)
        bias, residual = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((out,), (m, out)))
        rows_of_x = x if matrix.inputs is None else entry.plain(x, matrix.inputs)
        known = x if isinstance(rows_of_x, torch.Tensor) else reference.dequantize_rows(rows_of_x)
        wanted = reference.linear(known.double(), unpack(matrix.packed), bias, residual)
        torch.full((m, out), float("nan"), device=DEVICE, dtype=dtype)  # what the output may be put on
        found = linear(rows_of_x, matrix, bias, residual)
        same &= torch.equal(found, linear(rows_of_x, matrix, bias, residual))
        error = float((found.double() - wanted).norm() / wanted.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst, same


def check_rows() -> list[dict[str, Any]]:
    """The same for the row quantizers: codes that differ from the specification's, by more than one or in more than 1 %."""
    rows = []
    x, y = (torch.randn(33, 1408, device=DEVICE, dtype=torch.float16) for _ in range(2))
    w = torch.rand(1408, device=DEVICE, dtype=torch.float16)
    wanted = {
        "add_rms_norm": reference.rms_norm(x + y, w, 1e-6),
        "layer_norm": reference.layer_norm(x, w, w, 1e-5),
        "silu_mul": reference.silu_mul(x, y),
        "gelu": reference.gelu(x),
        "plain": x.float(),
    }
    for name, (_, producer) in PRODUCERS.items():
        made = producer(x, y, w)
        found = made if isinstance(made, reference.Quantized) else made[0]
        expected = reference.quantize_rows(wanted[name], entry.INT8.spec)
        apart = (found.codes.int() - expected.codes.int()).abs()
        share = float((apart > 0).float().mean())
        rows.append({"scheme": name, "dtype": "int8", "error": share, "right": int(apart.max()) <= 1 and share < 0.01})
    return rows


def check_floats() -> list[dict[str, Any]]:
    """Relative errors of what a step of decoding does between its products, in float16."""
    tokens = 300 if DEVICE == "cuda" else 20
    q, k, v = torch.randn(3, 2, 9, tokens, 128, device=DEVICE, dtype=torch.float16)
    angles = torch.randn(2, 1, tokens, 128, device=DEVICE)
    mask = torch.rand(2, 1, 1, tokens, device=DEVICE) < 0.3
    x, y = (torch.randn(33, 1408, device=DEVICE, dtype=torch.float16) for _ in range(2))
    made = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    entry.put(*made, k, v, torch.arange(tokens, device=DEVICE))
    found = {
        "rope": (entry.rope(q, k, *angles)[0], reference.rope(q, *angles)),
        "attend": (entry.attend(q[:, :, :1], k, v, mask, 0.1), reference.attend(q[:, :, :1], k, v, mask[:, 0, 0], 0.1)),
        "attend of many": (entry.attend(q, k, v, mask, 0.1), reference.attend(q, k, v, mask[:, 0, 0], 0.1)),
        "attend to all": (entry.attend(q, k, v, None, 0.1), reference.attend(q, k, v, None, 0.1)),
        "put": (torch.cat(made), torch.cat([k, v])),
        "rms_norm": (entry.rms_norm(x, y[0], 1e-6, None), reference.rms_norm(x, y[0], 1e-6)),
        "silu_mul": (entry.silu_mul(x, y, None), reference.silu_mul(x, y)),
    }
    errors = {name: float((a.double() - b.double()).norm() / b.double().norm()) for name, (a, b) in found.items()}
    return [{"scheme": name, "dtype": "torch.float16", "error": e, "right": e < 1e-3} for name, e in errors.items()]


def run(matrix: Prepared, rows: torch.Tensor | reference.Quantized, config: Config) -> torch.Tensor:
    """A product by a configuration."""
    if isinstance(rows, torch.Tensor):
        kernel = binary if binary.takes(len(rows), matrix.packed) else weight_only
        return kernel.linear(rows, matrix.packed, None, None, config=config)
    return codes.linear(rows, matrix.packed, None, None, matrix.dtype, config=config)


def candidates(scheme: str, m: int) -> list[Config]:
    """The configurations that a sweep tries."""
    if m == 1 and parse_scheme(scheme).weight.format.kind == "bcq":
        return SWEEP_OF_TABLES
    sweep = SWEEP if parse_scheme(scheme).input is None else SWEEP_OF_CODES
    return sweep[next(limit for limit in sweep if m <= limit)]


def compiled(job: tuple[str, int, Config]) -> str | None:
    """Compile what a sweep will time; why it does not fit the GPU, if so."""
    scheme, m, config = job
    matrix = prepared(scheme, 512, 4096, dtype_of(scheme))
    x = torch.randn(m, 4096, device=DEVICE, dtype=matrix.dtype)
    try:
        run(matrix, x if matrix.inputs is None else entry.plain(x, matrix.inputs), config)
        torch.cuda.synchronize()
    except UNFIT as error:
        return f"{scheme} {config}: {str(error).splitlines()[0][:80]}"
    return None


def swept(scheme: str, x: torch.Tensor, many: list[Prepared]) -> tuple[float, Config | None]:
    """The least microseconds, and of which configuration; of codes without their quantization."""
    inputs = many[0].inputs
    rows = x if inputs is None else entry.plain(x, inputs)
    best, found = float("inf"), None
    for config in candidates(scheme, len(x)):
        try:
            taken = time_of([partial(run, matrix, rows, config) for matrix in many], replays=7)
        except UNFIT:
            continue
        if taken < best:
            best, found = taken, config
    return best, found


def measured(part: str, sweep: bool, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Every shape, number of rows and scheme of a part, with the peers of that part."""
    schemes, rows, others = PARTS[part]
    if sweep:
        jobs = {(scheme, m, config) for scheme in schemes for m in rows for config in candidates(scheme, m)}
        for reason in filter(None, in_parallel(compiled, jobs)):
            print(reason, file=sys.stderr, flush=True)
    for inner, out in SHAPES:
        beside: dict[int, dict[str, float]] = {}
        for scheme in schemes:
            matrix = prepared(scheme, out, inner, dtype_of(scheme))
            many = copies(matrix)
            for m in rows:
                if m not in beside:
                    beside[m] = {name: us for peer in others for name, us in timed(peer, m, inner, out).items()}
                x = torch.randn(m, inner, device=DEVICE, dtype=matrix.dtype)
                row: dict[str, Any] = {"scheme": scheme, "inner": inner, "out": out, "m": m}
                row["floor"] = floor_of(matrix, m, limits)
                row["lowbit"] = time_of([lambda w=w, x=x: linear(x, w) for w in many])
                if sweep:
                    row["best"], config = swept(scheme, x, many)
                    row["best_config"] = None if config is None else vars(config)
                yield row | beside[m]


def measured_rows(limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Every producer, 2048 rows of 4096."""
    for name, (nbytes, producer) in PRODUCERS.items():
        count = copies_of(nbytes * 2048 * 4096)
        many = [tuple(torch.randn(2048, 4096, device=DEVICE, dtype=torch.float16) for _ in range(2)) for _ in range(count)]
        w = torch.rand(4096, device=DEVICE, dtype=torch.float16)
        row: dict[str, Any] = {"scheme": name, "inner": 4096, "out": 4096, "m": 2048}
        row["floor"] = nbytes * 2048 * 4096 / limits["copy"] * 1e6
        yield row | {"lowbit": time_of([lambda x=x, y=y, w=w, make=producer: make(x, y, w) for x, y in many])}


# Schemes, numbers of rows, and what they are timed beside.
PARTS: dict[str, tuple[list[str], list[int], list[Callable[[int, int, int], float]]]] = {
    "floats": (["w4a16-g128"], ROWS, [cublas, tinygemm, gemlite]),
    "others": (["w2a16-g64", "w3a16-g128", "w8a16-channel", "mxfp4a16", "nvfp4a16"], [1, 16, 256], [cublas]),
    "codes": (["w8a8", "fp8", "w4a8-channel", "w4a8"], [16, 64, 256, 2048, 8192], [cublas, int_mm, scaled_mm]),
    "binary": (["bcq2", "bcq3", "bcq4"], [1, 4, 16], [cublas]),
}
LUT_GEMM = {"bcq2": 0.32, "bcq3": 0.41, "bcq4": 0.49}  # its time at M = 1 over that of cuBLAS, 4096 x 11008, one H100


def met(part: str, row: dict[str, Any]) -> bool | None:
    """Whether a row does what is asked for; None where nothing is."""
    ours, m, floor = row["lowbit"], row["m"], row["floor"]
    if part == "rows":
        return ours <= 1.25 * floor
    if "cublas" not in row:
        return None
    if part == "floats":
        rival = min(row[name] for name in ("cublas", "tinygemm", "gemlite") if name in row)
        near = m > 16 or floor < 10 or ours <= (1.2 if floor >= 40 else 1.35) * floor
        return ours <= (1.0 if m <= 64 else 1.1) * rival and near
    if part == "binary":
        return ours <= LUT_GEMM[row["scheme"]] * row["cublas"] if m == 1 else None
    if part == "codes" and row["scheme"] in ("w8a8", "fp8"):
        return ours * (1.5 if m >= 2048 else 1.0) <= row["cublas"]
    return None


def markdown(parts: dict[str, dict[str, Any]]) -> str:
    """The section `kernels`."""
    first = next(iter(parts.values()))
    lines = [*describe(first["environment"])]
    for part, result in parts.items():
        lines += ["", f"### {part}", ""]
        if part == "check":
            wrong = [f"{row['scheme']} {row['dtype']} {row['error']:.1e}" for row in result["rows"] if not row["right"]]
            lines.append(f"{len(result['rows'])} schemes, dtypes and producers checked; wrong: {', '.join(wrong) or 'none'}")
            continue
        limits, rows = result["limits"], result["rows"]
        lines += [
            f"Read {limits['bytes'] / 1e12:.2f} TB/s, copy {limits['copy'] / 1e12:.2f} TB/s, cuBLAS float16 "
            f"{limits['operations'] / 1e12:.0f} T/s. Medians of CUDA-graph replays in microseconds; inputs are quantized.",
            "",
        ]
        others = [
            name for name in ("best", "cublas", "tinygemm", "gemlite", "int_mm", "scaled_mm") if any(name in r for r in rows)
        ]
        words = {True: "met", False: "missed", None: ""}
        cells = [
            [row["scheme"], f"{row['inner']} x {row['out']}", str(row["m"]), f"{row['lowbit']:.1f}", f"{row['floor']:.1f}"]
            + [f"{row[name]:.1f}" if name in row else "" for name in others]
            + [words[met(part, row)]]
            for row in rows
        ]
        lines.append(table(["scheme", "in x out", "M", "lowbit", "floor", *others, "bar"], cells))
    return "\n".join(lines)


def measure(part: str, *, sweep: bool = False) -> dict[str, Any]:
    """One part: environment, limits (but of "check") and rows; what `lowbit bench` may call."""
    torch.manual_seed(0)
    where = environment(DEVICE)
    if part == "check":
        return {"environment": where, "rows": check()}
    limits = ceilings()
    rows = []
    for row in measured_rows(limits) if part == "rows" else measured(part, sweep, limits):
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return {"environment": where, "limits": limits, "rows": rows}


def main() -> int:
    """Check or time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["check", "rows", *PARTS], default="check")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernels")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = measure(args.part, sweep=args.sweep)
    there = {name: args.out / f"{name}.json" for name in ("check", "rows", *PARTS)}
    parts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in there.items() if path.exists()}
    parts[args.part] = result
    keep(result, there[args.part], markdown(parts), page=args.markdown, name="kernels")
    if args.part == "check":
        return 0 if all(row["right"] for row in result["rows"]) else 1
    return 0 if all(met(args.part, row) is not False for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
