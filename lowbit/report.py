"""The report beside a checkpoint: report.json for programs, report.md and report.html for people, all from one dict."""

import html
import json
import warnings
from pathlib import Path
from typing import Any

from lowbit.files import read_small, write_json, write_text
from lowbit.page import judged, report_page

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
PAGE_NAME = "report.html"
_DAMAGE = (OSError, ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError)
_OWN = {"lowbit": str, "gate": dict, "evaluations": list, "linears": list}  # what every report of lowbit's has


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.md, report.html and, when these are there, report.json into a checkpoint's folder."""
    for name, text in ((MARKDOWN_NAME, markdown(report)), (PAGE_NAME, report_page(report))):
        write_text(folder / name, text)
    write_json(folder / JSON_NAME, report)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a checkpoint, None if it has none of lowbit's; one of something else, or a damaged one, gets a warning."""
    path = folder / JSON_NAME
    if not path.exists():
        return None
    try:
        report = json.loads(read_small(path))
    except (ValueError, RecursionError, OSError):
        report = None
    if isinstance(report, dict) and all(isinstance(report.get(key), kind) for key, kind in _OWN.items()):
        return report
    warnings.warn(f"{path} is no report of lowbit's, or a damaged one; it is ignored", stacklevel=2)
    return None


def hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint by its path in the folder, as its report has them; also where the report is
    damaged elsewhere. Empty where there are none."""
    try:
        report = json.loads(read_small(folder / JSON_NAME))
    except (ValueError, RecursionError, OSError):
        return {}
    files = report.get("files") if isinstance(report, dict) and "lowbit" in report else None
    return {name: digest for name, digest in files.items() if isinstance(digest, str)} if isinstance(files, dict) else {}


def problem_of_report(folder: Path) -> str | None:
    """What is wrong with the report of a checkpoint; None where there is none, it is good, or another program's."""
    path = folder / JSON_NAME
    if not path.exists():
        return None
    try:
        report = json.loads(read_small(path))
        if not isinstance(report, dict) or not _OWN.keys() & report.keys():
            return None
        if all(isinstance(report.get(key), kind) for key, kind in _OWN.items()):
            markdown(report)
            if len(hashes_of(folder)) == len(report.get("files", {})):
                return None
    except _DAMAGE:
        pass
    return f"{path} is damaged; fetch it again"


def add_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Append an evaluation to the report of a checkpoint, if there is a report.json.

    Raises:
        ValueError: it is damaged, or of another program.
        OSError: it cannot be written.
    """
    report = read_report(folder)
    if report is not None:
        problem = problem_of_report(folder)
        if problem is not None:
            raise ValueError(problem)
        report["evaluations"].append(evaluation)
        write_report(folder, report)
    elif (folder / JSON_NAME).exists():
        raise ValueError(f"{folder / JSON_NAME} is not a report of lowbit, so it is left as it is")


def markdown(report: dict[str, Any]) -> str:
    """The report for people. Names come from the model, so no text of them is markup: viewers of Markdown take HTML."""
    report = _escaped(report)
    model, sizes, gate = report["model"], report["sizes"], report["gate"]
    recipe = report["recipe"]
    lines = [
        f"# {model['name']}, quantized by lowbit {report['lowbit']}",
        "",
        f"{sizes['source_bytes'] / 1e6:.1f} MB became {sizes['output_bytes'] / 1e6:.1f} MB: "
        f"{sizes['bits_per_quantized_weight']:.2f} bits for each quantized weight "
        f"({sizes['quantized_weights']:,} of {sizes['parameters']:,} parameters), "
        f"{sizes['bits_per_parameter']:.2f} bits for each parameter over all.",
        "",
        "## What was done",
        "",
        table(["rule", "scheme"], [[rule["match"] or "(every linear)", rule["scheme"]] for rule in recipe["rules"]]),
        "",
        table(["step", "options"], [[step["method"], _options(step["options"])] for step in recipe["steps"]]),
        "",
        f"Format {recipe['format']}, engine {recipe['engine']}. Data: {_options(report['data'])}.",
        f"Device {report['device']}, {report['threads']} threads; {_options(report['versions'])}.",
        "",
        *_searches(report["searches"]),
        "## Read back after saving",
        "",
        f"{gate['weights_compared']} matrices dequantized from the files equal the solver's bit for bit. On {gate['rows']} "
        f"rows of {gate['length']} tokens the logits differ by at most {gate['largest_logit_difference']:.3g} (the largest "
        f"is {gate['largest_logit']:.3g}).",
        "",
    ]
    if report["adapter"]:
        lines += [
            f"The low-rank corrections are the LoRA adapter in {report['adapter']}/, which an engine must load beside this "
            "folder; without them it is less accurate than measured here.",
            "",
        ]
    notes = report.get("notes", [])
    lines += ["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []
    lines += _evaluations(report["evaluations"])
    lines += _warnings(report["linears"])
    lines += [
        "## Linears",
        "",
        "Errors are relative: of the layer's output on the calibration data (kind output), or of the weight (kind weight).",
        "",
        table(
            ["linear", "scheme", "method", "shape", "bits", "error of rounding", "error", "kind", "damping"],
            [
                [
                    row["name"],
                    row["scheme"],
                    row["method"],
                    " x ".join(map(str, row["shape"])),
                    f"{row['bits_per_weight']:.2f}",
                    f"{row['error_rtn']:.3e}",
                    f"{row['error']:.3e}",
                    row["error_kind"],
                    "" if row["damping"] is None else f"{row['damping']:g}",
                ]
                for row in report["linears"]
            ],
        ),
        "",
        "## Left float",
        "",
        table(["matrix", "reason"], [[row["name"], row["reason"]] for row in report["float_matrices"]])
        if report["float_matrices"]
        else "Inside the blocks, nothing.",
        "",
        "## Time and memory",
        "",
        table(
            ["stage", "seconds", "peak memory of the process, MB"],
            [[row["stage"], f"{row['seconds']:.1f}", f"{row['peak_rss'] / 1e6:.0f}"] for row in report["stages"]]
            + [[row["block"], f"{row['seconds']:.1f}", f"{row['peak_rss'] / 1e6:.0f}"] for row in report["blocks"]],
        ),
        "",
    ]
    return "\n".join(lines)


def _escaped(value: Any) -> Any:
    """A JSON value with the texts in it, keys included, as Markdown that shows them."""
    if isinstance(value, str):
        return html.escape(value, quote=False)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _evaluations(evaluations: list[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    scored = [
        [
            str(row["source"]),
            f"{row['windows']} x {row['window']}, stride {row['stride']}, bos {row['bos']}, {row['tokens']:,} targets",
            f"{row['perplexity']:.4g}",
            _number(row["reference_perplexity"], ".4g"),
            _number(row["kl"], ".3e"),
            _number(row["top1_agreement"], ".2%"),
        ]
        for row in evaluations
        if "perplexity" in row
    ]
    outputs = [row for row in evaluations if "perplexity" not in row]
    lines = ["## Evaluation", ""]
    if scored:
        head = ["text", "windows", "perplexity", "of the original", "mean KL, nats", "same top token"]
        lines += [table(head, scored), ""]
    if outputs:
        cells = [[str(row["source"]), f"{row['windows']} x {row['window']}", *judged(row).values()] for row in outputs]
        lines += [table(["text", "windows", *judged(outputs[0])], cells), ""]
    return lines


def _searches(searches: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for row in searches:
        curve = [
            ["none" if point["alpha"] is None else f"{point['alpha']:g}", f"{point['loss']:.4e}"] for point in row["curve"]
        ]
        chosen = "none" if row["alpha"] is None else f"{row['alpha']:g}"
        lines += [f"## {row['step']}: alpha {chosen}", "", table(["alpha", "loss of the whole model"], curve), ""]
    return lines


def _warnings(linears: list[dict[str, Any]]) -> list[str]:
    rows = [[row["name"], warning] for row in linears for warning in row["warnings"]]
    return ["## Warnings", "", table(["linear", "warning"], rows), ""] if rows else []


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
