"""The command line: what it prints, what it returns, what it refuses in one line, and silence where no one looks."""

import errno
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from lowbit import __version__
from lowbit.cli import _progress, main
from lowbit.export import QuantizedSource, load

ROOT = Path(__file__).resolve().parents[1]
RANDOM = ("--data", "random", "--rows", "4", "--length", "16")
RECIPE = """
engine = "transformers"

[data]
source = "random"
rows = 4
length = 16

[[rules]]
match = "down_proj"
scheme = "w8a16"

[[rules]]
match = ""
scheme = "w3a16-g32"

[[steps]]
method = "gptq"
damping = 0.02
"""
Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture(autouse=True, scope="module")
def _bars_again() -> Iterator[None]:
    """The commands silence the libraries for good."""
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, to be read only."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny.save("llama", folder, dtype=torch.bfloat16, seed=5)
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to evaluate on."""
    path = tmp_path_factory.mktemp("text") / "eval.txt"
    path.write_text("\n".join(tiny.TEXT * 4))
    return path


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in 4 bits, to be read only."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert main(["quantize", str(model), "--out", str(out), "--scheme", "w4a16-g32", *RANDOM]) == 0
    return out


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command; returns its status and what it wrote to both streams, libraries included."""

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


def assert_refused(result: Result, *parts: str) -> None:
    """Status 2, nothing on stdout, one line on stderr that has these parts."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("lowbit: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


# ------------------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("quantize", "eval", "inspect", "generate", "examples:")),
        (("quantize",), ("--scheme", "--recipe", "--option", "--ignore", "--format", "--engine", "--overwrite", "--rows")),
        (("eval",), ("--reference", "--window", "--stride", "--bos", "--limit", "--tasks", "--json")),
        (("inspect",), ("--json",)),
        (("generate",), ("--prompt", "--tokens", "--temperature", "--seed")),
    ],
    ids=lambda value: value[0] if value and value[0].isalpha() else "all",
)
def test_help(arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and all(word in out for word in words)


def test_no_command_is_help(command: Command) -> None:
    status, out, err = command()
    assert status == 0 and "usage: lowbit" in out and not err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"lowbit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("conquer",), "invalid choice: 'conquer'"),
        (("quantize", "model"), "the following arguments are required: --out"),
        (("quantize", "model", "--out", "x", "--rows", "many"), "invalid int value: 'many'"),
        (("quantize", "model", "--out", "x", "--format", "gguf"), "invalid choice: 'gguf'"),
        (("generate", "model"), "the following arguments are required: --prompt"),
    ],
    ids=["command", "out", "rows", "format", "prompt"],
)
def test_arguments_that_argparse_refuses(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and complaint in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- quantize


def test_quantize_tells_one_line(command: Command, model: Path, tmp_path: Path) -> None:
    """And nothing else where stderr is no terminal."""
    out = tmp_path / "out"
    status, told, err = command("quantize", model, "--out", out, "--scheme", "w4a16-g32", *RANDOM)
    assert status == 0 and err == ""
    sizes = report_of(out)["sizes"]
    assert told == (
        f"{out}: {sizes['source_bytes'] / 1e6:.1f} MB -> {sizes['output_bytes'] / 1e6:.1f} MB, 21 linears at 4.50 bits; "
        "read back and equal. See report.md there.\n"
    )
    assert sizes["bits_per_quantized_weight"] == 4 + 16 / 32


def test_quantize_with_everything(command: Command, model: Path, tmp_path: Path) -> None:
    """Every option of the short form arrives."""
    out = tmp_path / "out"
    status, _, _ = command(
        "quantize", model, "--out", out, "--scheme", "w5a16-channel-asym", "--method", "gptq", "--option", "damping=0.03",
        "--option", "order=natural", "--option", "shrink_steps=2", "--ignore", "o_proj", "--ignore", r"layers\.1\.",
        "--format", "lowbit", "--engine", "transformers", *RANDOM, "--seed", "3",
    )  # fmt: skip
    assert status == 0
    report = report_of(out)
    assert report["recipe"] == {
        "rules": [
            {"match": "o_proj", "scheme": "float", "optional": False},
            {"match": "layers\\.1\\.", "scheme": "float", "optional": False},
            {"match": "", "scheme": "w5a16-channel-asym", "optional": False},
        ],
        "steps": [{"method": "gptq", "options": {"damping": 0.03, "order": "natural", "shrink_steps": 2}}],
        "data": {"source": "random", "rows": 4, "length": 16, "seed": 3, "text_key": "text", "split": "train"},
        "format": "lowbit",
        "engine": "transformers",
        "kv_cache": None,
        "all_experts": False,
    }
    source = QuantizedSource(out)
    assert source.native and len(source.modules) == 2 * 6
    assert {row["damping"] for row in report["linears"]} == {0.03}


def test_quantize_by_recipe(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    status, told, err = command("quantize", model, "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert status == 0 and err == "" and "21 linears" in told
    report = report_of(tmp_path / "out")
    assert report["recipe"]["engine"] == "transformers" and report["data"]["rows"] == 4
    assert {row["name"].rpartition(".")[2]: row["scheme"] for row in report["linears"]}["down_proj"] == "w8a16"
    assert {row["damping"] for row in report["linears"]} == {0.02}


@pytest.mark.parametrize(
    ("arguments", "rows", "length", "seed"),
    [(("--rows", "6"), 6, 16, 0), (("--seed", "2"), 4, 16, 2), (("--data", "random", "--rows", "3", "--length", "8"), 3, 8, 0)],
    ids=["rows", "seed", "all of it"],
)
def test_data_of_the_command_replaces_that_of_the_recipe(
    arguments: tuple[str, ...], rows: int, length: int, seed: int, command: Command, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    status, _, _ = command("quantize", model, "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml", *arguments)
    assert status == 0
    data = report_of(tmp_path / "out")["data"]
    assert (data["rows"], data["length"], data["seed"]) == (rows, length, seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheme", "w4a16"), ("method", "gptq"), ("option", "damping=0.1"), ("ignore", "lm_head"), ("format", "lowbit"),
        ("engine", "vllm"),
    ],
)  # fmt: skip
def test_recipe_and_short_form_exclude_each_other(name: str, value: str, command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    result = command("quantize", model, "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml", f"--{name}", value)
    assert_refused(result, f"--{name} and --recipe exclude each other; change the recipe")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("say what to do with --recipe FILE.toml, or with --scheme",)),
        (("--scheme", "w4a16", "--rows", "3"), ("--rows describes --data, which is missing",)),
        (("--scheme", "w4a16", "--seed", "3"), ("--seed describes --data, which is missing",)),
        (("--scheme", "w4"), ("unknown scheme 'w4'", "w4a16-g64-asym")),
        (("--scheme", "w4a16-g32", "--method", "gptq"), ("gptq needs calibration data: --data FILE",)),
        (("--scheme", "w4a16-g32", "--method", "zip"), ("unknown method 'zip'; allowed are rotate, embed, ",)),
        (("--scheme", "w4a16-g32", "--option", "damping"), ("--option 'damping': write NAME=VALUE",)),
        (("--scheme", "w4a16-g32", "--option", "=1"), ("--option '=1': write NAME=VALUE",)),
        (("--scheme", "w4a16-g32", "--option", "damping=1"), ("rtn has no option 'damping'",)),
        (("--scheme", "w4a16-g32", "--option", "shrink_steps=many"), ("rtn: shrink_steps = 'many' is not a int",)),
        (("--scheme", "w4a16-g32", "--option", "shrink_steps=96"), ("rtn: shrink_steps = 96 is not between 0 and 95",)),
        (("--scheme", "w4a16-g32", "--ignore", "("), ("rule '(' is not a regular expression",)),
        (("--scheme", "w4a16-g32", "--ignore", "nothing"), ("rule 'nothing' -> float is never used",)),
        (("--scheme", "w4a16-g32", "--data", "random", "--rows", "0"), ("rows = 0: give a whole number of at least 1",)),
        (("--scheme", "w4a16-g32", "--data", "text.pdf"), ("source = 'text.pdf' is of no known kind",)),
        (("--scheme", "w4a16-g32", "--data", "no.txt"), ("source 'no.txt' is not a file",)),
        (("--scheme", "w4a16-g32", "--device", "abacus"), ("device 'abacus' cannot be used",)),
        (("--recipe", "no.toml"), ("recipe no.toml does not exist",)),
        (("--scheme", "w4a16-g32", "--revision", "main"), ("is a local folder, which has no revisions",)),
        (("--scheme", "w4a16-g48"), ("groups of 48 do not divide",)),
        (("--scheme", "w3a16-g32"), ("cannot be exported for vllm", "--engine transformers", "--format lowbit")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_quantize_refuses(
    arguments: tuple[str, ...], parts: tuple[str, ...], command: Command, model: Path, tmp_path: Path
) -> None:
    assert_refused(command("quantize", model, "--out", tmp_path / "out", *arguments), *parts)
    assert not (tmp_path / "out").exists()


def test_rows_without_data_in_the_recipe(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(re.sub(r"\[data\].*?(?=\[\[)", "", RECIPE, flags=re.S).replace("gptq", "rtn"))
    text = (tmp_path / "recipe.toml").read_text().replace("damping = 0.02", "")
    (tmp_path / "recipe.toml").write_text(text)
    arguments = ("quantize", model, "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert_refused(command(*arguments, "--rows", "6"), "--rows describes calibration data, but the recipe has no [data]")
    assert command(*arguments)[0] == 0


def test_quantize_refuses_an_existing_output(command: Command, model: Path, quantized: Path, tmp_path: Path) -> None:
    out = shutil.copytree(quantized, tmp_path / "out")
    arguments = ("quantize", model, "--out", out, "--scheme", "w8a16")
    assert_refused(command(*arguments), "exists and is not empty", "--overwrite")
    assert {row["scheme"] for row in report_of(Path(out))["linears"]} == {"w4a16-g32"}
    assert command(*arguments, "--overwrite")[0] == 0
    assert {row["scheme"] for row in report_of(Path(out))["linears"]} == {"w8a16"}


def test_warnings_are_told(command: Command, tmp_path: Path) -> None:
    """Experts that no calibration token reached."""
    tiny.save("mixtral", tmp_path / "model", dtype=torch.bfloat16, seed=2)
    arguments = ("--scheme", "w4a16-g32", "--method", "gptq", "--data", "random", "--rows", "1", "--length", "2")
    status, _, err = command("quantize", tmp_path / "model", "--out", tmp_path / "out", *arguments)
    assert status == 0
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert warned and "no calibration token reached this layer: rounded to nearest instead of gptq" in warned[0]
    assert len(warned) == sum(len(row["warnings"]) for row in report_of(tmp_path / "out")["linears"])
    assert warned[0].split(": ")[1] in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("what to mend"), 2, "lowbit: what to mend\n"),
        (ImportError("what to install"), 2, "lowbit: what to install\n"),
        (KeyboardInterrupt(), 130, "lowbit: interrupted; the same command run again goes on from there\n"),
    ],
    ids=["value", "import", "interrupt"],
)
def test_status(
    error: BaseException, status: int, message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("lowbit.run.quantize", quantize)
    assert command("quantize", "model", "--out", tmp_path / "out", "--scheme", "w4a16") == (status, "", message)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("a\n  b"), 2, r"a   b"),
        (ImportError("gguf"), 2, r"gguf"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 400), 2, r"x{300}: File name too long"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, r"a/b: Permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            r"a/b: the disk is full \(.*\); free some space and run .*",
        ),
        (MemoryError(), 2, r"out of memory \(of the machine\); use a machine .*"),
        (torch.OutOfMemoryError("CUDA out\nof memory"), 2, r"out of memory \(CUDA out of memory\); use a machine .*"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 GB"), 2, r"out of memory \(Default.*\); .*"),
        (KeyboardInterrupt(), 130, r"interrupted; the same command run again goes on from there"),
        (
            KeyError("turned"),
            1,
            r"a fault of lowbit, not of what you gave it: KeyError: 'turned' \(test_cli.py:\d+\)\. .*\.log",
        ),
        (RuntimeError("gate:\n..."), 1, r"a fault of lowbit.* RuntimeError: gate: \.\.\. \(test_cli.py:\d+\)\. .*\.log"),
        (OSError("without a file"), 1, r"a fault of lowbit.*"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors(
    error: BaseException, status: int, told: str, debug: bool, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each kind; a fault of lowbit leaves its traceback in a file, and --debug prints it."""

    def quantize(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("lowbit.run.quantize", quantize)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = ["quantize", "model", "--out", "out", "--scheme", "w4a16", *(["--debug"] if debug else [])]
    found, out, err = command(*given)
    assert (found, out) == (status, "")
    *before, line, end = err.split("\n")
    assert end == "" and re.fullmatch(f"lowbit: {told}", line), line
    assert bool(before) == (debug and status != 130) and ("Traceback" in err) == bool(before)
    logs = list(tmp_path.glob("lowbit-*.log"))
    assert len(logs) == (status == 1)
    for log in logs:
        text = log.read_text()
        assert str(log) in line and "Traceback" in text and "test_cli.py" in text and __version__ in text and "--scheme" in text
        assert log.stat().st_mode & 0o077 == 0


def test_help_says_what_the_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "exit status: 0 done; 2 something given is wrong" in out and "1 a fault of" in out and "--debug" in out


# ------------------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("report", ["{}", "[]", "{", '{"evaluations": {}}', None])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_eval_prints_whatever_becomes_of_the_report(
    command: Command,
    model: Path,
    text: Path,
    tmp_path: Path,
    report: str | None,
    form: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A report of another program is left alone; one that cannot be written is no reason to lose the figures."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    if report is not None:
        (folder / "report.json").write_text(report)
    else:

        def add(*given: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system", "x")

        monkeypatch.setattr("lowbit.report.add_evaluation", add)
    status, out, err = command("eval", folder, "--data", text, "--window", "32", "--limit", "2", *form)
    assert status == 0 and (json.loads(out)["perplexity"] > 1 if form else out.startswith("perplexity "))
    assert err.count("\n") == 1 and err.startswith(f"warning: {folder / 'report.json'} does not get this evaluation: ")
    assert report is None or (folder / "report.json").read_text() == report


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_eval_keeps_figures_when_tasks_fail(
    command: Command, quantized: Path, text: Path, tmp_path: Path, form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))

    def fail(*given: Any, **more: Any) -> None:
        raise ValueError("no such task")

    monkeypatch.setattr("lowbit.evaluate.run_tasks", fail)
    status, out, err = command("eval", folder, "--data", text, "--window", "32", "--limit", "2", "--tasks", "x", *form)
    assert status == 2 and err == "lowbit: no such task\n" and "perplexity" in out
    assert len(report_of(folder)["evaluations"]) == 1


def test_eval_prints_and_appends(command: Command, model: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    """One line on stdout; the evaluation joins those in the reports."""
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    gate = report_of(out)["gate"]
    arguments = ("eval", out, "--data", text, "--window", "32")
    status, told, err = command(*arguments, "--reference", model, "--limit", "4")
    assert status == 0 and err == "" and told.count("\n") == 1
    report = report_of(out)
    (first,) = report["evaluations"]
    assert report["gate"] == gate and len(report["linears"]) == 21
    assert first["source"] == "eval.txt" and first["windows"] == 4 and first["window"] == 32
    assert first["kl"] > 0 and 0 < first["top1_agreement"] <= 1
    assert first["perplexity"] != first["reference_perplexity"]
    assert told.startswith(f"perplexity {first['perplexity']:.4f} (original {first['reference_perplexity']:.4f}), mean KL ")
    assert "eval.txt, 4 windows of 32, stride 32, bos none, 124 tokens scored, float32, cpu" in told
    assert (
        f"| eval.txt | 4 x 32, stride 32, bos none, 124 targets | {first['perplexity']:.4g} |"
        in (out / "report.md").read_text()
    )

    options = ("--stride", "16", "--bos", "window", "--limit", "3", "--dtype", "bfloat16", "--json")
    status, told, _ = command(*arguments, *options)
    assert status == 0
    second = json.loads(told)
    assert report_of(out)["evaluations"] == [first, second]
    assert (second["stride"], second["bos"], second["windows"], second["dtype"]) == (16, "window", 3, "bfloat16")
    assert second["kl"] is None and second["reference_perplexity"] is None
    assert (out / "report.md").read_text().count("| eval.txt |") == 2


def test_eval_of_a_float_model_writes_nothing(command: Command, model: Path, text: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    status, told, _ = command("eval", model, "--data", text, "--window", "32", "--limit", "2")
    assert status == 0 and told.startswith("perplexity ") and "original" not in told
    assert sorted(path.name for path in model.iterdir()) == before


def test_eval_refuses(command: Command, quantized: Path, tmp_path: Path) -> None:
    before = (quantized / "report.json").read_bytes()
    assert_refused(command("eval", quantized), "say what to evaluate on: --data FILE, or --tasks")
    assert_refused(command("eval", quantized, "--data", tmp_path / "no.txt"), "no.txt' is not a file")
    assert_refused(command("eval", quantized, "--data", "random"), "random")
    (tmp_path / "empty.txt").write_text("")
    assert_refused(command("eval", quantized, "--data", tmp_path / "empty.txt"), "empty.txt holds no text")
    assert_refused(command("eval", tmp_path / "nowhere", "--data", tmp_path / "empty.txt"), "nowhere")
    bare = Path(shutil.copytree(quantized, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    assert_refused(command("eval", bare, "--data", tmp_path / "empty.txt"), "has no tokenizer (tokenizer.json")
    assert (quantized / "report.json").read_bytes() == before


def test_tasks_need_a_library(command: Command, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(command("eval", quantized, "--tasks", "arc_easy,piqa"), "lm-eval", "pip install")


# ---------------------------------------------------------------------------------------------------------------- inspect


def test_inspect(command: Command, quantized: Path) -> None:
    status, told, err = command("inspect", quantized)
    assert status == 0 and err == ""
    head, *lines = told.splitlines()
    assert re.fullmatch(rf"{re.escape(str(quantized))}: llama, compressed-tensors, 0\.\d MB", head)
    assert len(lines) == 21
    assert "  model.layers.0.mlp.down_proj  w4a16-g32  64 x 128  4.52 bits" in lines


@pytest.mark.parametrize(("format", "scheme"), [("compressed-tensors", "w8a8-channel"), ("lowbit", "w3a16-g32-asym")])
def test_inspect_json(format: str, scheme: str, command: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("quantize", model, "--out", out, "--scheme", scheme, "--format", format)[0] == 0
    status, told, _ = command("inspect", out, "--json")
    assert status == 0
    summary = json.loads(told)
    assert (summary["format"], summary["model_type"], summary["shards"]) == (format, "llama", 4)
    assert summary["folder"] == str(out) and summary["architectures"] == ["LlamaForCausalLM"]
    assert summary["gate"] == report_of(out)["gate"] and summary["evaluations"] == []
    assert len(summary["linears"]) == 21
    row = summary["linears"]["model.layers.1.self_attn.k_proj"]
    # 3-bit codes, a 16-bit scale and a zero point in a byte of its own for every 32; or 8-bit codes and a scale a row
    expected = 3 + (16 + 8) / 32 if format == "lowbit" else 8 + 16 / 64
    assert row == {"scheme": scheme, "shape": [32, 64], "bits": expected}
    stored = sum(info.nbytes for info in QuantizedSource(out).stored.values())
    assert summary["bytes"] == stored


def test_inspect_a_float_model(command: Command, model: Path) -> None:
    status, told, _ = command("inspect", model, "--json")
    summary = json.loads(told)
    assert status == 0 and summary["format"] == "float" and summary["linears"] == {} and "gate" not in summary
    assert_refused(command("inspect", model.parent / "nowhere"), "nowhere")


# --------------------------------------------------------------------------------------------------------------- generate


def test_generate(command: Command, quantized: Path) -> None:
    """Greedy by default, from bos and the prompt; what transformers generates with the same model."""
    status, told, err = command("generate", quantized, "--prompt", "The quick", "--tokens", "7")
    assert status == 0 and err == ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(quantized)
    prompt = torch.tensor([[tiny.BOS, *tokenizer("The quick", add_special_tokens=False)["input_ids"]]])
    loaded: Any = load(str(quantized))
    for _ in range(7):
        with torch.no_grad():
            following = loaded(prompt).logits[0, -1].argmax()
        prompt = torch.cat([prompt, following.view(1, 1)], 1)
        if int(following) == tiny.EOS:
            break
    assert told == tokenizer.decode(prompt[0], skip_special_tokens=True) + "\n"
    assert told.startswith("The quick") and len(told) > len("The quick\n")


def test_generate_samples_by_seed(command: Command, quantized: Path) -> None:
    def sample(seed: int) -> str:
        arguments = ("--prompt", "The", "--tokens", "12", "--temperature", "1.5", "--seed", str(seed))
        return command("generate", quantized, *arguments)[1]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1


def test_generate_from_nothing(command: Command, quantized: Path) -> None:
    """An empty prompt is bos alone."""
    status, told, err = command("generate", quantized, "--prompt", "", "--tokens", "3")
    assert status == 0 and err == "" and told.endswith("\n")


def test_generate_refuses(command: Command, tmp_path: Path) -> None:
    assert_refused(command("generate", tmp_path / "nowhere", "--prompt", "x"), "nowhere")
    tiny.save("bert", tmp_path / "bert")
    tiny.save_tokenizer(tmp_path / "bert")
    result = command("generate", tmp_path / "bert", "--prompt", "x")
    assert_refused(result, "is a BertForMaskedLM, which does not generate text")


# ------------------------------------------------------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with _progress() as progress:
        progress("quantizing", 0, 3)
        progress("quantizing", 3, 3)
        progress("checking the output", 1, 3)
    assert "quantizing" in stream.getvalue() and "3/3" in stream.getvalue()
    assert "checking the output" in stream.getvalue() and "1/3" in stream.getvalue()


def test_no_bar_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress() as progress:
        progress("quantizing", 0, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_real_process(tmp_path: Path) -> None:
    """`python -m lowbit`: quiet in a pipe, a bar on a terminal, the status that `main` returns."""
    tiny.save("mamba", tmp_path / "model")  # of which transformers has much to say
    command = [sys.executable, "-m", "lowbit", "quantize", str(tmp_path / "model"), "--scheme", "w4a16-g32", "--out"]
    done = subprocess.run([*command, str(tmp_path / "piped")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    again = subprocess.run([*command, str(tmp_path / "piped")], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stdout == "" and again.stderr.startswith("lowbit: ")

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*command, str(tmp_path / "shown")], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL, env=environment
    ):
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert b"quantizing" in shown and b"3/3" in shown
    assert (tmp_path / "shown" / "report.json").exists()
