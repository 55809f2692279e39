"""Discovery of blocks, linears and shared inputs on every tiny architecture, against tables written by hand; replay against
transformers."""

import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.arch import Arch, Linear, Tap, addresses, discover, site_of
from lowbit.source import Source, open_source

Folder = Callable[[str], Path]

# What a block contains. Each line is one input and the linears that share it, "name out in" between commas; "{e}" stands for
# every expert. Names are those of the checkpoint, without the path of the block.
ATTENTION = "self_attn.q_proj 64 64, self_attn.k_proj 32 64, self_attn.v_proj 32 64\nself_attn.o_proj 64 64\n"
WIDE_ATTENTION = "self_attn.q_proj 128 64, self_attn.k_proj 64 64, self_attn.v_proj 64 64\nself_attn.o_proj 64 128\n"
GATED = "mlp.gate_proj 128 64, mlp.up_proj 128 64\nmlp.down_proj 64 128\n"
EXPERTS = "mlp.experts.{e}.gate_proj 64 64, mlp.experts.{e}.up_proj 64 64\nmlp.experts.{e}.down_proj 64 64\n"
ENCODER = """attention.self.query 64 64, attention.self.key 64 64, attention.self.value 64 64
attention.output.dense 64 64
intermediate.dense 128 64
output.dense 64 128
"""
LINEARS = {
    "llama": ATTENTION + GATED,
    "llama_untied": ATTENTION + GATED,
    "mistral": ATTENTION + GATED,
    "qwen2": ATTENTION + GATED,
    "qwen3": WIDE_ATTENTION + GATED,
    "gemma2": WIDE_ATTENTION + GATED,
    "gemma3": WIDE_ATTENTION + GATED,
    "phi3": "self_attn.qkv_proj 128 64\nself_attn.o_proj 64 64\nmlp.gate_up_proj 256 64\nmlp.down_proj 64 128",
    "opt": """self_attn.q_proj 64 64, self_attn.k_proj 64 64, self_attn.v_proj 64 64
        self_attn.out_proj 64 64
        fc1 128 64
        fc2 64 128""",
    "gpt2": "attn.c_attn 192 64\nattn.c_proj 64 64\nmlp.c_fc 128 64\nmlp.c_proj 64 128",
    # Attention and feed forward side by side, behind one norm:
    "gptj": """attn.q_proj 64 64, attn.k_proj 64 64, attn.v_proj 64 64, mlp.fc_in 128 64
        attn.out_proj 64 64
        mlp.fc_out 64 128""",
    "falcon_old": """self_attention.query_key_value 96 64, mlp.dense_h_to_4h 128 64
        self_attention.dense 64 64
        mlp.dense_4h_to_h 64 128""",
    # ... and behind two:
    "gpt_neox": """attention.query_key_value 192 64
        attention.dense 64 64
        mlp.dense_h_to_4h 128 64
        mlp.dense_4h_to_h 64 128""",
    "falcon_new": """self_attention.query_key_value 128 64
        self_attention.dense 64 64
        mlp.dense_h_to_4h 128 64
        mlp.dense_4h_to_h 64 128""",
    "bloom": """self_attention.query_key_value 192 64
        self_attention.dense 64 64
        mlp.dense_h_to_4h 256 64
        mlp.dense_4h_to_h 64 256""",
    "mixtral": ATTENTION
    + """block_sparse_moe.experts.{e}.w1 128 64, block_sparse_moe.experts.{e}.w3 128 64
        block_sparse_moe.experts.{e}.w2 64 128""",
    "qwen2_moe": ATTENTION
    + EXPERTS
    + "mlp.shared_expert.gate_proj 128 64, mlp.shared_expert.up_proj 128 64\nmlp.shared_expert.down_proj 64 128",
    "qwen3_moe": WIDE_ATTENTION + EXPERTS,
    "bert": ENCODER,
    "roberta": ENCODER,
    "mamba": "mixer.in_proj 256 64\nmixer.x_proj 64 128\nmixer.out_proj 64 128",
    "mamba2": "mixer.in_proj 292 64\nmixer.out_proj 64 128",
}
FIRST_BLOCK = {"qwen3_moe": WIDE_ATTENTION + GATED}  # where it differs from the others

SKIPPED: dict[str, dict[str, str]] = {
    "mixtral": {"block_sparse_moe.gate": "not a linear layer but a MixtralTopKRouter"},
    "qwen2_moe": {
        "mlp.gate": "not a linear layer but a Qwen2MoeTopKRouter",
        "mlp.shared_expert_gate": "a gate of one output",
    },
    "qwen3_moe": {"mlp.gate": "not a linear layer but a Qwen3MoeTopKRouter"},
    "mamba": {
        "mixer.A_log": "not used as a linear layer (MambaMixer)",
        "mixer.conv1d": "not used as a linear layer (Conv1d)",
        "mixer.dt_proj": "not used as a linear layer (Linear)",
    },
    "mamba2": {"mixer.conv1d": "not used as a linear layer (Conv1d)"},
}
FIRST_SKIPPED: dict[str, dict[str, str]] = {"qwen3_moe": {}}

PREFIX = {
    **dict.fromkeys(("opt",), "model.decoder.layers"),
    **dict.fromkeys(("gpt2", "gptj", "bloom", "falcon_new", "falcon_old"), "transformer.h"),
    **dict.fromkeys(("mamba", "mamba2"), "backbone.layers"),
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
}
TIED = {
    "llama", "qwen2", "gemma2", "gemma3", "opt", "gpt2", "bloom", "falcon_new", "falcon_old", "bert", "roberta", "mamba",
}  # fmt: skip
FAST = ("llama", "gemma2", "gpt2", "gptj", "mixtral", "bert", "mamba")
each_model = pytest.mark.parametrize("name", tiny.NAMES)
some_fast = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny.NAMES]
)


def expected_groups(table: str) -> list[dict[str, tuple[int, int]]]:
    """The lines of a table, as name -> (out, in)."""
    groups = []
    for line in table.strip().splitlines():
        for expert in range(4) if "{e}" in line else (0,):
            entries = (entry.split() for entry in line.format(e=expert).split(","))
            groups.append({name: (int(out), int(inner)) for name, out, inner in entries})
    return groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Checkpoint folders of the tiny models, each saved once, to be read only."""
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            tiny.save(name, saved[name], seed=1)
        return saved[name]

    return get


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A llama checkpoint of several shards that a test may spoil."""
    tiny.save("llama", tmp_path)
    return tmp_path


def spoil(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Apply `change` to the tensors of the shard that holds `tensor`; returns the shard."""
    index = folder / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    shard = folder / described["weight_map"][tensor]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    described["weight_map"] = {name: place for name, place in described["weight_map"].items() if place != shard.name} | {
        name: shard.name for name in tensors
    }
    index.write_text(json.dumps(described))
    return shard


def other_model(name: str, folder: Path, **config: Any) -> Path:
    """Save a small random model that is not among the tiny ones."""
    described = transformers.AutoConfig.for_model(name, vocab_size=128, hidden_size=64, num_hidden_layers=2, **config)
    auto: Any = transformers.AutoModelForMaskedLM if name == "albert" else transformers.AutoModelForCausalLM
    auto.from_config(described).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- discovery


def test_linears_come_in_the_order_in_which_they_run(folder: Folder) -> None:
    """Not in that of their names."""
    for name, expected in (
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("gpt2", "c_attn c_proj c_fc c_proj"),
        ("mamba", "in_proj x_proj out_proj"),
    ):
        for block in discover(open_source(str(folder(name)))).blocks:
            assert " ".join(linear.name.rpartition(".")[2] for linear in block.linears) == expected
    for name, expected in (("mixtral", "w1 w3 w2"), ("qwen2_moe", "gate_proj up_proj down_proj")):  # experts not reached too
        for block in discover(open_source(str(folder(name)))).blocks:
            leaves = [linear.name.rpartition(".")[2] for linear in block.linears]
            assert leaves[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
            for expert in range(4):
                own = [leaf for leaf, x in zip(leaves, block.linears, strict=True) if f"experts.{expert}." in x.name]
                assert " ".join(own) == expected


def test_tables_are_complete() -> None:
    assert set(LINEARS) == set(tiny.NAMES)


@each_model
def test_discovers_linears_and_shared_inputs(name: str, folder: Folder) -> None:
    source = open_source(str(folder(name)))
    arch = discover(source)
    prefix = PREFIX.get(name, "model.layers")
    assert [block.name for block in arch.blocks] == [f"{prefix}.{i}" for i in range(tiny.LAYERS)]
    assert [block.index for block in arch.blocks] == list(range(tiny.LAYERS))
    for block in arch.blocks:
        first = block.index == 0
        groups = expected_groups(FIRST_BLOCK.get(name, LINEARS[name]) if first else LINEARS[name])
        local = {linear.name.removeprefix(f"{block.name}."): linear for linear in block.linears}
        assert {key: (linear.out_features, linear.in_features) for key, linear in local.items()} == {
            key: shape for group in groups for key, shape in group.items()
        }
        shared: dict[str, set[str]] = {}
        for key, linear in local.items():
            shared.setdefault(linear.shares, set()).add(key)
        assert sorted(map(sorted, shared.values())) == sorted(map(sorted, groups))
        order = list(local)
        assert all(leader.removeprefix(f"{block.name}.") == min(group, key=order.index) for leader, group in shared.items())
        reasons = FIRST_SKIPPED.get(name, SKIPPED.get(name, {})) if first else SKIPPED.get(name, {})
        assert dict(block.skipped) == {f"{block.name}.{key}": reason for key, reason in reasons.items()}
        # Every matrix of the block is accounted for, and the block has all of its tensors and no others.
        assert set(block.tensors) == {tensor for tensor in source.tensors if tensor.startswith(f"{block.name}.")}
        matrices = {tensor for tensor in block.tensors if len(source.tensors[tensor].shape) >= 2}
        told = {linear.tensor for linear in block.linears} | {
            tensor for tensor in matrices if tensor.removesuffix(".weight") in dict(block.skipped)
        }
        assert told == matrices
        assert {linear.transposed for linear in block.linears} == {name == "gpt2"}
        assert not any(linear.stacked for linear in block.linears)
    inside = {tensor for block in arch.blocks for tensor in block.tensors}
    assert set(arch.outside) == set(source.tensors) - inside and not arch.unused


@some_fast
def test_replay_equals_transformers(name: str, folder: Folder) -> None:
    """Embed, then load, call and free one block after another, then finish: the logits of the whole model."""
    arch = discover(open_source(str(folder(name))))

    def filled() -> set[str]:
        return {key for key, parameter in arch.model.named_parameters() if not parameter.is_meta}

    tokens = tiny.tokens(2, 24, seed=4)
    assert not filled()
    arch.load_outside()
    hidden, calls = arch.embed(tokens)
    assert hidden.shape == (2, 24, tiny.HIDDEN) and len(calls) == tiny.LAYERS
    arch.free_outside()
    for block in arch.blocks:
        assert not filled()
        values = arch.load(block.tensors)
        assert set(values) == set(block.tensors)
        assert filled() == {key for key, _ in arch.model.named_parameters() if key.startswith(f"{block.name}.")}
        for linear in block.linears:
            stored = values[linear.tensor]
            assert torch.equal(linear.view(arch.param(linear)), stored.T if linear.transposed else stored)
            assert linear.tensor == f"{linear.name}.weight"
        hidden = arch.call(block, hidden, calls[block.index])
        arch.free(block.name)
    assert not filled()
    arch.load_outside()
    found = arch.finish(tokens, hidden)
    arch.free_outside()
    assert not filled()

    model = tiny.auto_class(name).from_pretrained(folder(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@some_fast
def test_fill_equals_transformers(name: str, folder: Folder) -> None:
    filled = Arch(open_source(str(folder(name)))).fill()
    model = tiny.auto_class(name).from_pretrained(folder(name))
    expected = dict(model.named_parameters(remove_duplicate=False))
    found = dict(filled.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    head, embedding = filled.get_output_embeddings(), filled.get_input_embeddings()
    assert (head.weight is embedding.weight) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert (head.weight is embedding.weight) == (name in TIED or bool(model.config.tie_word_embeddings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 is computed in float32 by default, or in the dtype asked for."""
    saved = tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    arch = Arch(open_source(str(tmp_path)), dtype)
    for key, parameter in arch.fill().named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter.float(), saved.get_parameter(key).float())


def test_probe_tells_progress(folder: Folder) -> None:
    seen: list[tuple[int, int]] = []
    discover(open_source(str(folder("llama"))), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_arch_before_the_probe_has_no_linears(folder: Folder) -> None:
    arch = Arch(open_source(str(folder("llama"))))
    assert [len(block.linears) for block in arch.blocks] == [0, 0, 0]


def test_site_of_a_checkpoint_tensor(folder: Folder) -> None:
    """`Arch.site` agrees with what the probe saw, without a probe."""
    for name in ("llama", "gpt2", "mixtral"):
        source = open_source(str(folder(name)))
        arch = Arch(source)
        for block in discover(source).blocks:
            for linear in block.linears:
                assert arch.site(linear.tensor) == linear.site
    assert arch.site("model.layers.1.block_sparse_moe.experts.2.w3.weight") == ("model.layers.1.mlp.experts.gate_up_proj", 2)


@pytest.mark.parametrize(
    ("name", "config", "tensor", "transposed"),
    [
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "model.layers.1.mlp.experts.gate_up_proj", True),
        ("granitemoe", {"num_local_experts": 4}, "model.layers.1.block_sparse_moe.input_linear.weight", False),
    ],
    ids=["gpt_oss", "granitemoe"],
)
def test_stacked_experts(name: str, config: dict[str, Any], tensor: str, transposed: bool, tmp_path: Path) -> None:
    """Experts that the checkpoint itself keeps in one 3-D tensor are one linear each."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "num_experts_per_tok": 2}
    arch = discover(open_source(str(other_model(name, tmp_path, **heads, **config))))
    block = arch.blocks[1]
    stored = arch.load(block.tensors)[tensor]
    experts = [linear for linear in block.linears if linear.tensor == tensor]
    assert [linear.name for linear in experts] == [f"{tensor.removesuffix('.weight')}.{i}" for i in range(4)]
    for i, linear in enumerate(experts):
        assert linear.stacked and linear.transposed == transposed and linear.index == i and linear.shares == linear.name
        assert (linear.out_features, linear.in_features) == (256, 64)
        assert torch.equal(linear.view(arch.param(linear)), stored[i].T if transposed else stored[i])
        assert arch.site(tensor, i) == linear.site
    assert any("router" in skipped for skipped, _ in block.skipped)


# --------------------------------------------------------------------------------------------------------------- the tap


@pytest.mark.parametrize(
    ("call", "transposed"),
    [
        (lambda w, x: nn.functional.linear(x, w), False),
        (lambda w, x: x @ w.T, False),
        (lambda w, x: torch.matmul(x, w), True),
        (lambda w, x: torch.addmm(torch.zeros(6), x, w), True),
    ],
    ids=["linear", "matmul of the transpose", "matmul", "addmm"],
)
def test_tap_sees_and_replaces_inputs(call: Callable[..., torch.Tensor], transposed: bool) -> None:
    w, x = torch.randn(6, 6), torch.randn(3, 6)
    sites = addresses(_holder(w))
    seen: list[tuple[Any, bool]] = []

    def observe(weight: torch.Tensor, given: torch.Tensor, flipped: bool) -> torch.Tensor:
        assert given is x
        seen.append((site_of(weight, sites), flipped))
        return 2 * given

    expected = call(w, 2 * x)
    with Tap(observe):
        found = call(w, x)
    assert seen == [(("w", None), transposed)]
    assert torch.equal(found, expected)
    seen.clear()
    assert torch.equal(call(w, x), call(w, x)) and not seen


def test_tap_multiplies_in_the_dtype_of_the_weight() -> None:
    w, x, bias = torch.randn(6, 4).bfloat16(), torch.randn(3, 4), torch.randn(6)
    with Tap(lambda weight, given, flipped: given):
        found = nn.functional.linear(x, w, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, (x.bfloat16() @ w.T).float() + bias)


def test_site_of_slices() -> None:
    experts = torch.randn(4, 6, 5)
    sites = addresses(_holder(experts), "block.")
    assert site_of(experts, sites) == ("block.w", None)
    assert [site_of(experts[i], sites) for i in range(4)] == [("block.w", i) for i in range(4)]
    assert site_of(torch.randn(6, 5), sites) is None


def _holder(w: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(w, requires_grad=False)
    return module


def test_view_of_rows_of_an_expert() -> None:
    linear = Linear(
        name="x", tensor="x.weight", param="p", index=1, rows=(2, 5), transposed=True, stacked=False, out_features=3,
        in_features=4,
    )  # fmt: skip
    param = torch.arange(3 * 4 * 6.0).view(3, 4, 6)
    assert torch.equal(linear.view(param), param[1].T[2:5])
    linear.view(param).zero_()
    assert not param[1, :, 2:5].any() and param[1, :, :2].all() and param[2].all()


# ----------------------------------------------------------------------------------------------------------------- errors


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=128, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16).save_pretrained(tmp_path)
    save_file({"shared.weight": torch.zeros(128, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        Arch(open_source(str(tmp_path)))


def test_unknown_config_is_refused(damaged: Path) -> None:
    described = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(described | {"model_type": "no_such_model"}))
    with pytest.raises(ValueError, match="transformers cannot read this config: .*no_such_model"):
        Arch(open_source(str(damaged)))


def test_shared_blocks_are_refused(tmp_path: Path) -> None:
    """ALBERT runs one block again and again."""
    other_model("albert", tmp_path, embedding_size=64, num_attention_heads=4, intermediate_size=128)
    with pytest.raises(ValueError, match="runs out of order; lowbit needs a plain chain of blocks"):
        discover(open_source(str(tmp_path)))


def test_blocks_that_share_parameters_are_refused(tmp_path: Path) -> None:
    """Zamba2's attention is one for several blocks."""
    config = transformers.AutoConfig.for_model(
        "zamba2", vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"],
        num_attention_heads=4, intermediate_size=tiny.FFN, mamba_d_state=16, mamba_ngroups=2, n_mamba_heads=4, num_mem_blocks=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.shared_transformer.* is .*layers\.0.*, of another block"):
        discover(open_source(str(tmp_path)))


def test_broken_chain_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that changes the hidden states between its blocks."""
    arch = Arch(open_source(str(folder("llama"))))
    second = arch.model.get_submodule("model.layers.1")
    hook = second.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ValueError, match=r"model\.layers\.1 does not start from the output of the block before it"):
        arch.probe()
    hook.remove()


def test_inputs_that_depend_on_the_tokens_are_seen(folder: Folder) -> None:
    """A model that hands its blocks something that depends on the tokens."""
    arch = Arch(open_source(str(folder("llama"))))
    inner: Any = arch.model.get_submodule("model")
    plain = inner.forward

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        for layer in inner.layers:
            layer.forward = partial(layer.forward, per_layer_input=input_ids.float())
        return plain(input_ids=input_ids, **kwargs)

    inner.forward = forward
    arch.probe()
    assert all(len(block.varying) == 1 for block in arch.blocks)
    assert arch.calls_differ


def test_missing_tensors_are_named(damaged: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(damaged, name, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ValueError, match=r"lacks 1 tensors the model needs: model\.layers\.1\.mlp\.up_proj\.weight$"):
        Arch(open_source(str(damaged)))


def test_unknown_tensors_are_kept_apart(damaged: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(damaged, name, lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.ones(2, 2)}))
    arch = discover(open_source(str(damaged)))
    assert arch.unused == {"model.layers.1.extra.weight"}
    assert "model.layers.1.extra.weight" not in (*arch.outside, *arch.blocks[1].tensors)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.2.self_attn.v_proj.weight", float("nan")),
        ("model.layers.0.input_layernorm.weight", float("inf")),
        ("model.embed_tokens.weight", float("-inf")),
    ],
)
def test_values_that_are_not_finite(tensor: str, value: float, damaged: Path) -> None:
    """One such value anywhere stops the probe, with the tensor and its shard."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor].view(-1)[-3] = value

    shard = spoil(damaged, tensor, change)
    with pytest.raises(ValueError, match=f"{shard.name}: tensor {tensor} has NaN or infinite values"):
        discover(open_source(str(damaged)))


def test_infinities_that_cancel(damaged: Path) -> None:
    tensor = "model.layers.2.self_attn.v_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor][0, 0], tensors[tensor][0, 1] = float("inf"), float("-inf")

    spoil(damaged, tensor, change)
    with pytest.raises(ValueError, match=f"tensor {tensor} has NaN or infinite values"):
        discover(open_source(str(damaged)))


@pytest.mark.parametrize(("name", "scans"), [("mamba2", [0, 1, 2]), ("bamba", [0, 2]), ("llama", [])])
def test_points_of_scans(name: str, scans: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with a mixer have its tensors as points; another formula than lowbit's leaves them none, with the reason."""
    tiny.save(name, tmp_path)
    arch = discover(open_source(str(tmp_path)))
    assert [block.index for block in arch.blocks if block.points] == scans
    for index in scans:
        points = {point.local: point for point in arch.blocks[index].points}
        assert {"x", "B", "C", "z", "dt", "state", "conv_in", "conv1d.weight", "A_log", "D", "dt_bias"} <= set(points)
        assert (points["state"].sets, points["state"].inner, points["x"].sets) == (128, 16, 128)
        assert points["A_log"].tensor == points["A_log"].name and points["A_log"].tensor in arch.source.tensors
    if scans:
        other = Arch(open_source(str(tmp_path)))
        mixer = other.model.get_submodule(points["x"].mixer)
        kind, kept = type(mixer), type(mixer).forward
        monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **given: 2 * kept(self, hidden_states, **given))
        other.probe()
        assert not any(block.points for block in other.blocks)
        assert any("a scan that lowbit does not know" in reason for block in other.blocks for _, reason in block.skipped)


# ------------------------------------------------------------------------------------------ a config that is not the weights'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 10**9) for key in ("num_hidden_layers", "vocab_size", "head_dim", "intermediate_size", "hidden_size")),
        *((key, 10**9) for key in ("num_attention_heads", "num_key_value_heads", "num_labels")),
        *(
            ("num_hidden_layers", 2000),
            ("hidden_size", 2**31),
            ("intermediate_size", 2**62),
            ("vocab_size", -1),
            ("head_dim", 0),
        ),
        *(("vocab_size", 127), ("intermediate_size", 136), ("pad_token_id", 200), ("hidden_act", "x")),
        *(("rope_parameters", {"rope_type": "x"}), ("dtype", "x"), ("hidden_size", "64"), ("num_attention_heads", [4])),
        *(
            ("architectures", [3]),
            ("architectures", "LlamaForCausalLM"),
            ("architectures", [{}]),
            ("architectures", ["logging"]),
        ),
        *(("architectures", ["Trainer"]), ("architectures", ["pipeline"]), ("architectures", ["BertForMaskedLM"])),
        *(("model_type", ["llama"]), ("model_type", {}), ("model_type", "x"), ("rope_scaling", [1])),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_of_other_weights(tmp_path: Path, key: str, value: Any) -> None:
    """Told at once, with the file, before anything is made in its size."""
    tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    source = Source(tmp_path)
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        Arch(source)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    if value == 10**9:
        assert f"{key} = 1000000000" in str(caught.value) or key in ("num_attention_heads", "head_dim")
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6


def test_a_weight_of_other_dimensions(tmp_path: Path) -> None:
    """Found in the headers."""
    tiny.save("llama", tmp_path, dtype=torch.bfloat16, max_shard_size="1GB")
    path = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(path)
    for spoiled in (whole[name][None], whole[name].flatten(), whole[name][:-1], whole[name].T):
        save_file(whole | {name: spoiled.contiguous()}, path)
        with pytest.raises(ValueError, match=rf"{name} has shape \[{', '.join(map(str, spoiled.shape))}\]"):
            Arch(Source(tmp_path))
    save_file(whole | {name: whole[name].view(torch.int16)}, path)
    with pytest.raises(ValueError, match=f"model.safetensors: {name} is stored as I16; lowbit quantizes"):
        Arch(Source(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"max_new_tokens": [1]}'])
def test_broken_settings_of_generation(tmp_path: Path, text: str) -> None:
    """Found when the model is opened, so before it is quantized."""
    tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        Arch(Source(tmp_path))


def test_more_blocks_than_the_checkpoint_has(tmp_path: Path) -> None:
    """Also of a model whose mixers are looked at."""
    tiny.save("mamba", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors|num_hidden_layers"):
        Arch(open_source(str(tmp_path)))
