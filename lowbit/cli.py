"""The command line: lowbit quantize | plan | compare | eval | inspect | generate | bench.

Every import that costs time happens inside the command that needs it, so that --help answers at once.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowbit import __version__

_DESCRIPTION = "Post-training quantization of Hugging Face transformer models to checkpoints that real engines load."
_EXAMPLES = """examples:
  lowbit quantize MODEL --out OUT --scheme w4a16 --method gptq --data calibration.jsonl
  lowbit quantize MODEL --out OUT --recipe recipes/gptq-w4a16.toml
  lowbit plan MODEL --bits 4.5 --data calibration.jsonl --out plan.toml
  lowbit eval OUT --data test.txt --reference MODEL
  lowbit generate OUT --prompt "Once upon a time"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for an error the user can mend (told in one line on stderr)."""
    arguments = _parser().parse_args(argv)
    if arguments.command is None:
        _parser().print_help()
        return 0
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "quantize": _quantize,
        "plan": _plan,
        "compare": _compare,
        "eval": _eval,
        "inspect": _inspect,
        "generate": _generate,
        "bench": _bench,
    }
    try:
        commands[arguments.command](arguments)
        sys.stdout.flush()
    except (ValueError, ImportError) as error:
        print(f"lowbit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `lowbit inspect OUT | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("lowbit: interrupted; the same command run again goes on from there", file=sys.stderr)
        return 130
    return 0


# ----------------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    sub = commands.add_parser("quantize", help="write a quantized checkpoint; run again after a crash, it resumes")
    sub.add_argument("model", metavar="MODEL", help="folder or hub id of a float checkpoint")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")
    sub.add_argument("--overwrite", action="store_true", help="replace DIR, and forget an unfinished run of something else")
    sub.add_argument("--device", default="cpu", help="where blocks are solved: cpu (default), cuda, cuda:1, ...")
    sub.add_argument("--parallel", type=int, default=1, metavar="N", help="processes that train side by side, for mrem")
    sub.add_argument("--deterministic", action="store_true", help="have the result of --parallel not depend on timing")
    what = sub.add_argument_group("what to do: a recipe, or the short form")
    what.add_argument("--recipe", metavar="FILE.toml", help="rules, steps, data and format as TOML")
    what.add_argument("--scheme", help="w4a16, w4a16-g64-asym, w8a8, fp8, fp8-block, mxfp4, nvfp4a16, nf4, ... (README)")
    what.add_argument("--method", help="rtn (default), gptq, or steps in their order, such as smooth+gptq")
    what.add_argument(
        "--option",
        action="append",
        metavar="NAME=VALUE",
        help="an option of the method, such as damping=0.02, or of another step, such as smooth.alpha=auto; repeatable",
    )
    what.add_argument(
        "--ignore", action="append", metavar="REGEX", help="linears to leave float (default: lm_head); repeatable"
    )
    what.add_argument("--format", choices=("compressed-tensors", "lowbit"), help="default: compressed-tensors")
    what.add_argument("--kv-cache", choices=("fp8",), help="calibrate scales of an FP8 key-value cache for vLLM")
    what.add_argument(
        "--all-experts",
        action="store_true",
        default=None,
        help="statistics of every expert from all tokens, not only from those that the router sends it",
    )
    what.add_argument("--engine", choices=("vllm", "transformers"), help="who must load it (default: vllm)")
    data = sub.add_argument_group("calibration data (also replaces that of a recipe)")
    data.add_argument(
        "--data", metavar="SOURCE", help="FILE.txt, FILE.jsonl, hf:DATASET[:CONFIG], self (text the model writes) or random"
    )
    data.add_argument("--rows", type=int, metavar="N", help="sequences (default 128)")
    data.add_argument("--length", type=int, metavar="N", help="tokens of each (default 1024)")
    data.add_argument("--seed", type=int, metavar="N", help="which sequences (default 0)")

    sub = commands.add_parser("plan", help="choose a scheme for every linear: a recipe for a size or an accuracy")
    sub.add_argument("model", metavar="MODEL", help="folder or hub id of a float checkpoint")
    sub.add_argument("--out", required=True, metavar="FILE.toml", help="the recipe to write")
    goal = sub.add_mutually_exclusive_group(required=True)
    goal.add_argument("--bits", type=float, metavar="B", help="stored bits for each weight decided about, at most")
    goal.add_argument("--size", metavar="SIZE", help="of all weight files, at most: 2.1GB, 800MB, 1.5GiB, or bytes")
    goal.add_argument("--max-ppl-ratio", type=float, metavar="R", help="perplexity over the original's, at most: 1.02")
    sub.add_argument("--schemes", nargs="+", metavar="SCHEME", help="candidates; float leaves a linear as it is")
    sub.add_argument(
        "--signal", default="kl", help="kl (default, measured), eigenvalue (Q-BERT), trace (HAWQ-V2), fisher (quick)"
    )
    sub.add_argument("--per", default="linear", help="what gets one scheme: linear (default) or block, as in Q-BERT")
    sub.add_argument("--data", required=True, metavar="SOURCE", help="calibration data of measurement and recipe")
    sub.add_argument("--rows", type=int, default=16, metavar="N", help="sequences to measure on (default 16)")
    sub.add_argument("--length", type=int, default=256, metavar="N", help="tokens of each (default 256)")
    sub.add_argument("--method", default="gptq", help="steps of the recipe (default gptq)")
    sub.add_argument("--ignore", action="append", metavar="REGEX", help="what to leave float, undecided; repeatable")
    sub.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the steps, as for quantize; repeatable")
    sub.add_argument("--format", choices=("compressed-tensors", "lowbit"), default="compressed-tensors")
    sub.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="who must load it (default: vllm)")
    sub.add_argument("--sensitivities", metavar="FILE.json", help="what was measured (default: beside the recipe)")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")
    sub.add_argument("--device", default="cpu", help="default cpu")
    sub.add_argument("--overwrite", action="store_true", help="replace the recipe, and measure anew")

    sub = commands.add_parser("compare", help="run recipes on one model and show them side by side, as a table and a page")
    sub.add_argument("model", metavar="MODEL", help="folder or hub id of a float checkpoint")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the checkpoints, comparison.json and .html")
    sub.add_argument("--recipes", nargs="+", default=[], metavar="FILE.toml", help="to run, or to reuse where they are done")
    sub.add_argument(
        "--search", type=float, metavar="SECONDS", help="then rtn, gptq and awq+gptq at every scheme of plan, for so long"
    )
    sub.add_argument("--text", nargs="+", required=True, metavar="SOURCE", help="what to judge on")
    sub.add_argument("--data", metavar="SOURCE", help="calibration data, in place of that of the recipes")
    sub.add_argument("--rows", type=int, metavar="N", help="sequences of it")
    sub.add_argument("--length", type=int, metavar="N", help="tokens of each")
    sub.add_argument("--window", type=int, default=1024, metavar="N", help="tokens of a window (default 1024)")
    sub.add_argument("--limit", type=int, metavar="N", help="windows of each text (default: all)")
    sub.add_argument("--format", choices=("compressed-tensors", "lowbit"), default="compressed-tensors", help="of --search")
    sub.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="of --search")
    sub.add_argument("--sensitivities", metavar="FILE.json", help="of a plan, to be shown on the page")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")
    sub.add_argument("--device", default="cpu", help="default cpu")

    sub = commands.add_parser("eval", help="perplexity, divergence from the original, tasks")
    sub.add_argument("model", metavar="DIR_OR_MODEL", help="quantized or float checkpoint")
    sub.add_argument("--data", metavar="SOURCE", help="FILE.txt, FILE.jsonl or hf:DATASET[:CONFIG] to evaluate on")
    sub.add_argument("--reference", metavar="MODEL", help="the original, for KL divergence and top-1 agreement")
    sub.add_argument("--window", type=int, default=1024, metavar="N", help="tokens of a window (default 1024)")
    sub.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    sub.add_argument("--bos", choices=("none", "window"), default="none", help="put bos before every window (default none)")
    sub.add_argument("--limit", type=int, metavar="N", help="windows to evaluate (default: all)")
    sub.add_argument("--kv-cache", metavar="SPEC", help="simulate a quantized cache: fp8, int4-g64, int3-g32-kchannel-w128 ...")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32")
    sub.add_argument("--device", default="cpu", help="default cpu")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")
    sub.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval, when it is installed")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = commands.add_parser("inspect", help="what a checkpoint contains: lowbit's, compressed-tensors, GPTQ, AWQ, GGUF")
    sub.add_argument("model", metavar="DIR_OR_GGUF", help="quantized or float checkpoint")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = commands.add_parser("generate", help="continue a prompt")
    sub.add_argument("model", metavar="DIR", help="quantized or float checkpoint")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=int, default=40, metavar="N", help="new tokens (default 40)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    sub.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    sub.add_argument("--device", default="cpu", help="default cpu; on cuda low-bit kernels run, and steps are one CUDA graph")
    sub.add_argument("--kernels", action=argparse.BooleanOptionalAction, help="keep weights packed (default: on a GPU)")
    sub.add_argument("--compile", action="store_true", help="torch.compile the step, which takes a minute")

    sub = commands.add_parser("bench", help="speed and memory of models, as ratios to the first, or of the kernels")
    sub.add_argument("models", nargs="+", metavar="MODEL", help="the original, then quantized checkpoints; or: kernels")
    sub.add_argument("--batch", type=int, nargs="+", metavar="N", help="sequences (default 1 16), rows (1 16 256 2048)")
    sub.add_argument("--device", default="cpu", help="default cpu, where kernels run as their specification, slowly")
    sub.add_argument("--plot", metavar="FILE.png", help="a roofline picture")
    sub.add_argument("--json", action="store_true", help="print JSON")
    models = sub.add_argument_group("models")
    models.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    models.add_argument("--tokens", type=int, default=64, metavar="N", help="steps of decoding (default 64)")
    models.add_argument("--compile", action="store_true", help="torch.compile the step")
    models.add_argument("--peers", nargs="+", default=[], metavar="PEER", help="torchao-int4, torchao-int8: of the first model")
    kernels = sub.add_argument_group("kernels, on a GPU (lowbit bench kernels)")
    kernels.add_argument("--shapes", nargs="+", metavar="NAME", help="llama-7b, -13b, -70b, bert-base, -large (default: all)")
    kernels.add_argument("--schemes", nargs="+", metavar="SCHEME", help="default w4a16-g128 w8a8")
    return parser


# --------------------------------------------------------------------------------------------------------------- commands


def _quantize(arguments: argparse.Namespace) -> None:
    from lowbit.data import DataSpec
    from lowbit.recipe import read_recipe, short_recipe
    from lowbit.run import quantize

    given = _given(arguments, "rows", "length", "seed")
    if arguments.recipe:
        for name in ("scheme", "method", "option", "ignore", "format", "engine", "kv_cache", "all_experts"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} and --recipe exclude each other; change the recipe")
        recipe = _with_data(read_recipe(arguments.recipe), arguments.data, given)
    else:
        if not arguments.scheme:
            raise ValueError("say what to do with --recipe FILE.toml, or with --scheme, for example --scheme w4a16")
        if given and not arguments.data:
            raise ValueError(f"--{next(iter(given))} describes --data, which is missing")
        recipe = short_recipe(
            scheme=arguments.scheme,
            method=arguments.method or "rtn",
            options=_options(arguments.option or []),
            ignore=arguments.ignore,
            data=DataSpec(source=arguments.data, **given) if arguments.data else None,
            format=arguments.format or "compressed-tensors",
            engine=arguments.engine or "vllm",
            kv_cache=arguments.kv_cache,
            all_experts=bool(arguments.all_experts),
        )
    _quiet_libraries()
    with _progress() as progress:
        report = quantize(
            arguments.model,
            arguments.out,
            recipe=recipe,
            revision=arguments.revision,
            device=arguments.device,
            parallel=arguments.parallel,
            deterministic=arguments.deterministic,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    if not report:  # not the first of the processes of torchrun
        return
    sizes = report["sizes"]
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    for row in report["linears"]:
        for warning in row["warnings"]:
            print(f"warning: {row['name']}: {warning}", file=sys.stderr)
    print(
        f"{arguments.out}: {sizes['source_bytes'] / 1e6:.1f} MB -> {sizes['output_bytes'] / 1e6:.1f} MB, "
        f"{len(report['linears'])} linears at {sizes['bits_per_quantized_weight']:.2f} bits; read back and equal. "
        "See report.md there."
    )


def _plan(arguments: argparse.Namespace) -> None:
    from lowbit.files import replacing
    from lowbit.planner import plan

    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out} exists; choose another --out, or replace it with --overwrite")
    sensitivities = Path(arguments.sensitivities) if arguments.sensitivities else out.with_suffix(".sensitivities.json")
    _quiet_libraries()
    with _progress() as progress:
        made = plan(
            arguments.model,
            bits=arguments.bits,
            size=_bytes(arguments.size) if arguments.size else None,
            max_ppl_ratio=arguments.max_ppl_ratio,
            schemes=arguments.schemes,
            signal=arguments.signal,
            per=arguments.per,
            data=arguments.data,
            rows=arguments.rows,
            length=arguments.length,
            method=arguments.method,
            options=_options(arguments.option or []),
            ignore=arguments.ignore or (),
            format=arguments.format,
            engine=arguments.engine,
            sensitivities=sensitivities,
            revision=arguments.revision,
            device=arguments.device,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    with replacing(out) as temporary:
        temporary.write_text(made.recipe.to_toml(), encoding="utf-8")
    wide = [max(map(len, column)) for column in (made.schemes, made.schemes.values())]
    for name, scheme in made.schemes.items():
        print(f"  {name:{wide[0]}}  {scheme:{wide[1]}}  {made.costs[name]:.3e}")
    ratio = "" if made.ppl_ratio is None else f"; {made.ppl_ratio:.4f} times the perplexity on calibration text"
    print(
        f"{out}: {made.bits:.3f} bits a weight, {made.output_bytes / 1e6:.2f} MB of weight files{ratio}. "
        f"Measured costs are in {sensitivities}."
    )


def _compare(arguments: argparse.Namespace) -> None:
    from lowbit.comparison import compare, search_space
    from lowbit.data import DataSpec
    from lowbit.recipe import read_recipe
    from lowbit.source import read_json

    given = _given(arguments, "rows", "length")
    recipes = {}
    for path in arguments.recipes:
        name = Path(path).stem
        if name in recipes:
            raise ValueError(f"two recipes are named {name}; rename a file")
        recipes[name] = _with_data(read_recipe(path), arguments.data, given)
    searched = {}
    if arguments.search is not None:
        if not arguments.data:
            raise ValueError("--search needs calibration data: --data FILE")
        searched = search_space(DataSpec(source=arguments.data, **given), arguments.format, arguments.engine)
    if not recipes and not searched:
        raise ValueError("say what to compare with --recipes FILE.toml ..., or --search SECONDS")
    measured = read_json(Path(arguments.sensitivities), "measured sensitivities") if arguments.sensitivities else None
    _quiet_libraries()
    with _progress() as progress:
        result = compare(
            arguments.model,
            recipes,
            arguments.out,
            texts=arguments.text,
            window=arguments.window,
            windows=arguments.limit,
            sensitivities=measured,
            searched=searched,
            limit_seconds=arguments.search,
            revision=arguments.revision,
            device=arguments.device,
            progress=progress,
        )
    _print_comparison(result)
    for name in result["left_out"]:
        print(f"warning: {name}: not finished, the time was up; the same command goes on from there", file=sys.stderr)
    failed = [row for row in result["rows"] if "failed" in row]
    print(f"{arguments.out}/comparison.html shows more.")
    if failed:
        raise ValueError("; ".join(f"{row['name']} failed: {row['failed']}" for row in failed))


def _eval(arguments: argparse.Namespace) -> None:
    import torch

    from lowbit.data import evaluation_tokens
    from lowbit.evaluate import evaluate_model, run_tasks
    from lowbit.export import load
    from lowbit.kv import parse_cache, simulate_cache
    from lowbit.report import add_evaluation

    cache = parse_cache(arguments.kv_cache) if arguments.kv_cache else None
    if not arguments.data and not arguments.tasks:
        raise ValueError("say what to evaluate on: --data FILE, or --tasks")
    _quiet_libraries()
    dtype = getattr(torch, arguments.dtype)
    tokenizer = _tokenizer(arguments.model, arguments.revision)
    model = load(arguments.model, revision=arguments.revision, dtype=dtype, device=arguments.device)
    if cache is not None:
        simulate_cache(model, cache)
    results: dict[str, Any] = {}
    if arguments.data:
        tokens = evaluation_tokens(arguments.data, tokenizer)
        reference = load(arguments.reference, dtype=dtype, device=arguments.device) if arguments.reference else None
        with _progress() as progress:
            measured = evaluate_model(
                model,
                tokens,
                window=arguments.window,
                stride=arguments.stride,
                bos=arguments.bos,
                bos_id=tokenizer.bos_token_id if arguments.bos == "window" else None,
                reference=reference,
                max_windows=arguments.limit,
                device=arguments.device,
                source=Path(arguments.data).name,
                progress=lambda done, total: progress("evaluating", done, total),
            )
        results = measured.to_dict() | ({"kv_cache": cache.name} if cache is not None else {})
        add_evaluation(Path(arguments.model), results)
    if arguments.tasks:
        results["tasks"] = run_tasks(model, arguments.tasks.split(","), tokenizer=tokenizer)
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        _print_results(results)


def _inspect(arguments: argparse.Namespace) -> None:
    from lowbit.inspection import summary_of

    summary = summary_of(arguments.model)
    if arguments.json:
        print(json.dumps(summary, indent=1))
        return
    print(f"{summary['folder']}: {summary['model_type']}, {summary['format']}, {summary['bytes'] / 1e6:.1f} MB")
    for name, row in summary["linears"].items():
        print(f"  {name}  {row['scheme']}  {row['shape'][0]} x {row['shape'][1]}  {row['bits']:.2f} bits")
    for evaluation in summary.get("evaluations", []):
        _print_results(evaluation)


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from lowbit.decoding import generate
    from lowbit.runtime import load

    _quiet_libraries()
    tokenizer = _tokenizer(arguments.model, None)
    model = load(arguments.model, device=arguments.device, kernels=arguments.kernels)
    if not model.can_generate():
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which does not generate text")
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
    if tokenizer.bos_token_id is not None:
        prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), prompt], 1)
    prompt = prompt.to(arguments.device)
    output = generate(model, prompt, tokens=arguments.tokens, temperature=arguments.temperature, compiled=arguments.compile)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def _bench(arguments: argparse.Namespace) -> None:
    from lowbit.bench import bench, plot

    if arguments.models == ["kernels"]:
        _bench_kernels(arguments)
        return
    _quiet_libraries()
    with _progress() as progress:
        result = bench(
            arguments.models,
            batches=arguments.batch or (1, 16),
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            device=arguments.device,
            compiled=arguments.compile,
            peers=arguments.peers,
            progress=progress,
        )
    if arguments.plot:
        plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    rows = []
    for row in result["rows"]:
        step = row["step_seconds"]
        decode = (
            ("-", "-", "-")
            if step is None
            else (f"{row['rows'] / step:.1f}", f"{row['step_speedup'] or 0:.2f}", f"{row['of_roofline']:.0%}")
        )
        prefill = (f"{row['rows'] * row['prompt'] / row['prefill_seconds']:.0f}", f"{row['prefill_speedup']:.2f}")
        rows.append([row["model"], str(row["rows"]), f"{row['weight_bytes'] / 1e6:.1f}", *prefill, *decode])
    _print_table(("model", "batch", "MB", "prefill tok/s", "x", "decode tok/s", "x", "of roofline"), rows)


def _bench_kernels(arguments: argparse.Namespace) -> None:
    from lowbit.kernel_bench import bench_kernels, peer_names, plot_kernels

    given = {"models": arguments.shapes, "schemes": arguments.schemes, "rows": arguments.batch}
    with _progress() as progress:
        result = bench_kernels(**{name: value for name, value in given.items() if value}, progress=progress)
    if arguments.plot:
        plot_kernels(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    peers = peer_names(result["rows"])
    rows = []
    for row in result["rows"]:
        ratios = [f"{row[name] / row['lowbit']:.2f}" if name in row else "" for name in peers]
        cells = [row["model"], f"{row['inner']} x {row['out']}", row["scheme"], str(row["rows"]), f"{row['lowbit']:.1f}"]
        rows.append([*cells, f"{row['floor'] / row['lowbit']:.0%}", *ratios])
    limits = result["limits"]
    print(
        f"{result['device']}: {limits['bytes'] / 1e12:.2f} TB/s read, {limits['operations'] / 1e12:.0f} T float16 operations/s"
    )
    _print_table(("shapes of", "in x out", "scheme", "rows", "us", "of roofline", *(f"x {name}" for name in peers)), rows)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named arguments that were given."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _with_data(recipe: Any, source: str | None, given: dict[str, Any]) -> Any:
    """A recipe with what was said of calibration data in place of its own."""
    from dataclasses import replace

    from lowbit.data import DataSpec

    given = given | ({"source": source} if source else {})
    if recipe.data is not None:
        return replace(recipe, data=replace(recipe.data, **given))
    if source:
        return replace(recipe, data=DataSpec(**given))
    if given:
        raise ValueError(f"--{next(iter(given))} describes calibration data, but the recipe has no [data]; give --data")
    return recipe


def _print_comparison(result: dict[str, Any]) -> None:
    def speed(row: dict[str, Any]) -> tuple[str, str]:
        return f"{row['load_seconds']:.1f}", f"{row['decode_tokens_per_second']:.1f}"

    judged = [column for text in result["texts"] for column in (f"ppl, {text['source']}", "KL", "same top")]
    floats = [f"{each['perplexity']:.4g}" for each in result["float"]["evaluations"]]
    first = [cell for value in floats for cell in (value, "", "")]
    rows = [["original", f"{result['float']['bytes'] / 1e6:.1f}", "", *first, "", "", *speed(result["float"])]]
    for row in result["rows"]:
        if "failed" in row:
            continue
        cells = [
            cell
            for each in row["evaluations"]
            for cell in (f"{each['perplexity']:.4g}", f"{each['kl']:#.3g}", f"{each['top1_agreement']:.1%}")
        ]
        name = row["name"] + (" *" if row["name"] in result["front"] else "")
        ends = (f"{row['seconds']:.0f}", f"{row['peak_rss'] / 1e6:.0f}", *speed(row))
        rows.append([name, f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.2f}", *cells, *ends])
    _print_table(("recipe", "MB", "bits", *judged, "seconds", "peak MB", "load s", "tokens/s"), rows)
    print("* no other is both smaller and closer to the original; tokens/s: decoding of the dequantized model, in transformers")


def _print_table(head: Sequence[str], rows: list[list[str]]) -> None:
    """Columns of text, all but the first to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(head[0], box=None, pad_edge=False)
    for column in head[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _bytes(text: str) -> int:
    """A size such as 2.1GB (powers of ten) or 1.5GiB (of two) in bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else -1.0
    except ValueError:
        number = -1.0
    if match is None or number <= 0 or (match[3] and not match[2]):
        raise ValueError(f"--size {text!r}: write a number of bytes, or something like 2.1GB or 800MiB")
    return int(number * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def _options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are JSON where they can be, text otherwise."""
    options: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--option {pair!r}: write NAME=VALUE, for example damping=0.02")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _tokenizer(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no tokenizer that transformers can load: {str(error).splitlines()[0]}") from error


def _print_results(results: dict[str, Any]) -> None:
    if "perplexity" in results:
        line = f"perplexity {results['perplexity']:.4f}"
        if results["reference_perplexity"] is not None:
            line += f" (original {results['reference_perplexity']:.4f}), mean KL {results['kl']:.3e} nats, same top token "
            line += f"{results['top1_agreement']:.2%}"
        print(
            f"{line}; {results['source']}, {results['windows']} windows of {results['window']}, stride {results['stride']}, "
            f"bos {results['bos']}, {results['tokens']:,} tokens scored, {results['dtype']}, {results['device']}"
        )
    for task, scores in results.get("tasks", {}).get("results", {}).items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
        print(f"{task}: {numbers}")


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _progress:
    """A progress callback (stage, done, total): a bar with the time left on a terminal, nothing elsewhere."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        if not sys.stderr.isatty():
            return lambda stage, done, total: None
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._bar.start()
        return self._update

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
