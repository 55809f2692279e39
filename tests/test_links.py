"""Links: which there are in every architecture, that moving scales along them changes nothing, and what is no link."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lowbit.arch import Arch, Block
from lowbit.links import Link, Side, find_links, rescale, structure
from lowbit.source import open_source

ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = {
    "input_layernorm": ATTENTION,
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "mlp.up_proj": "mlp.down_proj",
}
GEMMA = LLAMA | {"pre_feedforward_layernorm": "mlp.gate_proj mlp.up_proj"}
del GEMMA["post_attention_layernorm"]
EXPERTS = {f"mlp.experts.gate_up_proj.{i}": f"mlp.experts.down_proj.{i}" for i in range(4)}
# architecture -> producer of block 0: what reads it
LINKS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "llama_untied", "mistral", "qwen2", "qwen3", "qwen3_moe"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    "phi3": {
        "input_layernorm": "self_attn.qkv_proj",
        "post_attention_layernorm": "mlp.gate_up_proj",
        "self_attn.qkv_proj": "self_attn.o_proj",
        "mlp.gate_up_proj": "mlp.down_proj",
    },
    "opt": {
        "self_attn_layer_norm": ATTENTION,
        "final_layer_norm": "fc1",
        "self_attn.v_proj": "self_attn.out_proj",
        "fc1": "fc2",
    },
    "gpt2": {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc", "attn.c_attn": "attn.c_proj"},
    "gptj": {"ln_1": "attn.q_proj attn.k_proj attn.v_proj mlp.fc_in", "attn.v_proj": "attn.out_proj"},
    "gpt_neox": {
        "input_layernorm": "attention.query_key_value",
        "post_attention_layernorm": "mlp.dense_h_to_4h",
        "attention.query_key_value": "attention.dense",
    },
    "bloom": {
        "input_layernorm": "self_attention.query_key_value",
        "post_attention_layernorm": "mlp.dense_h_to_4h",
        "self_attention.query_key_value": "self_attention.dense",
    },
    "falcon_new": {
        "ln_attn": "self_attention.query_key_value",
        "ln_mlp": "mlp.dense_h_to_4h",
        "self_attention.query_key_value": "self_attention.dense",
    },
    "falcon_old": {
        "input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h",
        "self_attention.query_key_value": "self_attention.dense",
    },
    "mixtral": {
        "input_layernorm": ATTENTION,
        "post_attention_layernorm": "mlp.gate mlp.experts.gate_up_proj",
        "self_attn.v_proj": "self_attn.o_proj",
        **EXPERTS,
    },
    "qwen2_moe": {
        "input_layernorm": ATTENTION,
        "post_attention_layernorm": "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.gate mlp.shared_expert_gate "
        "mlp.experts.gate_up_proj",
        "self_attn.v_proj": "self_attn.o_proj",
        "mlp.shared_expert.up_proj": "mlp.shared_expert.down_proj",
        **EXPERTS,
    },
    "bert": {"attention.self.value": "attention.output.dense"},
    "roberta": {"attention.self.value": "attention.output.dense"},
    "mamba": {"norm": "mixer.in_proj", "mixer.x_proj": "mixer.dt_proj"},
    "mamba2": {"norm": "mixer.in_proj", "mixer.norm": "mixer.out_proj"},
}
QUICK = ("llama", "gpt2", "gemma3", "bert")
EVERY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LINKS]


class Setting:
    """Block 0 of a tiny model in float64, and a row of random hidden states."""

    def __init__(self, name: str, folder: Path) -> None:
        tiny.save(name, folder, dtype=torch.float32, seed=2)
        self.arch = Arch(open_source(str(folder)), dtype=torch.float64)
        self.arch.probe()
        self.block: Block = self.arch.blocks[0]
        self.arch.load_outside()
        self.call: Any = self.arch.embed(tiny.tokens(1, 24))[1][0]
        self.arch.load(self.block.tensors)
        self.module = self.arch.model.get_submodule(self.block.name)
        self.hidden = torch.randn(1, 24, tiny.HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        heads = getattr(self.arch.model.config, "num_attention_heads", None)
        self.before = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.links, self.rejected = find_links(self.module, self.run, heads)

    def run(self, observe: Any = None) -> Tensor:
        return self.arch.call(self.block, self.hidden, self.call, observe)


Made = Callable[[str], Setting]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The links of an architecture, found once."""
    return cache(lambda name: Setting(name, tmp_path_factory.mktemp(name)))


def drawn(channels: int, seed: int) -> Tensor:
    """Scales 1/4 .. 4, no powers of two."""
    return torch.exp2(torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2)


def short(side: Side) -> str:
    name = side.param.removesuffix(".weight")
    return name if side.index is None else f"{name}.{side.index}"


@pytest.mark.parametrize("name", EVERY)
def test_links(name: str, made: Made) -> None:
    """As written down above; and the block is as it was."""
    found = made(name)
    assert {link.name: " ".join(map(short, link.consumers)) for link in found.links} == LINKS[name]
    after = found.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in found.before.items())
    assert {re.sub(r"\.\d$", "", link.name) for link in found.links}.isdisjoint(tried for tried, _ in found.rejected)


@pytest.mark.parametrize("name", EVERY)
def test_function_stays(name: str, made: Made) -> None:
    """In float64 to 1e-10, for all links at once and scales of any size; and every consumer is needed."""
    found = made(name)
    before = found.run()
    allowed = 1e-6 if name.startswith("gemma") else 1e-10  # the norms of Gemma compute in float32 themselves
    for i, link in enumerate(found.links):
        rescale(found.module, link, drawn(link.channels, i))
    assert float((found.run() - before).norm()) < allowed * float(before.norm())
    changed = {key for key, value in found.module.state_dict().items() if not torch.equal(value, found.before[key])}
    assert changed >= {side.param for link in found.links for side in (*link.producers, *link.consumers)}
    found.module.load_state_dict(found.before)
    for i, link in enumerate(found.links):
        for side in link.consumers:
            others = tuple(other for other in link.consumers if other is not side)
            incomplete = Link(
                kind=link.kind, name=link.name, channels=link.channels, producers=link.producers, consumers=others
            )
            rescale(found.module, incomplete, drawn(link.channels, i))
            # An expert of four may see no token.
            assert side.index is not None or float((found.run() - before).norm()) > 1e-6 * float(before.norm()), short(side)
            found.module.load_state_dict(found.before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("opt", {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"}, marks=pytest.mark.slow),
        ("gpt2", {"ln_1", "ln_2", "attn.c_attn"}),
        pytest.param("qwen2", {"self_attn.v_proj"}, marks=pytest.mark.slow),
    ],
)
def test_biases_follow_their_rows(name: str, expected: set[str], made: Made) -> None:
    """The bias of a producer is divided with it: of a norm, of values, of rows in a matrix of queries, keys and values."""
    links = made(name).links
    assert {link.name for link in links if len(link.producers) == 2} == expected
    for link in links:
        for weight, bias in [link.producers] if len(link.producers) == 2 else []:
            assert bias.param == weight.param.removesuffix(".weight") + ".bias" and torch.equal(bias.channels, weight.channels)


def test_channels_of_grouped_queries(made: Made) -> None:
    """Two query heads read each value head: columns of the output projection name its channels twice."""
    links = {link.name: link for link in made("llama").links}
    link = links["self_attn.v_proj"]
    heads = torch.arange(32).view(2, 16)
    assert link.channels == 32
    assert torch.equal(link.consumers[0].channels, heads.repeat_interleave(2, 0).flatten())


@pytest.mark.parametrize(
    ("name", "rows"), [pytest.param("phi3", slice(96, 128), marks=pytest.mark.slow), ("gpt2", slice(128, 192))]
)
def test_values_inside_a_matrix(name: str, rows: slice, made: Made) -> None:
    """[queries | keys | values] in one matrix: only its last rows follow the link."""
    link = next(link for link in made(name).links if "qkv" in link.name or "c_attn" in link.name)
    channels = link.producers[0].channels
    expected = torch.full((len(channels),), -1)
    expected[rows] = torch.arange(link.channels)
    assert torch.equal(channels, expected)
    assert link.producers[0].axis == (-1 if name == "gpt2" else -2)  # Conv1D is stored as [in, out]


def test_norms_that_add_one(made: Made) -> None:
    """Gemma multiplies by 1 + w."""
    for link in made("gemma3").links:
        assert link.producers[0].plus == (1 if link.kind == "norm" else 0)


def test_post_norm_is_no_link(made: Made) -> None:
    """BERT's norms feed the residual stream too; the reason says so."""
    reasons = dict(made("bert").rejected)
    assert reasons["attention.output.LayerNorm"] == (
        "what it puts out also flows past the linears that read it, into the block's output"
    )
    assert reasons["intermediate.dense"] == "no linear reads it in proportion"  # GELU lies between


@pytest.mark.slow
def test_structure(made: Made) -> None:
    """The same for blocks that differ in values alone."""
    arch = made("qwen3_moe").arch
    modules = [arch.model.get_submodule(block.name) for block in arch.blocks]
    kinds = [structure(module) for module in modules]
    assert len(set(kinds)) == 2  # dense blocks and blocks of experts
    assert kinds[0] == structure(modules[0])


class Crossed(nn.Module):
    """Two linears that read one norm, one of them through a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.plain = nn.Linear(16, 16)
        self.bent = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.plain(y) + self.bent(y.relu())


def test_relu_passes_positive_scales_and_gelu_does_not() -> None:
    from lowbit.arch import Tap

    for module, expected in ((Crossed(), ["plain.weight", "bent.weight"]), (Crossed(), None)):
        if expected is None:
            module.forward = lambda x, m=module: m.plain(m.norm(x)) + m.bent(nn.functional.gelu(m.norm(x)))  # type: ignore[method-assign,misc,assignment]
        x = torch.randn(1, 40, 16)

        def run(observe: Any, module: nn.Module = module, x: Tensor = x) -> Tensor:
            with Tap(observe or (lambda weight, value, transposed: value)):
                return module(x)

        links, rejected = find_links(module, run, None)
        if expected is None:
            assert links == () and dict(rejected)["norm"] == "it also changes what bent.weight reads, and not in proportion"
        else:
            assert [[side.param for side in link.consumers] for link in links] == [expected]
