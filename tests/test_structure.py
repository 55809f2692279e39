"""What the whole code base promises: layers, no code from data, no machine paths, a quick --help, docstrings, tests.

Everything here reads source text (or starts a subprocess), so it holds for modules that are added later.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lowbit"

# --------------------------------------------------------------------------------------------------------------- layers
# A module imports from its own level and the levels before it. A folder stands for all of its modules.
LEVELS = (
    ("arguments", "files", "processes", "formats", "packing", "codebooks", "orthogonal", "patterns", "ssm", "outputs"),
    ("qtensor", "adapter", "arch", "data", "source", "dequantize", "experts", "report", "page", "kv", "checks"),
    ("links",),
    ("unit", "kernels"),
    ("reconstruct",),
    ("methods", "allocate", "export"),
    ("attention",),
    ("scans", "runtime", "decoding", "transformers"),
    ("recipe", "views", "journal"),
    ("parallel",),
    ("run",),
    ("sensitivity",),
    ("planner",),
    ("evaluate",),
    ("comparison", "inspection", "bench", "kernel_bench"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FOLDERS = {"kernels", "methods"}
# Beyond the levels: the quantizer never needs a kernel, the runtime never needs a method. Neither written in the module
# itself (an import inside a function counts), nor loaded by importing it (through whatever its imports import).
NEVER = {"run": {"kernels", "runtime", "decoding", "evaluate"}, "runtime": {"methods"}, "transformers": {"methods"}}


class Import(NamedTuple):
    """What is imported (without `lowbit.`; "" is the package), in which line, and whether loading executes it."""

    target: str
    line: int
    at_load: bool


def module_name(path: Path) -> str:
    """`lowbit/methods/gptq.py` -> `methods.gptq`, `lowbit/methods/__init__.py` -> `methods`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in SOURCES}
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in SOURCES}
LAYERED = sorted(set(MODULES) - {"", "__main__"})

each_module = pytest.mark.parametrize("name", LAYERED)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def executed_at_load(tree: ast.Module) -> set[ast.AST]:
    """The nodes that importing the module executes: not in a function, not under `if TYPE_CHECKING`."""
    found: set[ast.AST] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        found.add(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
    return found


def lowbit_imports(name: str, tree: ast.Module, is_package: bool) -> Iterator[Import]:
    """Every import of a part of lowbit that the module contains, wherever it stands."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    package = [part for part in package if part]
    at_load = executed_at_load(tree)
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["lowbit", *package][: len(package) + 2 - node.level]
                source = ".".join([*base, *([node.module] if node.module else [])])
            else:
                source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix("lowbit.")
                if inner in MODULES:
                    targets.append(f"lowbit.{inner}")
                elif (source, alias.name) != ("lowbit", "__version__"):
                    targets.append(source)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            targets = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for target in targets:
            if target == "lowbit" or target.startswith("lowbit."):
                yield Import(target.removeprefix("lowbit").removeprefix("."), getattr(node, "lineno", 0), node in at_load)


def imports_of(name: str) -> list[Import]:
    """The imports of a module of the package, by its name."""
    path = MODULES[name]
    return list(lowbit_imports(name, TREES[path], path.name == "__init__.py"))


def layer_errors(name: str, imports: list[Import]) -> list[str]:
    """What the imports of module `name` break, one line each."""
    top = name.split(".")[0]
    errors = []
    for target, line, _ in imports:
        target_top = target.split(".")[0]
        where = f"lowbit.{name}, line {line}: imports lowbit{'.' if target else ''}{target}"
        if target == name:
            continue
        if target_top not in LEVEL:
            errors.append(f"{where}, which is in no level; import from the module that defines the name")
        elif LEVEL[target_top] > LEVEL[top]:
            errors.append(f"{where}, a later level")
        elif target_top in NEVER.get(top, ()):
            errors.append(f"{where}, which {top} never imports")
        elif top == target_top == "methods" and name != "methods":
            errors.append(f"{where}: a method never imports a sibling; move what they share to an earlier level")
    return errors


@each_module
def test_module_has_a_level(name: str) -> None:
    """A new module takes its place in LEVELS in the change that adds it."""
    top, *rest = name.split(".")
    assert top in LEVEL, f"lowbit.{name} is not in LEVELS of {Path(__file__).name}"
    is_folder = MODULES[name].name == "__init__.py" or bool(rest)
    assert is_folder == (top in FOLDERS), f"lowbit.{top} is {'a folder' if is_folder else 'a file'}, FOLDERS says otherwise"


@each_module
def test_layers(name: str) -> None:
    """Imports point to the same level or an earlier one."""
    if name.split(".")[0] not in LEVEL:
        pytest.skip("reported by test_module_has_a_level")
    assert not layer_errors(name, imports_of(name))


@pytest.mark.parametrize("name", sorted(set(NEVER) & set(MODULES)))
def test_never_loaded(name: str) -> None:
    """Importing the module loads none of what it must not need, directly or through others."""
    chain: dict[str, str] = {name: name}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for target, _, at_load in imports_of(current):
            if not at_load:
                continue
            parts = target.split(".")
            for loaded in (".".join(parts[: end + 1]) for end in range(len(parts))):
                if loaded in MODULES and loaded not in chain:
                    chain[loaded] = f"{chain[current]} -> {loaded}"
                    waiting.append(loaded)
    broken = [how for loaded, how in chain.items() if loaded.split(".")[0] in NEVER[name]]
    assert not broken, f"importing lowbit.{name} loads: {broken}"


@pytest.mark.parametrize(
    ("name", "code", "wrong"),
    [
        ("formats", "import lowbit.packing", False),
        ("formats", "from lowbit.qtensor import Spec", True),
        ("formats", "def f():\n    from lowbit import cli", True),
        ("methods.gptq", "from lowbit.unit import Unit", False),
        ("methods.gptq", "from lowbit.methods.rtn import rtn", True),
        ("methods.gptq", "from .rtn import rtn", True),
        ("methods.gptq", "from ..recipe import Recipe", True),
        ("methods.gptq", "from . import rtn", True),
        ("methods", "from lowbit.methods.gptq import gptq", False),
        ("run", "from lowbit.export import write", False),
        ("run", "if TYPE_CHECKING:\n    from lowbit.kernels import matmul", True),
        ("run", "importlib.import_module('lowbit.evaluate')", True),
        ("runtime", "from lowbit.methods import UNIT_METHODS", True),
        ("cli", "from lowbit import __version__", False),
        ("cli", "from lowbit import quantize", True),
        ("cli", "import lowbitter, torch", False),
    ],
)
def test_layer_check_itself(name: str, code: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees each way to write an import."""
    monkeypatch.setitem(MODULES, "cli", PACKAGE / "cli.py")
    imports = list(lowbit_imports(name, ast.parse(code), name in FOLDERS))
    assert bool(layer_errors(name, imports)) == wrong


# ------------------------------------------------------------------------------------------------------- code from data
FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load"}
TRUE_FORBIDDEN = {"trust_remote_code", "allow_pickle"}


def is_true(node: ast.expr | None) -> bool:
    """Whether the expression is the constant True."""
    return isinstance(node, ast.Constant) and node.value is True


def unsafe_nodes(tree: ast.Module) -> Iterator[str]:
    """What runs code that came with data, or hides an error; one line each."""
    for node in ast.walk(tree):
        what: list[str] = []
        match node:
            case ast.Import(names=names):
                what = [f"import {alias.name}" for alias in names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in FORBIDDEN_MODULES:
                    what = [f"import from {module}"]
                what += [f"{module}.{a.name}" for a in names if f"{module}.{a.name}" in FORBIDDEN_CALLS]
            case ast.Attribute() if ast.unparse(node) in FORBIDDEN_CALLS:
                what = [ast.unparse(node)]
            case ast.Call(func=ast.Name(id="eval" | "exec" as called)):
                what = [f"{called}()"]
            case ast.keyword(arg=str(arg), value=value) if arg in TRUE_FORBIDDEN and is_true(value):
                what = [f"{arg}=True"]
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                named = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
                what = [f"{key}: True" for key, value in named if key in TRUE_FORBIDDEN and is_true(value)]
            case ast.arguments():
                positional = [*node.posonlyargs, *node.args]
                last = positional[len(positional) - len(node.defaults) :]
                pairs = [*zip(last, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
                what = [f"{arg.arg}=True by default" for arg, v in pairs if arg.arg in TRUE_FORBIDDEN and is_true(v)]
            case ast.ExceptHandler(type=None):
                what = ["bare except"]
            case ast.ExceptHandler(type=ast.expr() as caught):
                names = [ast.unparse(n) for n in (caught.elts if isinstance(caught, ast.Tuple) else [caught])]
                if not isinstance(node.body[-1], ast.Raise):
                    what = [f"except {n}" for n in names if n.split(".")[-1] in ("Exception", "BaseException")]
        line = getattr(node, "lineno", None)
        yield from (f"{'' if line is None else f'line {line}: '}{text}" for text in what)


@each_source
def test_nothing_unsafe(path: Path) -> None:
    """No code from data (pickle, torch.load, remote code, eval), and no handler that swallows every error."""
    ends = path == PACKAGE / "cli.py"  # where all errors end, and are told
    assert not [each for each in unsafe_nodes(TREES[path]) if not (ends and each.endswith(": except Exception"))]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("from torch import load", True),
        ("torch.load('x')", True),
        ("f = torch.load", True),
        ("eval('1')", True),
        ("model.eval()", False),
        ("M.from_pretrained(p, trust_remote_code=True)", True),
        ("M.from_pretrained(p, trust_remote_code=False)", False),
        ("options = {'trust_remote_code': True}", True),
        ("def f(a, *, trust_remote_code=True): pass", True),
        ("def f(a, trust_remote_code=True): pass", True),
        ("def f(a=True, *, trust_remote_code=False): pass", False),
        ("np.load(p, allow_pickle=True)", True),
        ("try: pass\nexcept: pass", True),
        ("try: pass\nexcept Exception: pass", True),
        ("try: pass\nexcept Exception as error: raise ValueError('x') from error", False),
        ("try: pass\nexcept (ValueError, builtins.BaseException): pass", True),
        ("try: pass\nexcept (ValueError, OSError): pass", False),
    ],
)
def test_unsafe_check_itself(code: str, wrong: bool) -> None:
    """The check sees each of the forms, and lets their harmless neighbours pass."""
    assert bool(list(unsafe_nodes(ast.parse(code)))) == wrong


# -------------------------------------------------------------------------------------------------------- machine paths
MACHINE = re.compile(
    r"/work/|/root/|/home/|/Users/|/opt/(?:pypi|wheels)"  # a folder of one machine
    r"|pythonhosted\.org|\bpypi\.org|download\.pytorch\.org|(?:extra-)?index-url|find-links"  # where packages come from
)
BESIDE = re.compile(r"\.\./shared\b|\bparent\s*/\s*[\"']shared[\"']")
BESIDE_ALLOWED = ("tests/", "benchmarks/")  # only these may use what lies beside a developer's checkout
WALK_SKIPPED = re.compile(r"(?:^|/)(?:\.git|\.venv[^/]*|\.[a-z]+_cache|\.hypothesis|__pycache__|build|dist)(?:/|$)")


def repository_files() -> list[Path]:
    """The files git tracks or would track; where git does not answer, all files but caches and environments."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        everything = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*"))
        listed = "\0".join(name for name in everything if not WALK_SKIPPED.search(name))
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def test_no_machine_paths() -> None:
    """No text file names a machine's folder or a package host; only tests and benchmarks look beside the checkout."""
    found = []
    for path in repository_files():
        name = path.relative_to(ROOT).as_posix()
        data = path.read_bytes()
        if path == Path(__file__).resolve() or b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            patterns = [MACHINE] if name.startswith(BESIDE_ALLOWED) else [MACHINE, BESIDE]
            found += [f"{name}:{number}: {hit.group()}" for pattern in patterns if (hit := pattern.search(line))]
    assert not found


# ------------------------------------------------------------------------------------------------------------------ cli
HELP_SECONDS = 0.3
HEAVY = {"torch", "transformers", "accelerate", "compressed_tensors", "safetensors", "numpy", "datasets"}
needs_cli = pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="lowbit/cli.py does not exist yet")


def run_help(*options: str) -> subprocess.CompletedProcess[str]:
    """`python <options> -m lowbit --help`, which must succeed."""
    command = [sys.executable, *options, "-m", "lowbit", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)


@needs_cli
def test_help_imports_nothing_heavy() -> None:
    """`lowbit --help` does without torch, transformers and their kind."""
    result = run_help("-X", "importtime")
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "lowbit.cli" in imported
    assert not sorted(HEAVY & {name.split(".")[0] for name in imported})
    assert "quantize" in result.stdout


@needs_cli
def test_help_is_quick() -> None:
    """`lowbit --help` answers at once: the best of five, interpreter start included, by the core's time, which no other
    process stretches."""

    def spent() -> float:
        used = os.times()
        return used.children_user + used.children_system

    seconds = []
    for _ in range(5):
        before = spent()
        run_help()
        seconds.append(spent() - before)
    assert 0 < min(seconds) < HELP_SECONDS, [f"{value:.3f}" for value in seconds]


# ------------------------------------------------------------------------------------------------------- public surface
NO_DOCSTRING_NEEDED = {"forward", "backward", "setup_context"}  # torch defines what these do


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The module, public classes, and public functions and methods that have no docstring."""
    if not ast.get_docstring(tree):
        yield "the module"
    waiting: list[tuple[str, ast.AST]] = [("", node) for node in tree.body]
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, ast.If | ast.Try | ast.With):
            waiting.extend((prefix, child) for child in ast.iter_child_nodes(node))
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        excused = decorators & {"overload", "setter", "deleter"} or (prefix and node.name in NO_DOCSTRING_NEEDED)
        if not ast.get_docstring(node) and not excused:
            yield f"line {node.lineno}: {prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            waiting.extend((f"{prefix}{node.name}.", child) for child in node.body)


@each_source
def test_docstrings(path: Path) -> None:
    """Whatever a reader can import says what it does."""
    assert not list(undocumented(TREES[path]))


def test_public_names_resolve() -> None:
    """Every name in `lowbit.__all__` is there, from the module that the package says."""
    lowbit = importlib.import_module("lowbit")
    assert set(lowbit.__all__) == {"__version__", *lowbit._MODULE_OF}
    present = [name for name in lowbit._MODULE_OF if lowbit._MODULE_OF[name].removeprefix("lowbit.") in MODULES]
    missing = [f"{lowbit._MODULE_OF[name]}.{name}" for name in present if not hasattr(lowbit, name)]
    assert not missing
    assert not hasattr(lowbit, "no_such_name")


@pytest.mark.skipif("evaluate" not in MODULES, reason="lowbit/evaluate.py does not exist yet")
def test_evaluate_is_function_and_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lowbit.evaluate` can be called and has the module's names, whether or not the submodule was imported before."""
    lowbit = importlib.import_module("lowbit")
    module = importlib.import_module("lowbit.evaluate")
    monkeypatch.setattr(module, "evaluate", lambda *args, **options: (args, options))
    assert lowbit.evaluate is module
    assert callable(module), "lowbit/evaluate.py must end by making its own module callable"
    assert lowbit.evaluate(1, x=2) == ((1,), {"x": 2})


def test_import_is_light() -> None:
    """`import lowbit` loads nothing but the package itself."""
    code = "import sys, lowbit; print(*(name for name in sys.modules if name.split('.')[0] in ('lowbit', 'torch')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["lowbit"]


# --------------------------------------------------------------------------------------------------------------- mirror
UNMIRRORED = {"__init__.py", "__main__.py"}  # tested here and through the command line


@pytest.mark.parametrize("name", [p.relative_to(PACKAGE).as_posix() for p in SOURCES if p.name not in UNMIRRORED])
def test_every_module_has_its_tests(name: str) -> None:
    """`lowbit/methods/gptq.py` is tested in `tests/methods/test_gptq.py`."""
    folder, _, file = name.rpartition("/")
    mirror = ROOT / "tests" / folder / f"test_{file}"
    assert mirror.is_file(), f"lowbit/{name} has no {os.path.relpath(mirror, ROOT)}"
