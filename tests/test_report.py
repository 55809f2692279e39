"""The report: its two files say the same, and its Markdown is well formed."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowbit.report import JSON_NAME, MARKDOWN_NAME, PAGE_NAME, add_evaluation, markdown, read_report, table, write_report

PLAIN: dict[str, Any] = {
    "lowbit": "9.8.7",
    "versions": {"torch": "2.99", "transformers": "5.99"},
    "device": "cpu",
    "threads": 3,
    "model": {"name": "llama-7m", "revision": None, "class": "LlamaForCausalLM", "dtype": "bfloat16", "fingerprint": {}},
    "recipe": {
        "rules": [
            {"match": "q_proj|k_proj", "scheme": "float", "optional": False},
            {"match": "", "scheme": "w4a16-g32", "optional": False},
        ],
        "steps": [{"method": "gptq", "options": {"damping": 0.05, "order": "natural"}}],
        "data": None,
        "format": "compressed-tensors",
        "engine": "vllm",
    },
    "recipe_sha256": "00",
    "data": {"source": "text.jsonl", "rows": 16, "length": 128},
    "linears": [
        {
            "name": "layers.0.up_proj",
            "scheme": "w4a16-g32",
            "method": "gptq",
            "shape": [192, 64],
            "bits_per_weight": 4.5,
            "error": 0.0012345,
            "error_rtn": 0.0054321,
            "error_kind": "output",
            "damping": 0.05,
            "warnings": [],
        },
        {
            "name": "layers.0.down_proj",
            "scheme": "w4a16-g32",
            "method": "rtn (fallback from gptq)",
            "shape": [64, 192],
            "bits_per_weight": 4.5,
            "error": 0.02,
            "error_rtn": 0.02,
            "error_kind": "weight",
            "damping": None,
            "warnings": [],
        },
    ],
    "float_matrices": [{"name": "layers.0.q_proj", "reason": "left float by the rules"}],
    "blocks": [{"block": "layers.0", "seconds": 1.25, "peak_rss": 345_000_000, "transforms": []}],
    "stages": [{"stage": "probe", "seconds": 0.5, "peak_rss": 123_000_000}],
    "sizes": {
        "source_bytes": 12_300_000,
        "output_bytes": 4_500_000,
        "quantized_weights": 24_576,
        "parameters": 6_150_000,
        "bits_per_quantized_weight": 4.5,
        "bits_per_parameter": 5.85,
    },
    "gate": {
        "weights_compared": 2,
        "rows": 4,
        "length": 64,
        "largest_logit_difference": 0.000321,
        "largest_logit": 17.5,
    },
    "adapter": None,
    "searches": [],
    "outliers": None,
    "histograms": [],
    "evaluations": [],
}
EVALUATION: dict[str, Any] = {
    "source": "wiki.txt",
    "windows": 7,
    "window": 256,
    "stride": 128,
    "bos": 1,
    "tokens": 1792,
    "perplexity": 12.3456,
    "reference_perplexity": 11.9876,
    "kl": 0.0345678,
    "top1_agreement": 0.9123,
}


@pytest.fixture
def report() -> dict[str, Any]:
    """A report that a test may change."""
    return copy.deepcopy(PLAIN)


def section(text: str, heading: str) -> str:
    """What stands under a heading."""
    parts = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)
    assert parts.count(heading) == 1, f"{heading!r} in {parts[1::2]}"
    return parts[parts.index(heading) + 1]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text without their heads, cell by cell, a table being what GitHub makes one of."""
    found: list[list[list[str]]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|( --- \|)+", line):
            head = cells(lines[number - 1])
            assert number < 2 or not lines[number - 2], "a table needs a blank line before it"
            rows = []
            for row in lines[number + 1 :]:
                if not row:
                    break
                rows.append(cells(row))
            assert {len(row) for row in [head, cells(line), *rows]} == {len(head)}
            found.append(rows)
    return found


def cells(line: str) -> list[str]:
    """The cells of a table's line, split at pipes that no backslash precedes."""
    assert line.startswith("|") and line.endswith("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# ---------------------------------------------------------------------------------------------------------------- table
def test_table() -> None:
    assert table(["a", "b"], [["1", "2"], ["", "x y"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n|  | x y |"
    assert table(["a"], []) == "| a |\n| --- |"


def test_table_escapes_pipes() -> None:
    text = table(["a|b", "c"], [["x|y||", "|"]])
    assert text.splitlines()[0] == r"| a\|b | c |"
    assert tables(text) == [[["x|y||", "|"]]]


# ------------------------------------------------------------------------------------------------------------- markdown
def test_markdown_of_everything(report: dict[str, Any]) -> None:
    """Each number is where a reader looks for it."""
    text = markdown(report)
    top = section(text, "# llama-7m, quantized by lowbit 9.8.7")
    for part in ("12.3 MB became 4.5 MB", "4.50 bits for each quantized weight", "24,576 of 6,150,000", "5.85 bits for each"):
        assert part in top
    done = section(text, "## What was done")
    rules, steps = tables(done)
    assert rules == [["q_proj|k_proj", "float"], ["(every linear)", "w4a16-g32"]]
    assert steps == [["gptq", "damping 0.05, order natural"]]
    for part in (
        "Format compressed-tensors, engine vllm.",
        "Data: source text.jsonl, rows 16, length 128.",
        "Device cpu, 3 threads; torch 2.99, transformers 5.99.",
    ):
        assert part in done
    read_back = section(text, "## Read back after saving")
    for part in ("2 matrices", "On 4 rows of 64 tokens", "at most 0.000321", "is 17.5)"):
        assert part in read_back
    (linears,) = tables(section(text, "## Linears"))
    assert linears == [
        ["layers.0.up_proj", "w4a16-g32", "gptq", "192 x 64", "4.50", "5.432e-03", "1.234e-03", "output", "0.05"],
        [
            "layers.0.down_proj",
            "w4a16-g32",
            "rtn (fallback from gptq)",
            "64 x 192",
            "4.50",
            "2.000e-02",
            "2.000e-02",
            "weight",
            "",
        ],
    ]
    assert tables(section(text, "## Left float")) == [[["layers.0.q_proj", "left float by the rules"]]]
    (times,) = tables(section(text, "## Time and memory"))
    assert times == [["probe", "0.5", "123"], ["layers.0", "1.2", "345"]]
    assert "## Warnings" not in text
    assert "## Evaluation" not in text
    assert "None" not in text


def test_markdown_is_no_markup(report: dict[str, Any]) -> None:
    """Names come from strangers, and viewers of Markdown run HTML."""
    bad = "<script>alert(1)</script>&"
    report["model"]["name"] = report["linears"][0]["name"] = report["linears"][0]["method"] = bad
    report["recipe"]["rules"][0]["match"] = report["float_matrices"][0]["name"] = report["versions"][bad] = bad
    report["linears"][0]["warnings"] = [bad]
    text = markdown(report)
    assert "<" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 7
    assert report["model"]["name"] == bad


def test_markdown_of_warnings(report: dict[str, Any]) -> None:
    """One line for each, with the linear it is about."""
    report["linears"][1]["warnings"] = ["no token | reached it", "and another"]
    report["linears"][0]["warnings"] = ["damping raised"]
    (rows,) = tables(section(markdown(report), "## Warnings"))
    assert rows == [
        ["layers.0.up_proj", "damping raised"],
        ["layers.0.down_proj", "no token | reached it"],
        ["layers.0.down_proj", "and another"],
    ]


def test_markdown_of_evaluations(report: dict[str, Any]) -> None:
    """In their order; what was not measured is left empty."""
    alone = EVALUATION | {"source": "b|c.txt", "reference_perplexity": None, "kl": None, "top1_agreement": None, "bos": None}
    report["evaluations"] = [EVALUATION, alone]
    (rows,) = tables(section(markdown(report), "## Evaluation"))
    assert rows == [
        ["wiki.txt", "7 x 256, stride 128, bos 1, 1,792 targets", "12.35", "11.99", "3.457e-02", "91.23%"],
        ["b|c.txt", "7 x 256, stride 128, bos None, 1,792 targets", "12.35", "", "", ""],
    ]


def test_markdown_of_nothing_left_float(report: dict[str, Any]) -> None:
    report["float_matrices"] = []
    left = section(markdown(report), "## Left float")
    assert not tables(left)
    assert "nothing" in left


def test_markdown_zero_is_a_number(report: dict[str, Any]) -> None:
    """A divergence of 0 and a damping of 0 are results, not gaps."""
    report["evaluations"] = [EVALUATION | {"kl": 0.0, "top1_agreement": 0.0}]
    report["linears"][0]["damping"] = 0.0
    text = markdown(report)
    assert tables(section(text, "## Evaluation"))[0][0][-2:] == ["0.000e+00", "0.00%"]
    assert tables(section(text, "## Linears"))[0][0][-1] == "0"


# ---------------------------------------------------------------------------------------------------------------- files
def test_written_and_read(tmp_path: Path, report: dict[str, Any]) -> None:
    report["model"]["name"] = "Größe"
    assert read_report(tmp_path) is None
    write_report(tmp_path, report)
    assert (
        sorted(path.name for path in tmp_path.iterdir())
        == [PAGE_NAME, JSON_NAME, MARKDOWN_NAME]
        == ["report.html", "report.json", "report.md"]
    )
    assert read_report(tmp_path) == json.loads((tmp_path / JSON_NAME).read_bytes()) == report
    assert (tmp_path / MARKDOWN_NAME).read_text(encoding="utf-8") == markdown(report)


def test_evaluations_are_appended(tmp_path: Path, report: dict[str, Any]) -> None:
    """Both files show every one; the rest of the report stays."""
    write_report(tmp_path, report)
    second = EVALUATION | {"source": "other.txt"}
    add_evaluation(tmp_path, EVALUATION)
    add_evaluation(tmp_path, second)
    expected = report | {"evaluations": [EVALUATION, second]}
    assert read_report(tmp_path) == expected
    text = (tmp_path / MARKDOWN_NAME).read_text(encoding="utf-8")
    assert text == markdown(expected)
    assert [row[0] for row in tables(section(text, "## Evaluation"))[0]] == ["wiki.txt", "other.txt"]


def test_evaluation_without_a_report(tmp_path: Path) -> None:
    """A checkpoint of another program gets no report."""
    add_evaluation(tmp_path, EVALUATION)
    assert not list(tmp_path.iterdir())
