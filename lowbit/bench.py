"""How fast models are: prefill and decoding, the original beside quantized ones, and what the machine's memory allows at best.

Decoding is by `decoding.Decoder`, as `lowbit generate` does it, in a CUDA graph on a GPU. The floor of a step is the bytes of
all weights it reads over the read bandwidth measured in the same run. Times are medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit import export, runtime
from lowbit.arguments import checked, parse_device
from lowbit.decoding import Decoder, reason_against, reason_against_graph
from lowbit.kernels.entry import Prepared
from lowbit.page import save_figure
from lowbit.runtime import PackedLinear

RUNS = 7
PEERS = ("torchao-int4", "torchao-int8")  # the first model quantized by another package


def quantize_by(peer: str, model: Any) -> None:
    """Quantize the linears of a model, but its head, by a peer: weights of 4 bits in groups of 128, or weights and inputs int8.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError(f"{peer} needs torchao ({error}): pip install torchao") from error
    config = (
        Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        if peer == "torchao-int4"
        else Int8DynamicActivationInt8WeightConfig()
    )
    head = model.get_output_embeddings()
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and module is not head)


def seconds_of(action: Callable[[], Any], device: torch.device, *, runs: int = RUNS) -> float:
    """Median seconds of an action, after one that does not count."""
    taken = []
    for _ in range(runs + 1):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes read a second."""
    big = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    return big.nbytes / seconds_of(lambda: big.sum(), device)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights: packed matrices, and parameters and buffers once each."""
    matrices = {id(m.prepared): m.prepared for m in model.modules() if isinstance(m, PackedLinear)}
    packed = sum(each.nbytes for each in matrices.values() if isinstance(each, Prepared))
    return packed + sum(_bytes(part) for part in (*model.parameters(), *model.buffers()))


def _bytes(part: Any) -> int:
    """Bytes of a tensor, or of those that a tensor of another package is made of."""
    if not is_traceable_wrapper_subclass(part):
        return int(part.nbytes)
    return sum(_bytes(getattr(part, name)) for name in part.__tensor_flatten__()[0])


def read_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: all but those of an embedding that is only looked up."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return weight_bytes(model) - (0 if head is None or head.weight is table else table.nbytes)


@torch.no_grad()
def bench_model(model: Any, *, rows: int, prompt: int, tokens: int, compiled: bool = False) -> dict[str, Any]:
    """Time a causal model on random tokens [rows, prompt], then `tokens` steps.

    Returns:
        "prefill_seconds", "step_seconds", "graph" (whether steps were one), "weight_bytes", "read_bytes", and on a GPU
        "peak_bytes"; step_seconds is None where the model cannot decode by `Decoder`, with "reason".
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    size = model.get_input_embeddings().num_embeddings
    text = torch.randint(0, size, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, Any] = {
        "rows": rows,
        "prompt": prompt,
        "weight_bytes": weight_bytes(model),
        "read_bytes": read_bytes(model),
    }
    found["prefill_seconds"] = seconds_of(lambda: model(input_ids=text, use_cache=False), device)
    found |= {"step_seconds": None, "graph": False, "reason": reason_against(model)}
    if found["reason"] is None:
        decoder = Decoder(model, rows, prompt + tokens, compiled=compiled)
        decoder.prefill(text)
        found["graph"] = reason_against_graph(model, prompt + tokens) is None
        if found["graph"]:
            decoder.capture()

        def steps() -> None:
            decoder.prefill(text)
            _wait(device)
            start = time.perf_counter()
            for _ in range(tokens):
                decoder.step()
            _wait(device)
            taken.append((time.perf_counter() - start) / tokens)

        taken: list[float] = []
        for _ in range(3):
            steps()
        found["step_seconds"] = statistics.median(taken)
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


@checked
def bench(
    models: Sequence[str], *, batches: Sequence[int] = (1, 16), prompt: int = 512, tokens: int = 64, device: str = "cpu",
    dtype: torch.dtype | None = None, compiled: bool = False, peers: Sequence[str] = (),
    trust_remote_code: bool = False, progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time models one after the other, the first being what others are compared with.

    Args:
        models: folders or hub ids; quantized ones run on the kernels.
        peers: of PEERS, which quantize the first model, too.
        trust_remote_code: run the Python code in the models' folders, see `runtime.load`.

    Returns:
        "bandwidth", bytes a second, and "rows": for each model and batch what `bench_model` gives, "model" (or the peer), the
        ratios "prefill_speedup" and "step_speedup" to the first, and "of_roofline", the floor of a step over what it took.
    """
    where = parse_device(device)
    if not models:
        raise ValueError("models = []; give at least one")
    for name, value in (("prompt", prompt), ("tokens", tokens), ("batches", min(batches, default=0))):
        if value < 1:
            raise ValueError(f"{name} = {value}; allowed are whole numbers from 1 on")
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise ValueError(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if "torchao-int4" in peers and where.type != "cuda":
        raise ValueError("the kernel of torchao-int4 is one for GPUs; leave it out, or give --device cuda")
    opened = {name: export.open_checkpoint(name, trust_remote_code=trust_remote_code) for name in models}
    if peers and isinstance(opened[models[0]], export.QuantizedSource):
        raise ValueError(f"{models[0]} is quantized already, so that {peers[0]} cannot do it; name the original first")
    speed = bandwidth(where)
    rows: list[dict[str, Any]] = []
    jobs = [(name, None) for name in models] + [(models[0], peer) for peer in peers]
    for i, (name, peer) in enumerate(jobs):
        quantized = isinstance(opened[name], export.QuantizedSource)
        given = (torch.bfloat16 if where.type == "cuda" else None) if dtype is None else dtype
        model: Any = runtime.load(name, device=device, dtype=given, kernels=quantized, trust_remote_code=trust_remote_code)
        if not model.can_generate():
            raise ValueError(f"{name} is a {type(model).__name__}, which does not generate text")
        if peer is not None:
            quantize_by(peer, model)
        for j, batch in enumerate(batches):
            row = {"model": peer or name} | bench_model(model, rows=batch, prompt=prompt, tokens=tokens, compiled=compiled)
            first = rows[j] if i else row
            row["prefill_speedup"] = first["prefill_seconds"] / row["prefill_seconds"]
            both = first["step_seconds"] is not None and row["step_seconds"] is not None
            row["step_speedup"] = first["step_seconds"] / row["step_seconds"] if both else None
            row["of_roofline"] = row["read_bytes"] / speed / row["step_seconds"] if row["step_seconds"] else None
            rows.append(row)
            if progress is not None:
                progress("timing", len(rows), len(jobs) * len(batches))
        del model
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return {"device": device, "bandwidth": speed, "rows": rows}


def _no_formula(text: str) -> str:
    """Text for a label, which matplotlib would read as a formula between two dollars."""
    return text.replace("$", r"\$")


def plot(result: dict[str, Any], path: str) -> None:
    """Write a roofline picture of steps: tokens a second against tokens a byte read, under the measured bandwidth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    points = [row for row in result["rows"] if row["step_seconds"]]
    if points:
        intensity = [row["rows"] / row["read_bytes"] for row in points]
        line = [min(intensity) / 2, max(intensity) * 2]
        axes.loglog(line, [x * result["bandwidth"] for x in line], "k--", label="read bandwidth")
        for row, x in zip(points, intensity, strict=True):
            axes.loglog(
                [x], [row["rows"] / row["step_seconds"]], "o", label=f"{_no_formula(row['model'])}, batch {row['rows']}"
            )
        axes.legend(fontsize="small")
    axes.set_xlabel("tokens for each byte of weights read")
    axes.set_ylabel("tokens a second")
    save_figure(figure, path)
