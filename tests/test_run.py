"""Whole runs: every architecture, killed and resumed at any step, refused with a reason, and nothing lost on the way."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import run
from lowbit.arch import discover
from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, load
from lowbit.files import TEMPORARY
from lowbit.files import save_shard as save
from lowbit.qtensor import QTensor
from lowbit.recipe import Method, Recipe, Rule, Step
from lowbit.run import quantize
from lowbit.source import Source, open_source
from lowbit.unit import Stream, Unit

ROOT = Path(__file__).resolve().parents[1]
DATA = DataSpec(source="random", rows=8, length=16)
SHORT: dict[str, Any] = {"scheme": "w4a16-g32", "data": DATA}
GPTQ: dict[str, Any] = {"scheme": "w4a16-g32", "method": "gptq", "data": DATA}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No bars of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


def save_model(name: str, folder: Path) -> Path:
    """A checkpoint with everything that may lie beside the weights."""
    tiny.save(name, folder, dtype=torch.bfloat16, seed=4)
    tiny.save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\nä model\n", encoding="utf-8")
    (folder / "LICENSE").write_bytes(b"do\r\nwhat you like\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "table.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read, never copied")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be read only."""
    return save_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "own-llama"))


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The results of uninterrupted runs with `SHORT` and `GPTQ`, to be read only."""
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("whole") / method
            quantize(str(llama), made[method], **(SHORT if method == "rtn" else GPTQ))
        return made[method]

    return get


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of every file but the reports, which tell times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.md", "report.html")
    }


def linears_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "report.json").read_text())["linears"]


def assert_same_result(found: Path, expected: Path) -> None:
    """The same files to the byte, the same records, nothing beside."""
    assert files_of(found) == files_of(expected)
    assert linears_of(found) == linears_of(expected)
    assert (found / "report.md").exists()
    assert not [*found.parent.glob(f"{found.name}.*")]  # nothing beside


class Stopped(Exception):
    """Thrown by a test in the middle of a run."""


def stop_at(block: int) -> Callable[[str, int, int], None]:
    """A progress callback that throws when `block` begins."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == block:
            raise Stopped

    return progress


def stopped_run(model: Path, out: Path, block: int = 2, **what: Any) -> Path:
    """Run until `block` begins; returns the unfinished folder."""
    with pytest.raises(Stopped):
        quantize(str(model), out, progress=stop_at(block), **(what or SHORT))
    partial = out.with_name(out.name + ".partial")
    assert not out.exists() and len(records_of(partial)) == block
    return partial


def records_of(partial: Path) -> list[Path]:
    return sorted((partial / ".work").glob("block-*.json"))


def refused(model: Path, out: Path, *parts: str, **what: Any) -> str:
    """The run fails with a message that has these parts, and there is no result."""
    before = files_of(out) if out.is_dir() else None
    with pytest.raises(ValueError) as caught:
        quantize(str(model), out, **what)
    for part in parts:
        assert part in str(caught.value)
    assert (files_of(out) if out.is_dir() else None) == before
    return str(caught.value)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in tiny.NAMES if n != "gpt2")])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path / "model")
    source = open_source(str(model))
    format = "lowbit" if name == "gpt2" else "compressed-tensors"
    data = DataSpec(source="random", rows=16, length=32)
    tokens = tiny.tokens(2, 24, seed=5)
    with torch.no_grad():
        plain = tiny.auto_class(name).from_pretrained(model, dtype=torch.float32)(tokens).logits
    relative: dict[str, float] = {}
    divergence: dict[str, float] = {}
    for scheme, method in (("w4a16-g32", "gptq"), ("w4a16-g32", "rtn"), ("w8a8", "rtn")):
        out = tmp_path / f"{scheme}-{method}"
        report = quantize(str(model), out, scheme=scheme, method=method, data=data, format=format)
        assert json.loads(json.dumps(report)) == json.loads((out / "report.json").read_text())
        assert_complete(out, source, report, format)

        loaded = load(str(out), dtype=torch.float32)
        assert loaded.config.architectures == source.config["architectures"]
        tied = "lm_head.weight" not in source.tensors and bool(loaded.config.tie_word_embeddings)
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied
        with torch.no_grad():
            logits = loaded(tokens).logits
        assert bool(torch.isfinite(logits).all())
        p, q = plain.log_softmax(-1), logits.log_softmax(-1)
        relative[out.name] = float((logits - plain).norm() / plain.norm())
        divergence[out.name] = float((p.exp() * (p - q)).sum(-1).mean())
    four, nearest, eight = "w4a16-g32-gptq", "w4a16-g32-rtn", "w8a8-rtn"
    assert 0.03 < relative[four] < 0.5 and relative[nearest] < 0.8 and 0.003 < relative[eight] < 0.12
    assert relative[eight] < relative[four] / 2
    # 8 bits that went wrong would be no better than 4; with experts, a token that changes its expert costs as much as rounding
    assert 0 < 2 * divergence[eight] < divergence[four] < divergence[nearest] < 0.5


def assert_complete(out: Path, source: Source, report: dict[str, Any], format: str) -> None:
    """Every linear was quantized and compared, every other tensor and every file beside the weights is as it was."""
    arch = discover(source)
    names = [linear.name for block in arch.blocks for linear in block.linears]
    assert sorted(row["name"] for row in report["linears"]) == sorted(names)
    assert all(row["error"] <= 1.001 * row["error_rtn"] for row in report["linears"] if row["method"] == "gptq")
    matrices = {name.removesuffix(".weight") for name, info in source.tensors.items() if len(info.shape) >= 2}
    assert {row["name"] for row in report["float_matrices"]} == matrices - set(names)
    gate = report["gate"]
    assert gate["weights_equal"] and gate["weights_compared"] == len(names) and gate["rows"] == 2
    assert gate["largest_logit_difference"] <= 1e-4 * gate["largest_logit"]

    result = QuantizedSource(out)
    assert set(result.modules) == set(names) and set(result.tensors) == set(source.tensors)
    left = sorted(set(source.tensors) - {f"{name}.weight" for name in names})
    old, new = source.read(left), result.read(left)
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in left)
    shards = shards_of(out)
    stem = "lowbit" if format == "lowbit" else "model"
    assert [path.name for path in shards] == [f"{stem}-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((out / f"{stem}.safetensors.index.json").read_text())
    stored = {tensor: (path.name, value.nbytes) for path in shards for tensor, value in load_file(path).items()}
    assert index["weight_map"] == {tensor: shard for tensor, (shard, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in stored.values())
    assert report["sizes"]["output_bytes"] == sum(path.stat().st_size for path in shards)

    model = source.folder
    beside = {
        path.relative_to(model).as_posix()
        for path in model.rglob("*")
        if path.is_file() and path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json")
    } - {"config.json", ".gitattributes"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "extra/table.json", "README.md"} <= beside
    for name in beside:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    own = {
        "config.json",
        "report.json",
        "report.md",
        "report.html",
        f"{stem}.safetensors.index.json",
        *(path.name for path in shards),
    }
    assert written == beside | own | ({"lowbit.json"} if format == "lowbit" else set())
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE


def test_unknown_tensors_are_kept(own_llama: Path, tmp_path: Path) -> None:
    """What the model has no place for is in the result as it was."""
    extra = torch.arange(6.0).view(2, 3).bfloat16()
    spoil(own_llama, "model.norm.weight", lambda tensors: tensors.update({"vision.weight": extra}))
    quantize(str(own_llama), tmp_path / "out", **SHORT)
    assert torch.equal(QuantizedSource(tmp_path / "out").read(["vision.weight"])["vision.weight"], extra)


def test_short_form_and_recipe_are_one(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    recipe = Recipe(
        rules=(Rule(match="lm_head", scheme="float", optional=True), Rule(match="", scheme="w4a16-g32")),
        steps=(Step(method="rtn"),),
        data=DATA,
    )
    quantize(str(llama), tmp_path / "out", recipe=recipe)
    assert_same_result(tmp_path / "out", whole("rtn"))
    with pytest.raises(ValueError, match="give a recipe or a scheme, not both"):
        quantize(str(llama), tmp_path / "out2", recipe=recipe, scheme="w4a16")
    with pytest.raises(ValueError, match="say what to do: a recipe, or a scheme such as w4a16"):
        quantize(str(llama), tmp_path / "out2")


def test_without_data_the_gate_has_random_rows(llama: Path, tmp_path: Path) -> None:
    report = quantize(str(llama), tmp_path / "out", scheme="w4a16-g32")
    assert report["data"]["source"] == "random" and report["data"]["rows"] == report["gate"]["rows"] == 2
    assert {row["error_kind"] for row in report["linears"]} == {"weight"}


def test_rounding_reads_the_rows_of_the_gate_alone(whole: Callable[[str], Path]) -> None:
    """More of the calibration data would cost time and change nothing."""
    rows = {method: json.loads((whole(method) / "report.json").read_text())["data"]["rows"] for method in ("rtn", "gptq")}
    assert rows == {"rtn": 2, "gptq": 8}


def test_text_data(llama: Path, tmp_path: Path) -> None:
    """A text by its path; the report names the file without its folder."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.TEXT * 20))
    report = quantize(
        str(llama), tmp_path / "out", scheme="w4a16-g32", method="gptq", data=DataSpec(source=str(text), rows=4, length=32)
    )
    assert report["data"]["source"] == "text.txt"
    assert {row["error_kind"] for row in report["linears"]} == {"output"}
    assert str(tmp_path) not in (tmp_path / "out" / "report.md").read_text()


def test_progress_and_precision(llama: Path, tmp_path: Path) -> None:
    """All stages are told, and torch is left as it was found."""
    torch.set_float32_matmul_precision("highest")
    seen: list[tuple[str, int, int]] = []
    quantize(str(llama), tmp_path / "out", progress=lambda *step: seen.append(step), **SHORT)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["reading the model", "quantizing", "checking the output"]
    assert [(done, total) for stage, done, total in seen if stage == "quantizing"] == [(i, 3) for i in range(4)]
    stopped_run(llama, tmp_path / "other")
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------------------------------------------------------- the gate


def _flip_a_code(tensors: dict[str, Tensor]) -> None:
    next(value for name, value in tensors.items() if name.endswith("weight_packed")).view(-1)[0] ^= 1


def _nudge_a_scale(tensors: dict[str, Tensor]) -> None:
    scale = next(value for name, value in tensors.items() if name.endswith("weight_scale"))
    scale.view(torch.int16).view(-1)[0] += 1


def _lose_a_linear(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("weight_packed")).removesuffix("weight_packed")
    packed = {key: tensors.pop(key) for key in list(tensors) if key.startswith(name)}
    tensors[f"{name}weight"] = torch.zeros(packed[f"{name}weight_shape"].tolist(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip_a_code, "reads back with other weights than were solved"),
        (_nudge_a_scale, "reads back with other weights than were solved"),
        (_lose_a_linear, "reads back with other weights|21 quantized linears were found"),
    ],
    ids=["code", "scale", "linear"],
)
def test_gate_finds_what_was_written_wrongly(
    change: Callable[[dict[str, Tensor]], None], message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run.save_shard

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        if "00002-of" in path.name:
            tensors = {name: value.clone() for name, value in tensors.items()}
            change(tensors)
        plain(tensors, path)

    monkeypatch.setattr(run, "save_shard", wrong)
    with pytest.raises(RuntimeError, match=f"gate: .*({message})"):
        quantize(str(llama), tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


def test_gate_compares_logits(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights outside the blocks are seen through the logits."""
    plain = run.save_shard

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        if "model.norm.weight" in tensors:
            tensors = tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.02}
        plain(tensors, path)

    monkeypatch.setattr(run, "save_shard", wrong)
    with pytest.raises(RuntimeError, match="gate: logits of the reloaded model differ by"):
        quantize(str(llama), tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


def test_gate_refuses_logits_that_are_not_finite(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Stream.read

    def broken(self: Stream, boundary: int, start: int, stop: int, **which: Any) -> Tensor:
        hidden = plain(self, boundary, start, stop, **which)
        return hidden * float("nan") if boundary == tiny.LAYERS else hidden

    monkeypatch.setattr(Stream, "read", broken)
    with pytest.raises(RuntimeError, match="gate: the quantized model's logits are not finite"):
        quantize(str(llama), tmp_path / "out", **SHORT)


# ---------------------------------------------------------------------------------------------------------------- the head


EVERYTHING = (Rule(match="", scheme="w4a16-g32"),)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head is a matrix of its own."""
    return save_model("llama_untied", tmp_path_factory.mktemp("untied") / "llama")


def head_recipe(scheme: str = "w4a16-g32", steps: tuple[str, ...] = ("gptq",), **more: Any) -> Recipe:
    rules = (Rule(match="lm_head|embed_out", scheme=scheme), Rule(match="", scheme="w4a16-g32"))
    return Recipe(rules=rules, steps=tuple(Step(method=step) for step in steps), data=DATA, **more)


@pytest.mark.parametrize(
    ("name", "scheme", "steps", "format"),
    [
        ("llama_untied", "w4a16-g32", ("awq", "gptq"), "compressed-tensors"),
        ("llama_untied", "w8a8-astatic", ("gptq",), "compressed-tensors"),
        ("llama_untied", "w3a16-g32", ("rtn", "lorc"), "lowbit"),
        ("gptj", "w8a8", ("rtn", "lkd"), "compressed-tensors"),
        ("gpt_neox", "w4a16-g32-asym", ("gptq",), "compressed-tensors"),
    ],
)
def test_head_is_a_linear(name: str, scheme: str, steps: tuple[str, ...], format: str, tmp_path: Path) -> None:
    """It is solved from the last hidden states, and what is written computes what the report says."""
    model = save_model(name, tmp_path / "model")
    report = quantize(str(model), tmp_path / "out", recipe=head_recipe(scheme, steps, format=format))
    (row,) = [row for row in report["linears"] if "layers" not in row["name"] and ".h." not in row["name"]]
    head = "embed_out" if name == "gpt_neox" else "lm_head"
    assert row["name"] == head and row["scheme"] == scheme and report["blocks"][-1]["block"] == "lm_head"
    result = QuantizedSource(tmp_path / "out")
    plain = open_source(str(model))
    assert result.modules[head].scheme.weight.format.name == f"int{scheme[1]}"
    assert set(result.tensors) == set(plain.tensors)  # a bias too
    assert report["gate"]["weights_compared"] == len(report["linears"])

    loaded = load(str(tmp_path / "out"), dtype=torch.float32)
    tokens = run.calibration_tokens(DATA, None, vocab_size=tiny.VOCAB).tokens
    seen: list[Tensor] = []
    hook = loaded.get_output_embeddings().register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        loaded(tokens)
    hook.remove()
    w = plain.read([f"{head}.weight"])[f"{head}.weight"].float()
    lost = w - loaded.get_output_embeddings().weight
    x = seen[0] if row["error_kind"] == "output" else torch.eye(w.shape[1])
    tolerance = 0.1 if scheme.startswith("w8a8") else 0.01  # inputs are quantized, and rounding to bfloat16 counts
    assert row["error"] == pytest.approx(float((x @ lost.T).square().sum() / (x @ w.T).square().sum()), rel=tolerance)
    if "gptq" in steps:
        assert row["error_kind"] == "output" and row["error"] < 0.8 * row["error_rtn"]


@pytest.mark.parametrize("done", [False, True])
def test_resume_of_the_head(done: bool, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the head's record, or after it: the same result, and nothing is solved twice."""
    recipe = head_recipe()
    quantize(str(untied), tmp_path / "whole", recipe=recipe)
    plain = run._write_record

    def stopping(unit: Unit, *rest: Any) -> None:
        if done or unit.block is not unit.arch.head:
            plain(unit, *rest)
        if unit.block is unit.arch.head:
            raise Stopped

    solved: list[int] = []

    class Counted(Unit):
        def __init__(self, arch: Any, block: Any, *rest: Any) -> None:
            solved.append(block.index)
            super().__init__(arch, block, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run, "_write_record", stopping)
        quantize(str(untied), tmp_path / "out", recipe=recipe)
    monkeypatch.setattr(run, "Unit", Counted)
    quantize(str(untied), tmp_path / "out", recipe=recipe)
    assert solved == ([] if done else [tiny.LAYERS])
    assert_same_result(tmp_path / "out", tmp_path / "whole")


def test_gate_looks_at_the_head(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run.save_shard

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        if "lm_head.weight_packed" in tensors and path.name.startswith("model-"):
            tensors = tensors | {"lm_head.weight_packed": tensors["lm_head.weight_packed"] ^ 1}
        plain(tensors, path)

    monkeypatch.setattr(run, "save_shard", wrong)
    with pytest.raises(RuntimeError, match="gate: lm_head reads back with other weights than were solved"):
        quantize(str(untied), tmp_path / "out", recipe=head_recipe(steps=("rtn",)))


def test_head_that_is_the_embedding(llama: Path, tmp_path: Path) -> None:
    """It stays float, and who asks for more is told why; rotated models have one of their own."""
    refused(llama, tmp_path / "out", "rule 'lm_head|embed_out'", "lm_head is the matrix of the embedding", recipe=head_recipe())
    report = quantize(str(llama), tmp_path / "out", recipe=head_recipe(steps=("rotate", "rtn")))
    assert report["linears"][-1]["name"] == "lm_head" and report["gate"]["weights_equal"]


def test_head_stays_float_by_default(untied: Path, tmp_path: Path) -> None:
    report = quantize(str(untied), tmp_path / "out", **SHORT)
    assert {"name": "lm_head", "reason": "left float by the rules"} in report["float_matrices"]
    report = quantize(str(untied), tmp_path / "all", recipe=Recipe(rules=EVERYTHING, steps=(Step(method="rtn"),)))
    assert report["linears"][-1]["name"] == "lm_head"


def test_head_of_a_model_trained_as_a_whole(untied: Path, tmp_path: Path) -> None:
    refused(untied, tmp_path / "out", "end_to_end trains by the logits", recipe=head_recipe(steps=("gptq", "end_to_end")))


# ------------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_resume_does_not_compute_again(
    method: str, llama: Path, tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = SHORT if method == "rtn" else GPTQ
    partial = stopped_run(llama, tmp_path / "out", **what)
    assert [path.name for path in (partial / ".work").glob("hidden-*")] == ["hidden-00002"]
    finished = {path.name: path.stat().st_mtime_ns for path in shards_of(partial)}
    recorded = {path.name: path.stat().st_mtime_ns for path in records_of(partial)}
    assert len(finished) == len(recorded) == 2
    solved: list[int] = []

    class Counted(Unit):
        def __init__(self, arch: Any, block: Any, *rest: Any) -> None:
            solved.append(block.index)
            super().__init__(arch, block, *rest)

    monkeypatch.setattr(run, "Unit", Counted)
    times: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "checking the output":
            times.update({path.name: path.stat().st_mtime_ns for path in records_of(partial)})

    quantize(str(llama), tmp_path / "out", progress=progress, **what)
    assert solved == [2]
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in shards_of(tmp_path / "out")}.items()
    assert recorded.items() < times.items()
    assert_same_result(tmp_path / "out", whole(method))


def test_resume_with_a_teacher(llama: Path, tmp_path: Path) -> None:
    """The float model's hidden states are kept too; where they are gone, the block before is done again."""
    what = GPTQ | {"options": {"asymmetry": 0.5}}
    quantize(str(llama), tmp_path / "whole", **what)
    for lost in (False, True):
        out = tmp_path / f"out-{lost}"
        partial = stopped_run(llama, out, **what)
        kept = partial / ".work" / "teacher-00002"
        assert sorted(path.name for path in (partial / ".work").glob("*-00002")) == ["hidden-00002", "teacher-00002"]
        if lost:
            kept.unlink()
        quantize(str(llama), out, **what)
        assert_same_result(out, tmp_path / "whole")


TRAINED = {
    "scheme": "w3a16-g32",
    "method": "awq+gptq+mrem",
    "options": {"mrem.steps": 6, "mrem.batch": 2, "mrem.rate": 0.02, "mrem.blocks": 2},
    "data": DataSpec(source="random", rows=12, length=16),
    "engine": "transformers",
}


def test_training_blocks_together(llama: Path, tmp_path: Path) -> None:
    """Three blocks in modules of two: interrupted before the second module, between its blocks' records, and with the first
    block's record alone, the result is the same to the byte."""
    report = quantize(str(llama), tmp_path / "whole", **TRAINED)
    notes = [[note["step"] for note in block["transforms"]] for block in report["blocks"]]
    assert notes == [["awq", "mrem"], ["awq"], ["awq", "mrem"]]
    assert [report["blocks"][i]["transforms"][-1]["blocks"] for i in (0, 2)] == [2, 1]
    kept = report["blocks"][0]["transforms"][-1]["kept"]
    assert {row["method"] for row in report["linears"] if ".layers.0." in row["name"]} == {"gptq+mrem" if kept else "gptq"}
    for records in (2, 1, 0):
        out = tmp_path / f"out-{records}"
        partial = stopped_run(llama, out, **TRAINED)
        assert sorted(path.name for path in (partial / ".work").glob("*-00002")) == ["hidden-00002", "teacher-00002"]
        if records < 2:  # as if killed while the records were written: the hidden states before are still there
            again = stopped_run(llama, tmp_path / f"again-{records}", block=0, **TRAINED)
            for path in (again / ".work").glob("hidden-*"):
                shutil.copy(path, partial / ".work")
            for path in records_of(partial)[records:]:
                path.unlink()
        quantize(str(llama), out, **TRAINED)
        assert_same_result(out, tmp_path / "whole")


def test_a_method_that_trains_needs_a_solver(llama: Path, tmp_path: Path) -> None:
    refused(
        llama, tmp_path / "out", "steps mrem: first what", "then one that rounds every weight (rtn, hqq, gptq)",
        "what trains it further (lkd, mrem, omniquant, signround, tesseraq, block_ap)",
        **(TRAINED | {"method": "mrem", "options": {}}),
    )  # fmt: skip


def test_resume_after_the_last_block(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    """Interrupted between the blocks and the end: nothing is solved again."""
    partial = stopped_run(llama, tmp_path / "out", block=3)
    before = [path.stat().st_mtime_ns for path in shards_of(partial)]
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert [path.stat().st_mtime_ns for path in shards_of(tmp_path / "out")[:3]] == before
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_leftovers_are_cleaned(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    """Half-written files of a killed process are not in the result."""
    partial = stopped_run(llama, tmp_path / "out")
    for name in ("model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors", ".work/hidden-00003"):
        (partial / f"{name}.{8 * 'a7'}{TEMPORARY}").write_bytes(b"half")
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_hidden_states_that_are_gone_are_made_again(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    partial = stopped_run(llama, tmp_path / "out")
    for path in (partial / ".work").glob("hidden-*"):
        path.unlink()
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_records_of_an_unknown_run_are_not_used(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    """Without the description of the job, its records could be those of any other."""
    partial = stopped_run(llama, tmp_path / "out", **(SHORT | {"scheme": "w8a16"}))
    (partial / ".work" / "job.json").unlink()
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_foreign_folder_is_left_alone(llama: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    refused(llama, tmp_path / "out", "out.partial is needed for unfinished work, but holds something else", **SHORT)
    refused(llama, tmp_path / "out", "holds something else", overwrite=True, **SHORT)
    assert [path.name for path in partial.iterdir()] == ["thesis.txt"]


def _other_weights(model: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] += 1

    spoil(model, "model.norm.weight", change)


def _other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))


@pytest.mark.parametrize(
    ("changes", "change_model", "difference"),
    [
        ({"scheme": "w8a16"}, None, 'recipe.rules[1].scheme was "w4a16-g32", is "w8a16"'),
        ({"method": "gptq"}, None, 'recipe.steps[0].method was "rtn", is "gptq"'),
        ({"options": {"shrink_steps": 20}}, None, "recipe.steps[0].options.shrink_steps was null, is 20"),
        ({"ignore": ["down_proj"]}, None, 'recipe.rules[0].match was "lm_head|embed_out", is "down_proj"'),
        ({"format": "lowbit"}, None, 'recipe.format was "compressed-tensors", is "lowbit"'),
        ({"data": DataSpec(source="random", rows=8, length=16, seed=1)}, None, "recipe.data.seed was 0, is 1"),
        ({}, _other_config, "model.config.json was "),
    ],
    ids=["scheme", "method", "option", "ignore", "format", "data", "config"],
)
def test_unfinished_run_of_something_else(
    changes: dict[str, Any], change_model: Callable[[Path], None] | None, difference: str, own_llama: Path, tmp_path: Path
) -> None:
    """It is refused with the difference, and kept."""
    out = tmp_path / "out"
    partial = stopped_run(own_llama, out)
    before = files_of(partial)
    if change_model is not None:
        change_model(own_llama)
    what = SHORT | changes
    message = refused(own_llama, out, "holds an unfinished run of something else", difference, "--overwrite", **what)
    assert len(message) < 1000
    assert files_of(partial) == before


@pytest.mark.parametrize("what", ["format", "weights"])
def test_overwrite_starts_anew(what: str, own_llama: Path, tmp_path: Path) -> None:
    """With the result of a fresh run, and no shard of the old one beside it."""
    stopped_run(own_llama, tmp_path / "out")
    if what == "weights":
        _other_weights(own_llama)
    options = SHORT | ({"format": "lowbit"} if what == "format" else {})
    quantize(str(own_llama), tmp_path / "out", overwrite=True, **options)
    quantize(str(own_llama), tmp_path / "fresh", **options)
    assert_same_result(tmp_path / "out", tmp_path / "fresh")


def test_changed_text_is_something_else(own_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny.TEXT * 20))
    what = SHORT | {"data": DataSpec(source=str(text), rows=2, length=16)}
    stopped_run(own_llama, tmp_path / "out", **what)
    text.write_text("\n".join(tiny.TEXT[::-1] * 20))
    refused(own_llama, tmp_path / "out", "recipe.data.source_sha256 was ", "recipe.data.tokens_sha256 was ", **what)


def test_run_without_a_finished_block_does_not_stand_in_the_way(
    llama: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    """A mistake that was found after the first look at the model can be mended without --overwrite."""
    refused(llama, tmp_path / "out", "groups of 48 do not divide", scheme="w4a16-g48", data=DATA)
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", whole("rtn"))


# ----------------------------------------------------------------------------------------------------- where it is written


def test_existing_output_is_refused_or_replaced(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    out = tmp_path / "out"
    quantize(str(llama), out, **(SHORT | {"format": "lowbit"}))
    before = files_of(out)
    refused(llama, out, "exists and is not empty", "--overwrite", **SHORT)
    assert not out.with_name("out.partial").exists()
    with pytest.raises(Stopped):  # a run that does not come to its end leaves the old one
        quantize(str(llama), out, overwrite=True, progress=stop_at(2), **SHORT)
    assert files_of(out) == before
    quantize(str(llama), out, overwrite=True, **SHORT)
    assert_same_result(out, whole("rtn"))


def test_empty_folder_is_used(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    (tmp_path / "out").mkdir()
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_output_that_is_a_file(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    refused(llama, tmp_path / "out", "out is a file; choose another folder", **SHORT)
    refused(llama, tmp_path / "out" / "below", "cannot write to", "choose another --out", **SHORT)
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(llama, tmp_path / "locked" / "out", "cannot write to", "Permission denied", **SHORT)


@pytest.mark.parametrize("out", [".", "out", "..", "../own-llama.old/../own-llama"])
def test_model_and_output_lie_apart(out: str, own_llama: Path) -> None:
    """Even --overwrite never replaces the model, nor puts the result inside it."""
    before = files_of(own_llama)
    refused(own_llama, own_llama / out, "overlap; choose another --out", overwrite=True, **SHORT)
    assert files_of(own_llama) == before


def test_model_has_no_name_that_a_run_uses(own_llama: Path, tmp_path: Path) -> None:
    model = own_llama.rename(tmp_path / "out.partial")
    before = files_of(model)
    refused(model, tmp_path / "out", "overlap; choose another --out", overwrite=True, **SHORT)
    assert files_of(model) == before


def test_two_processes_at_once(llama: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    """The second is refused while the first goes on."""
    tried: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 1:
            tried.append(refused(llama, tmp_path / "out", "another process is writing", "out.partial", **SHORT))

    quantize(str(llama), tmp_path / "out", progress=progress, **SHORT)
    assert len(tried) == 1
    assert_same_result(tmp_path / "out", whole("rtn"))


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["shard", "hidden states", "record"])
def test_full_disk(
    where: str, llama: Path, tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is kept and what to do; with space again, the run goes on."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 2:
            if where == "shard":
                full.setattr("lowbit.files.save_file", no_space)
            elif where == "hidden states":
                full.setattr(Stream, "bytes", no_space)
            else:
                full.setattr("lowbit.journal.write_json", no_space)

    with monkeypatch.context() as full:
        parts = ("No space left on device", "2 finished blocks are kept", "run the same command again")
        refused(llama, tmp_path / "out", *parts, progress=progress, **SHORT)
    partial = tmp_path / "out.partial"
    before = {path.name: path.stat().st_mtime_ns for path in shards_of(partial)[:2]}
    assert len(records_of(partial)) == 2
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in shards_of(tmp_path / "out")}.items()
    assert_same_result(tmp_path / "out", whole("rtn"))


def test_disk_that_is_too_small(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is computed."""
    needed = Source(llama).nbytes()
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=needed // 2)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    seen: list[str] = []
    parts = ("are free, but up to", "are needed while quantizing", "choose another --out")
    refused(llama, tmp_path / "out", *parts, progress=lambda stage, done, total: seen.append(stage), **SHORT)
    assert asked == [tmp_path / "out.partial"] and not seen and not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match=r"\d\.?\d* kB are free, but up to [1-9]\d*\.\d\d kB are needed"):
        quantize(str(llama), tmp_path / "out", **SHORT)
    # The hidden states of two boundaries are counted too.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed + 100))
    refused(llama, tmp_path / "out", "are free, but up to", **SHORT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed + 2 * 8 * 16 * 64 * 4))
    quantize(str(llama), tmp_path / "out", **SHORT)


def test_what_is_written_already_needs_no_more_space(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = stopped_run(llama, tmp_path / "out")
    present = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = Source(llama).nbytes() + 2 * 8 * 16 * 64 * 4 - present
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    quantize(str(llama), tmp_path / "out", **SHORT)


def test_too_little_memory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available_memory", lambda: 10_000)
    refused(llama, tmp_path / "out", "of memory are available, but the largest block", "more memory", **SHORT)
    assert not shards_of(tmp_path / "out.partial") and not records_of(tmp_path / "out.partial")
    monkeypatch.setattr(run, "available_memory", lambda: None)  # unknown
    quantize(str(llama), tmp_path / "out", **SHORT)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("rtn+signround", "to train 1 block"),
        ("rtn+mrem", "to train 2 block"),
        ("rtn+end_to_end", "to train all blocks at once, as end_to_end does,"),
    ],
)
def test_too_little_memory_to_train(
    steps: str, said: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the first block; a step that does not train needs less."""
    one = sum(linear.in_features * linear.out_features for linear in discover(open_source(str(llama))).blocks[0].linears)
    monkeypatch.setattr(run, "available_memory", lambda: 64 * one - 1)
    quantize(str(llama), tmp_path / "rounded", **(SHORT | {"method": "rtn"}))
    monkeypatch.setattr(run, "available_memory", lambda: (128 if "mrem" in steps else 64) * one - 1)
    refused(llama, tmp_path / "out", said, "modules of fewer blocks", **(SHORT | {"method": steps}))


def test_available_memory() -> None:
    found = run.available_memory()
    assert found is None or 2**20 < found < 2**50


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("", {}, 8_000_000 * 1024),
        ("0::/\n", {"memory.max": "max", "memory.current": "5"}, 8_000_000 * 1024),
        ("0::/\n", {"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 300\ninactive_file 50"}, 650),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "900", "a/memory.current": "100"}, 800),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "1", "a/memory.max": "9", "a/memory.current": "10"}, 0),
        ("0::/a\n", {"memory.max": "1000", "memory.current": "1"}, 999),  # a container sees its group as the root
        ("5:cpu:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "70", "memory/a/memory.usage_in_bytes": "60"}, 10),
        (
            "4:cpu,memory:/docker/x\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "700",
                "memory/memory.usage_in_bytes": "600",
                "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 20",
            },
            120,
        ),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"},
            8_000_000 * 1024,
        ),
    ],
)
def test_available_memory_in_a_container(tmp_path: Path, own: str, files: dict[str, str], expected: int) -> None:
    """The least of the machine's and of the limits of all control groups above, of either version."""
    written = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB", "proc/self/cgroup": own}
    written |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert run.available_memory(tmp_path) == expected


def test_available_memory_is_not_told(tmp_path: Path) -> None:
    assert run.available_memory(tmp_path) is None


# ---------------------------------------------------------------------------------------------------------- damaged models


def spoil(folder: Path, tensor: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Apply `change` to the tensors of the shard that holds `tensor`; returns the shard."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][tensor]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shard


def _truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 10)


def _corrupt_header(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[8:40] = b"\xff" * 32
    shard.write_bytes(data)


def _empty_file(shard: Path) -> None:
    shard.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is truncated or not a safetensors file"),
        (_corrupt_header, "is truncated or not a safetensors file"),
        (_empty_file, "is truncated or not a safetensors file"),
        (Path.unlink, "1 of 9 shards are missing"),
    ],
    ids=["truncated", "corrupt", "empty", "missing"],
)
def test_damaged_shard(damage: Callable[[Path], None], message: str, own_llama: Path, tmp_path: Path) -> None:
    """Found before a folder is made, with the name of the shard."""
    shards = shards_of(own_llama)
    damage(shards[2])
    message = message.replace("9", str(len(shards)))
    refused(own_llama, tmp_path / "out", message, shards[2].name, **SHORT)
    assert not (tmp_path / "out.partial").exists()


def test_shard_that_changes_during_the_run(own_llama: Path, tmp_path: Path) -> None:
    """It is an error of the model, not of the disk that is written to; what is finished stays."""
    shard = own_llama / Source(own_llama).tensors["model.layers.2.mlp.down_proj.weight"].shard
    whole = shard.read_bytes()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 2:
            _truncate(shard)

    refused(own_llama, tmp_path / "out", f"{shard.name} cannot be read", "fetch this file again", progress=progress, **SHORT)
    shard.write_bytes(whole)
    assert len(records_of(tmp_path / "out.partial")) == 2
    quantize(str(own_llama), tmp_path / "out", **SHORT)


def test_values_that_are_not_finite(own_llama: Path, tmp_path: Path) -> None:
    """Found before the first block is solved, even in the last one."""
    name = "model.layers.2.mlp.down_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 1] = float("nan")

    shard = spoil(own_llama, name, change)
    refused(own_llama, tmp_path / "out", f"{shard.name}: tensor {name} has NaN or infinite values", **SHORT)
    assert not shards_of(tmp_path / "out.partial") and not records_of(tmp_path / "out.partial")


def test_model_quantized_in_an_unknown_way_is_refused(tmp_path: Path, llama: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    parts = ("is quantized already (gptq), which lowbit cannot dequantize", "the original checkpoint")
    refused(tmp_path / "model", tmp_path / "out", *parts, **SHORT)


def test_model_that_is_nowhere(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path / "out", "nothing", **SHORT)
    assert not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ({"scheme": "w4b16"}, ("unknown scheme 'w4b16'", "w4a16-g64-asym")),
        ({"scheme": "w9a16"}, ("9-bit integers are not supported",)),
        ({"scheme": "w4a16-g32", "method": "magic"}, ("unknown method 'magic'", "rtn, hqq, gptq")),
        ({"scheme": "w4a16-g32", "options": {"damping": 0.1}}, ("rtn has no option 'damping'",)),
        ({"scheme": "w4a16-g32", "method": "gptq"}, ("gptq needs calibration data",)),
        (
            {"scheme": "w4a16-g32", "ignore": ["no_such"]},
            ("rule 'no_such' -> float is never used", "no linear has such a name"),
        ),
        ({"scheme": "w4a16-g32", "ignore": [""]}, ("an earlier rule takes every linear it matches",)),
        ({"scheme": "w4a16-g32", "data": "nowhere.txt"}, ("'nowhere.txt' is not a file",)),
        ({"scheme": "w4a16-g32", "data": DataSpec(source="random"), "device": "cuda:77"}, ("device 'cuda:77' cannot be used",)),
        ({"scheme": "w4a16-g32", "revision": "main"}, ("is a local folder, which has no revisions",)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else "-".join(map(str, value)),
)
def test_refused_before_anything_is_written(what: dict[str, Any], parts: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path / "out", *parts, **what)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", " \n \n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_calibration_file(name: str, content: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    refused(llama, tmp_path / "out", f"{name} holds no", scheme="w4a16-g32", data=str(tmp_path / name))
    assert not (tmp_path / "out.partial").exists()


def test_too_little_text(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(tiny.TEXT[0])
    what = {"scheme": "w4a16-g32", "method": "gptq", "data": DataSpec(source=str(tmp_path / "short.txt"), rows=4, length=32)}
    refused(llama, tmp_path / "out", "4 rows of 32 need 128", "more text", **what)
    assert not (tmp_path / "out.partial").exists()


def test_missing_tokenizer(own_llama: Path, tmp_path: Path) -> None:
    """Text needs one; random tokens do not."""
    (tmp_path / "text.txt").write_text("\n".join(tiny.TEXT * 20))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_llama / name).unlink()
    data = DataSpec(source=str(tmp_path / "text.txt"), rows=4, length=32)
    refused(own_llama, tmp_path / "out", "has no tokenizer", "--data random", scheme="w4a16-g32", method="gptq", data=data)
    assert not (tmp_path / "out.partial").exists()
    quantize(str(own_llama), tmp_path / "out", **GPTQ)


def test_group_that_does_not_divide(llama: Path, tmp_path: Path) -> None:
    """The message names the linear, its columns, and groups that would do."""
    parts = ("groups of 48 do not divide its", "input columns", "use a group of 16, 32, 64", "--ignore")
    refused(llama, tmp_path / "out", *parts, scheme="w4a16-g48", data=DATA)
    message = refused(llama, tmp_path / "out", scheme="w4a16", data=DATA)  # 128 divides the inputs of down_proj alone
    assert "groups of 128 do not divide its 64 input columns" in message
    assert not shards_of(tmp_path / "out.partial") and not records_of(tmp_path / "out.partial")


def test_schemes_that_the_engine_does_not_load(llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path / "out", "cannot be exported for vllm", "--engine transformers", scheme="w3a16-g32", data=DATA)
    assert not shards_of(tmp_path / "out.partial") and not records_of(tmp_path / "out.partial")
    quantize(str(llama), tmp_path / "out", scheme="w3a16-g32", data=DATA, engine="transformers")


@pytest.mark.parametrize(
    ("name", "scheme", "reason"),
    [
        ("mixtral", "w4a16-g32-asym", "it cannot unpack this format into fused experts"),
        ("qwen3_moe", "mxfp8a16", "it cannot unpack this format into fused experts"),
        ("qwen2_moe", "w8a8", "it leaves the inputs of fused experts float"),
        ("falcon_new", "w4a16-g32", "its code for FalconLinear reads weights"),
        ("mamba2", "mxfp4", "its code for Mamba2Mixer reads weights"),
    ],
)
def test_what_transformers_cannot_load(name: str, scheme: str, reason: str, tmp_path: Path) -> None:
    """As measured over all tiny models and thirteen schemes (LOG.md)."""
    tiny.save(name, tmp_path / "model", dtype=torch.bfloat16)
    what = {"scheme": scheme, "data": DATA, "engine": "transformers"}
    refused(tmp_path / "model", tmp_path / "out", "cannot be exported for transformers", reason, "--format lowbit", **what)


def test_experts_of_one_matrix_have_one_input(tmp_path: Path) -> None:
    """Gate and up of an expert are one matrix in memory; one quantized input cannot serve a float one."""
    tiny.save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    rules = (Rule(match="w3$", scheme="w8a16"), Rule(match="", scheme="w8a8"))
    recipe = Recipe(rules=rules, steps=(Step(method="rtn"),), data=DATA, engine="transformers")
    message = refused(tmp_path / "model", tmp_path / "out", "are one matrix in the model", recipe=recipe)
    assert "give them one scheme" in message


# ---------------------------------------------------------------------------------------------------------------- being killed

# Runs a command in forked children. A child counts its steps (files opened for writing, half written, renamed, removed, copied;
# batches read) and kills itself at a given one. Prints what happened as JSON, with a hash of what lies at --out after each.
KILLER = """
import hashlib, json, os, random, shutil, signal, sys, traceback
from pathlib import Path
import lowbit.files, lowbit.unit
from lowbit.cli import main

job = json.load(sys.stdin)
root = Path(job["root"])
command = ["quantize", job["model"], *job["arguments"], "--out"]
TOUCHING = ("os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")


def child(out, extra, kill_at, pipe):
    steps = []

    def step(kind, before_death=lambda: None):
        steps.append(kind)
        if len(steps) == kill_at:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, details):
        path, *rest = details
        if event == "open":
            mode, flags = rest
            touches = bool(set(mode) & set("wa+")) if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
        else:
            touches = event in TOUCHING
        if touches and (str(path).startswith(str(out)) or event in ("os.remove", "os.rmdir")):
            step(event)

    save, read, write = lowbit.files.save_file, lowbit.unit.Stream.read, Path.write_text

    def save_file(tensors, path, metadata=None):
        save(tensors, path, metadata=metadata)
        step("half", lambda: os.truncate(path, Path(path).stat().st_size // 2))

    def reading(self, *which, **more):
        step("read")
        return read(self, *which, **more)

    def write_text(self, text, *rest, **options):
        write(self, text[: len(text) // 2], *rest, **options)
        step("half")
        return write(self, text, *rest, **options)

    lowbit.files.save_file, lowbit.unit.Stream.read, Path.write_text = save_file, reading, write_text
    sys.addaudithook(hook)
    code = main([*command, str(out), *extra])
    os.write(pipe, json.dumps(steps).encode())
    return code


def attempt(out, extra, kill_at):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child(out, extra, kill_at, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        steps = pipe.read()
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    code = None if killed else os.WEXITSTATUS(status)
    return {"kill_at": kill_at, "killed": killed, "code": code, "steps": json.loads(steps or "[]"), "hash": content(out)}


def content(out):
    digest = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts):
        if not path.name.startswith("report."):
            digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return digest.hexdigest() if out.exists() else None


assert main([*command, str(root / "whole")]) == 0  # in this process: imports are paid for once
first = attempt(root / "fresh", [], 0)
last = len(first["steps"])
rng = random.Random(job["seed"])
plans = [[step] for step in range(last - job["at_the_end"] + 1, last + 1)]
plans += [[step] for step, kind in enumerate(first["steps"], 1) if kind == "half" and job["samples"]]
plans += [sorted(rng.sample(range(1, last), 3), reverse=True) for _ in range(job["samples"])]
told = [{"name": "fresh", "attempts": [first], "old": content(Path(job["replace"])) if job["replace"] else None}]
for number, plan in enumerate(plans):
    out = root / f"out-{number}"
    extra = []
    if job["replace"]:
        shutil.copytree(job["replace"], out)
        extra = ["--overwrite"]
    attempts = []
    for kill_at in [*plan, 0]:
        attempts.append(attempt(out, extra, kill_at))
        if attempts[-1]["code"] == 0:
            break
    told.append({"name": out.name, "attempts": attempts})
json.dump(told, sys.stdout)
"""


def run_killer(tmp_path: Path, model: Path, method: str, **job: Any) -> list[dict[str, Any]]:
    """Run the script above; returns what it tells, the folders lie in tmp_path."""
    arguments = ["--scheme", "w4a16-g32", "--method", method, "--data", "random", "--rows", "8", "--length", "16"]
    description = {"root": str(tmp_path), "model": str(model), "arguments": arguments, "seed": 7, "replace": None, **job}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, input=json.dumps(description), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for plan in told:
        assert all(attempt["killed"] or attempt["code"] == 0 for attempt in plan["attempts"]), (plan, done.stderr[-3000:])
    return told


@pytest.mark.slow
@pytest.mark.parametrize(("method", "at_the_end", "samples"), [("rtn", 25, 10), ("gptq", 0, 15)])
def test_killed_at_any_step(method: str, at_the_end: int, samples: int, llama: Path, tmp_path: Path) -> None:
    """Killed up to three times wherever it may be, then run to the end: the same bytes as without."""
    told = run_killer(tmp_path, llama, method, at_the_end=at_the_end, samples=samples)
    killed = [sum(attempt["killed"] for attempt in plan["attempts"]) for plan in told]
    kinds = told[0]["attempts"][0]["steps"]
    assert killed[0] == 0 and len(kinds) > 80 and kinds.count("half") >= 4 + 6  # shards; JSON and the report
    assert all(count >= 1 for count in killed[1:]) and sum(killed) > at_the_end + kinds.count("half") + 1.5 * samples
    for plan in told:
        assert_same_result(tmp_path / plan["name"], tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_replacing(llama: Path, tmp_path: Path) -> None:
    """What lies at --out is always the whole old checkpoint or the whole new one, or nothing between two renames."""
    old = tmp_path / "old"
    quantize(str(llama), old, scheme="w8a16", data=DATA)
    told = run_killer(tmp_path, llama, "rtn", at_the_end=40, samples=0, replace=str(old))
    assert sum(plan["attempts"][0]["killed"] for plan in told) >= 40
    before, after = told[0]["old"], told[0]["attempts"][0]["hash"]
    hashes = [plan["attempts"][0]["hash"] for plan in told[1:]]
    assert {before, after} <= set(hashes) <= {before, after, None} and hashes.count(None) <= 1
    for plan in told:
        assert_same_result(tmp_path / plan["name"], tmp_path / "whole")


@pytest.mark.slow
def test_command_killed_at_random_moments(llama: Path, tmp_path: Path) -> None:
    """The real command, several times, after random times."""
    arguments = ["--scheme", "w4a16-g32", "--method", "gptq", "--data", "random", "--rows", "64", "--length", "64"]
    command = [sys.executable, "-m", "lowbit", "quantize", str(llama), *arguments, "--out"]
    rng = random.Random(11)
    out, job = tmp_path / "out", tmp_path / "out.partial" / ".work" / "job.json"
    killed = 0
    for _ in range(4):
        with subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while not job.exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.6))
            process.kill()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 1
    for folder in (out, tmp_path / "whole"):
        if not folder.exists() or (folder / ".work").exists():
            subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    assert_same_result(out, tmp_path / "whole")


@pytest.mark.slow
def test_interrupt_is_told(llama: Path, tmp_path: Path) -> None:
    """Ctrl-C says that the run can go on; also in a job whose shell ignores Ctrl-C, which children inherit."""
    arguments = ["--scheme", "w4a16-g32", "--method", "gptq", "--data", "random", "--rows", "512", "--length", "64"]
    command = [sys.executable, "-m", "lowbit", "quantize", str(llama), *arguments, "--out", str(tmp_path / "out")]
    job = tmp_path / "out.partial" / ".work" / "job.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        while not job.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.splitlines()[-1] == "lowbit: interrupted; the same command run again goes on from there"


@pytest.mark.slow
def test_file_size_limit(tmp_path: Path) -> None:
    """A write that the system itself refuses, inside the library that writes shards: the finished block is kept."""
    model = save_model("qwen3_moe", tmp_path / "model")  # its first block is dense and small
    quantize(str(model), tmp_path / "whole", **SHORT)
    sizes = [path.stat().st_size for path in shards_of(tmp_path / "whole")]
    assert sizes[0] < sizes[1]
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({(sizes[0] + sizes[1]) // 2},) * 2)\n"
        "from lowbit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--scheme", "w4a16-g32", "--data", "random", "--rows", "8", "--length", "16", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(model), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "1 finished blocks are kept" in done.stderr
    assert len(records_of(tmp_path / "out.partial")) == 1
    quantize(str(model), tmp_path / "out", **SHORT)
    assert_same_result(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------- one assigned, one not


def test_method_that_forgets_a_linear(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(unit: Unit) -> None:
        for linear in unit.linears[1:]:
            unit.assign_nearest(linear, method="rtn")

    monkeypatch.setitem(run.METHODS, "rtn", Method(apply=forgetful, calibrated=lambda options: False, kind="solver"))
    with pytest.raises(AssertionError, match="not every linear was assigned"):
        quantize(str(llama), tmp_path / "out", **SHORT)


def test_result_is_what_the_solver_had(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the result are the dequantized ones that were assigned, rounded to the checkpoint's dtype."""
    assigned: dict[str, QTensor] = {}
    plain = Unit.finish

    def finish(self: Unit, **options: Any) -> dict[str, Tensor]:
        assigned.update(self.assigned)
        return plain(self, **options)

    monkeypatch.setattr(Unit, "finish", finish)
    quantize(str(llama), tmp_path / "out", **GPTQ)
    source = QuantizedSource(tmp_path / "out")
    assert len(assigned) == 7 * tiny.LAYERS
    for name, q in assigned.items():
        values = q.codes.float().unflatten(1, (-1, 32)) * q.scale.float().unsqueeze(-1)
        assert torch.equal(source.read([f"{name}.weight"])[f"{name}.weight"], values.flatten(1).bfloat16())


# ---------------------------------------------------------------------------------------------------------- its own text
def test_text_the_model_writes_is_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written once, whatever happens later; another seed is other text."""
    data = DataSpec(source="self", rows=4, length=12)
    calls, write = [], run.written_tokens
    monkeypatch.setattr(run, "written_tokens", lambda *args, **options: calls.append(1) or write(*args, **options))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(run, "save_shard", lambda tensors, path: full() if ".work" not in str(path) else save(tensors, path))
        with pytest.raises(ValueError, match="No space left"):
            quantize(str(llama), tmp_path / "out", scheme="w4a16-g32", method="gptq", data=data)
    report = quantize(str(llama), tmp_path / "out", scheme="w4a16-g32", method="gptq", data=data)
    assert len(calls) == 1 and report["data"]["source"] == "self"
    assert not list((tmp_path / "out").rglob("written-*"))
    again = quantize(str(llama), tmp_path / "again", scheme="w4a16-g32", method="gptq", data=data)
    assert again["data"] == report["data"] and len(calls) == 2
    other = DataSpec(source="self", rows=4, length=12, seed=1)
    changed = quantize(str(llama), tmp_path / "other", scheme="w4a16-g32", method="gptq", data=other)
    assert changed["data"]["tokens_sha256"] != report["data"]["tokens_sha256"]


def test_an_encoder_writes_no_text(tmp_path: Path) -> None:
    model = save_model("bert", tmp_path / "model")
    refused(model, tmp_path / "out", "writes no text", scheme="w4a16-g32", method="gptq", data=DataSpec(source="self", rows=2))
