"""The statistics and records of a block, against plain forward hooks on the transformers model and the definitions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit import unit as unit_module
from lowbit.arch import Arch, Block, Linear, Observe, discover
from lowbit.methods.gptq import gptq
from lowbit.methods.rtn import rtn
from lowbit.qtensor import Grid, Scheme, dequantize, find_params, parse_scheme, quantize
from lowbit.source import open_source
from lowbit.unit import Input, Stream, Unit, _mirror, add_gram, energy, fast_products, quantized_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint folders of the tiny models, each saved once, to be read only."""
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            tiny.save(name, saved[name], seed=2)
        return saved[name]

    return get


class Setting:
    """A discovered model, a stream of tokens through it, and units for its blocks."""

    def __init__(self, folder: Path, work: Path, tokens: Tensor) -> None:
        self.folder = folder
        self.tokens = tokens
        self.arch = discover(open_source(str(folder)))
        self.stream = Stream(self.arch, tokens, work)
        self.stream.start()

    def unit(self, index: int, scheme: str | dict[str, str], dtype: torch.dtype = torch.float32) -> Unit:
        """Load block `index`; `scheme` is for all of its linears, or by the end of their names; scales have `dtype`."""
        block = self.arch.blocks[index]
        self.arch.load(block.tensors)
        given = {"": scheme} if isinstance(scheme, str) else scheme
        schemes: dict[str, Scheme] = {}
        for linear in block.linears:
            for end, name in given.items():
                if linear.name.endswith(end):
                    schemes[linear.name] = parse_scheme(name)
        return Unit(self.arch, block, schemes, self.stream, dtype)

    def reference(self, name: str) -> Any:
        """The same model by transformers alone."""
        return tiny.auto_class(name).from_pretrained(self.folder, dtype=torch.float32).eval()


def hooked_grams(model: Any, prefix: str, tokens: Tensor, bits: int | None = None) -> dict[str, Tensor]:
    """X^T X in float64 of every linear module below `prefix`, by forward hooks on plain calls of row after row.

    With `bits`, inputs are first rounded to that many bits, one scale a token, also in the forward itself.
    """
    grams: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if not name.startswith(prefix) or not isinstance(module, nn.Linear | Conv1D):
            continue

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...]:
            x = args[0]
            if bits is not None:
                limit = 2 ** (bits - 1) - 1
                scale = x.abs().amax(-1, keepdim=True) / limit
                x = (x / scale).round().clamp(-limit - 1, limit) * scale
            rows = x.reshape(-1, x.shape[-1]).double()
            grams[name] = grams.get(name, 0) + rows.T @ rows
            return (x,)

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for row in tokens:
            model(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return grams


@torch.no_grad()
def expert_grams(model: Any, prefix: str, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same for the experts of a mixtral layer, routed by hand; and how many tokens reach each expert."""
    caught: list[Tensor] = []
    mlp = model.get_submodule(f"{prefix}.mlp")
    handle = mlp.register_forward_pre_hook(lambda module, args: caught.append(args[0].reshape(-1, args[0].shape[-1])))
    for row in tokens:
        model(row.unsqueeze(0))
    handle.remove()
    x = torch.cat(caught)
    chosen = (x @ mlp.gate.weight.T).softmax(-1).topk(2).indices
    grams = {}
    counts = torch.zeros(4, dtype=torch.int64)
    for expert in range(4):
        own = x[(chosen == expert).any(-1)]
        counts[expert] = len(own)
        gate, up = mlp.experts.gate_up_proj[expert].chunk(2)
        between = nn.functional.silu(own @ gate.T) * (own @ up.T)
        name = f"{prefix}.block_sparse_moe.experts.{expert}"
        grams[f"{name}.w1"] = grams[f"{name}.w3"] = own.double().T @ own.double()
        grams[f"{name}.w2"] = between.double().T @ between.double()
    return grams, counts


def assert_grams(unit: Unit, expected: dict[str, Tensor]) -> None:
    """Every linear's Gram matrix, up to float32 sums of another order."""
    for linear in unit.linears:
        found, wanted = unit.gram(linear), expected[linear.name]
        assert found.shape == (linear.in_features, linear.in_features) and found.dtype == torch.float32
        assert torch.equal(found, found.T)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6 * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------------------------------------ grams


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bert"])
def test_grams_equal_hooks(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder(name), tmp_path, tiny.tokens(5, 20, seed=3))
    unit = setting.unit(0, "w4a16-g32")
    assert_grams(unit, hooked_grams(setting.reference(name), unit.block.name, setting.tokens))


def test_shared_inputs_share_one_gram(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(2, 20))
    unit = setting.unit(0, "w4a16-g32")
    by_leaf = {linear.name.rpartition(".")[2]: linear for linear in unit.linears}
    q, k, v = (unit.gram(by_leaf[leaf]) for leaf in ("q_proj", "k_proj", "v_proj"))
    assert q is k and k is v
    assert unit.gram(by_leaf["gate_proj"]) is unit.gram(by_leaf["up_proj"])
    others = [unit.gram(by_leaf[leaf]) for leaf in ("o_proj", "gate_proj")]
    assert all(not torch.equal(q, other) for other in others)


def test_linears_that_share_stand_together(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("gptj"), tmp_path, tiny.tokens(1, 8))
    leaders = [linear.shares for linear in setting.unit(0, "w4a16-g32").linears]
    assert len(leaders) == 6
    assert leaders == sorted(leaders, key=leaders.index) and leaders.count(leaders[0]) == 4


def test_grams_of_experts_count_their_own_tokens(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("mixtral"), tmp_path, tiny.tokens(4, 20, seed=5))
    unit = setting.unit(0, "w4a16-g32")
    model = setting.reference("mixtral")
    experts, counts = expert_grams(model, unit.block.name, setting.tokens)
    assert counts.sum() == 2 * 80 and (counts > 0).all() and len(counts.unique()) > 1
    assert_grams(unit, hooked_grams(model, unit.block.name, setting.tokens) | experts)


def test_grams_of_a_later_block_see_the_quantized_ones_before(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(3, 20, seed=6))
    first = setting.unit(0, "w3a16-g32")
    rtn(first)
    first.finish()
    setting.arch.free(first.block.name)
    second = setting.unit(1, "w3a16-g32")
    model = setting.reference("llama")
    before = hooked_grams(model, second.block.name, setting.tokens)
    with torch.no_grad():
        for name, q in first.assigned.items():
            model.get_submodule(name).weight.copy_(dequantize(q))
    assert_grams(second, hooked_grams(model, second.block.name, setting.tokens))
    # and the difference matters
    q_proj = next(linear for linear in second.linears if linear.name.endswith("q_proj"))
    assert (second.gram(q_proj).double() - before[q_proj.name]).norm() > 0.05 * before[q_proj.name].norm()


def test_sequential_grams_see_the_linears_before(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Those assigned before are quantized in the pass that gathers the next, and only if asked for."""
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(3, 20, seed=6))
    unit = setting.unit(0, "w3a16-g32")
    model = setting.reference("llama")
    plain = hooked_grams(model, unit.block.name, setting.tokens)
    for linear in unit.linears:
        expected = hooked_grams(model, unit.block.name, setting.tokens)[linear.name]
        found = unit.gram(linear, sequential=True).double()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max()))
        if linear.name.endswith(("o_proj", "up_proj")):
            assert (expected - plain[linear.name]).norm() > 0.02 * expected.norm()
        unit.assign_nearest(linear, method="rtn")
        with torch.no_grad():
            model.get_submodule(linear.name).weight.copy_(dequantize(unit.assigned[linear.name]))
    setting.arch.load(unit.block.tensors)
    again = setting.unit(0, "w3a16-g32")
    rtn(again)
    assert_grams(again, plain)


def test_grams_of_quantized_inputs(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A linear whose own input is quantized gets the statistics of the quantized input, and so do those after it."""
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(3, 20, seed=7))
    unit = setting.unit(0, "w8a8")
    model = setting.reference("llama")
    assert_grams(unit, hooked_grams(model, unit.block.name, setting.tokens, bits=8))
    plain = hooked_grams(model, unit.block.name, setting.tokens)
    gram = unit.gram(unit.linears[0]).double()
    assert (gram - plain[unit.linears[0].name]).abs().max() > 1e-4 * gram.abs().max()


def test_linears_of_one_input_with_different_input_schemes(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(2, 20, seed=7))
    unit = setting.unit(0, {"q_proj": "w8a8", "k_proj": "w4a16-g32", "v_proj": "w4a16-g32"})
    q, k, v = (next(x for x in unit.linears if x.name.endswith(leaf)) for leaf in ("q_proj", "k_proj", "v_proj"))
    model = setting.reference("llama")
    assert unit.gram(k) is unit.gram(v)
    plain = hooked_grams(model, unit.block.name, setting.tokens)
    rounded = hooked_grams(model, unit.block.name, setting.tokens, bits=8)
    for linear, other, expected in ((k, q, plain), (q, k, rounded)):
        wanted = expected[linear.name]
        torch.testing.assert_close(unit.gram(linear).double(), wanted, rtol=2e-5, atol=2e-6 * float(wanted.abs().max()))
        assert not torch.equal(unit.gram(linear), unit.gram(other))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_several_passes_give_the_same(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one matrix alone, every input is a pass over the data of its own."""
    setting = Setting(folder(name), tmp_path, tiny.tokens(3, 20, seed=8))
    calls: list[int] = []
    batches = setting.stream.batches

    def counted(boundary: int) -> Iterator[tuple[Tensor, Any]]:
        calls.append(boundary)
        return batches(boundary)

    monkeypatch.setattr(setting.stream, "batches", counted)
    unit = setting.unit(0, "w4a16-g32")
    together = {linear.name: unit.gram(linear) for linear in unit.linears}
    assert calls == [0]
    inputs = len({linear.shares for linear in unit.linears})
    for limit, passes in ((1, inputs), (2 * 64 * 64 * 4, None)):
        calls.clear()
        monkeypatch.setattr(unit_module, "GRAM_BYTES", limit)
        unit = setting.unit(0, "w4a16-g32")
        for linear in unit.linears:
            assert torch.equal(unit.gram(linear), together[linear.name])
        assert len(calls) == passes if passes is not None else 1 < len(calls) < inputs


@pytest.mark.parametrize("width", [1, 64, 255, 256, 257, 1030])
def test_add_gram_equals_the_plain_product(width: int) -> None:
    first, second = torch.randn(40, width), torch.randn(7, width)
    gram = torch.zeros(width, width)
    add_gram(gram, first)
    add_gram(gram, second)
    _mirror(gram)
    x = torch.cat([first, second]).double()
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- the stream


def test_stream_holds_the_embedded_rows(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "TOKENS_PER_BATCH", 45)
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(5, 20, seed=9))
    stream, arch = setting.stream, setting.arch
    assert [path.name for path in tmp_path.iterdir()] == [stream.file(0).name]
    assert stream.file(0).stat().st_size == 5 * 20 * tiny.HIDDEN * 4
    arch.load_outside()
    expected = arch.embed(setting.tokens)[0]
    arch.free_outside()
    assert torch.equal(stream.read(0, 0, 5), expected)
    assert torch.equal(stream.read(0, 1, 4), expected[1:4])
    found = [hidden for hidden, _ in stream.batches(0)]
    assert [len(hidden) for hidden in found] == [2, 2, 1]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (19, 1), (20, 1), (39, 1), (40, 2), (10_000, 5)])
def test_rows_of_a_batch(
    tokens: int, rows: int, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as fit into the number of tokens, at least one, at most all."""
    monkeypatch.setattr(unit_module, "TOKENS_PER_BATCH", tokens)
    stream = Stream(Arch(open_source(str(folder("llama")))), tiny.tokens(5, 20), tmp_path)
    stream.start()
    assert len(next(iter(stream.batches(0)))[0]) == rows


def test_stream_moves_on(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all blocks, in batches: the hidden states of the float model; files already used can be dropped."""
    monkeypatch.setattr(unit_module, "TOKENS_PER_BATCH", 45)
    setting = Setting(folder("gemma2"), tmp_path, tiny.tokens(5, 20, seed=9))
    with torch.no_grad():
        expected = setting.reference("gemma2").model(setting.tokens, output_hidden_states=True).hidden_states
    for block in setting.arch.blocks:
        setting.arch.load(block.tensors)
        setting.stream.advance(block, lambda hidden, call, block=block: setting.arch.call(block, hidden, call))
        setting.arch.free(block.name)
        setting.stream.drop(block.index)
        assert {path.name for path in tmp_path.iterdir()} == {setting.stream.file(block.index + 1).name}
        if block.index < tiny.LAYERS - 1:  # the last entry of transformers' comes after the final norm
            torch.testing.assert_close(
                setting.stream.read(block.index + 1, 0, 5), expected[block.index + 1], rtol=1e-5, atol=1e-5
            )
    setting.stream.drop(0)  # again


def test_stream_of_some_batches(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these go through the blocks, and give what they give among the others, which no one can read."""
    monkeypatch.setattr(unit_module, "TOKENS_PER_BATCH", 45)
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(9, 20, seed=9))
    (tmp_path / "some").mkdir()
    some = Stream(setting.arch, setting.tokens, tmp_path / "some")
    some.taken = [(2, 4), (8, 9)]
    some.start()
    block = setting.arch.blocks[0]
    setting.arch.load(block.tensors)
    for stream in (some, setting.stream):
        stream.advance(block, lambda hidden, call: setting.arch.call(block, hidden, call))
    assert [len(hidden) for hidden, _ in some.batches(1)] == [2, 1]
    for boundary in (0, 1):
        for part in some.taken:
            assert torch.equal(some.read(boundary, *part), setting.stream.read(boundary, *part))
    with pytest.raises(AssertionError, match="rows 3 to 5 were not taken"):
        some.read(1, 3, 5)


def test_stream_starts_in_the_middle(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a later boundary is on disk, nothing is written, and the other arguments of the calls are there again."""
    monkeypatch.setattr(unit_module, "TOKENS_PER_BATCH", 45)
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(5, 20, seed=9))
    whole = list(setting.stream.batches(0))
    setting.stream.file(0).rename(setting.stream.file(2))
    again = Stream(setting.arch, setting.tokens, tmp_path)
    again.start()
    assert [path.name for path in tmp_path.iterdir()] == [again.file(2).name]
    for (hidden, call), (old_hidden, old_call) in zip(again.batches(2), whole, strict=True):
        assert torch.equal(hidden, old_hidden)
        for key, value in old_call[1].items():
            other = call[1][key]
            pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
            assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_stream_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "work").mkdir()
    tokens = tiny.tokens(2, 20)
    stream = Stream(Arch(open_source(str(tmp_path / "model"))), tokens, tmp_path / "work")
    stream.start()
    assert stream.file(0).stat().st_size == 2 * 20 * tiny.HIDDEN * 2
    found = stream.read(0, 0, 2)
    assert found.dtype == torch.float32
    assert torch.equal(found, model.get_input_embeddings()(tokens).float())
    x = torch.randn(2, 20, tiny.HIDDEN)
    assert torch.equal(stream.rounded(x), x.bfloat16().float())


# ---------------------------------------------------------------------------------------------------------------- results


def relative_error(w: Tensor, q: Tensor, gram: Tensor | None) -> float:
    return energy(w - q, gram) / energy(w, gram)


@pytest.mark.parametrize("width", [8, 258, 300])
def test_energy_is_its_definition(width: int) -> None:
    """In one stripe, and in four of which the last is shorter."""
    w, x = torch.randn(6, width), torch.randn(20, width)
    gram = (x.double().T @ x.double()).float()
    of_outputs = (x.double() @ w.double().T).square().sum()
    assert energy(w, gram) == pytest.approx(float(of_outputs), rel=1e-4)
    assert energy(w, None) == pytest.approx(float(w.double().square().sum()), rel=1e-6)
    assert energy(torch.zeros(6, width), gram) == 0.0


def test_records_of_rounding(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(1, 8))
    unit = setting.unit(0, {"q_proj": "w4a16-g32-asym", "down_proj": "w8a8"})
    weights = {linear.name: unit.weight(linear).clone() for linear in unit.linears}
    unit.warn(unit.linears[0], "first")
    unit.warn(unit.linears[0], "second")
    rtn(unit)
    assert set(unit.records) == set(unit.assigned) == set(weights) and len(weights) == 2
    for linear in unit.linears:
        record, w = unit.records[linear.name], weights[linear.name]
        spec = parse_scheme(record.scheme).weight
        q = quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec)
        assert torch.equal(unit.assigned[linear.name].codes, q.codes)
        assert (record.name, record.method, record.error_kind, record.damping) == (linear.name, "rtn", "weight", None)
        assert record.shape == tuple(w.shape)
        assert record.error == record.error_rtn == pytest.approx(relative_error(w, dequantize(q), None))
        # 4-bit codes with a 4-bit zero point and a 32-bit scale for every 32; 8-bit codes and a scale a row.
        assert record.bits_per_weight == (4 + 36 / 32 if "asym" in record.scheme else 8 + 32 / 128)
    assert unit.records[unit.linears[0].name].warnings == ["first", "second"]
    assert unit.records[unit.linears[1].name].warnings == []


def test_records_of_a_calibrated_method(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(6, 20))
    unit = setting.unit(0, "w4a16-g32")
    gptq(unit)
    for linear in unit.linears:
        record, w, gram = unit.records[linear.name], unit.weight(linear), unit.gram(linear)
        spec = unit.spec(linear)
        nearest = quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec)
        assert (record.method, record.error_kind, record.damping, record.warnings) == ("gptq", "output", 0.01, [])
        assert record.error == pytest.approx(relative_error(w, dequantize(unit.assigned[linear.name]), gram))
        assert record.error_rtn == pytest.approx(relative_error(w, dequantize(nearest), gram))
        assert 0 < record.error < record.error_rtn


def test_assign_refuses_scales_that_are_no_scales(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(1, 8))
    unit = setting.unit(0, "w4a16-g32")
    linear = unit.linears[0]
    w, spec = unit.weight(linear), unit.spec(linear)
    scale, zero, _ = find_params(w, spec, scale_dtype=torch.float32)
    q = quantize(w, Grid(scale, zero, None), spec)
    q.scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{linear.name}: a scale is zero, not finite"):
        unit.assign(linear, q, method="rtn")
    assert not unit.records and not unit.assigned


def test_finish_replaces_weights_and_moves_the_stream(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(2, 20))
    unit = setting.unit(0, {"q_proj": "w3a16-g32", "down_proj": "w3a16-g32"}, torch.bfloat16)
    float_o = setting.arch.param(_named(unit.block, "o_proj")).clone()
    rtn(unit)
    unit.finish()
    for linear in unit.linears:
        assert torch.equal(unit.weight(linear), dequantize(unit.assigned[linear.name], torch.bfloat16).float())
    assert torch.equal(setting.arch.param(_named(unit.block, "o_proj")), float_o)
    model = setting.reference("llama")
    with torch.no_grad():
        for name, q in unit.assigned.items():
            model.get_submodule(name).weight.copy_(dequantize(q, torch.bfloat16))
        expected = model.model(setting.tokens, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(setting.stream.read(1, 0, 2), expected, rtol=1e-5, atol=1e-5)


def test_finish_quantizes_inputs(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(2, 20))
    unit = setting.unit(0, "w8a8")
    rtn(unit)
    unit.finish()
    model = setting.reference("llama")
    with torch.no_grad():
        for name, q in unit.assigned.items():
            model.get_submodule(name).weight.copy_(dequantize(q))
        plain = model.model(setting.tokens, output_hidden_states=True).hidden_states[1]
    caught: list[Tensor] = []
    handle = model.get_submodule(unit.block.name).register_forward_hook(lambda module, args, out: caught.append(out))
    hooked_grams(model, unit.block.name, setting.tokens, bits=8)
    handle.remove()
    found = setting.stream.read(1, 0, 2)
    torch.testing.assert_close(found, torch.cat(caught), rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3


def test_quantized_inputs_change_their_sites_alone(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(1, 8))
    unit = setting.unit(0, "w8a8")
    q, k = _named(unit.block, "q_proj"), _named(unit.block, "k_proj")
    spec = unit.scheme(q).input
    assert spec is not None
    observe: Observe = quantized_inputs(setting.arch.sites(unit.block), {q.site: Input(spec)})
    x = torch.randn(3, 64)
    assert observe(setting.arch.param(k), x, False) is x
    assert observe(torch.randn(64, 64), x, False) is x
    scale = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(observe(setting.arch.param(q), x, False), (x / scale).round() * scale)


def _named(block: Block, leaf: str) -> Linear:
    return next(linear for linear in block.linears if linear.name.endswith(leaf))


# ----------------------------------------------------------------------------------------------- experts without tokens


def test_expert_without_tokens_is_rounded(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two tokens reach four experts at most; the others are rounded to nearest, and the record says so."""
    setting = Setting(folder("mixtral"), tmp_path, tiny.tokens(1, 2, seed=1))
    unit = setting.unit(0, "w4a16-g32")
    counts = expert_grams(setting.reference("mixtral"), unit.block.name, setting.tokens)[1]
    assert 0 < int((counts == 0).sum()) < 4
    gptq(unit)
    for linear in unit.linears:
        record = unit.records[linear.name]
        unreached = "experts" in linear.name and int(counts[int(linear.name.split(".")[-2])]) == 0
        if not unreached:
            assert record.method == "gptq" and record.damping is not None
            continue
        assert record.method == "rtn (fallback from gptq)" and record.damping is None
        assert record.warnings == ["no calibration token reached this layer: rounded to nearest instead of gptq"]
        w, spec = unit.weight(linear), unit.spec(linear)
        nearest = quantize(w, find_params(w, spec, scale_dtype=torch.float32), spec)
        assert torch.equal(unit.assigned[linear.name].codes, nearest.codes)
    unit.finish()
    assert bool(torch.isfinite(setting.stream.read(1, 0, 1)).all())


# -------------------------------------------------------------------------------------------------------------- teacher
def test_cross(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """(X' - X)^T X against hooks on the float model and on the model with a quantized first block; rows in batches."""
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(5, 20))
    setting.stream.teacher = True
    first = setting.unit(0, "w2a16-g32")
    assert all(not bool(first.cross(linear).any()) for linear in first.linears if linear.shares.endswith("q_proj"))  # type: ignore[union-attr]
    for linear in first.linears:
        first.assign_nearest(linear, method="rtn")
    first.finish()
    second = setting.unit(1, "w4a16-g32")
    taught, student = setting.reference("llama"), setting.reference("llama")
    for linear in first.linears:
        module = student.get_submodule(linear.name)
        module.weight.data = dequantize(first.assigned[linear.name])
    inputs: list[dict[str, list[Tensor]]] = []
    for model in (taught, student):
        seen: dict[str, list[Tensor]] = {}
        for linear in second.linears:
            model.get_submodule(linear.name).register_forward_pre_hook(
                lambda module, args, name=linear.name, seen=seen: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
        with torch.no_grad():
            for row in setting.tokens:
                model(row.unsqueeze(0))
        inputs.append(seen)
    for linear in second.linears:
        theirs, own = (torch.cat(seen[linear.name]).double() for seen in inputs)
        expected = (theirs - own).T @ own
        found = second.cross(linear)
        assert found is not None and found.dtype == torch.float32
        assert float((found - expected).norm()) < 1e-3 * float(expected.norm()) and float(expected.norm()) > 0
    torch.testing.assert_close(
        setting.stream.read(1, 0, 5, teacher=True),
        torch.cat([taught.model.layers[0](*call[0], **call[1]) for call in _layer_calls(taught, setting.tokens)]),
        atol=1e-4,
        rtol=1e-4,
    )


def _layer_calls(model: Any, tokens: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the first layer is called with, row by row."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for row in tokens:
            model(row.unsqueeze(0))
    handle.remove()
    return calls


def test_experts_have_no_counterparts(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("mixtral"), tmp_path, tiny.tokens(3, 16))
    setting.stream.teacher = True
    unit = setting.unit(0, "w4a16-g32")
    found = {linear.name: unit.cross(linear) for linear in unit.linears}
    assert all((cross is None) == ("experts" in name) for name, cross in found.items())
    assert len({cross is None for cross in found.values()}) == 2


def test_teacher_is_dropped(folder: Callable[[str], Path], tmp_path: Path) -> None:
    setting = Setting(folder("llama"), tmp_path, tiny.tokens(2, 12))
    setting.stream.teacher = True
    assert setting.stream.complete(0) and not setting.stream.complete(1)
    unit = setting.unit(0, "w4a16-g32")
    for linear in unit.linears:
        unit.assign_nearest(linear, method="rtn")
    unit.finish()
    assert setting.stream.complete(1)
    setting.stream.file(1).unlink()
    assert not setting.stream.complete(1)
    setting.stream.drop(1)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-00000"]


@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_fast_products_are_exact_on_any_cpu(rows: int) -> None:
    """Also on one that multiplies bfloat16 in hardware: batches of other sizes must give the same numbers."""
    x, w = torch.randn(rows, 512), torch.randn(384, 512)
    exact = x.double() @ w.double().T
    before = torch.get_float32_matmul_precision()
    with fast_products():
        found = torch.nn.functional.linear(x, w)
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    assert torch.get_float32_matmul_precision() == before
