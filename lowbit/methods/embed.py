"""Token embeddings rounded to nearest, as ZeroQuant does (Yao et al., NeurIPS 2022, section 4.1), group by group of a row.

No data, no optimisation: a row of the table is looked up, not multiplied, so no input weighs its errors. Everything after it is
solved on the rounded embeddings. A head tied to them is rounded with them. Cost: one pass over the table.
"""

import torch
from torch import Tensor

from lowbit.arch import Arch, Linear
from lowbit.qtensor import QTensor, Scheme, check_shape, dequantize, find_params, parse_scheme, quantize
from lowbit.source import Source


class Rounded(Source):
    """A checkpoint, shown with its token embeddings rounded.

    Attributes:
        linear: the table [vocabulary, width] as the quantized matrix it becomes.
        scheme, q: how it is quantized, and the result.
        error: relative squared error.
    """

    def __init__(self, source: Source, linear: Linear, scheme: Scheme, q: QTensor, error: float) -> None:
        self.__dict__.update(source.__dict__)
        self.plain = source
        self.linear, self.scheme, self.q, self.error = linear, scheme, q, error

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors."""
        self.plain.unrounded = self.unrounded
        found = self.plain.read([name for name in names if name != self.linear.tensor])
        if self.linear.tensor in names:
            found[self.linear.tensor] = dequantize(self.q, self.dtype())
        return {name: found[name] for name in names}


@torch.no_grad()
def embed(arch: Arch, *, scheme: str = "w8a16") -> Rounded:
    """Round the token embeddings.

    Args:
        scheme: of their rows, with float inputs.

    Raises:
        ValueError: the scheme quantizes inputs or does not fit, or the model has no table of its own for the tokens.
    """
    parsed = parse_scheme(scheme)
    if parsed.input is not None:
        raise ValueError(f"embed: embeddings have no input to quantize; use a scheme like w8a16 instead of {scheme}")
    if arch.table is None:
        raise ValueError(
            f"embed: {type(arch.model).__name__} has no table of token embeddings in its checkpoint; leave embed out"
        )
    (linear,) = arch.table.linears
    check_shape(linear.name, linear.out_features, linear.in_features, parsed)
    w = arch.source.read([linear.tensor])[linear.tensor].float()
    q = quantize(w, find_params(w, parsed.weight, scale_dtype=arch.source.dtype()), parsed.weight)
    error = float((dequantize(q) - w).double().square().sum() / w.double().square().sum().clamp(min=1e-30))
    return Rounded(arch.source, linear, parsed, q, error)
