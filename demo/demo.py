"""Quantize the small model of this folder at two settings, and show what each cost.

    python demo/demo.py [--out FOLDER]

For each setting: quantize with GPTQ, evaluate on a text that calibration has not seen, load the written folder with
transformers' own from_pretrained, check that it computes what was evaluated, and let it write a line. No network, no GPU.
The folders of an earlier run are replaced. The exit status is 1 if a folder does not load as it should.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lowbit
from lowbit.data import DataSpec, evaluation_tokens

HERE = Path(__file__).resolve().parent
MODEL = HERE / "llama-7m"
TEXT = HERE / "public_domain_eval.txt"
DATA = DataSpec(source=str(HERE / "public_domain_calibration.txt"), rows=32, length=512)
SCHEMES = ("w4a16", "w8a8")
WINDOW, WINDOWS = 512, 12
PROMPT, NEW_TOKENS = "The ship", 16
# Mean KL, nats, allowed between the evaluated model (float32) and the folder in transformers. It is 2e-4, as activations are
# bfloat16 there, and 3e-3 with w8a8, whose inputs transformers rounds with scales of absmax / 127.5, not absmax / 127 as
# vLLM and lowbit do. A damaged layer costs far more.
SAME = 0.01
HEAD = ("model", "size, MB", "bits/weight", "perplexity", "ratio", "KL, nats", "same top token", "seconds")


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Quantize the small model of demo/ at two settings, and show what each cost.")
    parser.add_argument("--out", type=Path, default=HERE / "out", metavar="FOLDER", help="where to write (default: demo/out)")
    out = parser.parse_args().out
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # products this small gain little from a second thread, and wait for it on a busy machine
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = evaluation_tokens(str(TEXT), tokenizer)
    original = lowbit.load(str(MODEL), dtype=torch.float32)
    measured = lowbit.evaluate(original, tokens, window=WINDOW, max_windows=WINDOWS)
    size = (MODEL / "model.safetensors").stat().st_size
    rows = [("llama-7m", f"{size / 1e6:.2f}", "16", f"{measured.perplexity:.3f}", "1", "", "", "")]
    lines = [("llama-7m", write_line(reload(MODEL), tokenizer))]
    for scheme in SCHEMES:
        folder = out / scheme
        report = lowbit.quantize(str(MODEL), folder, scheme=scheme, method="gptq", data=DATA, overwrite=True)
        quantized = lowbit.load(str(folder), dtype=torch.float32)
        measured = lowbit.evaluate(quantized, tokens, window=WINDOW, max_windows=WINDOWS, reference=original)
        try:
            loaded = reload(folder)
            check_same(quantized, loaded, tokens[:WINDOW])
        except (OSError, ValueError, RuntimeError) as error:
            print(f"{folder} does not load in transformers: {error}", file=sys.stderr)
            return 1
        sizes = report["sizes"]
        seconds = sum(stage["seconds"] for stage in report["stages"])
        rows.append(
            (
                scheme,
                f"{sizes['output_bytes'] / 1e6:.2f}",
                f"{sizes['bits_per_quantized_weight']:.2f}",
                f"{measured.perplexity:.3f}",
                f"{measured.perplexity / measured.reference_perplexity:.4f}",
                f"{measured.kl:.4f}",
                f"{measured.top1_agreement:.1%}",
                f"{seconds:.1f}",
            )
        )
        lines.append((scheme, write_line(loaded, tokenizer)))
    print_table(HEAD, rows)
    print(f"\nContinuing {PROMPT!r}, loaded by transformers from the folder:")
    for name, line in lines:
        print(f"{name:<{len(rows[0][0])}}  {line}")
    return 0


def reload(folder: Path) -> Any:
    """The model as transformers loads it.

    Raises:
        ValueError: tensors are missing, left over, or of another shape; from_pretrained alone would make up what is missing.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no option turns off
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
        if wrong:
            raise ValueError(f"{folder} loads with {wrong}")
        model.eval()(torch.zeros(1, 1, dtype=torch.int64))  # the first forward is what unpacks the weights
    return model


@torch.no_grad()
def check_same(quantized: Any, loaded: Any, tokens: Tensor) -> None:
    """Raise ValueError if two models do not compute the same distributions for tokens [n]."""
    first, second = (model(tokens[None]).logits[0].float().log_softmax(-1) for model in (quantized, loaded))
    kl = float((first.exp() * (first - second)).sum(-1).mean())
    if not kl < SAME:
        raise ValueError(f"it computes something else than was evaluated: mean KL {kl:.2g} nats, not below {SAME:g}")


def write_line(model: Any, tokenizer: Any) -> str:
    """The prompt and the likeliest words after it, on one line."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    for line in (head, tuple("-" * width for width in widths), *rows):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
