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
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.experts import converters as converters_of_experts
from lowbit.experts import open_experts
from lowbit.source import FLOAT_DTYPES, Source
from lowbit.ssm import Mixer, is_mixer, point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 16
_SAME = 1e-2  # relative, of a mixer's output: another formula differs by more, bfloat16 products by less
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
        shares: name of the first linear of the block that has the same input, possibly its own.
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


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer (or state space) block: its path in the model, its checkpoint tensors, its linears as they run.

    `skipped` names the matrices of the block that no scheme can choose, with the reason. `points` are those of a state space
    mixer, if there is one and lowbit's own forward computes what the model's does.
    """

    index: int
    name: str
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    returns: int = 0  # 0: a tensor, n: a tuple of n with the hidden states first
    points: tuple[Point, ...] = ()


class Tap(TorchFunctionMode):
    """While active, calls `observe(weight, x, transposed)` for every product x W^T (or x W: transposed) and uses what it
    returns in place of x. Sees F.linear, addmm and x @ w, hence nn.Linear, Conv1D and experts that slice a 3-D parameter.
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
        return func(*args, **kwargs)


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
        self, source: Source, dtype: torch.dtype = torch.float32, device: str = "cpu", model: "PreTrainedModel | None" = None
    ) -> None:
        """model: the transformers model on the meta device; built from the checkpoint's config by default."""
        self.source = source
        self.dtype = dtype
        self.model = _empty_model(source) if model is None else model
        open_experts(self.model, source.tensors)
        self.device = torch.device(device)
        self.matrix_dtype = _matrix_dtype(source, dtype, self.device)
        self._matrices: frozenset[str] = frozenset()
        for name, buffer in list(self.model.named_buffers()):
            _set_tensor(self.model, name, buffer if buffer.is_meta else buffer.to(self.device))
        self._places = _Places(self.model, source)
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
        # Caches would carry state from call to call; encoders know no such argument.
        forward = inspect.signature(self.model.forward).parameters
        self._no_cache = {"use_cache": False} if "use_cache" in forward else {}
        self._check_complete()

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
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
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
            positional and keyword arguments the model calls it with (masks, positions).
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
        return first[0], calls

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
        given = (hidden.to(self.device, self.dtype), *args)
        with Tap(observe or (lambda weight, x, transposed: x)):
            out = torch.func.functional_call(module, parameters, given, kwargs) if parameters else module(*given, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, tokens: Tensor, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Run what comes after the blocks: logits [rows, length, vocabulary] of `hidden`, the last block's output, or the
        final hidden states of a model without a head. tokens [rows, length] as given to `embed`; `parameters` replace some of
        the model, by name. Gradients pass."""

        def stub(block: Block, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = _split_call(args, kwargs)[0]
            return self._returned(block, hidden.to(self.device) if block.index == len(self.blocks) - 1 else given)

        out = self._run(tokens, stub, parameters)
        return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state

    def divergence(self, tokens: Tensor, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How far the output after `found` is from that after `wanted`, hidden states that left the last block: `distance`."""
        return self.distance(self.finish(tokens, found), self.finish(tokens, wanted))

    def distance(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How far an output of `finish` is from another; gradients pass.

        Returns:
            the sum over positions of KL(wanted || found) of the next token, in nats, and their number; of a model without a
            head, the squared distance, and the squared length of what is wanted. Scalars, float64.
        """
        a, b = found.float(), wanted.float()
        if self.model.get_output_embeddings() is None:
            return (a - b).square().sum(dtype=torch.float64), b.square().sum(dtype=torch.float64)
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        return (b.exp() * (b - a)).sum(dtype=torch.float64), torch.tensor(a[..., 0].numel(), dtype=torch.float64)

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
        given = {"input_ids": tokens, **self._no_cache}
        return torch.func.functional_call(self.model, parameters, kwargs=given) if parameters else self.model(**given)

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
        return torch.tensor([usable[:PROBE_TOKENS], usable[-PROBE_TOKENS:]])

    @torch.no_grad()
    def probe(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Discover the linears by running one short row through the model, block by block from the checkpoint.

        Raises:
            ValueError: the blocks do not form a chain, share parameters, depend on the tokens beside the hidden states, contain
                no linear, or a tensor is damaged.
        """
        for name, original in self.tied.items():
            if any(name.startswith(f"{block.name}.") for block in self.blocks):
                raise ValueError(
                    f"{name} is {original}, of another block; lowbit solves one block after the other, so blocks need "
                    "parameters of their own (Zamba2's do not have them)"
                )
        tokens = self.sample_tokens()
        found: list[Block] = []
        previous: list[Tensor] = []

        def observed(block: Block, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if block.index != len(found):
                raise ValueError(f"{block.name} runs out of order; lowbit needs a plain chain of blocks")
            hidden = _split_call(args, kwargs)[0]
            if previous and not torch.equal(hidden, previous[-1]):
                raise ValueError(
                    f"{block.name} does not start from the output of the block before it; lowbit needs a plain chain"
                )
            values = self.load(block.tensors)
            linears, skipped, out = self._observe(block, values, original, args, kwargs)
            points, reasons = self._checked_points(block, out, original, args, kwargs)
            self.free(block.name)
            found.append(
                replace(
                    block,
                    points=points,
                    linears=linears,
                    skipped=(*skipped, *reasons),
                    returns=len(out) if isinstance(out, tuple) else 0,
                )
            )
            previous[:] = [out[0] if isinstance(out, tuple) else out]
            if progress is not None:
                progress(len(found), len(self.blocks))
            return out

        self.load_outside()
        self._run(tokens[:1], observed)
        if len(found) != len(self.blocks):
            raise ValueError(f"only {len(found)} of {len(self.blocks)} blocks run; lowbit needs a plain chain of blocks")
        self.adopt(tuple(found))
        if not any(block.linears for block in self.blocks):
            raise ValueError("no linear layer was found in any block of this model")
        first, second = self.embed(tokens[:1])[1], self.embed(tokens[1:])[1]
        if not all(_equal(a, b) for a, b in zip(first, second, strict=True)):
            raise ValueError("the blocks of this model take token-dependent inputs beside the hidden states: not supported")
        self.free_outside()

    def _observe(
        self, block: Block, values: dict[str, Tensor], original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Linear, ...], tuple[tuple[str, str], ...], Any]:
        """Run a loaded block and tell which of its matrices multiply inputs, and which inputs are the same tensor."""
        sites = self.sites(block)
        inputs: dict[Site, Tensor] = {}
        transposed: dict[str, bool] = {}

        def observe(weight: Tensor | str, x: Tensor, transpose: bool) -> Tensor:
            site = site_of(weight, sites)
            if site is not None and not isinstance(weight, str):
                inputs.setdefault(site, x)  # kept alive, so that no later input can have its address
                transposed[site[0]] = transpose
            return x

        with Tap(observe):
            out = original(*args, **kwargs)
        linears: list[Linear] = []
        skipped: list[tuple[str, str]] = []
        for tensor in block.tensors:
            if values[tensor].dim() < 2:
                continue
            for linear in self._places.linears(tensor, values[tensor].shape, transposed):
                reason = self._reason_to_skip(linear, transposed)
                if reason is None and not torch.equal(
                    linear.view(self.param(linear)).cpu(), matrix_of(linear, values).to(self.dtype)
                ):
                    reason = REARRANGED
                if reason is not None:
                    skipped.append((linear.name, reason))
                else:
                    linears.append(linear)
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
        return tuple(linears), tuple(skipped), out

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
        a, b = (value[0] if isinstance(value, tuple) else value for value in (own, out))
        if float((a - b).norm()) <= _SAME * float(b.norm()):
            return block.points, ()
        paths = {each.mixer for each in block.points}
        for path in paths:
            del self.model.get_submodule(path).forward
        return (), tuple((path, "a scan that lowbit does not know; its projections can be quantized") for path in sorted(paths))

    def _reason_to_skip(self, linear: Linear, transposed: dict[str, bool]) -> str | None:
        module = self.model.get_submodule(linear.param.rpartition(".")[0])
        kind = type(module).__name__
        if linear.param not in transposed:
            return f"not used as a linear layer ({kind})"
        if not (isinstance(module, nn.Linear) or kind == "Conv1D" or linear.index is not None):
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
        return self.call(self.block, self.original, args, kwargs)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, other positional arguments, other keyword arguments of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return True


def matrix_of(linear: Linear, values: dict[str, Tensor]) -> Tensor:
    """The [out, in] matrix of a linear as the checkpoint holds it."""
    tensor = values[linear.tensor]
    if linear.stacked:
        assert linear.index is not None
        tensor = tensor[linear.index]
    return tensor.T if linear.transposed else tensor


def _empty_model(source: Source) -> "PreTrainedModel":
    """The transformers model of the checkpoint, parameters on the meta device, buffers real, in evaluation mode."""
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(source.folder)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{source.folder}: transformers cannot read this config: {str(error).splitlines()[0]}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; lowbit quantizes decoders and encoders, not both in one")
    for key, value in source.overrides.items():
        setattr(config, key, value)
    config._experts_implementation = "eager"
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = kind(config) if kind is not None else transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def _matrix_dtype(source: Source, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    stored = source.dtype()
    fast = device.type != "cpu" or (stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return stored if fast and dtype == torch.float32 else dtype


def _block_list(model: nn.Module) -> str:
    """The path of the model's chain of blocks: of the module lists in no other list, the one with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise ValueError(f"{type(model).__name__} has no list of blocks; lowbit quantizes models that are a chain of blocks")
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


class _Places:
    """Relates checkpoint tensors to model parameters through transformers' conversion mapping."""

    def __init__(self, model: "PreTrainedModel", source: Source) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        converters += converters_of_experts(source.tensors, model.state_dict(), converters)
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
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
        prefix = model.base_model_prefix
        for name in sorted(source.tensors, key=dot_natural_key):
            param, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if param not in state and name in state:
                param, pattern = name, None
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
        for first, names in self._members.items():
            labels = {name: torch.arange(6).view(2, 3) + 6 * i for i, name in enumerate(names)}
            for param, value in self._convert(first, labels).items():
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
        elif tensor in self._plain and len(shape) in (2, 3):
            param = self._plain[tensor]
            flipped = transposed.get(param, False)
            out, inner = (shape[-1], shape[-2]) if flipped else (shape[-2], shape[-1])
            stacked = len(shape) == 3 and param in transposed
            for index in range(shape[0]) if stacked else (None,):
                yield Linear(
                    name=name if index is None else f"{name}.{index}", tensor=tensor, param=param, index=index,
                    rows=(0, out), transposed=flipped, stacked=stacked, out_features=out, in_features=inner,
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
