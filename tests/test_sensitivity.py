"""What decides a plan: eigenvalues and traces against dense algebra, second derivatives, measured divergences, decisions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from lowbit.arch import Arch
from lowbit.qtensor import Scheme, dequantize, find_params, parse_scheme, quantize
from lowbit.recipe import FLOAT
from lowbit.sensitivity import (
    SIGNALS,
    Effort,
    Whole,
    _Curvature,
    check_candidates,
    decisions,
    measure,
    top_eigenvalue,
    traces,
)
from lowbit.source import open_source

SCHEMES = {name: parse_scheme(name) for name in ("w2a16-g16", "w4a16-g16", "w8a16-channel")}


def arch_of(folder: Path) -> Arch:
    arch = Arch(open_source(str(folder)))
    arch.probe()
    arch.matrix_dtype = torch.float32
    return arch


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama so small that the Hessian of a linear can be written down."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def whole_of(folder: Path, *, rows: int = 4, length: int = 12, subsets: int = 2, vocabulary: int = 32) -> Whole:
    generator = torch.Generator().manual_seed(0)
    return Whole(arch_of(folder), torch.randint(3, vocabulary, (rows, length), generator=generator), subsets)


def measured(
    whole: Whole,
    signal: Any,
    schemes: dict[str, Scheme] = SCHEMES,
    *,
    effort: Effort | None = None,
    known: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda rows: None,
    embeddings: bool = False,
) -> dict[str, Any]:
    every = decisions(whole.arch, embeddings=embeddings)
    return measure(whole, every, schemes, signal, effort or Effort(), known=known or {}, keep=keep, progress=lambda a, b: None)


def symmetric(size: int, *, definite: float | None = None) -> Tensor:
    a = torch.randn(size, size, dtype=torch.float64)
    return a + a.T if definite is None else definite * (a @ a.T + torch.eye(size))


@pytest.mark.parametrize("definite", [1.0, -1.0, None])
def test_top_eigenvalue(definite: float | None) -> None:
    """That of largest magnitude, with its sign, as a dense solver finds it."""
    a = symmetric(24, definite=definite)
    every = torch.linalg.eigvalsh(a)
    wanted = float(every[every.abs().argmax()])
    found = top_eigenvalue(lambda v: a @ v, torch.randn(24, dtype=torch.float64), iterations=2000, tolerance=1e-9)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_top_eigenvalue_of_nothing() -> None:
    """A Hessian that is zero has eigenvalue 0, not NaN."""
    assert top_eigenvalue(lambda v: v * 0, torch.ones(3)) == 0


def test_traces() -> None:
    """All probes of +1 and -1 together give the traces of blocks exactly."""
    a = symmetric(4)
    probes = [torch.tensor(signs, dtype=torch.float64) for signs in torch.cartesian_prod(*[torch.tensor([-1, 1])] * 4).tolist()]
    assert traces(lambda v: a @ v, probes, [4]) == [pytest.approx(float(a.trace()))]
    assert traces(lambda v: a @ v, probes, [1, 3]) == [pytest.approx(float(a[0, 0])), pytest.approx(float(a[1:, 1:].trace()))]


def curvature(whole: Whole) -> _Curvature:
    block = whole.arch.blocks[max(whole.at, 0)]
    return _Curvature(whole, block, block.linears)


def dense(whole: Whole, linears: list[Any], k: int) -> Tensor:
    """The Hessian of linears, by automatic differentiation of the whole model, row by row."""
    made = curvature(whole)
    product = made._product(made._gradients(k, graph=True), linears)
    size = sum(linear.out_features * linear.in_features for linear in linears)
    return torch.stack([product(unit) for unit in torch.eye(size)]).double()


def test_eigenvalue_and_trace_of_a_real_layer(small: Path) -> None:
    """Of every kind of linear, and of several at once as in a plan for whole blocks, within 1e-3 of the dense Hessian's."""
    whole = whole_of(small, subsets=1)
    linears = {name: x for x in whole.arch.blocks[0].linears if (name := x.name.rpartition(".")[2]) in ("k_proj", "o_proj")}
    for together in [[linears["k_proj"]], [linears["o_proj"]], [*linears.values()]]:
        hessian = dense(whole, together, 0)
        assert torch.allclose(hessian, hessian.T, atol=1e-5 * float(hessian.abs().max()))
        every = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
        effort = Effort(subsets=1, iterations=500, probes=100, tolerance=1e-6)
        found = curvature(whole).measure("eigenvalue", effort, [together])[together[-1].name]
        assert found["mean"] == pytest.approx(float(every[every.abs().argmax()]), rel=1e-3)
        assert found["std"] == 0 and found["omega"] == abs(found["mean"])
        estimated = curvature(whole).measure("trace", effort, [together])[together[-1].name]["trace"]
        deviation = (2 * float(hessian.square().sum()) / 100) ** 0.5  # of Hutchinson's estimator
        assert estimated == pytest.approx(float(hessian.trace()), abs=4 * deviation)


def test_products_are_second_derivatives(small: Path) -> None:
    """H v equals the difference of gradients at w + e v and w - e v."""
    whole = whole_of(small)
    made = curvature(whole)
    check_products(made, whole.arch.blocks[0].linears[0])


def check_products(made: _Curvature, linear: Any) -> None:
    v = torch.randn(linear.out_features, linear.in_features)
    found = made._product(made._gradients(0, graph=True), [linear])(v.flatten()).view_as(v)
    step, gradients = 2e-3, []
    for sign in (1, -1):
        made.parameters[linear.param] += sign * step * v
        gradients.append(linear.view(made._gradients(0, graph=False)[linear.param]))
        made.parameters[linear.param] -= sign * step * v
    wanted = (gradients[0] - gradients[1]) / (2 * step)
    assert torch.allclose(found, wanted, atol=3e-3 * float(wanted.abs().max()))


def test_spread_counts(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Omega = |mean| + std: of two linears of one mean, that whose eigenvalue varies with the data is more sensitive."""
    whole = whole_of(small)
    made = curvature(whole)
    a, b = whole.arch.blocks[0].linears[:2]
    steady, varying = made._summary("eigenvalue", a, [2.0, 2.0], {}, 8), made._summary("eigenvalue", b, [0.0, 4.0], {}, 8)
    assert steady["mean"] == varying["mean"] == 2 and steady["omega"] == 2 and varying["omega"] == 4
    assert made._summary("eigenvalue", a, [-3.0, -3.0], {}, 8)["omega"] == 3


def test_fisher_estimates_the_divergence(small: Path) -> None:
    """The three signals with a unit of nats, and the measured one, agree on what is worst, and roughly on how bad."""
    whole = whole_of(small, rows=32, length=32, subsets=32)
    rows = {}
    for signal in ("kl", "fisher"):
        whole.restart()
        rows[signal] = measure(
            whole,
            decisions(whole.arch),
            SCHEMES,
            signal,
            Effort(),
            known={},
            keep=lambda rows: None,
            progress=lambda a, b: None,
        )
    for name, row in rows["kl"].items():
        assert row["cost"][FLOAT] == 0
        assert row["cost"]["w2a16-g16"] > row["cost"]["w4a16-g16"] > row["cost"]["w8a16-channel"] >= 0
        ratio = rows["fisher"][name]["cost"]["w4a16-g16"] / row["cost"]["w4a16-g16"]
        assert 0.1 < ratio < 10, (name, ratio)


@pytest.mark.parametrize("signal", SIGNALS)
def test_rows_and_going_on(small: Path, signal: Any) -> None:
    """Rows are plain JSON, kept after every block; what is known is not measured again."""
    kept: list[str] = []
    effort = Effort(subsets=2, iterations=2, probes=1)

    def run(known: dict[str, Any]) -> dict[str, Any]:
        whole = whole_of(small)
        before = [p.clone() for p in whole.arch.model.parameters()]
        keep = lambda rows: kept.append(json.dumps(rows))  # noqa: E731
        rows = measured(whole, signal, effort=effort, known=known, keep=keep)
        assert all(torch.equal(a, b) for a, b in zip(before, whole.arch.model.parameters(), strict=True)), "weights are back"
        return rows

    rows = run({})
    assert len(kept) == 3 and len(json.loads(kept[0])) == 4, "two blocks and the head"
    assert ("sensitivity" in next(iter(rows.values()))) == (signal != "kl")
    first = json.loads(kept[0])
    next(iter(first.values()))["cost"]["w4a16-g16"] = 123.0
    again = run(first)
    assert next(iter(again.values()))["cost"]["w4a16-g16"] == 123.0
    untouched = list(rows)[1:]
    assert {name: again[name] for name in untouched} == {name: rows[name] for name in untouched}


def test_decisions_follow_engines(tmp_path: Path) -> None:
    """What has one input is one decision, and so are all experts of a block; every linear is in exactly one."""
    for name in ("llama", "mixtral", "gpt2", "bert", "mamba2"):
        folder = tmp_path / name
        tiny.save(name, folder)
        arch = arch_of(folder)
        found = decisions(arch)
        assert sorted(x.name for d in found for x in d.linears) == sorted(
            x.name for b in (*arch.blocks, *([arch.head] if arch.head else [])) for x in b.linears
        )
        leaves = [{linear.name.rpartition(".")[2] for linear in decision.linears} for decision in found]
        if name == "llama":
            assert {"q_proj", "k_proj", "v_proj"} in leaves and {"gate_proj", "up_proj"} in leaves and {"o_proj"} in leaves
        if name == "mixtral":
            assert {"w1", "w2", "w3"} in leaves
            assert sum(len(decision.linears) > 3 for decision in found) == len(arch.blocks)
        more = decisions(arch, embeddings=True)
        assert more[1:] == found and more[0].block == -1 and more[0].linears[0].param.endswith(("weight",))


@pytest.mark.parametrize("model", ["llama", "llama_untied"])
def test_embeddings_and_heads(model: str, tmp_path: Path) -> None:
    """Their cost is the divergence of the model with their rows rounded, of both where they are tied, at their inputs too."""
    tiny.save(model, tmp_path)
    schemes = SCHEMES | {"w8a4": parse_scheme("w8a4")}
    whole = whole_of(tmp_path, vocabulary=tiny.VOCAB)
    rows = measured(whole, "kl", schemes, embeddings=True)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = twin(whole.tokens).logits.log_softmax(-1)
        for name in ["model.embed_tokens"] + ["lm_head"] * (model == "llama_untied"):
            weight = twin.get_parameter(f"{name}.weight")
            assert ("w8a4" in rows[name]["cost"]) == (name == "lm_head")
            original, spec = weight.clone(), schemes["w4a16-g16"].weight
            weight.copy_(dequantize(quantize(weight, find_params(weight, spec, scale_dtype=torch.float32), spec)))
            found = twin(whole.tokens).logits.log_softmax(-1)
            kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
            assert rows[name]["cost"]["w4a16-g16"] == pytest.approx(kl, rel=1e-3)
            weight.copy_(original)
    if model == "llama_untied":
        assert rows["lm_head"]["cost"]["w8a4"] > 3 * rows["lm_head"]["cost"]["w8a16-channel"]


def test_derivatives_of_embeddings_and_heads(tmp_path: Path) -> None:
    """The loss is a function of tied embeddings in both places, and of a head: H v equals a difference of gradients."""
    for model, name in (("llama", "model.embed_tokens"), ("llama_untied", "lm_head")):
        tiny.save(model, tmp_path / model)
        whole = whole_of(tmp_path / model, vocabulary=tiny.VOCAB)
        block = next(b for b in (whole.arch.table, whole.arch.head) if b is not None and b.linears[0].name == name)
        whole.advance(block.index)
        made = _Curvature(whole, block, block.linears)
        check_products(made, block.linears[0])


def test_schemes_that_cannot_be_measured() -> None:
    """Static inputs need calibration, and gradients of weights do not see inputs."""
    with pytest.raises(ValueError, match="calibrates no static inputs"):
        check_candidates({"w8a8-tensor-astatic": parse_scheme("w8a8-tensor-astatic")}, "kl")
    mixed = {name: parse_scheme(name) for name in ("w4a8", "w8a8", "w8a16")}
    with pytest.raises(ValueError, match="trace sees weights only"):
        check_candidates(mixed, "trace")
    check_candidates(mixed, "kl")
    check_candidates({name: mixed[name] for name in ("w4a8", "w8a8")}, "trace")


def test_inputs_count(small: Path) -> None:
    """A scheme that also quantizes inputs costs more than one of the same weights."""
    whole = whole_of(small)
    schemes = {name: parse_scheme(name) for name in ("w8a16-channel", "w8a4")}
    rows = measured(whole, "kl", schemes)
    assert all(row["cost"]["w8a4"] > 3 * row["cost"]["w8a16-channel"] for row in rows.values())


def test_a_model_without_a_head(tmp_path: Path) -> None:
    """An encoder is measured by its last hidden states."""
    tiny.save("bert", tmp_path / "bert")
    for signal in ("kl", "trace"):
        whole = whole_of(tmp_path / "bert", vocabulary=100)
        effort = Effort(subsets=2, probes=8)
        rows = measured(whole, signal, effort=effort)
        assert all(row["cost"]["w2a16-g16"] > row["cost"]["w8a16-channel"] for row in rows.values())
