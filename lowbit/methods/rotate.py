"""Rotate: turn the hidden states of the whole model by an orthogonal matrix, so that no channel is an outlier any more.

For R with R R^T = I, a model of RMS norms without gains computes the same when its hidden states h become h R: the embedding
becomes E R, what reads a norm W R, what writes to the residual R^T W (rows), and the head W R (QuaRot, Ashkboos et al., NeurIPS
2024, section 3; SliceGPT). So gains are folded into the linears that read them first. R is a Hadamard matrix with random signs,
which spreads a channel over all others; of a width that is no power of two, the Kronecker product of the largest Hadamard
matrix that fits and a random orthogonal one. With `block`, R is block-diagonal with Hadamard blocks of that size: what
microscaling formats want, since a rotation over more channels than share a scale makes every block as bad as the average one
(BRQ, MR-GPTQ). `heads` also turns the values of every head and the columns of the output projection that read them.

Nothing is computed online, so every engine runs the result. The price is a head of its own where it was tied to the embedding.

The rotated model is shown as a checkpoint (`Rotated`): what comes after sees an ordinary float model. Linears that will be
quantized are read as float32, unrounded. Who reads and who writes is discovered (links.py), and the rotated model's logits are
compared with those of the original before anything is quantized. Not for LayerNorm, whose mean a rotation does not keep, nor
for norms of what is written (Gemma 2 and 3). Cost: three passes over the weights, no data.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from lowbit.arch import Arch, Block
from lowbit.links import Link, Run, find_links, structure
from lowbit.orthogonal import hadamard
from lowbit.source import Source
from lowbit.unit import Between

_TOLERANCE = 1e-3  # relative, of float32 logits
_TOKENS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """An orthogonal matrix R [width, width], as factors: x R = (x * signs) (H or H (x) mixer), in blocks of `block`."""

    block: int
    signs: Tensor
    mixer: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x R of x [..., width], in x's dtype."""
        size = self.block // len(self.mixer)
        parts = (x * self.signs.to(x)).unflatten(-1, (-1, size, len(self.mixer)))
        return (hadamard(parts.transpose(-1, -2)).transpose(-1, -2) @ self.mixer.to(x)).flatten(-3)


def make_rotation(width: int, block: int, seed: int) -> Rotation:
    """A random Hadamard rotation of `width` channels in blocks of `block`, the whole width if 0.

    Raises:
        ValueError: the block is no power of two that divides the width.
    """
    if block and (width % block or block & (block - 1)):
        raise ValueError(f"rotate: block = {block} is not a power of two that divides the width {width}")
    block = block or width
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (width,), generator=generator).double() * 2 - 1
    odd = block // (block & -block)
    mixer = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0] if odd > 1 else torch.ones(1, 1)
    return Rotation(block=block, signs=signs, mixer=mixer.double())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Role:
    """What happens to one checkpoint tensor, in this order.

    gain: [in], folded into columns. turn_columns, turn_rows: by the rotation. heads_of_rows, heads_of_columns: the entries of
    every head's channels [heads, head], turned by a Hadamard matrix. value: the tensor becomes this number.
    """

    gain: Tensor | None = None
    turn_columns: bool = False
    turn_rows: bool = False
    heads_of_rows: Tensor | None = None
    heads_of_columns: Tensor | None = None
    value: float | None = None


class Rotated(Source):
    """A checkpoint, shown rotated.

    Attributes:
        exact: read all tensors that change as float32; else only those in `unrounded`.
    """

    def __init__(self, source: Source, roles: dict[str, _Role], rotation: Rotation, head: tuple[str, str] | None) -> None:
        """head: the name of a head that is made from a tied embedding, and that of the embedding."""
        self.__dict__.update(source.__dict__)
        self.plain = source
        self.roles = roles
        self.rotation = rotation
        self.exact = False
        self._copies: dict[str, str] = {}
        if head is not None:
            name, embedding = head
            self._copies = {name: embedding}
            self.tensors = source.tensors | {name: source.tensors[embedding]}
            self.overrides = source.overrides | {"tie_word_embeddings": False}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, rotated."""
        stored = self.plain.read(list(dict.fromkeys(self._copies.get(name, name) for name in names)))
        return {name: self._turned(name, stored[self._copies.get(name, name)]) for name in names}

    def _turned(self, name: str, value: Tensor) -> Tensor:
        role = self.roles.get(name)
        if role is None:
            return value
        if role.value is not None:
            return torch.full_like(value, role.value)
        turned = value.double()
        if role.gain is not None:
            turned = turned * role.gain
        if role.turn_columns:
            turned = self.rotation(turned)
        if role.turn_rows:
            turned = _rows_last(self.rotation(_rows_last(turned)))
        if role.heads_of_columns is not None:
            turned = _turn_heads(turned, role.heads_of_columns)
        if role.heads_of_rows is not None:
            turned = _rows_last(_turn_heads(_rows_last(turned), role.heads_of_rows))
        return turned.float() if self.exact or name in self.unrounded else turned.to(value.dtype)


def _rows_last(x: Tensor) -> Tensor:
    """A matrix, or a stack of them, with rows as the last axis, and back; a bias as it is."""
    return x.transpose(-1, -2) if x.dim() > 1 else x


def _turn_heads(x: Tensor, heads: Tensor) -> Tensor:
    """x [..., n] with the entries of every head turned by a Hadamard matrix; heads: [heads, head] int64."""
    turned = x.clone()
    turned[..., heads.flatten()] = hadamard(x[..., heads]).flatten(-2)
    return turned


def rotate(
    arch: Arch, *, block: Annotated[int, Between(0, 65536)] = 0, heads: bool = True, seed: Annotated[int, Between(0, 2**31)] = 0
) -> Source:
    """The checkpoint of a probed model, rotated.

    Args:
        block: channels that are turned among themselves, a power of two; 0: all.
        heads: also turn the values of each head, where a head's width is a power of two.
        seed: of the signs.

    Raises:
        ValueError: the model has parts that do not turn along, with the reason; block does not divide the width.
    """
    embedding = arch.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rotation = make_rotation(embedding.embedding_dim, block, seed)
    roles, head = _plan(arch, rotation, heads)
    rotated = Rotated(arch.source, roles, rotation, head)
    _check(arch, rotated)
    return rotated


def _plan(arch: Arch, rotation: Rotation, heads: bool) -> tuple[dict[str, _Role], tuple[str, str] | None]:
    """The role of every tensor; and, if it was tied, the head to make: (its name, the embedding's)."""
    width = len(rotation.signs)
    tensors: dict[str, list[str]] = {}
    for tensor in arch.source.tensors:
        if tensor not in arch.unused:
            tensors.setdefault(arch.param_of(tensor), []).append(tensor)
    calls = _calls(arch)
    roles: dict[str, _Role] = {}
    offsets = set()
    known: dict[object, tuple[Link, ...]] = {}
    for block in arch.blocks:
        arch.load(block.tensors)
        module = arch.model.get_submodule(block.name)
        kind = structure(module)
        if kind not in known:
            known[kind] = find_links(
                module, _runner(arch, block, width, calls[block.index]), _config(arch, "num_attention_heads")
            )[0]
        params, offset = _plan_block(arch, block, known[kind], width, heads)
        roles |= {tensor: role for param, role in params.items() for tensor in tensors[param]}
        offsets |= offset
        arch.free(block.name)

    outside = {
        name: p
        for name, p in arch.model.named_parameters()
        if all(tensor in arch.outside for tensor in tensors.get(name, [""]))
    }
    final = [name for name, p in outside.items() if p.dim() == 1 and len(p) == width]
    head = arch.model.get_output_embeddings()
    if len(final) != 1 or len(offsets) != 1 or head is None:
        raise ValueError(
            f"rotate: a model needs one final norm and a head; here {len(final)} vectors of the model's width lie outside the "
            f"blocks, and there is {'a' if head is not None else 'no'} head"
        )
    plus, norm = offsets.pop(), tensors[final[0]][0]
    gain = arch.source.read([norm])[norm].double() + plus
    names = {id(p): name for name, p in arch.model.named_parameters(remove_duplicate=False)}
    embedding = tensors[names[id(arch.model.get_input_embeddings().weight)]][0]
    param = next(name for name, module in arch.model.named_modules() if module is head) + ".weight"
    tied = param not in tensors
    roles[norm] = _Role(value=1.0 - plus)
    roles[embedding] = _Role(turn_columns=True)
    roles[param if tied else tensors[param][0]] = _Role(gain=gain, turn_columns=True)
    return roles, (param, embedding) if tied else None


def _plan_block(
    arch: Arch, block: Block, links: tuple[Link, ...], width: int, heads: bool
) -> tuple[dict[str, _Role], set[float]]:
    """The roles of a loaded block's parameters, and what its norms add to their gains."""
    module = arch.model.get_submodule(block.name)
    params = {name: p.detach() for name, p in module.named_parameters()}
    norms = [link for link in links if link.kind == "norm" and link.channels == width]
    roles: dict[str, _Role] = {}
    for link in norms:
        weight = link.producers[0]
        if len(link.producers) > 1:
            raise ValueError(f"rotate: {block.name}.{link.name} is a LayerNorm, whose mean a rotation does not keep")
        gain = params[weight.param].double().cpu() + weight.plus
        roles[weight.param] = _Role(value=1.0 - weight.plus)
        for side in link.consumers:
            if side.axis != -1:
                raise ValueError(f"rotate: {block.name}.{side.param} is stored as [in, out]; such models are not rotated")
            roles[side.param] = _Role(gain=gain, turn_columns=True)
    matrices = _matrices(arch, block)
    for name in matrices:
        if name not in roles and params[name].shape[-2] == width:
            roles[name] = _Role(turn_rows=True)
            bias = name.removesuffix("weight") + "bias"
            if bias in params:
                roles[bias] = _Role(turn_rows=True)
    if heads:
        _add_heads(arch, links, params, roles)
    of_matrices = {name.removesuffix("weight") + "bias" for name, p in params.items() if p.dim() > 1}
    vectors = {name for name, p in params.items() if p.dim() == 1 and len(p) == width}
    left = sorted(vectors - set(roles) - of_matrices)
    if not norms or left:
        what = f"{left[0]} does not turn along" if left else "no norm was found that linears alone read"
        raise ValueError(f"rotate: {block.name}: {what}; use recipes without rotate for this model")
    return {f"{block.name}.{name}": role for name, role in roles.items()}, {link.producers[0].plus for link in norms}


def _add_heads(arch: Arch, links: tuple[Link, ...], params: dict[str, Tensor], roles: dict[str, _Role]) -> None:
    """Turn the values of each head, where there is a link from all value rows to the columns of the output projection."""
    count = _config(arch, "num_attention_heads")
    for link in links:
        if link.kind != "linear" or len(link.consumers) != 1 or not count or params[link.producers[0].param].dim() != 2:
            continue
        side = link.consumers[0]
        size = _config(arch, "head_dim") or (_config(arch, "hidden_size") or 0) // count
        values = (_config(arch, "num_key_value_heads") or count) * size
        if (len(side.channels), link.channels) != (count * size, values) or size & (size - 1):
            continue
        if not _reads_heads(side.channels, size):
            continue
        for rows in link.producers:
            order = torch.argsort(torch.where(rows.channels >= 0, rows.channels, link.channels), stable=True)[: link.channels]
            roles[rows.param] = replace(roles.get(rows.param, _Role()), heads_of_rows=order.view(-1, size))
        every = torch.arange(len(side.channels)).view(-1, size)
        roles[side.param] = replace(roles.get(side.param, _Role()), heads_of_columns=every)


def _reads_heads(columns: Tensor, size: int) -> bool:
    """Whether every `size` columns follow the channels of one whole head in order."""
    heads = columns.view(-1, size)
    return bool((heads == heads[:, :1] + torch.arange(size)).all()) and bool((heads[:, 0] % size == 0).all())


def _config(arch: Arch, key: str) -> int | None:
    value = arch.source.config.get(key)
    return value if isinstance(value, int) else None


def _calls(arch: Arch) -> list[object]:
    """The other arguments of every block's call, for rows of `_TOKENS` tokens."""
    arch.load_outside()
    calls = arch.embed(torch.arange(_TOKENS).unsqueeze(0))[1]
    arch.free_outside()
    return list(calls)


def _runner(arch: Arch, block: Block, width: int, call: object) -> Run:
    hidden = torch.randn(1, _TOKENS, width, generator=torch.Generator().manual_seed(0))
    return lambda observe: arch.call(block, hidden, call, observe)


def _matrices(arch: Arch, block: Block) -> list[str]:
    """Parameters of the block, by their names in it, that belong to its linears or are matrices it multiplies by."""
    names = {linear.param.removeprefix(block.name + ".") for linear in block.linears}
    return sorted(names)


@torch.no_grad()
def _check(arch: Arch, rotated: Rotated) -> None:
    """Compare logits of the original and the rotated model.

    Raises:
        ValueError: they differ: some part does not turn along.
    """
    rotated.exact = True
    before, after = (_logits(arch, source) for source in (arch.source, rotated))
    rotated.exact = False
    difference = float((after - before).norm() / before.norm())
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"rotate: the rotated model would compute something else (logits differ by {difference:.1e}); use recipes without "
            "rotate for this model, or heads = false"
        )


def _logits(arch: Arch, source: Source) -> Tensor:
    """Logits of one row, in float32, block by block."""
    twin = Arch(source, device=str(arch.device))
    twin.matrix_dtype = torch.float32
    twin.adopt(arch.blocks)
    tokens = torch.arange(_TOKENS).unsqueeze(0)
    twin.load_outside()
    hidden, calls = twin.embed(tokens)
    twin.free_outside()
    for block in twin.blocks:
        twin.load(block.tensors)
        hidden = twin.call(block, hidden, calls[block.index])
        twin.free(block.name)
    twin.load_outside()
    logits = twin.finish(tokens, hidden).cpu()
    twin.free_outside()
    return logits
