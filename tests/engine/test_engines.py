"""Other engines compute what lowbit measured: checkpoints of the demo model in vLLM (CPU build) and in transformers.

lowbit.load in float32 is the reference, because evaluation and the gate use it. Where weights alone are quantized,
transformers must give its logits; vLLM computes in bfloat16, so it gets a bound on KL(lowbit || vLLM). Quantized inputs are
chaotic: noise of 1e-6 that crosses one rounding boundary moves others, and two right implementations of W8A8 differ by nearly
as much as either differs from the float model. A test shows that the bounds would not let another model pass.

What vLLM computes on a CPU depends on the processor: with AVX2 alone its library has no product with 4-bit weights and no FP8
cache, and without VNNI its int8 products saturate. The tests ask the build (vllm_cpu.py) and skip what it lacks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit.data import DataSpec
from lowbit.recipe import Recipe, Rule, Step, read_recipe, short_recipe

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("vllm_worker.py")
CALIBRATION = DataSpec(source=str(ROOT / "demo" / "public_domain_calibration.txt"), rows=8, length=256)
LAYERS = 6
PROMPTS, LENGTH, NEW = 3, 64, 8


@dataclass(frozen=True)
class Case:
    """How a checkpoint is made and what vLLM must use for it: (scheme, kernel) of attention and of the MLP."""

    recipe: Recipe
    attention: tuple[str, str]
    mlp: tuple[str, str]
    head: tuple[str, str] | None = field(default=None, kw_only=True)  # None: float
    kl: float  # most mean KL(lowbit || vLLM), nats
    gap: float  # most a token that vLLM chose may be less likely than the likeliest, nats
    float_inputs: bool = False  # vLLM's kernel leaves inputs float, whatever the scheme says


def case(scheme: str, method: str, used: tuple[str, str], kl: float, gap: float, float_inputs: bool = False) -> Case:
    """One scheme for every linear."""
    data = CALIBRATION if method == "gptq" else None
    return Case(short_recipe(scheme=scheme, method=method, data=data), used, used, kl, gap, float_inputs)


INT4 = ("CompressedTensorsWNA16", "CPUWNA16LinearKernel")
INT8 = ("CompressedTensorsW8A8Int8", "CPUInt8ScaledMMLinearKernel")
FP8 = ("CompressedTensorsW8A8Fp8", "ChannelWiseTorchFP8ScaledMMLinearKernel")
MIXED = replace(read_recipe(ROOT / "recipes" / "mixed-w8a8-w4a16.toml"), data=CALIBRATION)
# As a plan mixes: other schemes for the same linears in other layers.
PLANNED = Recipe(
    rules=(
        Rule(match=r"^model\.layers\.[02]\.self_attn\.(?:q_proj|k_proj|v_proj)$", scheme="w4a16-g32"),
        Rule(match=r"^model\.layers\.1\.mlp\.down_proj$", scheme="w4a16-g64-asym"),
        Rule(match=r"^model\.layers\.5\.mlp\.(?:gate_proj|up_proj)$", scheme="w4a16-channel"),
        Rule(match="", scheme="w4a16-g128"),
    ),
    steps=(Step(method="gptq"),),
    data=CALIBRATION,
)
# Rotation gives the model a head of its own.
HEAD = short_recipe(scheme="w4a16-g128", method="rotate+rtn", ignore=[])
CASES = {
    "planned": Case(PLANNED, INT4, INT4, 8e-4, 0.25),
    "w4a16": case("w4a16", "gptq", INT4, 8e-4, 0.25),
    "w4a16-g64-asym": case("w4a16-g64-asym", "rtn", INT4, 8e-4, 0.25),
    "w4a16-channel": case("w4a16-channel", "rtn", INT4, 8e-4, 0.25),
    "w4a8": case("w4a8", "rtn", ("CompressedTensorsWNA8Int", "CPUWNA16LinearKernel"), 8e-4, 0.25, float_inputs=True),
    "w8a8": case("w8a8", "gptq", INT8, 2.5e-2, 0.5),  # products that saturate: 0.009, exact ones: 0.003
    "fp8": case("fp8", "rtn", FP8, 2e-2, 0.5),
    "mixed": Case(MIXED, INT8, INT4, 4e-3, 0.5),
    "head": Case(HEAD, INT4, INT4, 8e-4, 0.25, head=INT4),
}
# These differ from one another by less than quantized inputs scatter.
EIGHT_BIT = ("w8a8", "fp8", "float")
# Of 3 bits there is no kernel in vLLM, and static int8 inputs are not what was measured in its CPU build (KL 0.06, a token that
# is 2.1 nats less likely); transformers loads both.
TRANSFORMERS_ONLY = {
    "w3a16": short_recipe(scheme="w3a16", engine="transformers"),
    "w8a8-astatic": short_recipe(scheme="w8a8-astatic", method="gptq", data=CALIBRATION, engine="transformers"),
}
# What vLLM's library for a processor may lack.
ABILITIES = {"int4": "product with 4-bit weights (AVX-512)", "fp8_cache": "FP8 key-value cache (AVX-512 or AMX)"}
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="session")
def abilities(vllm_python: Path) -> dict[str, bool]:
    """What vLLM's library for this processor computes, see `vllm_cpu.abilities`."""
    done = subprocess.run(
        [vllm_python, WORKER.with_name("vllm_cpu.py")], env=outside_of_here(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def outside_of_here() -> dict[str, str]:
    """The environment for a process of another Python."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def needs_int4(case: Case) -> bool:
    """Whether vLLM multiplies with 4-bit weights."""
    return INT4[1] in (case.attention[1], case.mlp[1])


def skip_without(ability: str, abilities: dict[str, bool]) -> None:
    """Skip a test whose kernel is not in vLLM's library for this processor."""
    if not abilities[ability]:
        pytest.skip(f"vLLM's library for this processor has no {ABILITIES[ability]}")


@dataclass(frozen=True)
class Result:
    """What vLLM computed: log-probabilities [tokens - 1, vocabulary] and new tokens of every prompt, and its record."""

    logprobs: list[Tensor]
    generated: list[list[int]]
    record: dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No bars of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    """The first tokens of three paragraphs far apart in the evaluation text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    text = (ROOT / "demo" / "public_domain_eval.txt").read_text(encoding="utf-8")
    paragraphs = [line for line in text.splitlines() if len(line) > 6 * LENGTH]
    chosen = paragraphs[:: len(paragraphs) // PROMPTS][:PROMPTS]
    rows = [tokenizer(line, add_special_tokens=False)["input_ids"][: LENGTH - 1] for line in chosen]
    assert [len(row) for row in rows] == [LENGTH - 1] * PROMPTS
    return [[tokenizer.bos_token_id, *row] for row in rows]


@pytest.fixture(scope="module")
def checkpoint(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of the cases by name, each made once; "float" is the model itself."""
    known = {"float": demo_model}
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if name not in known:
            recipe = CASES[name].recipe if name in CASES else TRANSFORMERS_ONLY[name]
            lowbit.quantize(str(demo_model), folder / name, recipe=recipe)
            known[name] = folder / name
        return known[name]

    return get


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """The models of the cases as lowbit loads them, in float32."""
    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            known[name] = lowbit.load(str(checkpoint(name)), dtype=torch.float32)
        return known[name]

    return get


@pytest.fixture(scope="module")
def in_vllm(
    vllm_python: Path,
    abilities: dict[str, bool],
    checkpoint: Callable[[str], Path],
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Result]:
    """What vLLM computes from the checkpoints, each run once; skips the test where vLLM has no kernel for one."""
    known: dict[str, Result] = {}
    folder = tmp_path_factory.mktemp("vllm")

    def get(name: str) -> Result:
        if needs_int4(CASES[name]):
            skip_without("int4", abilities)
        if name not in known:
            known[name] = run_vllm(vllm_python, checkpoint(name), prompts, folder / f"{name}.safetensors")
        return known[name]

    return get


def run_vllm(python: Path, checkpoint: Path, prompts: list[list[int]], out: Path) -> Result:
    """What vLLM computes from a checkpoint; it is left in `out`."""
    asked = out.with_name("prompts.json")
    asked.write_text(json.dumps(prompts))
    command = [python, WORKER, checkpoint, asked, out, "--generate", str(NEW)]
    done = subprocess.run(command, cwd=out.parent, env=outside_of_here(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    tensors = load_file(out)
    return Result(
        [tensors[f"logprobs.{i}"] for i in range(len(prompts))],
        [tensors[f"generated.{i}"].tolist() for i in range(len(prompts))],
        json.loads(out.with_suffix(".json").read_text()),
    )


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> Tensor:
    """[tokens, vocabulary] float32."""
    return model(torch.tensor([tokens])).logits[0].float()


def logprobs(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """As `Result.logprobs`."""
    return [logits(model, row)[:-1].log_softmax(-1) for row in prompts]


def divergence(p: list[Tensor], q: list[Tensor]) -> float:
    """Mean KL(p || q) of log-probabilities, nats a position."""
    return float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean())


# -------------------------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.engine
@each_case
def test_vllm_computes_what_lowbit_measured(
    name: str,
    in_vllm: Callable[[str], Result],
    reference: Callable[[str], Any],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-probabilities of the prompts, and greedy new tokens, which are nearly the likeliest ones for lowbit too."""
    result, model, expected = in_vllm(name), reference(name), CASES[name]
    if expected.float_inputs:
        monkeypatch.setattr("lowbit.unit.fake_quantize_input", lambda x, spec, largest: x)
    kl = divergence(logprobs(model, prompts), result.logprobs)
    gaps = []
    for prompt, new in zip(prompts, result.generated, strict=True):
        assert len(new) == NEW
        rows = logits(model, prompt + new[:-1])[-NEW:].log_softmax(-1)
        gaps.append(float((rows.max(-1).values - rows.gather(1, torch.tensor(new)[:, None])[:, 0]).max()))
    print(f"{name}: KL {kl:.2e}, largest gap of a chosen token {max(gaps):.3f}, seconds {result.record['seconds']}")
    assert kl < expected.kl
    assert max(gaps) < expected.gap
    assert result.record["quantization"] == "compressed-tensors" and result.record["dtype"] == "bfloat16"


@pytest.mark.engine
def test_vllm_runs_the_projections_of_mamba2(vllm_python: Path, abilities: dict[str, bool], tmp_path: Path) -> None:
    """One state group: with several, vLLM's gated norm is over each, transformers' over all channels, of float models too.

    Another checkpoint of the model would be at 0.09 (4-bit weights). Products that saturate are at 0.008, others at 0.001.
    """
    tiny.save("mamba2", tmp_path / "model", dtype=torch.bfloat16)
    lowbit.quantize(str(tmp_path / "model"), tmp_path / "out", recipe=short_recipe(scheme="w8a8", method="rtn"))
    prompts = tiny.tokens(2, 48).tolist()
    result = run_vllm(vllm_python, tmp_path / "out", prompts, tmp_path / "found.safetensors")
    assert result.record["schemes"] == [INT8[0]] and result.record["kernels"] == [INT8[1]]
    expected = logprobs(lowbit.load(str(tmp_path / "out"), dtype=torch.float32), prompts)
    assert divergence(expected, result.logprobs) < (3e-3 if abilities["exact_int8"] else 3e-2)


@pytest.mark.engine
@each_case
def test_vllm_uses_quantized_kernels(name: str, in_vllm: Callable[[str], Result]) -> None:
    """Every linear of every block, and the head, runs in the kernel of its scheme; nothing else is taken for quantized."""
    layers = in_vllm(name).record["layers"]
    expected = CASES[name]
    found = {path: (entry["scheme"], entry.get("kernel")) for path, entry in layers.items() if "scheme" in entry}
    head = {} if expected.head is None else {"lm_head": expected.head}
    assert found == head | {
        f"model.layers.{i}.{leaf}": expected.attention if leaf.startswith("self_attn") else expected.mlp
        for i in range(LAYERS)
        for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }


@pytest.mark.engine
def test_the_bounds_tell_models_apart(
    abilities: dict[str, bool], in_vllm: Callable[[str], Result], reference: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    """No result would pass for that of another checkpoint, nor for the float model's, the 8-bit ones among themselves apart."""
    references = {other: logprobs(reference(other), prompts) for other in (*CASES, "float")}
    run = [name for name in CASES if abilities["int4"] or not needs_int4(CASES[name])]
    table = {name: {other: divergence(references[other], in_vllm(name).logprobs) for other in references} for name in run}
    print(json.dumps(table, indent=1))
    for name, row in table.items():
        others = [other for other in row if other != name and not {name, other} <= set(EIGHT_BIT)]
        assert min(row[other] for other in others) > 2 * CASES[name].kl, (name, row)


# ------------------------------------------------------------------------------------------------------------ transformers


def in_transformers(folder: Path) -> Any:
    """The model from transformers' own from_pretrained, with its weights then in float32.

    The first forward unpacks the weights in the checkpoint's dtype, as it does for every user; only then are they widened,
    which changes no weight. transformers forbids `.float()` on quantized models, torch does not.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    logits(model.eval(), [0, 1])
    return torch.nn.Module.float(model)


@pytest.mark.engine
@pytest.mark.parametrize("name", [*CASES, *TRANSFORMERS_ONLY])
def test_transformers_computes_what_lowbit_measured(
    name: str,
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], Any],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every weight is the same. Logits too: with int8 inputs, once lowbit takes the library's scales for them.

    compressed-tensors divides absmax by 127.5, vLLM (and so lowbit) by 127.
    """
    model, twin = reference(name), in_transformers(checkpoint(name))
    weights = dict(twin.named_parameters())
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[path]), path
    kl = divergence(logprobs(model, prompts), logprobs(twin, prompts))
    int8_inputs = any("a8" in rule.scheme and "astatic" not in rule.scheme for rule in recipe_of(name).rules)
    assert kl < (1.2e-2 if int8_inputs else 1e-6)
    if int8_inputs:
        assert kl > 1e-5
        monkeypatch.setattr("lowbit.unit.fake_quantize_input", with_library_scale)
    difference = max(float((logits(model, row) - logits(twin, row)).abs().max()) for row in prompts)
    print(f"{name}: KL {kl:.2e}, largest difference of logits {difference:.2e}")
    assert difference <= 1e-3


def recipe_of(name: str) -> Recipe:
    """Of a case, whichever table it is in."""
    return CASES[name].recipe if name in CASES else TRANSFORMERS_ONLY[name]


def with_library_scale(x: Tensor, spec: Any, largest: float | None) -> Tensor:
    """`qtensor.fake_quantize_input` for int8, with the scale of the compressed-tensors library."""
    assert spec.format.name == "int8"
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


# ------------------------------------------------------------------------------------------------------------- the fixture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "outcome", "message"),
    [
        ({}, "1 skipped", "LOWBIT_VLLM_PYTHON is not set to the python of an environment with vLLM"),
        ({"LOWBIT_VLLM_PYTHON": ""}, "1 skipped", "LOWBIT_VLLM_PYTHON is not set"),
        ({"CI": "true"}, "1 error", "LOWBIT_VLLM_PYTHON is not set to the python of an environment with vLLM"),
        ({"LOWBIT_VLLM_PYTHON": "no/such/python"}, "1 error", "'no/such/python' is not an executable file"),
        ({"LOWBIT_VLLM_PYTHON": sys.executable, "CI": "true"}, "1 passed", ""),
    ],
)
def test_without_an_environment(variables: dict[str, str], outcome: str, message: str, tmp_path: Path) -> None:
    """Tests that need vLLM are skipped, saying why, where nobody promised it, and fail in CI."""
    (tmp_path / "test_it.py").write_text("def test_it(vllm_python):\n    assert vllm_python.is_file()\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "LOWBIT_VLLM_PYTHON")}
    environment |= variables | {"PYTHONPATH": str(ROOT / "tests")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-rsE",
        "-c",
        os.devnull,
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert outcome in done.stdout.splitlines()[-1], done.stdout + done.stderr
    assert message in done.stdout


@pytest.mark.engine
def test_fp8_cache(
    vllm_python: Path,
    abilities: dict[str, bool],
    demo_model: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    reference: Callable[[str], Any],
) -> None:
    """vLLM takes the scales of a checkpoint for its key-value cache, and stays near the model with a simulated one.

    Measured: KL(lowbit || vLLM) 0.011, with a float cache on both sides 0.0002; the simulated cache alone costs 0.0034.
    """
    skip_without("fp8_cache", abilities)
    skip_without("int4", abilities)
    recipe = short_recipe(scheme="w4a16-g64", kv_cache="fp8", data=CALIBRATION)
    lowbit.quantize(str(demo_model), tmp_path / "checkpoint", recipe=recipe)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [vllm_python, WORKER, tmp_path / "checkpoint", tmp_path / "prompts.json", tmp_path / "out.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, env=outside_of_here(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    record = json.loads((tmp_path / "out.json").read_text())
    attention = record["layers"]["model.layers.0.self_attn.attn"]
    assert attention["method"] == "CompressedTensorsKVCacheMethod"
    assert attention["kv_cache_dtype"].startswith("fp8")  # the checkpoint alone asks for it
    tensors = load_file(tmp_path / "out.safetensors")
    model = lowbit.load(str(tmp_path / "checkpoint"), dtype=torch.float32)
    mine = logprobs(model, prompts)
    found = [tensors[f"logprobs.{i}"] for i in range(len(prompts))]
    divergence = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(mine, found, strict=True)]).mean()
    assert float(divergence) < 4e-2
    other = logprobs(reference("float"), prompts)
    cost = torch.cat([(b.exp() * (b - a)).sum(-1) for a, b in zip(mine, other, strict=True)]).mean()
    assert float(cost) > 1e-3  # the cache and 4 bits are there
