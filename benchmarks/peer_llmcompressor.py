"""Quantize a model with llm-compressor, for comparison, and record what it took.

    python peer_llmcompressor.py MODEL TOKENS.safetensors OUT_DIR --scheme W4A16|W4A16_ASYM|W8A8|...
                                 [--group-size N] --method rtn|gptq|awq|smooth|smooth+gptq

For an environment that has llm-compressor and not lowbit: imports nothing of lowbit. TOKENS.safetensors holds `tokens`,
int64 [rows, length]: each row is one calibration sample, run alone and in order (llm-compressor's batch size is 1); rtn
reads none of them. All choices that have no option here are llm-compressor's defaults: the model keeps the dtype it is
stored in (float32 is used inside GPTQ only), activation order and observer are the modifier's own. The head is not
quantized and GPTQ's dampening is 0.01.

OUT_DIR, which must be new or empty, gets the compressed checkpoint and at the end peer.json: versions, settings,
seconds and peak memory. The seconds of `oneshot` contain neither loading nor saving; `total` is the whole process,
imports included. Peak memory comes twice: `ru_maxrss` also counts the process that started this one, if that was
larger; `vm_hwm` (Linux only, else null) does not.
"""

import os
import time

_BEGIN = time.perf_counter()
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

DAMPENING = 0.01
SCHEMES = ["W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A8", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16"]
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "accelerate")


def peak_memory() -> dict[str, int | None]:
    """Peak resident bytes of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return {
        "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "vm_hwm": next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None),
    }


def make_scheme(name: str, group_size: int | None) -> QuantizationScheme:
    """The preset `name` for all linear layers, with another group size if one is given."""
    preset = preset_name_to_scheme(name, ["Linear"]).model_dump()
    if group_size is not None:
        preset["weights"]["group_size"] = group_size
    return QuantizationScheme.model_validate(preset)


def main() -> None:
    seconds = {"import": time.perf_counter() - _BEGIN}
    memory = {"after_import": peak_memory()}

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--group-size", type=int, metavar="N", help="the preset's (128) by default; W8A8 has none")
    parser.add_argument("--method", choices=["rtn", "gptq", "awq", "smooth", "smooth+gptq"], required=True)
    args = parser.parse_args()
    if args.group_size is not None and (args.scheme == "W8A8" or args.group_size < 1):
        parser.error("--group-size is a positive number, and W8A8 has one scale for each row of the weight")
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        parser.error(f"{args.out_dir} is not empty")

    if not torch.accelerator.is_available():  # AWQ asks for pinned memory wherever it runs, which machines without one refuse
        torch.Tensor.pin_memory = lambda self, *rest: self  # type: ignore[method-assign,assignment]
    tokens = load_file(args.tokens)["tokens"]
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seconds["load"] = time.perf_counter() - start

    groups = {"group_0": make_scheme(args.scheme, args.group_size)}
    loader: DataLoader | None = None
    rounding = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    if args.method.endswith("gptq"):
        rounding = GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=DAMPENING)
    before = {"awq": [AWQModifier()], "smooth": [SmoothQuantModifier()], "smooth+gptq": [SmoothQuantModifier()]}
    recipe = [*before.get(args.method, []), rounding]
    if args.method != "rtn":
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
        loader = DataLoader(samples, batch_size=1)
    start = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=loader)
    seconds["oneshot"] = time.perf_counter() - start

    start = time.perf_counter()
    model.save_pretrained(args.out_dir, save_compressed=True)
    tokenizer.save_pretrained(args.out_dir)
    seconds["save"] = time.perf_counter() - start

    seconds["total"] = time.perf_counter() - _BEGIN
    memory["end"] = peak_memory()
    saved = json.loads((args.out_dir / "config.json").read_text())
    record = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "method": args.method,
        "scheme": args.scheme,
        "dampening": DAMPENING if args.method.endswith("gptq") else None,
        "weights": saved["quantization_config"]["config_groups"]["group_0"]["weights"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": tokens.shape[0],
        "length": tokens.shape[1],
        "tokens_used": args.method != "rtn",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "memory": memory,
    }
    partial = args.out_dir / "peer.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(args.out_dir / "peer.json")


if __name__ == "__main__":
    main()
