"""Launches that overlap: only kernels that wait, and none on a device that has no such launches."""

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lowbit.kernels import launch  # noqa: E402

FILES = sorted(Path(launch.__file__).parent.glob("*.py"))


def kernels() -> list[tuple[str, ast.FunctionDef]]:
    """All functions that take PDL, but `follow` itself."""
    found = [
        (path.name, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    return [(name, node) for name, node in found if node.name != "follow" and "PDL" in [arg.arg for arg in node.args.args]]


@pytest.mark.parametrize(("file", "kernel"), kernels(), ids=lambda each: getattr(each, "name", each))
def test_every_kernel_waits_before_it_reads(file: str, kernel: ast.FunctionDef) -> None:
    """A kernel that did not would run beside the one whose result it takes, and only sometimes be wrong."""
    calls = [node for node in ast.walk(kernel) if isinstance(node, ast.Call)]
    waits = [call.lineno for call in calls if ast.unparse(call) == "follow(PDL)"]
    memory = [call.lineno for call in calls if ast.unparse(call.func).endswith((".load", ".store", ".atomic_add"))]
    helpers = [call.lineno for call in calls if ast.unparse(call.func) in ("_step", "_inputs", "_turn", "_added", "_write")]
    assert len(waits) == 1 and waits[0] < min(memory + helpers)


def test_launches() -> None:
    """As many kernels wait as are launched so."""
    launched = sum(path.read_text().count("**overlapping(") for path in FILES)
    assert len(kernels()) == launched > 5
    assert launch.overlapping(torch.device("cpu")) == {"PDL": False}
