"""Sort-and-cluster against exhaustive search, and that no step changes what a scan computes, in float64."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache

from lowbit.arch import Tap, discover
from lowbit.methods.hadamard import hadamard
from lowbit.methods.reorder import partition, reorder, sort_and_cluster
from lowbit.qtensor import parse_scheme
from lowbit.source import open_source
from lowbit.ssm import CHUNK, Mixer
from lowbit.unit import Stream, Unit, quantized_inputs


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_partition_is_the_best_there_is(parts: int) -> None:
    rows = torch.rand(7, 3, dtype=torch.float64).sort(0, descending=True).values

    def cost(runs: list[slice]) -> float:
        return sum((run.stop - run.start) * float(rows[run].amax(0).square().sum()) for run in runs)

    tried = []
    for cuts in itertools.combinations(range(1, 7), min(parts, 7) - 1):
        ends = [0, *cuts, 7]
        tried.append(cost([slice(a, b) for a, b in itertools.pairwise(ends)]))
    found = partition(rows, parts)
    assert [run.start for run in found] == [0, *(run.stop for run in found[:-1])] and found[-1].stop == 7
    assert len(found) <= parts and cost(found) == pytest.approx(min(tried))


def test_orders_stay_inside_heads_and_state_groups() -> None:
    groups, heads, size = 2, 3, 8
    reach = torch.rand(groups, heads, size)
    by_head, by_channel, labels = sort_and_cluster(reach, 2, 3)
    assert by_head.sort().values.tolist() == list(range(groups * heads))
    assert by_channel.sort().values.tolist() == list(range(groups * heads * size))
    assert (by_head.view(groups, heads) // heads == torch.arange(groups).unsqueeze(1)).all()
    assert (by_channel.view(-1, size) // size == by_head.unsqueeze(1)).all()
    assert int(labels.max()) + 1 <= groups * 2 * 3
    for each in labels.view(-1, size):
        assert (each.diff() >= 0).all()
    squared = torch.zeros(int(labels.max()) + 1).scatter_reduce(0, labels, reach.flatten()[by_channel], "amax")[labels].square()
    assert squared.sum() < reach.amax().square() * labels.numel()
    assert sort_and_cluster(reach[:1], 1, 1)[2].unique().tolist() == [0]


@torch.no_grad()
def run(mixer: Mixer, config: Any, x: Tensor, observe: Any, split: tuple[int, ...]) -> Tensor:
    """Outputs of a mixer in calls of so many tokens, with a cache where there are several."""
    cache = DynamicCache(config=config) if len(split) > 1 else None
    with Tap(observe):
        return torch.cat([mixer(part, cache_params=cache) for part in x.split(split, 1)], 1)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba"])
def test_a_scan_computes_the_same(name: str, tmp_path: Path) -> None:
    """Reordered, with its output turned: below 1e-10 in float64, in one pass and step by step."""
    tiny.save(name, tmp_path / "model", seed=5)
    arch = discover(open_source(str(tmp_path / "model")))
    stream = Stream(arch, tiny.tokens(2, 40), tmp_path)
    stream.start()
    block = arch.blocks[0]
    values = arch.load(block.tensors)
    schemes = {linear.name: parse_scheme("w8a16") for linear in block.linears}
    before = {name: p.clone() for name, p in arch.model.get_submodule(block.name).named_parameters()}
    unit = Unit(arch, block, schemes, stream, torch.float32, values)
    (path,) = {point.mixer for point in block.points}
    length = CHUNK + 7
    x = torch.randn(2, length, tiny.HIDDEN, dtype=torch.float64)
    splits = ((length,), (CHUNK - 3, *[1] * 10))

    module = arch.model.get_submodule(path)
    mixer = Mixer(module, path)
    module.double()
    expected = [run(mixer, arch.model.config, x, lambda weight, x, transposed: x, split) for split in splits]
    torch.testing.assert_close(expected[0], expected[1], rtol=1e-10, atol=1e-10)

    arch.dtype = torch.float64
    module.float()
    reorder(unit, heads=2, channels=3)
    moved = [name for name, p in arch.model.get_submodule(block.name).named_parameters() if not torch.equal(p, before[name])]
    assert all(any(name.endswith(part.param) for name in moved) for part in mixer.indexed())
    module.double()
    hadamard(unit)
    turned = quantized_inputs(arch.sites(block), unit.inputs_by_site())
    assert unit.notes[-1]["linears"] == [f"{path}.out_proj"]
    for split, wanted in zip(splits, expected, strict=True):
        found = run(mixer, arch.model.config, x, turned, split)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-10
        assert (
            float((run(mixer, arch.model.config, x, lambda weight, x, transposed: x, split) - wanted).norm() / wanted.norm())
            > 0.1
        )


def test_a_width_without_a_matrix_is_refused(tmp_path: Path) -> None:
    """28 heads of 2 channels have 56 inputs; and a norm whose groups cut state groups is not reordered."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "mamba2", vocab_size=tiny.VOCAB, hidden_size=28, num_hidden_layers=1, state_size=8, num_heads=28, head_dim=2, n_groups=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    arch = discover(open_source(str(tmp_path / "model")))
    stream = Stream(arch, tiny.tokens(1, 20), tmp_path)
    stream.start()
    block = arch.blocks[0]
    arch.load(block.tensors)
    unit = Unit(arch, block, {linear.name: parse_scheme("w8a16") for linear in block.linears}, stream, torch.float32)
    with pytest.raises(ValueError, match="no Hadamard matrix of the 56 inputs"):
        hadamard(unit)
    arch.model.get_submodule(unit.mixers[0].path).norm.group_size = 14
    with pytest.raises(ValueError, match="cut state groups in two"):
        reorder(unit)
