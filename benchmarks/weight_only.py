"""The weight-only linear on a GPU: checked against the reference first, then timed beside cuBLAS and PyTorch's int4 kernel.

    python benchmarks/weight_only.py [--sweep] [--bits 4]

Checks: all bits, groups, symmetric or not, float16 and bfloat16, odd shapes, outputs poisoned by NaN in between, the same bits
twice. Times: CUDA graphs of launches over as many copies of the weights as exceed twice the L2 cache, the median of replays;
the floor is bytes over the read bandwidth, or operations over the rate of a large cuBLAS product, both measured in that run.
--sweep also times other configurations and says which are best. --out gets weight_only.json, the table goes into the section
`weight-only` of --markdown. The exit status is 1 if a check fails or a bar is missed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sections import RESULTS, ROOT, describe, environment, keep

from lowbit.kernels import reference
from lowbit.kernels.weight_only import Config, Packed, config_for, linear, pack, unpack
from lowbit.qtensor import QTensor, find_params, parse_scheme, quantize
from lowbit.report import table

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824), (8192, 28672)]  # in, out
ROWS = [1, 4, 16, 64, 256, 2048]
CHECKS = [
    *("w2a16-g32", "w2a16-g64-asym", "w3a16-g128", "w3a16-g64-asym", "w4a16-g32", "w4a16-g64-asym", "w4a16-g128"),
    *("w4a16-g128-asym", "w4a16-channel", "w8a16-g128", "w8a16-channel-asym", "w8a16-g32"),
]
SWEEP = {
    16: [Config(16, n, s, stages=p) for n in (32, 64, 128) for s in (1, 2, 4, 8, 16) for p in (3, 5)],
    64: [Config(m, n, s, stages=p) for m in (32, 64) for n in (64, 128) for s in (1, 2, 4, 8) for p in (3, 4)],
    256: [Config(m, n, s, w, 3) for m in (64, 128, 256) for n in (64, 128) for s in (1, 2, 4) for w in (4, 8)],
    2048: [Config(m, n, 1, w, p) for m in (128, 256) for n in (64, 128, 256) for w in (4, 8) for p in (3, 4)],
}


def quantized(scheme: str, out: int, inner: int, dtype: torch.dtype) -> QTensor:
    """A random matrix, quantized on the GPU."""
    spec = parse_scheme(scheme).weight
    w = torch.randn(out, inner, device="cuda") / inner**0.5
    return quantize(w, find_params(w, spec, scale_dtype=dtype), spec)


def check() -> list[dict[str, Any]]:
    """Relative errors of every scheme, dtype and a few shapes; a row that is wrong is not "right"."""
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        most = 1e-3 if dtype == torch.float16 else 8e-3
        for scheme in CHECKS:
            worst = 0.0
            same = True
            for m, out, inner in (
                (1, 200, 1024),
                (5, 1000, 640),
                (17, 256, 1408),
                (64, 384, 2048),
                (130, 520, 4096),
                (300, 264, 896),
            ):
                inner = inner // 128 * 128
                packed = pack(quantized(scheme, out, inner, dtype), dtype)
                x = torch.randn(m, inner, device="cuda", dtype=dtype)
                bias = torch.randn(out, device="cuda", dtype=dtype)
                wanted = reference.linear(x.double(), unpack(packed), bias)
                for config in (config_for(m, out, inner, 132), Config(16, 64, 4), Config(128, 64, 1)):
                    torch.full((m, out), float("nan"), device="cuda", dtype=dtype)  # what the output may be put on
                    found = linear(x, packed, bias, config=config)
                    same &= torch.equal(found, linear(x, packed, bias, config=config))
                    error = float((found.double() - wanted).norm() / wanted.norm())
                    worst = max(worst, error if error == error else float("inf"))
            rows.append({"scheme": scheme, "dtype": str(dtype), "error": worst, "right": worst < most and same})
    return rows


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
    """Bytes read a second, and float16 operations a second."""
    big = torch.randn(2**28, device="cuda")
    read = time_of([lambda: big.sum()] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product = time_of([lambda: a @ b] * 4)
    return {"bytes": big.nbytes / read * 1e6, "operations": 2 * 8192**3 / product * 1e6}


def peers(packed: Packed, m: int, inner: int, out: int) -> dict[str, float]:
    """Microseconds of cuBLAS float16 and of PyTorch's int4 kernel (tinygemm, bfloat16, groups of 128)."""
    weights = [torch.randn(out, inner, device="cuda", dtype=torch.float16) for _ in range(copies_of(2 * out * inner))]
    x = torch.randn(m, inner, device="cuda", dtype=torch.float16)
    found = {"cublas": time_of([lambda w=w: x @ w.T for w in weights])}
    del weights
    if m <= 64:
        try:
            codes = torch.randint(0, 256, (out, inner // 2), device="cuda", dtype=torch.uint8)
            words = torch._convert_weight_to_int4pack(codes, 8)
            scales = torch.rand(inner // 128, out, 2, device="cuda", dtype=torch.bfloat16)
            many = [words.clone() for _ in range(copies_of(words.nbytes))]
            half = x.bfloat16()
            found["tinygemm"] = time_of([lambda w=w: torch._weight_int4pack_mm(half, w, 128, scales) for w in many])
        except RuntimeError as error:
            print(f"tinygemm {inner}x{out}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def measured(bits: int, sweep: bool, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Every shape and number of rows."""
    rows = []
    for inner, out in SHAPES:
        packed = pack(quantized(f"w{bits}a16-g128", out, inner, torch.float16), torch.float16)
        many = [packed, *(packed.to("cpu").to("cuda") for _ in range(copies_of(packed.nbytes) - 1))]
        for m in ROWS:
            x = torch.randn(m, inner, device="cuda", dtype=torch.float16)

            def ours(config: Config | None, x: torch.Tensor = x, many: list[Packed] = many) -> float:
                return time_of([lambda w=w: linear(x, w, config=config) for w in many])

            chosen = config_for(m, out, inner, torch.cuda.get_device_properties(0).multi_processor_count)
            moved = packed.nbytes + 2 * m * (inner + out)
            floor = max(moved / limits["bytes"], 2 * m * inner * out / limits["operations"]) * 1e6
            row: dict[str, Any] = {
                "inner": inner,
                "out": out,
                "m": m,
                "floor": floor,
                "lowbit": ours(None),
                "config": vars(chosen),
            }
            row |= peers(packed, m, inner, out) if bits == 4 else {}
            if sweep:
                row["best"], row["best_config"] = row["lowbit"], vars(chosen)
                for config in SWEEP[next(limit for limit in SWEEP if m <= limit)]:
                    try:
                        taken = ours(config)
                    except Exception as error:  # noqa: BLE001 (a configuration that does not fit the GPU)
                        print(f"{m} {config}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
                        continue
                    if taken < row["best"]:
                        row["best"], row["best_config"] = taken, vars(config)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of w4a16-g128."""
    found = []
    for row in rows:
        if "cublas" not in row:
            continue
        rival = min(row[name] for name in ("cublas", "tinygemm") if name in row)
        most = 1.0 if row["m"] <= 64 else 1.1
        met = row["lowbit"] <= most * rival
        if row["m"] <= 16 and row["floor"] >= 10:
            met &= row["lowbit"] <= (1.2 if row["floor"] >= 40 else 1.35) * row["floor"]
        found.append({"bar": f"{row['inner']}x{row['out']}, M {row['m']}", "met": met})
    return found


def markdown(result: dict[str, Any]) -> str:
    """The section `weight-only`."""
    limits = result["limits"]
    wrong = [row for row in result["checks"] if not row["right"]]
    lines = [
        *describe(result["environment"]),
        f"- Read bandwidth {limits['bytes'] / 1e12:.2f} TB/s, cuBLAS float16 {limits['operations'] / 1e12:.0f} T/s",
        f"- Checks: {len(result['checks'])} schemes and dtypes, {len(wrong)} wrong; the largest relative error is "
        f"{max(row['error'] for row in result['checks']):.1e}",
        "",
        "Microseconds, float16, groups of 128, median of CUDA-graph replays; tinygemm is PyTorch's int4 kernel in bfloat16.",
        "",
    ]
    cells = []
    for row in result["rows"]:
        best = [f"{row['best']:.1f}"] if "best" in row else []
        others = [f"{row[name]:.1f}" if name in row else "" for name in ("cublas", "tinygemm")]
        ratio = f"{row['cublas'] / row['lowbit']:.2f}" if "cublas" in row else ""
        shape = f"{row['inner']} x {row['out']}"
        cells.append([shape, str(row["m"]), f"{row['lowbit']:.1f}", *best, *others, f"{row['floor']:.1f}", ratio])
    head = [
        "in x out",
        "M",
        "lowbit",
        *(["best of the sweep"] if "best" in result["rows"][0] else []),
        "cuBLAS",
        "tinygemm",
        "floor",
    ]
    lines += [table([*head, "times cuBLAS"], cells), ""]
    missed = [bar["bar"] for bar in result["bars"] if not bar["met"]]
    lines.append(
        f"- Bars met in {len(result['bars']) - len(missed)} of {len(result['bars'])} cells, missed: "
        + (", ".join(missed) or "none")
    )
    return "\n".join(lines)


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "weight-only")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    where = environment("cuda")
    checks = check()
    for row in checks:
        print(json.dumps(row), file=sys.stderr, flush=True)
    limits = ceilings()
    rows = measured(args.bits, args.sweep, limits)
    result = {"environment": where, "limits": limits, "checks": checks, "rows": rows, "bars": bars(rows)}
    keep(result, args.out / "weight_only.json", markdown(result), page=args.markdown, name="weight-only")
    return 0 if all(row["right"] for row in checks) and all(bar["met"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
