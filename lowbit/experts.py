"""Experts that a checkpoint stores as one 3-D tensor, shown one matrix an expert, which is what engines read of
compressed-tensors.

The hub has them both ways: "mlp.experts.3.up_proj.weight" [out, in], and "mlp.experts.gate_up_proj" [experts, 2 * out, in] (or
[experts, in, 2 * out]) of all experts, whose first half is the gate. Splitting is exact, and so is what `converters` puts
together again for the model. Gates and ups that alternate, and biases of experts (gpt-oss), have no such form.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.source import Source, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of a fused pair, and of the module whose experts they are, by a pattern for both.
_FUSED = (
    (re.compile(r"(.*\bexperts)\.gate_up_proj(?:\.weight)?"), r"\1", r"\1.down_proj"),
    (re.compile(r"(.*\.block_sparse_moe)\.input_linear\.weight"), r"\1.experts", r"\1.output_linear.weight"),
)
_PARTS = ("gate_proj", "up_proj", "down_proj")
_ONE = re.compile(r"(.*\bexperts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
# Model types whose experts vLLM (0.32, by its source) reads one by one under these names though the hub has them fused.
_IN_VLLM = (
    *("gemma4", "gemma4_text", "granitemoe", "granitemoeshared", "granitemoehybrid", "llama4", "llama4_text"),
    *("qwen3_vl_moe", "qwen3_vl_moe_text"),
)


class PerExpert(Source):
    """A checkpoint with fused experts, some of them shown one matrix an expert."""

    def __init__(self, plain: Source, pairs: Mapping[str, tuple[str, str, bool]]) -> None:
        """pairs: by module ("...experts"), the names of gate_up_proj and down_proj, and whether they are stored [in, out]."""
        self.__dict__.update(plain.__dict__)
        self.plain = plain
        self._pairs = pairs
        self._parts: dict[str, tuple[str, int, int | None, bool]] = {}  # fused tensor, expert, half, transposed
        for module, (gate_up, down, transposed) in pairs.items():
            for name, fused, half in (("gate_proj", gate_up, 0), ("up_proj", gate_up, 1), ("down_proj", down, None)):
                for expert in range(plain.tensors[fused].shape[0]):
                    self._parts[f"{module}.{expert}.{name}.weight"] = (fused, expert, half, transposed)
        fused_tensors = {fused for pair in pairs.values() for fused in pair[:2]}
        self.tensors = {name: info for name, info in plain.tensors.items() if name not in fused_tensors}
        for name, (fused, _, half, transposed) in self._parts.items():
            info = plain.tensors[fused]
            out, inner = reversed(info.shape[1:]) if transposed else info.shape[1:]
            self.tensors[name] = TensorInfo(info.shard, (out if half is None else out // 2, inner), info.dtype)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors."""
        out = self.plain.read([name for name in names if name not in self._parts])
        by_tensor: dict[str, list[str]] = {}
        for name in names:
            if name in self._parts:
                by_tensor.setdefault(self._parts[name][0], []).append(name)
        for fused, wanted in by_tensor.items():
            whole = self.plain.read([fused])[fused]
            for name in wanted:
                _, expert, half, transposed = self._parts[name]
                matrix = whole[expert].T if transposed else whole[expert]
                matrix = matrix if half is None else matrix.chunk(2)[half]
                out[name] = matrix.clone(memory_format=torch.contiguous_format)
        return out

    def without(self, names: Iterable[str]) -> Source:
        """The same, with the experts among `names` as they are stored."""
        left = {found[1] for name in names if (found := _ONE.fullmatch(name))}
        kept = {module: pair for module, pair in self._pairs.items() if module not in left}
        return PerExpert(self.plain, kept) if kept else self.plain


def split_experts(source: Source, quantized: Callable[[list[str]], set[str]]) -> Source:
    """Show fused experts of which matrices are to be quantized one by one, where an engine reads them so; others stay as they
    are, and so does the source if there are none.

    Args:
        quantized: gives those of the named linears that get a scheme.

    Raises:
        ValueError: only some of the matrices of a fused pair are to be quantized.
    """
    if not (_types(source.config) & set(_IN_VLLM) or _mapped(source)):
        return source
    found = _pairs(source.tensors)
    names = {
        module: [f"{module}.{expert}.{part}" for expert in range(source.tensors[gate_up].shape[0]) for part in _PARTS]
        for module, (gate_up, _, _) in found.items()
    }
    chosen = quantized([name for each in names.values() for name in each])
    for module, each in names.items():
        if 0 < len(chosen.intersection(each)) < len(each):
            raise ValueError(f"{module}: engines keep all of its experts in one tensor; quantize all of their matrices or none")
    pairs = {module: pair for module, pair in found.items() if chosen.issuperset(names[module])}
    return PerExpert(source, pairs) if pairs else source


def open_experts(model: "PreTrainedModel", names: Iterable[str]) -> None:
    """Give a model on the meta device modules for experts that multiply all tokens by one 3-D parameter (Llama 4), as
    transformers does for compressed-tensors, if the checkpoint's tensors `names` have one matrix an expert."""
    from accelerate import init_empty_weights
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    if not any(_ONE.fullmatch(name) for name in names):
        return
    for path, module in list(model.named_modules()):
        known = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
        if known is not None:
            make: Any = known["module_name"]
            with init_empty_weights(include_buffers=False):
                replacement = make(model.config.get_text_config())
            model.set_submodule(path, replacement.eval().requires_grad_(False))


def converters(names: Iterable[str], state: Iterable[str], known: list[Any]) -> list[Any]:
    """What puts experts of a checkpoint, one matrix each, together for a model that has them as 3-D parameters, where
    transformers has no such converter for the model.

    Args:
        names: tensors of the checkpoint.
        state: parameters of the model.
        known: the converters that transformers has for it.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if _merging(known) or not any(_ONE.fullmatch(name) for name in names):
        return []
    if not any(name.endswith("experts.gate_up_proj") for name in state):
        return []
    return [
        WeightConverter(
            source_patterns=["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
            target_patterns="experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="experts.*.down_proj.weight",
            target_patterns="experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def reason_of_transformers(model: "PreTrainedModel", fused: Iterable[str]) -> str | None:
    """Why transformers (5.22) would not load quantized experts stored one matrix each; None if it would.

    fused: the checkpoint's tensors of quantized linears that the model holds in 3-D parameters.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not any(_ONE.fullmatch(name) for name in fused) or _merging(get_model_conversion_mapping(model)):
        return None
    return f"it loads the experts of {model.config.model_type} as one tensor only, which compressed-tensors does not have"


def _types(config: Mapping[str, Any]) -> set[str]:
    text = config.get("text_config")
    return {str(part.get("model_type", "")) for part in (config, text) if isinstance(part, Mapping)}


def _mapped(source: Source) -> bool:
    """Whether transformers knows the model's experts one by one too, which is how they were published before."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return any(_merging(get_checkpoint_conversion_mapping(kind) or []) for kind in _types(source.config))


def _merging(converters: list[Any]) -> bool:
    """Whether one of transformers' converters merges experts of the usual names."""
    patterns = [pattern for entry in converters for pattern in entry.source_patterns]
    return any(re.search(r"experts\.\*\.(gate|up|down)_proj\.weight$", pattern) for pattern in patterns)


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, str, bool]]:
    """Fused pairs of tensors; see `PerExpert`. The shapes of both tell whether they are stored [out, in] or [in, out]."""
    found = {}
    for name, info in tensors.items():
        for pattern, module, other in _FUSED:
            matched = pattern.fullmatch(name)
            if matched is None or len(info.shape) != 3:
                continue
            down = matched.expand(other)
            down = down if down in tensors else f"{down}.weight"
            if down not in tensors or len(tensors[down].shape) != 3:
                continue
            _, a, b = info.shape
            _, c, d = tensors[down].shape
            if (a, b) == (2 * d, c) or (b, a) == (2 * c, d):
                found[matched.expand(module)] = (name, down, (a, b) != (2 * d, c))
    return found
