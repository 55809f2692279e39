"""The command line: lowbit quantize | plan | compare | eval | inspect | generate | bench.

Every import that costs time happens inside the command that needs it, so that --help answers at once.
"""

import argparse
import errno
import json
import os
import re
import sys
import tempfile
import traceback
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

exit status: 0 done; 2 something given is wrong, or memory or disk are too small: the message says what to do; 1 a fault of
lowbit: the message says where the traceback is and where to report it; 130 interrupted. --debug of every command prints the
traceback of any error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, as --help lists them. What went wrong is told in one line on stderr."""
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
    except BrokenPipeError:  # of `lowbit inspect OUT | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("lowbit: interrupted; the same command run again goes on from there", file=sys.stderr)
        return 130
    except Exception as error:  # here all errors end
        if arguments.debug:
            traceback.print_exc()
        told = _told(error)
        if told is not None:
            print(f"lowbit: {' '.join(told.splitlines())}", file=sys.stderr)
            return 2
        print(f"lowbit: {_report_of_fault(error, sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        return 1
    return 0


def _told(error: Exception) -> str | None:
    """What the user can do about an error; None if it is a fault of lowbit."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        words = " ".join(text.split())[:200] or "of the machine"
        return f"out of memory ({words}); use a machine or device with more, or do less at once"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename or 'a file'}: the disk is full ({error.strerror}); free some space and run the same command again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)[:300]}: {error.strerror}"
    return text if isinstance(error, (ValueError, ImportError)) else None


def _report_of_fault(error: Exception, argv: Sequence[str]) -> str:
    """Keep the traceback of an error that should not be in a new file; returns what to print."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    short = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(last.filename).name}:{last.lineno})"
    try:
        handle, log = tempfile.mkstemp(prefix="lowbit-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"lowbit {__version__}, Python {sys.version}\n{[*argv]}\n")
            traceback.print_exception(error, file=file)
    except OSError:
        log = "the output of the same command with --debug"
    return f"a fault of lowbit, not of what you gave it: {short}. Please report it to its maintainers, with {log}"


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
    _add_common(sub)

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
    sub.add_argument("--length", type=int, metavar="N", help="tokens of each (default 256)")
    sub.add_argument("--method", default="gptq", help="steps of the recipe (default gptq)")
    sub.add_argument("--ignore", action="append", metavar="REGEX", help="what to leave float, undecided; repeatable")
    sub.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the steps, as for quantize; repeatable")
    sub.add_argument("--format", choices=("compressed-tensors", "lowbit"), default="compressed-tensors")
    sub.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="who must load it (default: vllm)")
    sub.add_argument("--sensitivities", metavar="FILE.json", help="what was measured (default: beside the recipe)")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")
    sub.add_argument("--device", default="cpu", help="default cpu")
    sub.add_argument("--overwrite", action="store_true", help="replace the recipe, and measure anew")
    _add_common(sub)

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
    _add_common(sub)

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
    _add_common(sub)

    sub = commands.add_parser("inspect", help="what a checkpoint contains: lowbit's, compressed-tensors, GPTQ, AWQ, GGUF")
    sub.add_argument("model", metavar="DIR_OR_GGUF", help="quantized or float checkpoint")
    sub.add_argument("--check", action="store_true", help="read a quantized DIR whole, and print what is wrong with it")
    sub.add_argument("--json", action="store_true", help="print JSON")
    _add_common(sub, builds=False)

    sub = commands.add_parser("generate", help="continue a prompt")
    sub.add_argument("model", metavar="DIR", help="quantized or float checkpoint")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=int, default=40, metavar="N", help="new tokens (default 40)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    sub.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    sub.add_argument("--device", default="cpu", help="default cpu; on cuda low-bit kernels run, and steps are one CUDA graph")
    sub.add_argument("--kernels", action=argparse.BooleanOptionalAction, help="keep weights packed (default: on a GPU)")
    sub.add_argument("--compile", action="store_true", help="torch.compile the step, which takes a minute")
    _add_common(sub)

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
    _add_common(sub)
    return parser


def _add_common(sub: argparse.ArgumentParser, *, builds: bool = True) -> None:
    """The flags of every command; builds: it builds a model."""
    sub.add_argument("--debug", action="store_true", help="print the traceback of an error")
    if not builds:
        return
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that is in the model's folder or repository, or that it names in another one, with your "
        "rights, where transformers does not know the model or tokenizer itself; only for sources you trust",
    )


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
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    if not report:  # not the first of the processes of torchrun
        return
    sizes = report["sizes"]
    for row in report["linears"]:
        for warning in row["warnings"]:
            print(f"warning: {row['name']}: {warning}", file=sys.stderr)
    print(
        f"{arguments.out}: {sizes['source_bytes'] / 1e6:.1f} MB -> {sizes['output_bytes'] / 1e6:.1f} MB, "
        f"{len(report['linears'])} linears at {sizes['bits_per_quantized_weight']:.2f} bits; read back and equal. "
        "See report.md there."
    )


def _plan(arguments: argparse.Namespace) -> None:
    from lowbit.files import check_name, remove_unfinished, write_text
    from lowbit.planner import plan

    out = Path(arguments.out)
    check_name(out)
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
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    remove_unfinished(out.parent, re.escape(out.name))
    write_text(out, made.recipe.to_toml())
    wide = [max(map(len, column)) for column in (made.schemes, made.schemes.values())]
    for name, scheme in made.schemes.items():
        print(f"  {name:{wide[0]}}  {scheme:{wide[1]}}  {made.costs[name]:.3e}")
    ratio = "" if made.ppl_ratio is None else f"; {made.ppl_ratio:.4f} times the perplexity on calibration text"
    print(
        f"{out}: {made.bits:.3f} bits a weight, {made.output_bytes / 1e6:.2f} MB of weight files{ratio}; {made.mix}. "
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
            trust_remote_code=arguments.trust_remote_code,
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

    from lowbit.arguments import parse_device
    from lowbit.data import evaluation_tokens, tokenizer_of
    from lowbit.evaluate import (
        Evaluation,
        OutputDivergence,
        evaluate_model,
        evaluate_outputs,
        run_tasks,
        sentence_pooling,
    )
    from lowbit.export import load, open_checkpoint
    from lowbit.kv import parse_cache, simulate_cache
    from lowbit.outputs import predicts_next_token

    cache = parse_cache(arguments.kv_cache) if arguments.kv_cache else None
    if not arguments.data and not arguments.tasks:
        raise ValueError("say what to evaluate on: --data FILE, or --tasks")
    parse_device(arguments.device)
    _quiet_libraries()
    dtype = getattr(torch, arguments.dtype)
    trusted = arguments.trust_remote_code
    source = open_checkpoint(arguments.model, arguments.revision, trust_remote_code=trusted)
    tokenizer = tokenizer_of(source)
    model = load(str(source.folder), dtype=dtype, device=arguments.device, trust_remote_code=trusted)
    if cache is not None:
        simulate_cache(model, cache)
    if arguments.data and not arguments.reference and not predicts_next_token(type(model)):
        raise ValueError(
            f"{arguments.model} is a {type(model).__name__}, which predicts no next token and so has no perplexity; give "
            "--reference MODEL, the float model, to measure how far their outputs are apart"
        )
    results: dict[str, Any] = {}
    if arguments.data:
        tokens = evaluation_tokens(arguments.data, tokenizer)
        reference = None
        if arguments.reference:
            reference = load(arguments.reference, dtype=dtype, device=arguments.device, trust_remote_code=trusted)
        given: dict[str, Any] = {
            "reference": reference,
            "window": arguments.window,
            "max_windows": arguments.limit,
            "source": Path(arguments.data).name,
        }
        with _progress() as progress:
            given["progress"] = lambda done, total: progress("evaluating", done, total)
            measured: Evaluation | OutputDivergence
            if predicts_next_token(type(model)):
                bos_id = tokenizer.bos_token_id if arguments.bos == "window" else None
                ways = {"stride": arguments.stride, "bos": arguments.bos, "bos_id": bos_id, "device": arguments.device}
                measured = evaluate_model(model, tokens, **given, **ways)
            else:
                measured = evaluate_outputs(model, tokens, **given, pooling=sentence_pooling(source.folder))
        results = measured.to_dict() | ({"kv_cache": cache.name} if cache is not None else {})
        if not arguments.json:
            _print_results(results)
    try:
        if arguments.tasks:
            results["tasks"] = run_tasks(model, arguments.tasks.split(","), tokenizer=tokenizer)
            if not arguments.json:
                _print_results({"tasks": results["tasks"]})
    finally:  # what was measured before is not lost with the tasks
        if arguments.json and results:
            print(json.dumps(results, indent=1))
        sys.stdout.flush()
        if arguments.data:
            _add_to_report(Path(arguments.model), {key: value for key, value in results.items() if key != "tasks"})


def _add_to_report(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add an evaluation, which was printed, to the report of a quantized checkpoint; a warning says where that fails."""
    from lowbit.report import JSON_NAME, add_evaluation

    try:
        add_evaluation(folder, evaluation)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"warning: {folder / JSON_NAME} does not get this evaluation: {reason}", file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> None:
    from lowbit.inspection import problems_of, summary_of

    if arguments.check:
        _quiet_libraries()
        with _progress() as progress:
            problems, hashes = problems_of(arguments.model, progress)
        if arguments.json:
            print(json.dumps({"folder": arguments.model, "hashes": hashes, "problems": problems}, indent=1))
        else:
            print("\n".join(problems) or f"{arguments.model}: nothing is wrong")
            if not hashes:
                print("There is no report.json of lowbit's with hashes, so that changed codes or settings cannot be told.")
        if problems:
            raise ValueError(f"{arguments.model}: {len(problems)} problems")
        return
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

    from lowbit.arguments import parse_device
    from lowbit.data import tokenizer_of
    from lowbit.decoding import generate
    from lowbit.export import open_checkpoint
    from lowbit.runtime import load

    if not -(2**63) <= arguments.seed < 2**64:
        raise ValueError(f"--seed {arguments.seed}: allowed are whole numbers from -2^63 to 2^64 - 1")
    parse_device(arguments.device)
    _quiet_libraries()
    trusted = arguments.trust_remote_code
    source = open_checkpoint(arguments.model, trust_remote_code=trusted)
    tokenizer = tokenizer_of(source)
    model = load(str(source.folder), device=arguments.device, kernels=arguments.kernels, trust_remote_code=trusted)
    if not model.can_generate():
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which does not generate text")
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
    if tokenizer.bos_token_id is not None:
        prompt = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), prompt], 1)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.num_embeddings
    if prompt.numel() and int(prompt.max()) >= size:
        raise ValueError(
            f"{arguments.model}: its tokenizer gives id {int(prompt.max())}, but the model has {size} tokens; "
            "use the tokenizer of this model"
        )
    prompt = prompt.to(arguments.device)
    output = generate(model, prompt, tokens=arguments.tokens, temperature=arguments.temperature, compiled=arguments.compile)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def _bench(arguments: argparse.Namespace) -> None:
    from lowbit.bench import bench, plot
    from lowbit.page import check_figure

    if arguments.plot:
        check_figure(arguments.plot)
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
            trust_remote_code=arguments.trust_remote_code,
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
    from lowbit.page import judged

    def speed(row: dict[str, Any]) -> tuple[str, str]:
        decoding = row["decode_tokens_per_second"]
        return f"{row['load_seconds']:.1f}", "-" if decoding is None else f"{decoding:.1f}"

    columns = [
        f"{title}, {each['source']}" if k == 0 else title
        for each in result["float"]["evaluations"]
        for k, title in enumerate(judged(each))
    ]
    first = [text if title == "ppl" else "" for each in result["float"]["evaluations"] for title, text in judged(each).items()]
    rows = [["original", f"{result['float']['bytes'] / 1e6:.1f}", "", *first, "", "", *speed(result["float"])]]
    for row in result["rows"]:
        if "failed" in row:
            continue
        cells = [text for each in row["evaluations"] for text in judged(each).values()]
        name = row["name"] + (" *" if row["name"] in result["front"] else "")
        ends = (f"{row['seconds']:.0f}", f"{row['peak_rss'] / 1e6:.0f}", *speed(row))
        rows.append([name, f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.2f}", *cells, *ends])
    _print_table(("recipe", "MB", "bits", *columns, "seconds", "peak MB", "load s", "tokens/s"), rows)
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


def _outputs_line(results: dict[str, Any]) -> str:
    """How far the outputs of a model that predicts no next token are from the original's."""
    if results["kl"] is not None:
        return f"mean KL {results['kl']:.3e} nats an output, same first choice {results['top1_agreement']:.2%}"
    line = f"relative error {results['relative_error']:.3e}, mean cosine {results['cosine']:.6f}"
    embedding = results["sentence_cosine"]
    return line if embedding is None else f"{line}, of sentence embeddings {embedding:.6f}"


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
    elif "kl" in results:
        print(
            f"{_outputs_line(results)}; {results['source']}, {results['windows']} windows of {results['window']} tokens, "
            f"{results['dtype']}, {results['device']}"
        )
    for task, scores in results.get("tasks", {}).get("results", {}).items():
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
        print(f"{task}: {numbers}")


def _quiet_libraries() -> None:
    import warnings

    from transformers.utils import logging

    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
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
