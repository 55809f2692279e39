"""Models that run on the kernels: low-bit weights stay packed, and what can be done in one step is.

`load` builds the transformers model and puts a `PackedLinear` where a linear is quantized, or `PackedExperts` in the place of a
3-D parameter. The model's own code stays and calls them; nothing of a model class is known here. Then one short row of tokens
runs through it, every module's input and output is kept, and what is seen decides:

    linears that get the same tensor       become one product; the first one called computes it, the others take their part
    a norm or GELU whose output such       quantizes in the same kernel. Its output is a tensor of NaN that stands for the
    a product takes as codes               codes: whoever reads it otherwise gives NaN, and then nothing is fused there
    silu(gate) * up before a product       one kernel, with the quantization if there is one, in place of the module around them
    an RMSNorm                             becomes one kernel
    a sum of a product and a tensor        is made by the product, which waits for it (`Awaited`)
    rotary embedding of queries and keys   one kernel, in the attention's own forward

Attention is transformers' own but for what `attention` says.

Each candidate is compared with what the module gave before, and at the end every block runs once more on its input of then: one
that does not compute what it did is put back as it was. What no kernel multiplies is dequantized, with a warning.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lowbit import attention, export, scans
from lowbit.adapter import LowRank
from lowbit.arch import MATMUL, Arch, Linear
from lowbit.arguments import checked, parse_device
from lowbit.export import QuantizedSource, open_checkpoint, restore_generation
from lowbit.formats import FP8_E4M3
from lowbit.kernels import entry
from lowbit.kernels.entry import Prepared, Rows
from lowbit.kernels.reference import Quantized
from lowbit.kv import CacheSpec, simulate_cache
from lowbit.orthogonal import hadamard
from lowbit.qtensor import Scheme
from lowbit.unit import Input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = (
    0.15  # relative, of a block's output: codes of 4-bit inputs flip where sums differ in last bits; what is wrong is near 1
)


# ---------------------------------------------------------------------------------------------------------------- modules


class Handoff:
    """What was computed from a tensor, for the modules that get this very tensor next; kept until `readers` have taken it."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._left = 0
        self._tensor: Tensor | None = None
        self._value: Any = None

    def put(self, tensor: Tensor, value: Any) -> None:
        """Keep `value` for those who come with `tensor`."""
        self._tensor, self._value, self._left = tensor, value, self.readers

    def take(self, tensor: Tensor) -> Any:
        """What was kept for `tensor`, or None."""
        if tensor is not self._tensor:
            return None
        value = self._value
        self._left -= 1
        if self._left == 0:
            self._tensor = self._value = None
        return value


class PackedLinear(nn.Module):
    """A linear layer whose weight [out, in] stays packed; of no use before `prepare`.

    Attributes:
        names: the linears of the checkpoint that make it up, below each other.
        given: how inputs are quantized, or turned; None if they are not.
        simulated: the kernel takes floats all the same, so inputs are quantized and dequantized before.
        prepared: the matrix as the kernel reads it.
        low: a correction b a beside it.
        awaited: whether something of its shape is added to its output, which then is `Awaited`.
        codes: where a module before this one leaves the codes of its output.
    """

    def __init__(self, names: list[str], bias: Tensor | None, given: Input | None, simulated: bool) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.names = names
        self.given = given
        self.simulated = simulated
        self.prepared: Prepared | None = None
        self.low: LowRank | None = None
        self.awaited = False
        self.codes: Handoff | None = None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def prepare(self, source: QuantizedSource, dtype: torch.dtype, device: torch.device) -> "PackedLinear":
        """Read the matrix and lay it out for inputs of `dtype`; returns itself."""
        parts = [source.quantized(name, device) for name in self.names]
        inputs = self.given if self.takes_codes else None
        self.prepared = entry.prepare(parts, inputs=inputs, dtype=dtype, device=device)
        low = source.corrections.get(self.names[0])
        self.low = None if low is None else LowRank(*(part.to(device, dtype) for part in low))
        return self

    @property
    def takes_codes(self) -> bool:
        """Whether the kernel multiplies codes of inputs."""
        return self.given is not None and self.given.spec is not None and not self.simulated

    @property
    def turned(self) -> bool:
        """Whether inputs are multiplied by a Hadamard matrix first."""
        return self.given is not None and self.given.turned

    @property
    def takes_produced(self) -> bool:
        """Whether its input may come from a kernel alone, as nothing else reads it here."""
        return self.low is None and not self.simulated and not self.turned

    @property
    def out_features(self) -> int:
        """Outputs."""
        assert self.prepared is not None
        return self.prepared.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs."""
        assert self.prepared is not None
        return self.prepared.shape[1]

    @property
    def weight(self) -> Tensor:
        """No more than a dtype and a device, for models that ask for these before they multiply."""
        assert self.prepared is not None, self.names
        return self.prepared.packed.words.new_empty(0, dtype=self.prepared.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows: Rows | None = None if self.codes is None else self.codes.take(x)
        if rows is None:  # the entry makes codes of x where the kernel takes them
            rows = x
            if self.given is not None and self.simulated:
                rows = self.given.quantize(x)
            elif self.turned:
                rows = hadamard(x.float()).to(torch.float32 if self.takes_codes else x.dtype)
        if self.low is not None:
            return self._product(rows, F.linear(F.linear(x, self.low.a), self.low.b))
        return self.product(rows)

    def product(self, rows: Rows) -> Tensor:
        """The product with inputs as the kernel takes them, `Awaited` if it may be."""
        if self.awaited and not torch.compiler.is_compiling():  # which joins additions with what follows them
            assert self.prepared is not None
            codes = rows.codes if isinstance(rows, Quantized) else rows
            return Awaited.of(codes, self.out_features, self.prepared.dtype, partial(self._product, rows))
        return self._product(rows)

    def _product(self, rows: Rows, residual: Tensor | None = None) -> Tensor:
        assert self.prepared is not None, self.names
        return entry.linear(rows, self.prepared, self.bias, residual)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        if self.prepared is not None:  # follows .to(device); its dtype is that of `prepare`
            device = fn(torch.empty(0, device=self.prepared.packed.words.device)).device
            self.prepared = self.prepared.to(device)
            self.low = None if self.low is None else LowRank(*(part.to(device) for part in self.low))
        return self

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{', '.join(self.names)}; inputs: {'codes' if self.takes_codes else 'floats'}"


class Awaited(Tensor):
    """A product that nothing was done for yet: added to a tensor of its shape, it is computed by one kernel with the sum.

    Whatever else is asked of it computes it. Its own memory is that of one number without meaning.
    """

    product: Callable[[Tensor | None], Tensor]
    value: Tensor | None

    @classmethod
    def of(cls, x: Tensor, width: int, dtype: torch.dtype, product: Callable[[Tensor | None], Tensor]) -> "Awaited":
        """The product with rows x [..., in]: [..., width]; `product` takes what is added to it, or None."""
        made = x.new_empty((), dtype=dtype).expand(*x.shape[:-1], width).as_subclass(cls)
        made.product, made.value = product, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_SHAPE:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func is F.dropout and not (kwargs or {}).get("training", True):
            return args[0]
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            waiting, other = args if isinstance(args[0], cls) else args[::-1]
            other = _computed(other)
            same = isinstance(other, Tensor) and (other.shape, other.dtype) == (waiting.shape, waiting.dtype)
            if same and waiting.value is None:
                return waiting.product(other)
        return func(*tree_map(_computed, args), **tree_map(_computed, kwargs or {}))


def _computed(x: Any) -> Any:
    if not isinstance(x, Awaited):
        return x
    if x.value is None:
        x.value = x.product(None)
    return x.value


_ADDITIONS = (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
_OF_SHAPE = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
)  # fmt: skip


class Part(nn.Module):
    """One of several linears that are one product."""

    def __init__(self, whole: PackedLinear, outputs: Handoff, sizes: list[int], index: int) -> None:
        super().__init__()
        self.whole = whole
        self.outputs = outputs
        self.sizes = sizes
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        parts = self.outputs.take(x)
        if parts is None:
            parts = self.whole(x).split(self.sizes, -1)
            self.outputs.put(x, parts)
            self.outputs.take(x)
        out: Tensor = parts[self.index]
        return out


class PackedExperts(nn.Module):
    """In the place of a 3-D parameter: `experts[i]` is the matrix of one expert, which F.linear and @ multiply by."""

    def __init__(self, experts: list[PackedLinear], transposed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.transposed = transposed

    def __getitem__(self, index: Any) -> "_Expert":
        expert = self.experts[int(index)]
        assert isinstance(expert, PackedLinear)
        return _Expert(expert, self.transposed)


@dataclass
class _Expert:
    """Stands for the matrix of one expert where the model multiplies by it."""

    packed: PackedLinear
    transposed: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: list[Any] = [*args, *(kwargs or {}).values()]
        if isinstance(given[1], cls) and (func in MATMUL if given[1].transposed else func is F.linear):
            out = given[1].packed(given[0])
            return out if len(given) < 3 or given[2] is None else out + given[2]
        return NotImplemented


class Norm(nn.Module):
    """RMSNorm or, with a bias, LayerNorm, in one kernel; `one_plus`: times 1 + weight, `dtype`: of what an RMSNorm gives."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, one_plus: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.eps = eps
        self.one_plus = one_plus
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        out = entry.rms_norm(x, self.weight, self.eps, None, one_plus=self.one_plus, dtype=self.dtype)
        assert isinstance(out, Tensor)
        return out


class QuantizingNorm(Norm):
    """A norm that leaves its output as codes, and as floats only where `floats` says that they are read too.

    What it gives otherwise is `nan`, one number, of that shape.
    """

    nan: Tensor

    def __init__(self, norm: Norm, codes: Handoff, inputs: Input, nan: Tensor, floats: bool) -> None:
        bias = None if norm.bias is None else norm.bias.data
        super().__init__(norm.weight.data, bias, norm.eps, norm.one_plus, norm.dtype)
        self.register_buffer("nan", nan, persistent=False)
        self.codes = codes
        self.inputs = inputs
        self.floats = floats

    def forward(self, x: Tensor) -> Tensor:
        if self.floats and self.bias is None:
            rows, out = entry.kept_rms_norm(x, self.weight, self.eps, self.inputs, one_plus=self.one_plus)
        elif self.floats:
            rows, out = entry.kept_layer_norm(x, self.weight, self.bias, self.eps, self.inputs)
        elif self.bias is None:
            rows, out = entry.rms_norm(x, self.weight, self.eps, self.inputs, one_plus=self.one_plus), self.nan.expand(x.shape)
        else:
            rows, out = entry.layer_norm(x, self.weight, self.bias, self.eps, self.inputs), self.nan.expand(x.shape)
        self.codes.put(out, rows)
        return out


class QuantizingGelu(nn.Module):
    """A GELU that leaves its output as codes, and gives `nan` of that shape."""

    nan: Tensor

    def __init__(self, codes: Handoff, inputs: Input, nan: Tensor, tanh: bool) -> None:
        super().__init__()
        self.register_buffer("nan", nan, persistent=False)
        self.codes = codes
        self.inputs = inputs
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        out = self.nan.expand(x.shape)
        self.codes.put(out, entry.gelu(x, self.inputs, tanh=self.tanh))
        return out


class GatedProduct(nn.Module):
    """down(silu(gate(x)) * up(x)), with the input of `down` made in one kernel."""

    def __init__(self, both: PackedLinear, down: PackedLinear, sizes: list[int], gate_first: bool) -> None:
        super().__init__()
        self.both = both
        self.down = down
        self.sizes = sizes
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).split(self.sizes, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.down.product(entry.silu_mul(gate, up, self.down.given))


# ---------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a quantized linear, or scan, of the checkpoint runs.

    Attributes:
        runs: "packed", "packed, inputs simulated", or "dequantized"; of a scan "int8" or "simulated".
        reason: why not packed, or why simulated.
    """

    name: str
    scheme: str
    runs: str
    reason: str = ""


@checked
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kernels: bool | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a checkpoint, quantized or not, as a transformers model.

    Args:
        model: a folder written by `quantize`, another compressed-tensors folder, a float checkpoint or a hub id.
        dtype: of activations and of float parameters; the checkpoint's own by default. With kernels 16 bits,
            bfloat16 for a float32 checkpoint.
        kernels: keep quantized weights packed and run on the kernels. By default where the device is a GPU and the checkpoint
            is quantized. On a CPU they run as their specification in plain torch, slowly; without kernels weights are
            dequantized (`export.load`), which is the reference for accuracy.
        trust_remote_code: run the Python code in the folder or repository, with the rights of this process, where
            transformers does not know the model itself; only for sources you trust.

    Returns:
        the model; with kernels its attribute `lowbit` lists a `Row` for each quantized linear.

    Raises:
        ValueError: the folder is incomplete or in a format lowbit does not read; kernels for a float checkpoint, or for one of
            which no linear can stay packed.
    """
    model, where = str(model), parse_device(device)
    source = open_checkpoint(model, revision, trust_remote_code=trust_remote_code)
    if kernels is None:
        kernels = isinstance(source, QuantizedSource) and where.type == "cuda"
    if not kernels:
        return export.load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if not isinstance(source, QuantizedSource):
        raise ValueError(f"{model} is not quantized: kernels have nothing to do there; leave out kernels=True")
    dtype = dtype or (torch.bfloat16 if source.dtype() == torch.float32 else source.dtype())
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"kernels compute in float16 or bfloat16, not {dtype}; give dtype=torch.bfloat16")
    arch = Arch(source, dtype, device)
    rows = place(arch, source)
    packed = {source.modules[row.name].tensor for row in rows if row.runs != "dequantized"}
    arch.outside = tuple(name for name in arch.outside if name not in packed)
    arch.load_outside()
    for block in arch.blocks:
        arch.load(tuple(name for name in block.tensors if name not in packed))
    restore_generation(arch.model, source.folder)
    return finished(arch, source, rows)


def place(arch: Arch, source: QuantizedSource) -> list[Row]:
    """Put packed modules without weights into the model of a quantized checkpoint, wherever a kernel can do the work."""
    export.check_model(arch, source)
    rows: list[Row] = []
    inputs = source.inputs()
    by_param: dict[str, list[tuple[Linear, str]]] = {}
    for name, module in source.modules.items():
        linear = arch.linear(module.tensor, module.index, transposed=module.transposed)
        if linear is None:
            rows.append(_dequantized(name, module.scheme, "transformers stores it rearranged"))
        else:
            by_param.setdefault(linear.param, []).append((linear, name))
    for param, members in by_param.items():
        reason, simulated = _how(arch, source, param, members, inputs)
        for _, name in members:
            scheme = source.modules[name].scheme
            if reason is not None:
                rows.append(_dequantized(name, scheme, reason))
            else:
                runs = "packed" if simulated is None else "packed, inputs simulated"
                rows.append(Row(name=name, scheme=scheme.name, runs=runs, reason=simulated or ""))
        if reason is None:
            _place(arch, param, members, inputs.get(members[0][1]), simulated is not None)
    if all(row.runs == "dequantized" for row in rows):
        reasons = sorted({row.reason for row in rows})
        raise ValueError(
            f"{source.folder}: no linear of it can stay packed ({'; '.join(reasons)}); lowbit.load with kernels=False "
            "dequantizes it"
        )
    return rows


def finished(arch: Arch, source: QuantizedSource, rows: list[Row]) -> "PreTrainedModel":
    """The model, in which `place` was at work and all but packed modules is filled, with these filled, and fused.

    One matrix is read after the other; the float model is never whole in memory.
    """
    model: Any = arch.model
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.prepare(source, arch.dtype, arch.device)
    found, points = scans.place(arch, source)
    of_scans = [Row(name=name, scheme="s8", runs="simulated" if why else "int8", reason=why) for name, why in found.items()]
    model.lowbit = rows = rows + of_scans
    for kind, reason in sorted({(row.runs, row.reason) for row in rows if row.reason}):
        concerned = [row for row in rows if (row.runs, row.reason) == (kind, reason)]
        what = "scans" if kind == "simulated" else "linears"
        warnings.warn(f"{len(concerned)} {what} {kind}: {reason} ({concerned[0].name}, ...)", stacklevel=3)
    attention.join(model)
    with torch.no_grad():
        fuse(arch, source)
    inputs = source.inputs()
    floats = [source.modules[row.name] for row in rows if row.runs == "dequantized" and row.name in inputs]
    sites = points | {arch.site(module.tensor, module.index): inputs[module.name] for module in floats}
    if sites:
        export.quantize_inputs(model, sites)
    for path, scales in source.cache_scales().items():
        simulate_cache(model.get_submodule(path), CacheSpec(name="fp8", format=FP8_E4M3), scales)
    return model


def _dequantized(name: str, scheme: Scheme, reason: str) -> Row:
    return Row(name=name, scheme=scheme.name, runs="dequantized", reason=reason)


def _how(
    arch: Arch, source: QuantizedSource, param: str, members: list[tuple[Linear, str]], inputs: dict[str, Input]
) -> tuple[str | None, str | None]:
    """Why a parameter cannot stay packed, or None; why its inputs are simulated, or None."""
    value = arch.model.get_parameter(param)
    path, _, leaf = param.rpartition(".")
    owner = arch.model.get_submodule(path)
    first = members[0][0]
    schemes = [source.modules[name].scheme for _, name in members]
    if value.dim() == 2 and not ((isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D") and leaf == "weight"):
        return f"it is no linear layer but a {type(owner).__name__}", None
    if param in arch.tied or param in arch.tied.values():
        return "it is tied to another parameter", None
    if sum(linear.out_features * linear.in_features for linear, _ in members) != value.numel():
        return "other rows of the same matrix are float", None
    if any((scheme.weight, inputs.get(name)) != (schemes[0].weight, inputs.get(members[0][1]))
           for scheme, (_, name) in zip(schemes, members, strict=True)):  # fmt: skip
        return "rows of one matrix have different schemes", None
    corrected = any(name in source.corrections for _, name in members)
    if corrected and (len(members) > 1 or inputs.get(members[0][1]) is not None):
        return "a low-rank correction of several matrices, or with quantized inputs", None
    scheme = schemes[0]
    if any(linear.out_features % scheme.weight.rows for linear, _ in members):
        return f"its rows are no multiple of blocks of {scheme.weight.rows}", None
    if first.in_features % max(1, scheme.weight.group):
        return f"its {first.in_features} columns are no multiple of groups of {scheme.weight.group}", None
    reason = entry.reason_against(scheme)
    if reason is None or scheme.input is None:
        return reason, None
    floats = entry.reason_against(replace(scheme, input=None))
    return (reason, None) if floats is not None else (None, reason)


def _place(arch: Arch, param: str, members: list[tuple[Linear, str]], given: Input | None, simulated: bool) -> None:
    """Put packed modules in the place of a parameter."""
    path, _, leaf = param.rpartition(".")
    owner: Any = arch.model.get_submodule(path)
    members = sorted(members, key=lambda member: (member[0].index or 0, member[0].rows))
    if members[0][0].index is None:
        parent, _, name = path.rpartition(".")
        packed = PackedLinear([name for _, name in members], owner.bias, given, simulated)
        setattr(arch.model.get_submodule(parent), name, packed)
        return
    by_index: dict[int, list[str]] = {}
    for linear, name in members:
        by_index.setdefault(linear.index or 0, []).append(name)
    experts = [PackedLinear(names, None, given, simulated) for names in by_index.values()]
    arch.model.set_experts_implementation("eager")  # the one that multiplies by one expert after the other
    del owner._parameters[leaf]
    setattr(owner, leaf, PackedExperts(experts, members[0][0].transposed))


# ----------------------------------------------------------------------------------------------------------------- fusing


@dataclass
class _Call:
    """The input and the output of a module in the short run."""

    x: Tensor
    out: Tensor


@dataclass
class _Rotation:
    """The arguments of `apply_rotary_pos_emb` in the short run, q, k, cos and sin, and the two tensors it gave."""

    args: tuple[Tensor, ...]
    out: tuple[Tensor, ...]


@dataclass
class _Swap:
    """A module, or another attribute of one, put in the place of another."""

    owner: nn.Module
    name: str
    old: Any
    path: str

    def undo(self) -> None:
        """Put the old one back."""
        setattr(self.owner, self.name, self.old)


def fuse(arch: Arch, source: QuantizedSource) -> None:
    """Join what can be done in one step; see the module's docstring."""
    model = arch.model
    tokens = arch.sample_tokens()[:1].to(arch.device)
    before = _observed(arch, tokens)
    for path in {point.mixer for block in arch.blocks for point in block.points}:
        if not isinstance(model.get_submodule(path), scans.ScanMixer):  # these put padded tokens to 0, of which none is here
            before.read[id(before.calls[path].x)] = before.calls[path].x
    swaps: list[_Swap] = []

    def swap(path: str, new: Any) -> None:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        swaps.append(_Swap(owner, name, getattr(owner, name), path))
        setattr(owner, name, new)

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and name in before.calls and before.only_added(before.calls[name].out):
            swap(f"{name}.awaited", True)
    for name, call in before.rotations.items():
        if _distance(torch.cat(entry.rope(*call.args), 1), torch.cat(call.out, 1)) < _SAME:
            swap(f"{name}.forward", _with_rotation(model.get_submodule(name), entry.rope))
    readers = _merge(arch, source, before.calls, swap)
    _join_norms(model, before, readers, swap)
    _join_activations(model, before, readers, swap)
    for block in arch.blocks:
        args, kwargs = before.blocks[block.name]
        out = model.get_submodule(block.name)(*args, **kwargs)
        if _distance(out[0] if isinstance(out, tuple) else out, before.calls[block.name].out) > TOLERANCE:
            for each in reversed([each for each in swaps if each.path.startswith(block.name + ".")]):
                each.undo()
            warnings.warn(f"{block.name}: fused, it does not compute the same; its linears run one by one", stacklevel=2)


class _Seen(TorchFunctionMode):
    """What happens while the row runs.

    Attributes:
        calls: the first call of every module that takes a tensor and gives one.
        blocks: the arguments of every block.
        rotations: what every attention has `apply_rotary_pos_emb` do.
        read: tensors that anything but a packed linear computed with, by id; kept, so that no other gets their id.
        reads: how often. added: those that were added to one of their shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, _Call] = {}
        self.read: dict[int, Tensor] = {}
        self.rotations: dict[str, _Rotation] = {}
        self.reads: Counter[int] = Counter()
        self.added: set[int] = set()
        self.blocks: dict[str, tuple[Any, Any]] = {}
        self.packed = 0  # depth of packed linears

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.packed and getattr(func, "__name__", "") not in _ONLY_SHAPE:
            found = {id(x): x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
            self.read |= found
            self.reads.update(list(found))
            if func in _ADDITIONS and len({x.shape for x in found.values()}) == 1:
                self.added |= set(found)
        return func(*args, **(kwargs or {}))

    def only_added(self, x: Tensor) -> bool:
        """Whether all that was done with x is one addition."""
        return id(x) in self.added and self.reads[id(x)] == 1


_ONLY_SHAPE = ("__get__", "size", "dim", "numel", "is_floating_point", "dropout")  # dropout does nothing here


_ROTATION = "apply_rotary_pos_emb"  # transformers' name for it in most models


def _rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function of that name in the module's forward, if there is one."""
    forward = type(module).forward
    named = _ROTATION in getattr(getattr(forward, "__code__", None), "co_names", ()) and "forward" not in vars(module)
    return forward.__globals__.get(_ROTATION) if named else None


def _with_rotation(module: nn.Module, rotate: Callable[..., Any]) -> MethodType:
    """The module's forward, where the function of that name is `rotate`; as it was under torch.compile, which joins such things
    itself and takes a global name for what the module has there."""
    old: Any = type(module).forward
    new = FunctionType(old.__code__, {**old.__globals__, _ROTATION: rotate}, old.__name__, old.__defaults__, old.__closure__)
    new.__kwdefaults__ = old.__kwdefaults__

    @wraps(old)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (old if torch.compiler.is_compiling() else new)(self, *args, **kwargs)

    return MethodType(forward, module)


def _observed(arch: Arch, tokens: Tensor) -> _Seen:
    """Run the row."""
    seen = _Seen()

    def noted(name: str, theirs: Any) -> Callable[..., Any]:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            out = theirs(*args, **kwargs)
            if len(args) == 4 and not kwargs:
                q, k, cos, sin = args
                of_heads = q.dim() == k.dim() == 4 and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:]
                if of_heads and q.shape[3] % 2 == 0 and len(cos) in (1, len(q)) and out[0].dtype == q.dtype:
                    seen.rotations[name] = _Rotation(args, out)
            return out

        return rotate

    def entered(module: nn.Module, args: Any) -> None:
        seen.packed += 1

    def left(module: nn.Module, args: Any, out: Any) -> None:
        seen.packed -= 1

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(x, Tensor) and isinstance(out, Tensor):
                seen.calls.setdefault(name, _Call(x, out))

        return hook

    def called(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.blocks[name] = (args, kwargs)

        return hook

    hooks = []
    for block in arch.blocks:
        module = arch.model.get_submodule(block.name)
        hooks.append(module.register_forward_pre_hook(called(block.name), with_kwargs=True))
    turning = {name: module for name, module in arch.model.named_modules() if _rotation_of(module) is not None}
    for name, module in turning.items():
        module.forward = _with_rotation(module, noted(name, _rotation_of(module)))
    for name, module in arch.model.named_modules():
        hooks.append(module.register_forward_hook(keep(name), with_kwargs=True))
        if isinstance(module, PackedLinear | Part):
            hooks += [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]
    try:
        with seen:
            arch.run(tokens)
    finally:
        for hook in hooks:
            hook.remove()
        for module in turning.values():
            del module.forward
    return seen


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative; infinite where something is not finite, or of another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    distance = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    return distance if distance == distance else float("inf")


_SAME = 0.01  # relative, of what one module gives: rounding to 16 bits is less
_Readers = dict[int, tuple[Tensor, list[tuple[str, PackedLinear]]]]


def _merge(arch: Arch, source: QuantizedSource, calls: dict[str, _Call], swap: Callable[[str, nn.Module], None]) -> _Readers:
    """Make one product of linears with one input; the packed linears that read each tensor after that, by its id."""
    by_input: dict[int, list[tuple[str, PackedLinear]]] = {}
    for name, module in arch.model.named_modules():
        if isinstance(module, PackedLinear) and name in calls:
            by_input.setdefault(id(calls[name].x), []).append((name, module))
    readers: _Readers = {}
    for key, members in by_input.items():
        x = calls[members[0][0]].x
        kinds: dict[Any, list[tuple[str, PackedLinear]]] = {}
        for name, module in members:
            spec = source.modules[module.names[0]].scheme.weight
            kind = name if module.low is not None else (spec, module.given, module.simulated)
            kinds.setdefault(kind, []).append((name, module))
        left: list[tuple[str, PackedLinear]] = []
        for same in kinds.values():
            if len(same) == 1:
                left += same
                continue
            first = same[0][1]
            names = [name for _, module in same for name in module.names]
            bias = _joined_bias([module for _, module in same])
            whole = PackedLinear(names, bias, first.given, first.simulated).prepare(source, arch.dtype, arch.device)
            outputs = Handoff(len(same))
            sizes = [module.out_features for _, module in same]
            for i, (name, _) in enumerate(same):
                swap(name, Part(whole, outputs, sizes, i))
            left.append((same[0][0], whole))
        readers[key] = (x, left)
    return readers


def _joined_bias(modules: list[PackedLinear]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    like = next(module.bias for module in modules if module.bias is not None)
    return torch.cat([like.new_zeros(m.out_features) if m.bias is None else m.bias.data for m in modules])


def _join_norms(model: nn.Module, seen: _Seen, readers: _Readers, swap: Callable[[str, nn.Module], None]) -> None:
    """Put one-kernel norms in the place of norms, with the quantization where their readers take codes."""
    for name, module in list(model.named_modules()):
        norm = _norm_of(module, seen.calls[name]) if name in seen.calls else None
        if norm is None:
            continue
        out = seen.calls[name].out
        left = _leave_codes(out, readers)
        if left is not None:
            swap(name, QuantizingNorm(norm, *left, out.new_full((), torch.nan), floats=id(out) in seen.read))
        elif norm.bias is None:
            swap(name, norm)


def _leave_codes(out: Tensor, readers: _Readers) -> tuple[Handoff, Input] | None:
    """Have the products that take codes find those of `out`, quantized as is returned too; None if there is no such product."""
    takers = [reader for _, reader in readers.get(id(out), (out, []))[1] if reader.takes_codes and not reader.turned]
    takers = [reader for reader in takers if reader.given == takers[0].given]
    if not takers or takers[0].given is None:
        return None
    codes = Handoff(len(takers))
    for reader in takers:
        reader.codes = codes
    return codes, takers[0].given


def _norm_of(module: nn.Module, call: _Call) -> Norm | None:
    """The norm that a module computes, if it is one."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.shape != call.x.shape[-1:] or eps is None or list(module.children()):
        return None
    for one_plus in (False, True):
        norm = Norm(weight.data, None if bias is None else bias.data, eps, one_plus, call.out.dtype)
        if _distance(norm(call.x), call.out) < _SAME:
            return norm
    return None


def _join_activations(model: nn.Module, seen: _Seen, readers: _Readers, swap: Callable[[str, nn.Module], None]) -> None:
    """Make one kernel of SiLU and a product, and quantize in the kernel of the activation what products take as codes."""
    for name, module in list(model.named_modules()):
        if name in seen.calls and not list(module.parameters()) and not list(module.children()):
            call = seen.calls[name]
            kinds = {tanh: _distance(F.gelu(call.x, approximate=tanh), call.out) for tanh in ("none", "tanh")}
            kind = min(kinds, key=lambda each: kinds[each])
            left = None if kinds[kind] > _SAME or id(call.out) in seen.read else _leave_codes(call.out, readers)
            if left is not None:
                swap(name, QuantizingGelu(*left, call.out.new_full((), torch.nan), tanh=kind == "tanh"))
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) and name in seen.calls and module.codes is None and module.takes_produced:
            path = name.rpartition(".")[0]
            gated = _gated_of(model, path, module, seen.calls, name)
            if gated is not None:
                swap(path, gated)


def _gated_of(model: nn.Module, path: str, down: PackedLinear, calls: dict[str, _Call], name: str) -> GatedProduct | None:
    """What computes the same as the module at `path`, if that is a gated product that ends in `down`."""
    if path not in calls or calls[path].out is not calls[name].out:
        return None
    for child, module in model.get_submodule(path).named_children():
        call = calls.get(f"{path}.{child}")
        if call is None or call.x is not calls[path].x:
            continue
        if isinstance(module, Part) and len(module.sizes) == 2 and module.index == 0:
            twin = next(n for n, m in model.named_modules() if isinstance(m, Part) and m.whole is module.whole and m.index == 1)
            whole, pair = module.whole, (call.out, calls[twin].out)
        elif isinstance(module, PackedLinear) and module.out_features == 2 * down.in_features:
            first, second = call.out.chunk(2, -1)
            whole, pair = module, (first, second)
        else:
            continue
        for gate_first in (True, False):
            gate, up = pair if gate_first else pair[::-1]
            z = calls[name].x
            if gate.shape == up.shape == z.shape and _distance(F.silu(gate) * up, z) < _SAME:
                return GatedProduct(whole, down, [part.shape[-1] for part in pair], gate_first)
    return None
