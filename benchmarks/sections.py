"""What the benchmark scripts share: results, the sections of RESULTS.md, peak memory, and where something was measured.

RESULTS.md has one section for each script, between the lines `<!-- NAME -->` and `<!-- /NAME -->`. A script replaces what is
between its own two lines and leaves every other byte as it is.
"""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowbit.files import replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # larger models and texts; the default of arguments only
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SECTIONS = {
    "accuracy": ("Accuracy", "results.py"),
    "techniques": ("How techniques combine", "techniques.py"),
    "peer": ("Beside llm-compressor: time and memory", "side_by_side.py"),
    "peers": ("Beside llm-compressor and AutoRound: accuracy", "peers.py"),
    "autoround": ("Beside AutoRound: accuracy in the same time", "peers.py --section autoround --table autoround"),
    "learned": ("Learned reconstruction", "learned.py"),
    "encoder": ("Learned reconstruction of an encoder", "encoder.py --model MINILM"),
    "parallel": ("MREM in several processes", "parallel.py"),
    "parallel-gpu": ("MREM in several processes on a GPU", "parallel.py --device cuda --section parallel-gpu"),
    "parallel-gpus": ("MREM in several processes, a GPU each", "parallel.py --device cuda --section parallel-gpus"),
    "blocks": ("A block of a large model", "blocks.py --device cuda --peer"),
    "depth": ("Memory of training against depth", "blocks.py --section depth --layers 4 16 --hidden 512 ..."),
    "mixed": ("Mixed precision", "mixed.py"),
    "mixed-encoder": (
        "Mixed precision of an encoder",
        "mixed.py --encoder --round --section mixed-encoder --model MINILM --text test.jsonl --signals kl trace "
        "--length 128 --plan-length 128",
    ),
    "ssm": ("State space models", "ssm.py"),
    "kernels": ("Kernels on a GPU", "kernels.py --part check|floats|others|codes|rows|binary"),
    "scans": ("Scans on a GPU", "scans.py --part check|decode"),
    "end-to-end": ("Models on the kernels, end to end", "end_to_end.py --part decode   # then prefill, encoder"),
    "streaming": ("Memory on a model larger than its blocks", "streaming_memory.py"),
    "fuzz": ("Damaged input", "fuzz.py"),
    "kills": ("Killed at any step", "kills.py"),
}
PACKAGES = ("torch", "transformers", "accelerate", "compressed-tensors", "safetensors", "numpy")


def keep(result: dict[str, Any], path: Path, section: str, *, page: Path, name: str) -> None:
    """Write a result as JSON to `path`, and its Markdown into the section `name` of `page` and to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    write_section(page, name, section)
    print(section)


def joined(paths: list[Path]) -> dict[str, Any]:
    """One result of several that differ in their "rows", which come one after the other, and in "bars", which are left out.

    Raises:
        ValueError: they differ in more.
    """
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    same = parts[0].keys() - {"rows", "bars"}
    for part in parts[1:]:
        for key in same:
            if part[key] != parts[0][key]:
                raise ValueError(f"the results are not of one measurement: {key} is {part[key]} and {parts[0][key]}")
    return {key: parts[0][key] for key in same} | {"rows": [row for part in parts for row in part["rows"]]}


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` into the section `name` of the Markdown file at `path`, which is created where it is missing.

    Raises:
        ValueError: the file does not have the two lines around the section, each once and in order.
    """
    page = path.read_text(encoding="utf-8") if path.exists() else empty_page()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"{path} does not have the lines {start.strip()} and {end.strip()}, each once: restore them")
    before, rest = page.split(start)
    after = rest.split(end)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(f"{before}{start}{text.strip()}\n{end}{after}", encoding="utf-8")


def empty_page() -> str:
    """RESULTS.md before anything is measured."""
    lines = ["# Results", "", "Each section is written by the script that it names, and by nothing else."]
    for name, (title, script) in SECTIONS.items():
        lines += ["", f"## {title}", "", f"`python benchmarks/{script}`", ""]
        lines += [f"<!-- {name} -->", "Not measured yet.", f"<!-- /{name} -->"]
    return "\n".join(lines) + "\n"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes, without that of the process that started it (Linux only)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, threads, versions and commit, JSON types only."""
    import torch

    from lowbit import __version__

    return {
        "device": _cpu_name() if device == "cpu" else f"{torch.cuda.get_device_name(device)}, driver {_driver()}",
        "threads": torch.get_num_threads(),
        "versions": {"lowbit": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def describe(where: dict[str, Any]) -> list[str]:
    """Two Markdown list items for an `environment`."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return [f"- Device: {where['device']}, {where['threads']} threads", f"- Versions: {versions}; commit {where['commit']}"]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else f"CPU {platform.machine()}"


def _driver() -> str:
    """Version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _commit() -> str:
    """The commit, and whether code that the figures depend on differs from it; GIT_COMMIT where there is no repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "lowbit", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
