"""What a model is made of: its chain of blocks, and the linear layers in them.

Nothing here is a table of model classes. The model is built on the meta device from its config, and one short row of tokens is
run through it with each block loaded from the checkpoint just before it is called and freed right after. What is observed is
what holds: the order of the blocks and what they return, which matrices multiply their inputs, and which linears share one
input. The same pass reads every weight, so damaged files, missing tensors and NaN are found before any work starts.

Two names for one weight: the checkpoint's ("model.layers.0.block_sparse_moe.experts.3.w1.weight") and the place in the
transformers model (rows 0..127 of "model.layers.0.mlp.experts.gate_up_proj"[3]). transformers' own conversion mapping relates
them, on labelled stand-ins; `Arch.load` checks the result against the real tensors. Users, records and checkpoints see only
checkpoint names.
"""

import contextlib
import ctypes
import gc
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowbit.arguments import parse_device
from lowbit.experts import converters as converters_of_experts
from lowbit.experts import open_experts
from lowbit.outputs import distance, gives_choices, input_ids, output_of
from lowbit.source import FLOAT_DTYPES, Source, in_short, read_json, refused_code
from lowbit.ssm import Mixer, is_mixer, point

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

PROBE_TOKENS = 16
_SLACK = 2**24  # weights, or bytes of computed tables, that a model may have beyond what its files explain
_SAME = 1e-2  # relative, of a mixer's output: another formula differs by more, bfloat16 products by less
_REPEATED = 1e-4  # relative, of a block's output on a second call: a key more in a cache changes it by more
REARRANGED = "transformers stores it rearranged"  # a reason in `Block.skipped`


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One weight matrix [out, in] of the checkpoint that multiplies activations.

    Attributes:
        name: the checkpoint's tensor name without ".weight"; for experts stored as one 3-D tensor, with the expert's number.
        tensor: the checkpoint's tensor.
        param: the model parameter that holds it.
        index: the slice of a 3-D parameter (an expert), or None.
        rows: the output rows it occupies there.
        transposed: the parameter is stored as [in, out] (GPT-2's Conv1D).
        stacked: the checkpoint's tensor is 3-D itself, and `index` selects from it too.
        swapped: the checkpoint's tensor has the last two dimensions the other way round than the parameter.
        shares: name of the first linear of the block that has the same input, possibly its own.
        router: it chooses experts.
    """

    name: str
    tensor: str
    param: str
    index: int | None
    rows: tuple[int, int]
    transposed: bool
    stacked: bool
    out_features: int
    in_features: int
    shares: str = ""
    router: bool = False
    swapped: bool = False

    @property
    def stored_transposed(self) -> bool:
        """The checkpoint's tensor is stored as [in, out]."""
        return self.transposed != self.swapped

    @property
    def site(self) -> "Site":
        """Where the model multiplies by this matrix."""
        return (self.param, self.index)

    def view(self, param: Tensor) -> Tensor:
        """The [out, in] view of this linear in its parameter."""
        matrix = param if self.index is None else param[self.index]
        return (matrix.T if self.transposed else matrix)[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A tensor of a block, besides the weights and inputs of its linears, that may be quantized.

    Attributes:
        name: under the checkpoint's name of its module.
        mixer: the module's path in the model.
        local: the name within the module.
        tensor: of a parameter, the checkpoint's tensor; None for what is computed.
        sets, inner: consecutive `inner` features of an activation are one of `sets` sets, which may have scales of their own.
        groups: the state group of each set [sets], where it has one.
    """

    name: str
    mixer: str
    local: str
    tensor: str | None = None
    sets: int = 1
    inner: int = 1
    groups: Tensor | None = None

    @property
    def site(self) -> "Site":
        """Where the model computes it, or the parameter."""
        return (f"{self.mixer}.{self.local}", None)


Site = tuple[str, int | None]
Observe = Callable[[Tensor | str, Tensor, bool], Tensor]
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
BATCHED = (*MATMUL, torch.bmm, Tensor.bmm)
TOPK = (torch.topk, Tensor.topk)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer (or state space) block: its path in the model, its checkpoint tensors, its linears as they run.

    `skipped` names the matrices of the block that no scheme can choose, with the reason. `points` are those of a state space
    mixer, if there is one and lowbit's own forward computes what the model's does. `aside` are linears that stay float, for the
    reason beside them, unless a rule is for such linears alone.

    The block's other arguments, as `leaves` lists them: `varying` are those that depend on the tokens (per-layer embeddings,
    tokens that choose experts). `carried` are mappings that blocks fill and later blocks read (keys and values of another
    layer).
    """

    index: int
    name: str
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    returns: int = 0  # 0: a tensor, n: a tuple of n with the hidden states first
    points: tuple[Point, ...] = ()
    varying: tuple[int, ...] = ()
    carried: tuple[int, ...] = ()
    aside: tuple[tuple[Linear, str], ...] = ()


class Tap(TorchFunctionMode):
    """While active, calls `observe(weight, x, transposed)` for every product x W^T (or x W: transposed) and uses what it
    returns in place of x. Sees F.linear, addmm and x @ w, hence nn.Linear, Conv1D and experts that slice a 3-D parameter, or
    multiply all of its slices at once.
    A `ssm.point` x is seen as well, with its name in the place of the weight.

    A weight in another dtype than x is multiplied in its own dtype, and the product returned in that of x."""

    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is point:
            return self.observe(args[1], args[0], False)
        if func is F.linear and len(args) >= 2:
            bias = args[2] if len(args) == 3 else kwargs.get("bias")
            return _product(F.linear, self.observe(args[1], args[0], False), args[1], bias)
        if func is torch.addmm and len(args) == 3:
            return _product(torch.matmul, self.observe(args[2], args[1], True), args[2], args[0])
        if func in MATMUL and len(args) == 2 and args[1].dim() == 2:
            return _product(torch.matmul, self.observe(args[1], args[0], args[1].is_contiguous()), args[1], None)
        if func in BATCHED and len(args) == 2 and isinstance(args[1], nn.Parameter) and args[0].dim() == args[1].dim() == 3:
            each = zip(args[0].unbind(), args[1].unbind(), strict=True)
            return torch.stack([_product(torch.matmul, self.observe(w, x, True), w, None) for x, w in each])
        return func(*args, **kwargs)


class _Discovery(Tap):
    """A `Tap` that also tells which linears choose experts: `routers` gets the weight whose product a top-k looks at next."""

    def __init__(self, observe: Observe) -> None:
        super().__init__(self._seen)
        self._observe, self._last, self.routers = observe, (torch.empty(0), 0, 0), list[Tensor]()

    def _seen(self, weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
        if not isinstance(weight, str):
            width = weight.shape[1] if transposed else weight.shape[0]
            self._last = (weight, width, width * (x.numel() // x.shape[-1]))
        return self._observe(weight, x, transposed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight, width, size = self._last
        if func in TOPK and args and args[0].shape[-1] == width and args[0].numel() == size:
            self.routers.append(weight)
        return super().__torch_function__(func, types, args, kwargs)


def _product(multiply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = multiply(x.to(weight.dtype), weight).to(x.dtype)
    return product if bias is None else product.add_(bias)


class Arch:
    """A model on the meta device whose blocks are filled from the checkpoint one at a time.

    Attributes:
        model: the transformers model.
        blocks: the chain, in the order in which it runs.
        head: what turns the last hidden states into logits, where it is a matrix of its own: shaped like a block behind the
            last one, whose call takes tokens as its other arguments. Its tensors are also among `outside`.
        tied_head: name of a head that is the embedding's matrix, which stays float.
        table: the token embeddings as one matrix [vocabulary, width], where they are one: shaped like a block before the first.
            Its tensor is also among `outside`.
        dtype: the dtype in which parameters are filled; everything that solves or compares uses float32.
        matrix_dtype: the dtype in which the matrices of discovered linears are filled: that of the checkpoint where the
            machine multiplies it fast, else `dtype`. Activations between products have `dtype` all the same.
        outside: checkpoint tensors of no block (embeddings, final norm, head).
        unused: checkpoint tensors the model has no place for; they are kept as they are.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        model: "PreTrainedModel | None" = None,
    ) -> None:
        """model: the transformers model on the meta device; built from the checkpoint's config by default."""
        self.source = source
        self.dtype = dtype
        self.device = parse_device(device)
        if model is not None:
            _check_sizes(model, source)
        self.model = _empty_model(source) if model is None else model
        open_experts(self.model, source.tensors)
        self.matrix_dtype = _matrix_dtype(source, dtype, self.device)
        self._matrices: frozenset[str] = frozenset()
        for name, buffer in list(self.model.named_buffers()):
            _set_tensor(self.model, name, buffer if buffer.is_meta else buffer.to(self.device))
        self._places = _Places(self.model, source)
        self._check_complete()
        self.unused = self._places.unused
        prefix = _block_list(self.model)
        count = len(list(self.model.get_submodule(prefix).children()))
        self.blocks = tuple(
            Block(index=i, name=f"{prefix}.{i}", tensors=self._places.sources_under(f"{prefix}.{i}.")) for i in range(count)
        )
        self.blocks = tuple(replace(block, points=self._points(block)) for block in self.blocks)
        taken = {name for block in self.blocks for name in block.tensors}
        self.outside = tuple(name for name in source.tensors if name not in taken and name not in self.unused)
        self.head, self.tied_head = self._find_head()
        self.table = self._find_table()
        self._configs = _configs_with_cache(self.model)
        self._rows_axis = 0  # of hidden states in the model; everywhere else rows come first

    # ------------------------------------------------------------------------------------------------------ filling

    def load(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Fill the model with the named checkpoint tensors in `dtype`; matrices of known linears in `matrix_dtype`.

        Returns:
            the tensors as the checkpoint holds them.

        Raises:
            ValueError: a tensor is unreadable or not finite.
        """
        values = self.source.read(list(names))
        for name, tensor in values.items():
            unlimited = tensor.dim() == 0 and bool(tensor.isinf())  # a limit of Gemma 4's towers, where there is none
            if tensor.is_floating_point() and not unlimited and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                raise ValueError(
                    f"{self.source.folder / self.source.tensors[name].shard}: tensor {name} has NaN or infinite "
                    "values; the checkpoint is damaged, fetch or save it again"
                )
        for param, value in self._places.assemble(values).items():
            dtype = self.matrix_dtype if param in self._matrices else self.dtype
            _set_tensor(self.model, param, value.to(self.device, dtype if value.is_floating_point() else None))
        return values

    def load_outside(self) -> None:
        """Fill everything that is in no block, one tensor after the other, and tie what is tied."""
        for names in self._places.sets(self.outside):
            self.load(names)
        for tied, original in self._places.tied.items():
            _set_tensor(self.model, tied, self.model.get_parameter(original))

    def free(self, prefix: str = "") -> None:
        """Put the parameters under `prefix` (a block's name; all of them by default) back on the meta device."""
        for name, param in list(self.model.named_parameters(remove_duplicate=False)):
            if (not prefix or name.startswith(prefix + ".")) and not param.is_meta:
                _set_tensor(self.model, name, torch.empty_like(param, device="meta"))
        return_freed_memory()

    def free_outside(self) -> None:
        """Free everything that is in no block."""
        inside = tuple(block.name + "." for block in self.blocks)
        for name, param in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(inside) and not param.is_meta:
                _set_tensor(self.model, name, torch.empty_like(param, device="meta"))
        return_freed_memory()

    def fill(self) -> "PreTrainedModel":
        """Fill the whole model, for use rather than for streaming, and return it."""
        self.load_outside()
        for block in self.blocks:
            self.load(block.tensors)
        return self.model

    def param(self, linear: Linear) -> Tensor:
        """The parameter that holds `linear`, in `matrix_dtype` while its block is loaded."""
        return self.model.get_parameter(linear.param)

    def param_of(self, tensor: str) -> str:
        """The parameter that a checkpoint tensor fills, or fills together with others."""
        return self._places.param_of(tensor)

    def sites(self, block: Block) -> dict[int, str]:
        """The addresses of a loaded block; see `site_of`."""
        return addresses(self.model.get_submodule(block.name), block.name + ".")

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that are the same as another, by name."""
        return self._places.tied

    def site(self, tensor: str, index: int | None = None) -> Site:
        """Where the model multiplies by a checkpoint tensor (or by expert `index` of one that is 3-D)."""
        linear = self.linear(tensor, index)
        assert linear is not None, tensor
        return linear.site

    def linear(self, tensor: str, index: int | None = None, *, transposed: bool = False) -> Linear | None:
        """The linear of a checkpoint tensor (or expert `index` of one that is 3-D) without a probe, so what it shares is not
        known; `transposed` if the model keeps [in, out]. None where transformers rearranges the tensor."""
        shape = torch.Size(self.source.tensors[tensor].shape)
        every = {self._places.param_of(tensor): transposed}
        return next((x for x in self._places.linears(tensor, shape, every) if index in (None, x.index)), None)

    def place(self, tensor: str) -> str | None:
        """The parameter of which a checkpoint tensor is the whole or a slice; None where the model holds it otherwise."""
        place = self._places.place(tensor)
        return None if place is None else place[0]

    def held(self, tensor: str) -> Tensor:
        """What the loaded model holds for a checkpoint tensor that has a `place`, in the checkpoint's layout and dtype."""
        place = self._places.place(tensor)
        assert place is not None, tensor
        name, index, rows, transposed = place
        value: Tensor = self.model.get_parameter(name)
        value = value if index is None else value[index]
        value = value.T if transposed else value
        return value[slice(*rows) if rows else slice(None)].to("cpu", self.stored_dtype(tensor)).contiguous()

    def stored_dtype(self, tensor: str) -> torch.dtype:
        """The dtype of a float tensor in the checkpoint."""
        return FLOAT_DTYPES[self.source.tensors[tensor].dtype]

    def set_aside(self, reasons: dict[str, str]) -> None:
        """Leave the named linears float, for the reason given, unless they are taken back."""
        self.adopt(tuple(_divided(block, reasons) for block in self.blocks))

    def take_back(self, names: Iterable[str]) -> None:
        """Have linears that were set aside be linears as all others."""
        wanted = set(names)
        for_good = []
        for block in self.blocks:
            back = tuple(replace(linear, shares=linear.name) for linear, _ in block.aside if linear.name in wanted)
            aside = tuple(pair for pair in block.aside if pair[0].name not in wanted)
            for_good.append(replace(block, linears=(*block.linears, *back), aside=aside))
        self.adopt(tuple(for_good))

    # ------------------------------------------------------------------------------------------------------ running

    def adopt(self, blocks: tuple[Block, ...]) -> None:
        """Take over blocks as `probe` discovered them, here or in the same model from another checkpoint."""
        self.blocks = blocks
        for block in blocks:
            self._use_mixers(block)
        self._matrices = frozenset(linear.param for block in blocks for linear in block.linears)

    def embed(
        self, tokens: Tensor, parameters: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Run what comes before the blocks on tokens [rows, length] int64, with gradients to the `parameters` that replace some
        of the model, by name.

        Returns:
            hidden states [rows, length, width] float32 that enter the first block, and for every block the other
            positional and keyword arguments the model calls it with (masks, positions), without caches. A model that keeps
            several streams has further dimensions behind the rows.
        """
        first: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stub(block: Block, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, args, kwargs = _split_call(args, kwargs)
            if not first:
                first.append(hidden)
            calls.append((args, kwargs))
            if block.index == len(self.blocks) - 1:
                raise _Reached
            return self._returned(block, hidden)

        with contextlib.suppress(_Reached):
            self._run(tokens, stub, parameters)
        self._rows_axis = _axis_of_rows(first[0], tokens)
        return first[0].movedim(self._rows_axis, 0), calls

    @torch.no_grad()
    def call(self, block: Block, hidden: Tensor, call: Any, observe: Observe | None = None) -> Tensor:
        """Run one loaded block on hidden states [rows, length, width] float32, on `device` or not.

        Args:
            call: the other arguments, from `embed`; of the head, the tokens.
            observe: see `Tap`.
        """
        return self.forward(block, hidden, call, observe, {})

    def forward(
        self, block: Block, hidden: Tensor, call: Any, observe: Observe | None, parameters: dict[str, Tensor]
    ) -> Tensor:
        """`call` with gradients, and with some parameters of the block replaced, by name within it (of the head: in all)."""
        if block is self.head:
            with Tap(observe or (lambda weight, x, transposed: x)):
                return self.finish(call, hidden, parameters)
        args, kwargs = call
        module = self.model.get_submodule(block.name)
        given = (self._inside(hidden).to(self.dtype), *args)
        with Tap(observe or (lambda weight, x, transposed: x)):
            out = torch.func.functional_call(module, parameters, given, kwargs) if parameters else module(*given, **kwargs)
        return (out[0] if isinstance(out, (tuple, list)) else out).movedim(self._rows_axis, 0)

    def _inside(self, hidden: Tensor) -> Tensor:
        """Hidden states with rows first as the model's blocks take them, on `device`."""
        return hidden.to(self.device).movedim(0, self._rows_axis).contiguous()  # sums depend on the layout in memory

    def finish(self, tokens: Tensor, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Run what comes after the blocks: what the model gives out (see `outputs`) for `hidden`, the last block's output.
        tokens [rows, length] as given to `embed`; `parameters` replace some of the model, by name. Gradients pass."""

        def stub(block: Block, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = _split_call(args, kwargs)[0]
            return self._returned(block, self._inside(hidden) if block.index == len(self.blocks) - 1 else given)

        return output_of(self._run(tokens, stub, parameters))

    def divergence(self, tokens: Tensor, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How far the output after `found` is from that after `wanted`, hidden states that left the last block: `distance`."""
        return self.distance(self.finish(tokens, found), self.finish(tokens, wanted))

    def distance(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How far an output of `finish` is from another, see `outputs.distance`."""
        return distance(found, wanted, choices=gives_choices(self.model))

    def _returned(self, block: Block, hidden: Tensor) -> Any:
        return (hidden, *[None] * (block.returns - 1)) if block.returns else hidden

    def _run(self, tokens: Tensor, call: Callable[..., Any], parameters: dict[str, Tensor] | None = None) -> Any:
        """The model's own forward, with call(block, original forward, args, kwargs) in the place of every block."""
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                module = self.model.get_submodule(block.name)
                module.forward = _Replaced(call, block, module.forward)
                stack.callback(module.__dict__.pop, "forward")
            return self.run(tokens.to(self.device), parameters)

    def run(self, tokens: Tensor, parameters: dict[str, Tensor] | None = None) -> Any:
        """The whole model, filled, on tokens [rows, length] on its device, without a cache; `parameters` replace some."""
        given = {"input_ids": input_ids(self.model, tokens)}
        with _without_caches(self._configs):
            return torch.func.functional_call(self.model, parameters, kwargs=given) if parameters else self.model(**given)

    @property
    def merged(self) -> list[str]:
        """Tensors of other than two dimensions, such as convolutions, of which transformers makes one parameter."""
        return self._places.merged

    @property
    def calls_differ(self) -> bool:
        """Whether batches of one shape call blocks with other arguments beside the hidden states; see `Block`."""
        return any(block.varying or block.carried for block in self.blocks)

    # --------------------------------------------------------------------------------------------------- discovery

    def _find_head(self) -> tuple[Block | None, str | None]:
        """`head` and `tied_head`."""
        module = self.model.get_output_embeddings()
        if not isinstance(module, nn.Linear):
            return None, None
        path = next(name for name, each in self.model.named_modules() if each is module)
        tensors = tuple(name for name in self.outside if self.place(name) in (f"{path}.weight", f"{path}.bias"))
        weights = [name for name in tensors if self.place(name) == f"{path}.weight"]
        if f"{path}.weight" in self._places.tied or module.weight is self.model.get_input_embeddings().weight or not weights:
            return None, path
        shape = torch.Size(self.source.tensors[weights[0]].shape)
        (linear,) = self._places.linears(weights[0], shape, {})
        linear = replace(linear, shares=linear.name)
        return Block(index=len(self.blocks), name=path, tensors=tensors, linears=(linear,)), None

    def _find_table(self) -> Block | None:
        """`table`."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        param = next((name for name, value in self.model.named_parameters() if value is weight), None)
        tensor = next((name for name in self.outside if param is not None and self.place(name) == param), None)
        if tensor is None or param is None:
            return None
        (linear,) = self._places.linears(tensor, torch.Size(self.source.tensors[tensor].shape), {})
        return Block(index=-1, name=param.rpartition(".")[0], tensors=(tensor,), linears=(replace(linear, shares=linear.name),))

    def sample_tokens(self) -> Tensor:
        """Two different rows of PROBE_TOKENS tokens, none of them a special one."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        special = json.dumps([self.source.config.get(key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")])
        named = set(map(int, re.findall(r"\d+", special)))  # each an id, a list of ids, or null
        usable = [i for i in range(min(embedding.num_embeddings, 4 * PROBE_TOKENS)) if i not in named]
        if not usable:
            raise ValueError(f"{self.source.folder / 'config.json'}: no token of its {embedding.num_embeddings} is not special")
        return torch.tensor([usable[:PROBE_TOKENS], usable[-PROBE_TOKENS:]])

    @torch.no_grad()
    def probe(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Discover the linears by running one short row through the model, block by block from the checkpoint.

        Raises:
            ValueError: the blocks do not form a chain, share parameters, keep state from call to call, contain no linear, or a
                tensor is damaged.
        """
        for name, original in self.tied.items():
            if any(name.startswith(f"{block.name}.") for block in self.blocks):
                raise ValueError(
                    f"{name} is {original}, of another block; lowbit solves one block after the other, so blocks need "
                    "parameters of their own (Zamba2's do not have them)"
                )
        tokens = self.sample_tokens()
        found: list[Block] = []
        empty: list[tuple[int, int, Any]] = []  # mappings, with the block and the argument
        previous: list[Tensor] = []
        arguments: list[list[Any]] = []  # of every block, beside the hidden states

        def observed(block: Block, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if block.index != len(found):
                raise ValueError(f"{block.name} runs out of order; lowbit needs a plain chain of blocks")
            hidden = _split_call(args, kwargs)[0]
            if previous and not torch.equal(hidden, previous[-1]):
                raise ValueError(
                    f"{block.name} does not start from the output of the block before it; lowbit needs a plain chain"
                )
            given = leaves(_split_call(args, kwargs)[1:])[0]
            arguments.append(given)
            empty.extend((block.index, i, x) for i, x in enumerate(given) if isinstance(x, MutableMapping) and not x)
            values = self.load(block.tensors)
            linears, skipped, routers, out = self._observe(block, values, original, args, kwargs)
            _check_repeats(block, out, original, args, kwargs)
            points, reasons = self._checked_points(block, out, original, args, kwargs)
            self.free(block.name)
            seen = replace(
                block,
                points=points,
                linears=linears,
                skipped=(*skipped, *reasons),
                returns=len(out) if isinstance(out, (tuple, list)) else 0,
            )
            found.append(_divided(seen, dict.fromkeys(routers, "router")))
            previous[:] = [out[0] if isinstance(out, (tuple, list)) else out]
            if progress is not None:
                progress(len(found), len(self.blocks))
            return out

        self.load_outside()
        try:
            output = output_of(self._run(tokens[:1], observed))
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.source.folder / 'config.json'}: a {type(self.model).__name__} of this config does not run on a row of "
                f"{PROBE_TOKENS} tokens ({type(error).__name__}: {in_short(error)}); compare it with that of the original model"
            ) from error
        if len(found) != len(self.blocks):
            raise ValueError(f"only {len(found)} of {len(self.blocks)} blocks run; lowbit needs a plain chain of blocks")
        self.adopt(tuple(found))
        if not any(block.linears for block in self.blocks):
            raise ValueError("no linear layer was found in any block of this model")
        again = self.finish(tokens[:1], previous[-1])
        if again.shape != output.shape or not torch.allclose(again, output, rtol=_SAME, atol=_SAME, equal_nan=True):
            raise ValueError(
                f"the output of a {type(self.model).__name__} does not follow from what its last block returns; lowbit needs "
                "a plain chain of blocks"
            )
        first, second = self.embed(tokens[:1])[1], self.embed(tokens[1:])[1]
        for block, given in zip(self.blocks, arguments, strict=True):
            if not _same_tensors(given, leaves(first[block.index])[0]):
                raise ValueError(
                    f"{block.name} takes more from the block before it than hidden states; lowbit needs a plain chain of blocks"
                )
        filled = {id(leaves(first[block])[0][i]) for block, i, mapping in empty if mapping}
        self.blocks = tuple(
            replace(
                block,
                varying=_varying(block, first[block.index], second[block.index]),
                carried=tuple(i for i, x in enumerate(leaves(first[block.index])[0]) if id(x) in filled),
            )
            for block in self.blocks
        )
        self.free_outside()

    def _observe(
        self, block: Block, values: dict[str, Tensor], original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Linear, ...], tuple[tuple[str, str], ...], list[str], Any]:
        """Run a loaded block and tell which matrices multiply inputs, which inputs are the same tensor, and which linears
        choose experts."""
        sites = self.sites(block)
        inputs: dict[Site, Tensor] = {}
        transposed: dict[str, bool] = {}

        def observe(weight: Tensor | str, x: Tensor, transpose: bool) -> Tensor:
            site = site_of(weight, sites)
            if site is not None and not isinstance(weight, str):
                inputs.setdefault(site, x)  # kept alive, so that no later input can have its address
                transposed[site[0]] = transpose
            return x

        with _Discovery(observe) as tap:
            out = original(*args, **kwargs)
        choosing = {site_of(weight, sites) for weight in tap.routers}
        linears: list[Linear] = []
        skipped: list[tuple[str, str]] = []
        for tensor in block.tensors:
            if values[tensor].dim() < 2:
                continue
            for linear in self._places.linears(tensor, values[tensor].shape, transposed):
                reason = self._reason_to_skip(linear, transposed, inputs.get(linear.site))
                if reason is None and not torch.equal(
                    linear.view(self.param(linear)).cpu(), matrix_of(linear, values).to(self.dtype)
                ):
                    reason = REARRANGED
                if reason is not None:
                    skipped.append((linear.name, reason))
                else:
                    linears.append(replace(linear, router=linear.site in choosing or self._named_router(block, linear)))
        # In the order in which they run. Experts that no token of the probe reached have no observed input: they come last,
        # in the order of the others, and theirs is shared by site alone.
        position = {site: i for i, site in enumerate(inputs)}
        params = list(dict.fromkeys(param for param, _ in inputs))
        linears.sort(key=lambda linear: (position.get(linear.site, len(position)), params.index(linear.param)))
        leaders: dict[Any, str] = {}
        for i, linear in enumerate(linears):
            x = inputs.get(linear.site)
            key = linear.site if x is None or linear.index is not None else (x.data_ptr(), x.shape, x._version)
            linears[i] = replace(linear, shares=leaders.setdefault(key, linear.name))
        return tuple(linears), tuple(skipped), [linear.name for linear in linears if linear.router], out

    def _mixers(self, block: Block) -> list[str]:
        """The paths of the state space mixers of a block."""
        modules = self.model.get_submodule(block.name).named_modules()
        return [f"{block.name}.{path}" for path, module in modules if is_mixer(module)]

    def _points(self, block: Block) -> tuple[Point, ...]:
        """What could be quantized in the mixers of a block, by their structure alone."""
        places = {self._places.param_of(tensor): tensor for tensor in block.tensors}
        found = []
        for path in self._mixers(block):
            mixer = Mixer(self.model.get_submodule(path), path)
            prefix = places[f"{path}.in_proj.weight"].removesuffix("in_proj.weight")
            for local in mixer.activations():
                sets, inner = mixer.features(local)
                groups = mixer.group_of(local)
                found.append(Point(name=prefix + local, mixer=path, local=local, sets=sets, inner=inner, groups=groups))
            for local in mixer.parameters:
                found.append(Point(name=prefix + local, mixer=path, local=local, tensor=places[f"{path}.{local}"]))
        return tuple(found)

    def _use_mixers(self, block: Block) -> None:
        """Run the mixers of a block by lowbit's own forward, where it has points."""
        for path in {each.mixer for each in block.points}:
            module = self.model.get_submodule(path)
            module.forward = Mixer(module, path)

    def use_points(self) -> None:
        """Run all mixers by lowbit's own forward, without a probe, for a checkpoint whose points were quantized."""
        for block in self.blocks:
            self._use_mixers(block)

    def _checked_points(
        self, block: Block, out: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Point, ...], tuple[tuple[str, str], ...]]:
        """The points of a loaded block with the output `out`, if lowbit's own forward gives the same; or why not."""
        if not block.points:
            return (), ()
        self._use_mixers(block)
        with Tap(lambda weight, x, transposed: x):
            own = original(*args, **kwargs)
        a, b = (value[0] if isinstance(value, (tuple, list)) else value for value in (own, out))
        if float((a - b).norm()) <= _SAME * float(b.norm()):
            return block.points, ()
        paths = {each.mixer for each in block.points}
        for path in paths:
            del self.model.get_submodule(path).forward
        return (), tuple((path, "a scan that lowbit does not know; its projections can be quantized") for path in sorted(paths))

    def _named_router(self, block: Block, linear: Linear) -> bool:
        """Whether a linear is called a router, or belongs to a module of the block that is."""
        path = linear.param.removeprefix(f"{block.name}.").rpartition(".")[0]
        if linear.index is not None or not path:
            return False
        parts = path.split(".")
        inside = [self.model.get_submodule(".".join((block.name, *parts[:i]))) for i in range(1, len(parts))]
        kinds = [type(module).__name__ for module in inside]
        return "router" in path.lower() or any(re.search("Router|Gating|Gate$", kind) for kind in kinds)

    def _reason_to_skip(self, linear: Linear, transposed: dict[str, bool], x: Tensor | None) -> str | None:
        """x: what the linear was seen to multiply."""
        module = self.model.get_submodule(linear.param.rpartition(".")[0])
        kind = type(module).__name__
        if linear.param not in transposed:
            return f"not used as a linear layer ({kind})"
        if not (isinstance(module, nn.Linear) or kind == "Conv1D" or linear.index is not None):
            return f"not a linear layer but a {kind}"
        if isinstance(module, nn.Linear) and x is not None and not _multiplies(module, x):
            return f"not a linear layer but a {kind}"
        if linear.out_features == 1:
            return "a gate of one output"
        return None

    def _check_complete(self) -> None:
        missing = self._places.missing
        if missing:
            raise ValueError(
                f"{self.source.folder}: the checkpoint lacks {len(missing)} tensors the model needs: "
                f"{', '.join(sorted(missing)[:5])}{' ...' if len(missing) > 5 else ''}"
            )


def _multiplies(module: nn.Linear, x: Tensor) -> bool:
    """Whether a module of a class derived from nn.Linear does nothing but what nn.Linear does."""
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        out = module(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(out, Tensor) and torch.allclose(out, F.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-5)


def _divided(block: Block, reasons: dict[str, str]) -> Block:
    """A block with the named linears set aside, for the reason given."""
    kept = [linear for linear in block.linears if linear.name not in reasons]
    leaders: dict[str, str] = {}  # the first linear with an input may be among those set aside
    kept = [replace(linear, shares=leaders.setdefault(linear.shares, linear.name)) for linear in kept]
    aside = tuple((linear, reasons[linear.name]) for linear in block.linears if linear.name in reasons)
    return replace(block, linears=tuple(kept), aside=(*block.aside, *aside))


class _Reached(Exception):
    """What comes after the blocks need not run."""


def addresses(module: nn.Module, prefix: str = "") -> dict[int, str]:
    """Storage address -> name of every parameter of a module; see `site_of`."""
    return {p.untyped_storage().data_ptr(): prefix + name for name, p in module.named_parameters()}


def site_of(weight: Tensor | str, sites: dict[int, str]) -> Site | None:
    """Which parameter (and which slice of a 3-D one) a tensor seen by a `Tap` is, or which point; `sites` comes from
    `addresses`."""
    if isinstance(weight, str):
        return weight, None
    name = sites.get(weight.untyped_storage().data_ptr())
    if name is None:
        return None
    whole = weight.untyped_storage().nbytes() // weight.element_size()
    return (name, None) if weight.numel() == whole else (name, weight.storage_offset() // weight.numel())


def discover(source: Source, progress: Callable[[int, int], None] | None = None) -> Arch:
    """Build the meta model of a checkpoint and probe it; see `Arch`."""
    arch = Arch(source)
    arch.probe(progress)
    return arch


@dataclass
class _Replaced:
    """Stands in for a block's forward; keeps the arguments apart from the block they belong to."""

    call: Callable[..., Any]
    block: Block
    original: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.block, self.original, _without_cache(args), _without_cache(kwargs))


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, other positional arguments, other keyword arguments of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def leaves(call: Any) -> tuple[list[Any], Any]:
    """The arguments of a block's call one by one, containers taken apart, and what `unflattened` needs to put them together.
    A mapping that is still empty is one argument, for blocks to fill."""
    return tree_flatten(call, is_leaf=lambda x: isinstance(x, MutableMapping) and not x)


def unflattened(found: list[Any], shape: Any) -> Any:
    """The inverse of `leaves`."""
    return tree_unflatten(found, shape)


def _varying(block: Block, first: Any, second: Any) -> tuple[int, ...]:
    """The arguments that differ between the calls for two rows of tokens.

    Raises:
        ValueError: something differs that is no tensor.
    """
    a, b = leaves(first)[0], leaves(second)[0]
    if len(a) != len(b):
        raise ValueError(
            f"{block.name} is called with other arguments for every row of tokens; lowbit cannot quantize this model"
        )
    return tuple(
        i
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if isinstance(x, Tensor) and not (isinstance(y, Tensor) and x.shape == y.shape and torch.equal(x, y))
    )


def _axis_of_rows(hidden: Tensor, tokens: Tensor) -> int:
    """Where hidden states have the rows of tokens [rows, length].

    Raises:
        ValueError: nowhere.
    """
    for axis in range(hidden.dim() - 1):
        if hidden.shape[axis : axis + 2] == tokens.shape:
            return axis
    raise ValueError(
        f"hidden states of shape {list(hidden.shape)} enter the blocks for tokens of shape {list(tokens.shape)}; lowbit needs "
        "one hidden state for every token"
    )


def _configs_with_cache(model: nn.Module) -> list[Any]:
    """All configs in a model that say whether it caches."""
    found: dict[int, Any] = {}
    pending = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [
                part for name in getattr(config, "sub_configs", {}) if (part := getattr(config, name, None)) is not None
            ]
    return [config for config in found.values() if getattr(config, "use_cache", None) is not None]


@contextlib.contextmanager
def _without_caches(configs: list[Any]) -> Iterator[None]:
    """Have a model make no cache, however its classes pass on the argument `use_cache`."""
    before = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


def _without_cache(args: Any) -> Any:
    """A block's arguments with None in the place of a cache that the model made all the same."""
    from transformers import Cache

    if isinstance(args, dict):
        return {name: None if isinstance(x, Cache) else x for name, x in args.items()}
    return tuple(None if isinstance(x, Cache) else x for x in args)


def _check_repeats(block: Block, out: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call a block with other hidden states, and then again as it was called when it gave `out`.

    Raises:
        ValueError: the output is another one, so the block keeps state somewhere.
    """
    hidden, others, named = _split_call(args, kwargs)
    original(hidden.flip(-2), *others, **named)
    again = original(*args, **kwargs)
    a, b = ((value[0] if isinstance(value, (tuple, list)) else value).nan_to_num() for value in (out, again))
    if a.shape != b.shape or float((a - b).norm()) > _REPEATED * float(a.norm()):
        raise ValueError(
            f"{block.name} gives another output when it is called again with the same arguments, so it keeps state, such "
            "as a cache, from call to call; lowbit calls blocks many times and cannot quantize this model"
        )


def _same_tensors(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists of arguments have equal tensors in the same places."""
    if len(some) != len(others):
        return False
    pairs = [pair for pair in zip(some, others, strict=True) if any(isinstance(x, Tensor) for x in pair)]
    return all(isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and _same(x, y) for x, y in pairs)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether tensors of one shape are equal, NaN in the same places included."""
    return bool(((x == y) | ((x != x) & (y != y))).all())


def matrix_of(linear: Linear, values: dict[str, Tensor]) -> Tensor:
    """The [out, in] matrix of a linear as the checkpoint holds it."""
    tensor = values[linear.tensor]
    if linear.stacked:
        assert linear.index is not None
        tensor = tensor[linear.index]
    return tensor.T if linear.stored_transposed else tensor


def _empty_model(source: Source) -> "PreTrainedModel":
    """The transformers model of the checkpoint, parameters on the meta device, buffers real, in evaluation mode.

    Raises:
        ValueError: transformers cannot make it of the configuration, or the weights are not those of such a model.
    """
    from accelerate import init_empty_weights

    _check_counts(source)
    generation_of(source.folder)
    model: Any = None
    for place in (torch.device("meta"), init_empty_weights(include_buffers=False)):
        config = _config(source)
        build = _builder(config, source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with place:
                    model = build(config)
            except MemoryError:
                raise
            except Exception as error:
                path = source.folder / "config.json"
                raise ValueError(f"{path}: transformers cannot make a model of this config: {in_short(error)}") from error
        if place == torch.device("meta"):  # first without memory, as sizes may be wrong
            _check_sizes(model, source)
    return model.eval().requires_grad_(False)


def _config(source: Source) -> Any:
    """The transformers configuration of the checkpoint."""
    import transformers

    path, trusted = source.folder / "config.json", source.trust_remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trusted)
    except MemoryError:
        raise
    except Exception as error:  # checks of a hundred classes, which raise all kinds
        if not trusted and "trust_remote_code" in str(error):
            raise refused_code(path) from error
        raise ValueError(f"{path}: transformers cannot read this config: {in_short(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; lowbit quantizes decoders and encoders, not both in one")
    for key, value in source.overrides.items():
        setattr(config, key, value)
    config._experts_implementation = "eager"
    return config


def generation_of(folder: Path) -> "GenerationConfig | None":
    """The generation settings of a checkpoint, None if it has none.

    Raises:
        ValueError: generation_config.json is damaged, or has values that transformers does not take.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return None
    read_json(path, "settings of generation")
    try:
        return GenerationConfig.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot read these settings: {in_short(error)}; mend or remove it") from error


_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # keys of a config for the number of blocks
_FEW = 128  # blocks that cost no time; what is missing of them is told later, and some models use one block again and again
_MOST = 2**16  # of what a config counts under other names, where the weights are small


def _check_counts(source: Source) -> None:
    """Refuse numbers of blocks, heads, experts, labels ... that the weights contradict, for transformers makes lists of them.

    What has shapes, `_check_sizes` compares.
    """
    numbers = [int(part) for name in source.tensors for part in name.split(".") if part.isdecimal() and len(part) < 6]
    blocks = max(numbers, default=0) + 1
    most = max(_MOST, blocks, *(size for info in source.tensors.values() for size in info.shape))
    path = source.folder / "config.json"
    for key, value in _numbers(source.config):
        leaf = key.rpartition(".")[2]
        if key.removeprefix("text_config.") in _BLOCKS and value > max(blocks, _FEW):
            raise ValueError(f"{path}: {key} = {value}, but the weights are of {blocks} blocks; fetch both again")
        counts = leaf in _BLOCKS or (leaf.startswith(("num_", "n_")) and leaf not in ("n_positions", "n_ctx"))
        if counts and value > most:
            raise ValueError(f"{path}: {key} = {value}, but nothing in the weights is larger than {most}; fetch both again")


def _numbers(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers of a configuration with their keys, those of configurations within it as "outer.inner"."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int):
            yield prefix + key, value


def _check_sizes(model: "PreTrainedModel", source: Source) -> None:
    """Refuse a model on the meta device whose parameters have other shapes than the checkpoint's tensors."""
    path = source.folder / "config.json"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, (param, pattern) in _renamed(model, source).items():
        info = source.tensors[name]
        if pattern is not None or param not in parameters:
            continue
        shape = tuple(parameters[param].shape)
        if shape != info.shape:
            keys = [key for key, value in _numbers(source.config) if value in set(shape) - set(info.shape)]
            given = "".join(f", {key} = {dict(_numbers(source.config))[key]}" for key in keys)
            raise ValueError(
                f"{path}: its model has {param} of shape {list(shape)}{given}, but in {info.shard} {name} has shape "
                f"{list(info.shape)}; fetch both again"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{source.folder / info.shard}: {name} is stored as {info.dtype}; lowbit quantizes BF16, F16 and F32 weights"
            )
    held = sum(math.prod(info.shape) for info in source.tensors.values())
    needed = sum(parameter.numel() for parameter in model.parameters())
    computed = sum(buffer.nbytes for buffer in model.buffers())
    if needed > 4 * held + _SLACK or computed > 16 * held + _SLACK:
        raise ValueError(
            f"{path}: its model has {needed:.3g} weights and {computed:.3g} bytes of tables, but the files hold {held:.3g} "
            "weights; fetch both again"
        )


def _builder(config: Any, source: Source) -> Callable[[Any], Any]:
    """What makes a model of a config: the class that `architectures` names, or what the auto class for causal models takes.

    Where code of the folder may run, the classes in it that `auto_map` names are taken before those of transformers.
    """
    import transformers

    names, trusted = config.architectures or [""], source.trust_remote_code
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"{source.folder / 'config.json'}: architectures = {names!r}; allowed is a list of names of classes")
    name = names[0]
    own = getattr(config, "auto_map", None) or {} if trusted else {}
    auto = next((key for key, reference in own.items() if key.startswith("AutoModel") and reference.endswith(f".{name}")), None)
    found = getattr(transformers, name, None) if auto is None else None
    if found is not None:
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ValueError(f"{source.folder / 'config.json'}: architectures = {names!r}, which is no model of transformers")
        return found
    made = getattr(transformers, auto or "AutoModelForCausalLM").from_config
    # In the dtype of the config, as is the default, buffers such as rotary frequencies would be rounded to it.
    return partial(made, trust_remote_code=trusted, dtype=torch.float32)


def _matrix_dtype(source: Source, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    stored = source.dtype()
    fast = device.type != "cpu" or (stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return stored if fast and dtype == torch.float32 else dtype


def _block_list(model: "PreTrainedModel") -> str:
    """The path of the model's chain of blocks: of the module lists in no other list, the one with the most parameters among
    those nearest to the token embeddings, since the tower for images may be larger."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise ValueError(f"{type(model).__name__} has no list of blocks; lowbit quantizes models that are a chain of blocks")
    embedding = model.get_input_embeddings()
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    while path:
        path = path.rpartition(".")[0]
        near = [(n, m) for n, m in outer if n.startswith(f"{path}.")]
        if near and path:
            outer = near
            break
    return max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))[0]


def return_freed_memory() -> None:
    """Collect cycles, and let glibc give freed memory back to the system: what one block leaves would add up over blocks."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _conversions(model: "PreTrainedModel", source: Source) -> tuple[list[Any], list[Any]]:
    """Renamings and converters from checkpoint tensors to the model's parameters: transformers', and those of `experts`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return renamings, converters + converters_of_experts(source.tensors, model.state_dict(), converters)


def _renamed(model: "PreTrainedModel", source: Source) -> dict[str, tuple[str, str | None]]:
    """By checkpoint tensor, in natural order: the parameter that it fills, and the pattern of the converter that it goes
    through, None where it is the parameter as it is."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _conversions(model, source)
    state = model.state_dict()
    found = {}
    for name in sorted(source.tensors, key=dot_natural_key):
        param, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        found[name] = (name, None) if param not in state and name in state else (param, pattern)
    return found


class _Places:
    """Relates checkpoint tensors to model parameters through transformers' conversion mapping."""

    def __init__(self, model: "PreTrainedModel", source: Source) -> None:
        by_pattern = {pattern: entry for entry in _conversions(model, source)[1] for pattern in entry.source_patterns}
        state = model.state_dict()
        buffers = {name for name, _ in model.named_buffers()}
        self.model = model
        self.unused: set[str] = set()
        self._plain: dict[str, str] = {}  # checkpoint tensor -> parameter
        self._converted: dict[str, tuple[str, str]] = {}  # checkpoint tensor -> (first parameter, source pattern)
        self._converters: dict[str, Any] = {}  # first parameter -> converter
        self._members: dict[str, list[str]] = {}  # first parameter -> checkpoint tensors
        self._shapes = {name: info.shape for name, info in source.tensors.items()}
        filled: set[str] = set()
        for name, (param, pattern) in _renamed(model, source).items():
            if param not in state:
                self.unused.add(name)
            elif pattern is None:
                self._plain[name] = param
                filled.add(param)
            else:
                self._converted[name] = (param, pattern)
                self._converters[param] = by_pattern[pattern]
                self._members.setdefault(param, []).append(name)
        # Where each converted tensor ends up, found by converting labelled stand-ins of shape [2, 3].
        self._located: dict[str, tuple[str, int | None, tuple[int, int], bool]] = {}
        self.merged: list[str] = []  # tensors of other than two dimensions that make a parameter together
        self._stacks: dict[str, bool] = {}  # 3-D tensors that are a parameter; whether the last two dimensions are exchanged
        for first, names in list(self._members.items()):
            if any(len(self._shapes[name]) != 2 for name in names):
                filled |= self._take_whole(first, names)
                continue
            labels = {name: torch.arange(6).view(2, 3) + 6 * i for i, name in enumerate(names)}
            try:
                converted = self._convert(first, labels)
            except RuntimeError:  # the conversion divides rows by a number of heads
                filled |= self._take_whole(first, names)
                continue
            for param, value in converted.items():
                filled.add(param)
                for i, name in enumerate(names):
                    place = _locate(value, 6 * i)
                    if place is not None:
                        out = self._shapes[name][0]
                        index, row, transposed = place
                        self._located[name] = (param, index, (row * out, row * out + out), transposed)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {a: b for a, b in tied.items() if a not in filled and b in filled}
        self.tied |= {b: a for a, b in tied.items() if b not in filled and a in filled}
        self.missing = set(state) - filled - set(self.tied) - buffers

    def _take_whole(self, first: str, names: list[str]) -> set[str]:
        """Take tensors of other than two dimensions, whose conversion depends on their shapes; returns the parameters filled.

        A stack of matrices that becomes one parameter, as it is or turned, is found here. Matrices of others are not located.
        """
        if len(names) > 1:
            self.merged += names
        made = self._convert(first, {name: torch.empty(self._shapes[name], device="meta") for name in names})
        shape = self._shapes[names[0]]
        if len(names) == 1 and list(made) == [first] and len(shape) == 3:
            found, turned = tuple(made[first].shape), (shape[0], shape[2], shape[1])
            exchanged = found == turned
            if exchanged and shape == turned:  # the shape does not tell: see where one entry goes
                label = torch.zeros(shape, dtype=torch.uint8)
                label[0, 0, 1] = 1
                exchanged = bool(self._convert(first, {names[0]: label})[first][0, 1, 0])
            if exchanged or found == tuple(shape):
                self._stacks[names[0]] = exchanged
        return set(made)

    def sources_under(self, prefix: str) -> tuple[str, ...]:
        """The checkpoint tensors that fill parameters whose names start with `prefix`."""
        names = [*self._plain, *self._converted]
        return tuple(name for name in names if self.param_of(name).startswith(prefix))

    def param_of(self, tensor: str) -> str:
        """The parameter a checkpoint tensor fills, or fills together with others."""
        return self._plain[tensor] if tensor in self._plain else self._converted[tensor][0]

    def place(self, tensor: str) -> tuple[str, int | None, tuple[int, int] | None, bool] | None:
        """The parameter that holds a checkpoint tensor, the slice of a 3-D one, the rows (None: all), whether transposed."""
        if tensor in self._plain:
            return self._plain[tensor], None, None, False
        return self._located.get(tensor)

    def sets(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The named checkpoint tensors, those that make one parameter together."""
        return list(
            dict.fromkeys((name,) if name in self._plain else tuple(self._members[self.param_of(name)]) for name in names)
        )

    def assemble(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Model parameters from whole sets of checkpoint tensors, in the dtypes these have."""
        out = {self._plain[name]: value for name, value in values.items() if name in self._plain}
        for first, names in self._members.items():
            if names[0] in values:
                out |= self._convert(first, {name: values[name] for name in names})
        return out

    def linears(self, tensor: str, shape: torch.Size, transposed: dict[str, bool]) -> Iterator[Linear]:
        """The candidate linears of one checkpoint tensor of 2 or 3 dimensions."""
        name = tensor.removesuffix(".weight")
        if tensor in self._located:
            param, index, rows, flipped = self._located[tensor]
            yield Linear(
                name=name, tensor=tensor, param=param, index=index, rows=rows, transposed=flipped, stacked=False,
                out_features=shape[0], in_features=shape[1],
            )  # fmt: skip
        elif (tensor in self._plain or tensor in self._stacks) and len(shape) in (2, 3):
            param, swapped = self.param_of(tensor), self._stacks.get(tensor, False)
            flipped = transposed.get(param, False)
            out, inner = (shape[-1], shape[-2]) if flipped != swapped else (shape[-2], shape[-1])
            stacked = len(shape) == 3 and param in transposed
            for index in range(shape[0]) if stacked else (None,):
                yield Linear(
                    name=name if index is None else f"{name}.{index}", tensor=tensor, param=param, index=index,
                    rows=(0, out), transposed=flipped, stacked=stacked, out_features=out, in_features=inner, swapped=swapped,
                )  # fmt: skip

    def _convert(self, first: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self._converters[first])
        for name in values:
            converter.add_tensor(first, name, self._converted[name][1], values[name])
        result = converter.convert(first, model=self.model, config=self.model.config)
        return {param: value[0] if isinstance(value, list) else value for param, value in result.items()}


def _locate(value: Tensor, label: int) -> tuple[int | None, int, bool] | None:
    """Where the 2 x 3 stand-in with labels label .. label+5 lies in a converted tensor: (slice, row block, transposed)."""
    hits = (value == label).nonzero()
    if len(hits) != 1 or value.dim() not in (2, 3):
        return None
    index = int(hits[0, 0]) if value.dim() == 3 else None
    matrix = value if index is None else value[index]
    for transposed in (False, True):
        upright = matrix.T if transposed else matrix
        if upright.shape[1] != 3:
            continue
        row = int((upright == label).nonzero()[0, 0])
        if row % 2 == 0 and torch.equal(upright[row : row + 2], torch.arange(6).view(2, 3) + label):
            return index, row // 2, transposed
    return None
