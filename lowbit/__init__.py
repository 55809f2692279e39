"""Post-training quantization of Hugging Face transformer models to low-bit checkpoints that real engines load.

Public names are imported on first use, so `import lowbit` costs no torch. `lowbit.evaluate` is a module that can be
called: `lowbit.evaluate(...)` and `lowbit.evaluate.<name>` both work, in whatever order things were imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.arch import Arch
    from lowbit.comparison import compare
    from lowbit.evaluate import evaluate
    from lowbit.formats import Format
    from lowbit.planner import Plan, plan
    from lowbit.qtensor import QTensor, Scheme, Spec
    from lowbit.recipe import Recipe
    from lowbit.run import quantize
    from lowbit.runtime import load
    from lowbit.unit import Unit

__version__ = "0.1.0"

__all__ = [
    "Arch",
    "Format",
    "Plan",
    "QTensor",
    "Recipe",
    "Scheme",
    "Spec",
    "Unit",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "plan",
    "quantize",
]

_MODULE_OF = {
    "Arch": "lowbit.arch",
    "Format": "lowbit.formats",
    "Plan": "lowbit.planner",
    "QTensor": "lowbit.qtensor",
    "Recipe": "lowbit.recipe",
    "Scheme": "lowbit.qtensor",
    "Spec": "lowbit.qtensor",
    "Unit": "lowbit.unit",
    "compare": "lowbit.comparison",
    "evaluate": "lowbit.evaluate",
    "load": "lowbit.runtime",
    "plan": "lowbit.planner",
    "quantize": "lowbit.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULE_OF[name])
    value = module if name == "evaluate" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names before they are imported."""
    return sorted({*globals(), *__all__})
