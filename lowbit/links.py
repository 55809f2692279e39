"""Links: who can take over a scale of each channel, so that a block computes the same with other weights.

Dividing what a producer puts out by s [channels], and multiplying by s the columns with which the linears after it read it,
changes nothing, provided that only these linears read it and that what lies between scales along. Norms in front of linears,
value rows in front of the output projection (each head of a grouped one read several times), up rows in front of down, and the
layers around a ReLU are such links (SmoothQuant, arXiv 2211.10438, section 4; OmniQuant, arXiv 2308.13137, section 3.3).

No table of model classes says where they are. Each norm and each matrix of a block is tried: its channels are scaled by powers
of two, which is exact in every float dtype, and the inputs of all matrices are compared with those before. A matrix whose input
columns changed by constant powers of two follows; which channel a column follows is read from several runs, one for each digit
of the channel's number in base 7 (2^-3 .. 2^3). The columns that follow are compensated and the runs repeated, until no other
matrix follows; routing experts compare from then on, since the router is compensated. The link holds if nothing else in the
block has changed. Stand-ins replace the weights meanwhile: no channel of theirs is dead and no expert idle, so what is found
depends on the block's structure alone and serves all blocks of the same structure.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.arch import Observe, Site, addresses, site_of

_DIGITS = 7  # 2^-3 .. 2^3
_TOLERANCE = 1e-3  # powers of two are exact: what differs at all differs by more
_STEP = 64  # stand-ins of vectors are multiples of 1/64: 1 + w and its products with the powers are exact too


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One end of a link: a parameter of the block and the channel that each entry along one axis belongs to.

    Attributes:
        param: name of the parameter within the block.
        index: the slice of a 3-D parameter (an expert); None: the whole parameter, every slice alike.
        axis: -1 or -2, the axis along which entries follow channels.
        channels: [entries] int64, the channel of each entry, -1 where it follows none.
        plus: what the model adds to the parameter before it multiplies by it (1 in Gemma's norms).
    """

    param: str
    index: int | None = None
    axis: int = -1
    channels: Tensor
    plus: float = 0.0

    def factors(self, by_channel: Tensor) -> Tensor:
        """The factor of each entry along the axis, from one for each channel; 1 where the entry follows none."""
        channels = self.channels.to(by_channel.device)
        return torch.where(channels >= 0, by_channel[channels.clamp(min=0)], 1)

    def scaled(self, value: Tensor, by_channel: Tensor) -> Tensor:
        """A parameter's value times its entries' factors, with gradients."""
        factors = self.factors(by_channel).to(value.dtype)
        factors = factors if self.axis == -1 else factors.unsqueeze(-1)
        if self.index is None:
            return (value + self.plus) * factors - self.plus
        return value.select_scatter((value[self.index] + self.plus) * factors - self.plus, 0, self.index)

    def scale(self, value: Tensor, by_channel: Tensor) -> None:
        """Multiply a parameter's value in place by its entries' factors."""
        part = value if self.index is None else value[self.index]
        factors = self.factors(by_channel).to(value.dtype)
        factors = factors if self.axis == -1 else factors.unsqueeze(-1)
        part.add_(self.plus).mul_(factors).sub_(self.plus) if self.plus else part.mul_(factors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """A producer and all linears that read it: dividing the producers' channels by s and multiplying the consumers' columns
    by it leaves the block's function unchanged.

    Attributes:
        kind: what the producer is.
        name: the producer within the block, with the expert's number where it is one.
        channels: how many channels it has.
        producers: its weight first, then its bias if there is one; of linears, the rows.
        consumers: the columns of every matrix that reads it, routers and gates included.
    """

    kind: Literal["norm", "linear"]
    name: str
    channels: int
    producers: tuple[Side, ...]
    consumers: tuple[Side, ...] = ()


@torch.no_grad()
def rescale(module: nn.Module, link: Link, s: Tensor) -> None:
    """Move s [channels] from the producers of a link to its consumers, in the dtypes that the block's parameters have."""
    for side in link.producers:
        side.scale(module.get_parameter(side.param), 1 / s)
    for side in link.consumers:
        side.scale(module.get_parameter(side.param), s)


def structure(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """What decides a block's links: equal for blocks in which `find_links` finds the same."""
    modules = [(name, type(child).__name__) for name, child in module.named_modules()]
    return (*modules, *((name, str(tuple(param.shape))) for name, param in module.named_parameters()))


Run = Callable[[Observe], Tensor]


@torch.no_grad()
def find_links(module: nn.Module, run: Run, heads: int | None) -> tuple[tuple[Link, ...], tuple[tuple[str, str], ...]]:
    """Find the links of a block by trying its norms and matrices.

    Args:
        module: the block, loaded. Its parameters are replaced while this runs and as before afterwards.
        run: runs the block on always the same input under a `Tap` with the given observer and returns its output
            [..., width]; a few dozen tokens, so that every router uses some experts.
        heads: how many query heads the config names, to find the values in matrices that hold queries, keys and values.

    Returns:
        the links, and (producer, reason) for everything that was tried and is none.
    """
    links: list[Link] = []
    rejected: list[tuple[str, str]] = []
    with _stand_ins(module):
        trial = _Trial(module, run)
        for name, choices in _candidates(module, trial.transposed, heads):
            reason = ""
            for choice in choices:
                found, why = trial.follow(choice)
                reason = reason or why
                if found is not None:
                    links += _by_expert(found, module)
                    break
            else:
                rejected.append((name, reason))
    return tuple(links), tuple(rejected)


class _Trial:
    """Runs of one block with scaled channels, compared with the run before any scaling."""

    def __init__(self, module: nn.Module, run: Run) -> None:
        self.module = module
        self.run = run
        self.sites = addresses(module)
        self.transposed: dict[str, bool] = {}
        self.inputs, self.out = self.observed()

    def observed(self) -> tuple[dict[Site, Tensor], Tensor]:
        """The input [tokens, in] of every matrix, and the block's output."""
        seen: dict[Site, list[Tensor]] = {}

        def observe(weight: Tensor | str, x: Tensor, transposed: bool) -> Tensor:
            site = site_of(weight, self.sites)
            if site is not None and not isinstance(weight, str):
                seen.setdefault(site, []).append(x.reshape(-1, x.shape[-1]).clone())
                self.transposed[site[0]] = transposed
            return x

        out = self.run(observe)
        return {site: torch.cat(parts) for site, parts in seen.items()}, out

    def scaled(self, links: list[Link], scales: list[Tensor]) -> tuple[dict[Site, Tensor], Tensor]:
        """`observed` with links rescaled by powers of two, and nothing changed afterwards."""
        for link, s in zip(links, scales, strict=True):
            rescale(self.module, link, s)
        seen = self.observed()
        for link, s in zip(links, scales, strict=True):
            rescale(self.module, link, 1 / s)
        return seen

    def follow(self, link: Link) -> tuple[Link | None, str]:
        """The link with all of its consumers; or None, and why it is no link."""
        codes = _codes(link.channels, self.out.device)
        while True:
            consumed = {side.param for side in link.consumers}
            digits: dict[Site, Tensor] = {}
            for place, code in enumerate(codes):
                inputs, _ = self.scaled([link], [torch.exp2(-code)])
                followed: dict[Site, Tensor] = {}
                for site, x in inputs.items():
                    if site[0] not in consumed and (place == 0 or site in digits):
                        exponents = _exponents(self.inputs.get(site), x)
                        if exponents is not None and (place > 0 or bool(exponents.any())):
                            followed[site] = (exponents + _DIGITS // 2) * _DIGITS**place
                digits = followed if place == 0 else {site: digits[site] + value for site, value in followed.items()}
                if not digits:
                    break
            new = {site: value for site, value in digits.items() if bool((value < link.channels).all())}
            if not new:
                break
            for param in dict.fromkeys(site[0] for site in new):
                maps = [value for site, value in new.items() if site[0] == param]
                if not all(torch.equal(maps[0], other) for other in maps[1:]):
                    return None, f"the slices of {param} read it differently"
                axis = -2 if self.transposed[param] else -1
                link = replace(link, consumers=(*link.consumers, Side(param=param, axis=axis, channels=maps[0].cpu())))
        if not link.consumers:
            return None, "no linear reads it in proportion"
        shapes = [self.module.get_parameter(side.param).shape for side in (*link.producers, *link.consumers)]
        if len(shapes[0]) == 3 and not all(len(shape) == 3 and shape[0] == shapes[0][0] for shape in shapes):
            return None, "experts produce it, but what reads it is not one matrix for each of them"
        return self._accepted(link)

    def _accepted(self, link: Link) -> tuple[Link | None, str]:
        """The link, if other random scales, of every expert its own, leave everything but its consumers' inputs as it was."""
        generator = torch.Generator().manual_seed(0)
        links = _by_expert(link, self.module)
        shape = (len(links), link.channels)
        scales = torch.exp2(torch.randint(-3, 4, shape, generator=generator).float()).to(self.out.device)
        inputs, out = self.scaled(links, list(scales))
        consumed = {side.param for side in link.consumers}
        for site, before in self.inputs.items():
            if site[0] in consumed:
                continue
            after = inputs.get(site)
            if after is None or after.shape != before.shape or not _close(after, before):
                return None, f"it also changes what {site[0]} reads, and not in proportion"
        if not _close(out, self.out):
            return None, "what it puts out also flows past the linears that read it, into the block's output"
        return link, ""


def _codes(channels: int, device: torch.device) -> Tensor:
    """The digits of every channel's number in base 7, lowest first, as exponents -3..3: [places, channels] float32."""
    number = torch.arange(channels, device=device)
    places: list[Tensor] = []
    while not places or bool((number > 0).any()):
        places.append((number % _DIGITS - _DIGITS // 2).float())
        number = number // _DIGITS
    return torch.stack(places)


def _exponents(before: Tensor | None, after: Tensor) -> Tensor | None:
    """By which powers of two -3..3 the columns of an input changed: [in] int64; None where they did otherwise."""
    if before is None or before.shape != after.shape:
        return None
    ratio = after.abs().sum(0) / before.abs().sum(0)  # NaN where a column is 0
    exponents = torch.log2(ratio).round()
    if not bool((exponents.abs() <= _DIGITS // 2).all()) or not _close(after, before * torch.exp2(exponents), dim=0):
        return None
    return exponents.long()


def _close(after: Tensor, before: Tensor, dim: int | None = None) -> bool:
    """Whether two tensors are the same, in every column with dim=0, up to float sums of another order."""
    difference, size = torch.linalg.vector_norm(after - before, dim=dim), torch.linalg.vector_norm(before, dim=dim)
    return bool((difference <= _TOLERANCE * size).all())


# ------------------------------------------------------------------------------------------------------------ candidates


def _candidates(module: nn.Module, transposed: dict[str, bool], heads: int | None) -> Iterator[tuple[str, list[Link]]]:
    """What may be a producer: its name, and the forms to try, of which the first that holds is taken."""
    params = dict(module.named_parameters())
    for name, child in module.named_modules():
        own = dict(child.named_parameters())
        if "weight" in own and set(own) <= {"weight", "bias"} and all(value.dim() == 1 for value in own.values()):
            width = len(own["weight"])
            every = torch.arange(width)
            bias = (Side(param=f"{name}.bias", channels=every),) if "bias" in own else ()
            yield (
                name,
                [
                    Link(
                        kind="norm",
                        name=name,
                        channels=width,
                        producers=(Side(param=f"{name}.weight", channels=every, plus=plus), *bias),
                    )
                    for plus in (0.0, 1.0)
                ],
            )
    for param, flipped in transposed.items():
        path = param.removesuffix(".weight")
        axis = -1 if flipped else -2
        out = params[param].shape[axis]
        links = []
        for rows in _row_choices(out, heads):
            channels = torch.full((out,), -1)
            channels[rows] = torch.arange(len(rows))
            sides = [Side(param=param, axis=axis, channels=channels)]
            if path != param and f"{path}.bias" in params:
                sides.append(Side(param=f"{path}.bias", channels=channels))
            links.append(Link(kind="linear", name=path, channels=len(rows), producers=tuple(sides)))
        yield path, links


def _row_choices(out: int, heads: int | None) -> list[Tensor]:
    """Rows of a matrix that may be one producer: all; halves, one after the other or alternating (gate and up); and the
    values of a matrix [queries | keys | values], or with these side by side for each key head."""
    every = torch.arange(out)
    choices = [every]
    if out % 2 == 0:
        choices += [every[out // 2 :], every[: out // 2], every[1::2], every[::2]]
    if out % 3 == 0:
        choices.append(every[out * 2 // 3 :])
    for pairs in range(1, (heads or 0) + 1):
        assert heads is not None
        if heads % pairs == 0 and out % (heads + 2 * pairs) == 0:
            width = out // (heads + 2 * pairs)
            choices += [every[out - pairs * width :], every.view(pairs, -1, width)[:, -1].flatten()]
    return list({tuple(rows.tolist()): rows for rows in choices}.values())


def _by_expert(link: Link, module: nn.Module) -> list[Link]:
    """A link between 3-D parameters as one link for every slice; others as they are."""
    if module.get_parameter(link.producers[0].param).dim() < 3:
        return [link]
    count = len(module.get_parameter(link.producers[0].param))
    return [
        replace(
            link,
            name=f"{link.name}.{index}",
            producers=tuple(replace(side, index=index) for side in link.producers),
            consumers=tuple(replace(side, index=index) for side in link.consumers),
        )
        for index in range(count)
    ]


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[None]:
    """Replace the values of all parameters: matrices by random ones of even rows, vectors by numbers from 0.5 to 1.5, and
    biases by numbers from -1/4 to 1/4, so that no neuron is off for every token."""
    saved = [(name, param, param.detach().clone()) for name, param in module.named_parameters()]
    generator = torch.Generator(saved[0][1].device).manual_seed(0)
    for name, param, _ in saved:
        if param.dim() == 1:
            low, high = (-_STEP // 4, _STEP // 4) if name.endswith("bias") else (_STEP // 2, _STEP * 3 // 2)
            param.copy_(torch.randint(low, high, param.shape, generator=generator, device=param.device) / _STEP)
        elif param.is_floating_point():
            param.normal_(0, max(param.shape[-1], 16) ** -0.5, generator=generator)
    try:
        yield
    finally:
        for _, param, value in saved:
            param.copy_(value)
