"""Checkpoints that were edited, damaged or made up: an error that names the place, or the same numbers, and nothing else."""

import json
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import load
from lowbit.cli import main
from lowbit.data import DataSpec
from lowbit.export import QuantizedSource, open_checkpoint
from lowbit.inspection import problems_of, summary_of
from lowbit.recipe import Recipe, Rule, Step
from lowbit.run import quantize

DATA = DataSpec(source="random", rows=2, length=16)
NATIVE_RULES = {
    "layers.0.*q_proj": "w4a16-g32-asym", "layers.0.*k_proj": "w8a8-astatic", "layers.0.*v_proj": "nvfp4",
    "layers.0.*o_proj": "w3a16-channel", "layers.0.*gate": "mxfp4a16", "layers.0.*up": "kmeans3",
    "layers.0.*down": "w4a8-g32-two",
    "layers.1.*q_proj": "fp8", "layers.1.*k_proj": "bcq2-g32",
    "layers.1.*v_proj": "w4a16-tensor", "layers.1.*o_proj": "w8a8-asym",
    "layers.1.*mlp": "w5a16-g32", "": "w8a8",
}  # fmt: skip
LIBRARY_RULES = {
    "layers.0.*q_proj": "w4a16-g32-asym", "layers.0.*k_proj": "w8a8-astatic", "layers.0.*v_proj": "nvfp4",
    "layers.0.*o_proj": "w3a16-channel", "layers.0.*gate": "mxfp4a16", "layers.0.*up": "mxfp6a16",
    "layers.0.*down": "w4a8-g32",
    "layers.1.*q_proj": "fp8", "layers.1.*k_proj": "w2a16-g32", "layers.1.*v_proj": "fp8-tensor", "layers.1.*o_proj": "w8a16",
    "layers.1.*mlp": "w5a16-g32", "": "w8a8",
}  # fmt: skip
LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkv")
OUT, DOWN = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finished checkpoints, each made once and only read: one of every layout in both formats, one with an adapter, one of
    which every linear can stay packed, one with a scan."""
    root = tmp_path_factory.mktemp("outs")
    tiny.save("llama", root / "llama", dtype=torch.bfloat16, seed=3)
    tiny.save("mamba2", root / "mamba2", dtype=torch.bfloat16, seed=3)

    def rules(table: dict[str, str]) -> tuple[Rule, ...]:
        return tuple(Rule(match=match, scheme=scheme) for match, scheme in table.items())

    def made(name: str) -> None:
        given: dict[str, Any] = {"format": "lowbit", "engine": "transformers", "data": DATA, "steps": (Step(method="rtn"),)}
        if name == "native":
            given["rules"] = rules(NATIVE_RULES)
        elif name == "library":
            given |= {"rules": rules(LIBRARY_RULES), "format": "compressed-tensors"}
        elif name == "cache":
            given |= {"rules": rules({"": "w4a16-g32"}), "format": "compressed-tensors", "engine": "vllm", "kv_cache": "fp8"}
        elif name == "lorc":
            given |= {
                "rules": rules({"": "w3a16-g32"}),
                "steps": (Step(method="rtn"), Step(method="lorc", options={"rank": 2})),
            }
        elif name == "packed":
            given["rules"] = rules({"q_proj": "w8a8", "": "w4a16-g32-asym"})
        else:
            given["rules"] = rules({r"\.(x|B|C|z|dt|state|conv_in|conv1d\.weight|A_log)$": "s8", "": "w8a8"})
        quantize(str(root / ("mamba2" if name == "scan" else "llama")), root / name, recipe=Recipe(**given))

    def get(name: str) -> Path:
        if not (root / name).exists():
            made(name)
        return root / name

    return get


@pytest.fixture
def copied(outs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies to be edited."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(outs(name), tmp_path / name))

    return get


def shard_of(folder: Path, tensor: str) -> Path:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if tensor in file.keys():  # noqa: SIM118 (not a mapping)
                return path
    raise AssertionError(tensor)


def edit(folder: Path, tensor: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a tensor in its shard; None removes it, also from the index."""
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    found = change(tensors.pop(tensor))
    if found is not None:
        tensors[tensor] = found.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    if found is None:
        index = next(folder.glob("*.index.json"))
        described = json.loads(index.read_text())
        del described["weight_map"][tensor]
        index.write_text(json.dumps(described))
        forget(folder, index.name)


def describe(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "lowbit.json") -> None:
    """Edit a JSON file of a folder; what `change` returns, if anything, takes its place."""
    value = json.loads((folder / name).read_text())
    found = change(value)
    (folder / name).write_text(json.dumps(value if found is None else found))


def forget(folder: Path, *names: str) -> None:
    """Remove files from the hashes of report.json, as if they had been edited on purpose, or before there were hashes."""
    report = json.loads((folder / "report.json").read_text())
    for name in names:
        report["files"].pop(name, None)
    (folder / "report.json").write_text(json.dumps(report))


def entry(*path: str | int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def at(value: Any) -> Any:
        for key in path:
            value = value[key]
        return value

    return at


def setting(key: str, new: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    """Sets a key of the object at a path."""

    def change(value: dict[str, Any]) -> None:
        entry(*path)(value)[key] = new

    return change


def without(key: str, *path: str | int) -> Callable[[dict[str, Any]], None]:
    """Removes a key of the object at a path."""

    def change(value: dict[str, Any]) -> None:
        del entry(*path)(value)[key]

    return change


def numbers(folder: Path) -> dict[str, Any]:
    """All that a checkpoint says about the model's numbers."""
    source = open_checkpoint(str(folder))
    assert isinstance(source, QuantizedSource)
    found: dict[str, Any] = dict(source.read(list(source.tensors)))
    for name in source.modules:
        source.quantized(name)
    points = {name: (point.spec, point.largest.tolist(), point.labels.tolist()) for name, point in source.points().items()}
    return found | {"inputs": source.inputs(), "points": points, "cache": source.cache_scales()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """To the bit."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value for key, value in wanted.items()
    )


@pytest.mark.parametrize("name", ["native", "library", "lorc", "packed", "scan", "cache"])
def test_what_was_written_is_right(name: str, outs: Callable[[str], Path]) -> None:
    """Nothing to complain about, with the hashes and without them; values are there to be compared below."""
    assert problems_of(str(outs(name))) == ([], True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(numbers(outs(name))) > 10


# ------------------------------------------------------------------------------------------------------------------ values

VALUES: dict[str, tuple[str, str, Callable[[Tensor], Tensor | None], str]] = {
    "scale of one row": (
        "native",
        f"{Q}.scale",
        lambda x: x[:1],
        r"q_proj\.scale is BF16 \[1, 2\], but lowbit\.json calls for BF16 \[64, 2\]",
    ),
    "scale of one column": ("native", f"{Q}.scale", lambda x: x[:, :1], r"q_proj\.scale is BF16 \[64, 1\]"),
    "scale as int32": ("native", f"{Q}.scale", lambda x: (x * 1000).int(), r"q_proj\.scale is I32 \[64, 2\]"),
    "scale in another dtype": ("native", f"{Q}.scale", lambda x: x.float(), r"q_proj\.scale is F32"),
    "scale negated": ("native", f"{Q}.scale", lambda x: -x, "q_proj: a scale is zero, not finite, or negative"),
    "scale zero": ("native", f"{OUT}.scale", lambda x: 0 * x, "o_proj: a scale is zero"),
    "scale NaN": ("native", f"{OUT}.scale", lambda x: x * torch.nan, "o_proj: a scale is zero, not finite"),
    "scale infinite": ("native", f"{K}.scale", lambda x: x * torch.inf, "k_proj: a scale is zero, not finite"),
    "scale missing": (
        "native",
        f"{Q}.scale",
        lambda x: None,
        r"q_proj\.scale is missing, which lowbit\.json calls for as BF16 \[64, 2\]",
    ),
    "zero of one row": ("native", f"{Q}.zero", lambda x: x[:1], r"q_proj\.zero is I8 \[1, 2\]"),
    "zero out of range": (
        "native",
        f"{Q}.zero",
        lambda x: torch.full_like(x, 127),
        r"q_proj: a zero point lies outside -8 \.\. 7",
    ),
    "zero missing": ("native", f"{Q}.zero", lambda x: None, r"q_proj\.zero is missing"),
    "codes of fewer rows": ("native", f"{Q}.codes", lambda x: x[:-1], r"q_proj\.codes is U8 \[63, 32\]"),
    "codes of fewer columns": ("native", f"{Q}.codes", lambda x: x[:, :-1], r"q_proj\.codes is U8 \[64, 31\]"),
    "codes as int8": ("native", f"{Q}.codes", lambda x: x.view(torch.int8), r"q_proj\.codes is I8"),
    "no number as code": (
        "native",
        "model.layers.1.self_attn.q_proj.codes",
        lambda x: torch.full_like(x, 127),
        "a code of fp8_e4m3 is no number",
    ),
    "outer of all rows": ("native", f"{DOWN}.outer", lambda x: x[:1], r"down_proj\.outer is F32 \[1, 1\]"),
    "outer negative": ("native", f"{DOWN}.outer", lambda x: -x, "down_proj: the second factor of the scales"),
    "outer infinite": ("native", f"{V}.outer", lambda x: x / 0, "v_proj: the second factor of the scales"),
    "largest 0": (
        "native",
        f"{K}.input_largest",
        lambda x: 0 * x,
        r"k_proj\.input_largest is \[0\.0\], not a finite number above 0",
    ),
    "largest negative": ("native", f"{K}.input_largest", lambda x: -x, r"k_proj\.input_largest is \[-"),
    "largest NaN": ("native", f"{K}.input_largest", lambda x: x * torch.nan, r"k_proj\.input_largest is \[nan\]"),
    "largest of many": ("native", f"{K}.input_largest", lambda x: x.expand(3), r"k_proj\.input_largest is F32 \[3\]"),
    "largest missing": ("native", f"{K}.input_largest", lambda x: None, r"k_proj\.input_largest is missing"),
    "norm NaN": ("native", f"{LAYER}.input_layernorm.weight", lambda x: x * torch.nan, "NaN or infinite"),
    "library: scale of one row": (
        "library",
        f"{Q}.weight_scale",
        lambda x: x[:1],
        r"q_proj\.weight_scale is BF16 \[1, 2\], but config\.json calls for",
    ),
    "library: scale of one column": (
        "library",
        f"{Q}.weight_scale",
        lambda x: x[:, :1],
        r"q_proj\.weight_scale is BF16 \[64, 1\]",
    ),
    "library: scale NaN": ("library", f"{OUT}.weight_scale", lambda x: x * torch.nan, "o_proj: a scale is zero, not finite"),
    "library: scale negative": (
        "library",
        f"{K}.weight_scale",
        lambda x: -x,
        "k_proj: a scale is zero, not finite, or negative",
    ),
    "library: scale NaN in E8M0": (
        "library",
        f"{LAYER}.mlp.gate_proj.weight_scale",
        lambda x: torch.full_like(x, 255),
        "gate_proj: a scale",
    ),
    "library: zero of one row": ("library", f"{Q}.weight_zero_point", lambda x: x[:1], r"q_proj\.weight_zero_point is I32"),
    "library: zero missing": ("library", f"{Q}.weight_zero_point", lambda x: None, r"q_proj\.weight_zero_point is missing"),
    "library: shape": (
        "library",
        f"{Q}.weight_shape",
        lambda x: x * 2,
        r"q_proj\.weight_shape is \[128, 128\], but weight_packed has shape",
    ),
    "library: shape within the padding": ("library", f"{OUT}.weight_shape", lambda x: x - torch.tensor([0, 1]), r"\[64, 63\]"),
    "library: shape of three": (
        "library",
        f"{Q}.weight_shape",
        lambda x: torch.tensor([64, 64, 1]),
        r"q_proj\.weight_shape must be I64 \[2\]",
    ),
    "library: codes": ("library", f"{K}.weight", lambda x: x[:, :-1], r"k_proj.*\[(32, 63|31)"),
    "library: no number as code": (
        "library",
        "model.layers.1.self_attn.q_proj.weight",
        lambda x: (x.float() * torch.nan).to(x.dtype),
        "is no number",
    ),
    "library: global 0": ("library", f"{V}.weight_global_scale", lambda x: 0 * x, "v_proj: the second factor of the scales"),
    "library: input 0": ("library", f"{K}.input_scale", lambda x: 0 * x, r"k_proj\.input_scale is \[0\.0\]"),
    "library: input NaN": (
        "library",
        f"{V}.input_global_scale",
        lambda x: x * torch.nan,
        r"v_proj\.input_global_scale is \[nan\]",
    ),
    "library: scale missing": ("library", f"{K}.weight_scale", lambda x: None, r"k_proj\.(weight is I8|input_scale is there)"),
    "cache": ("cache", f"{LAYER}.self_attn.k_scale", lambda x: -x, r"k_scale is -.*, not a finite number above 0"),
    "half a cache": ("cache", f"{LAYER}.self_attn.k_scale", lambda x: None, "v_scale is there without its twin"),
    "packed: scale NaN": ("packed", f"{K}.scale", lambda x: x * torch.nan, "k_proj: a scale"),
    "packed: scale of one row": ("packed", f"{Q}.scale", lambda x: x[:1], r"q_proj\.scale is BF16 \[1, 1\]"),
    "packed: zero": ("packed", f"{K}.zero", lambda x: torch.full_like(x, -9), "k_proj: a zero point"),
    "scan: scale": (
        "scan",
        "backbone.layers.0.mixer.x.largest",
        lambda x: -x,
        r"mixer\.x\.largest has numbers that are not finite or not above 0",
    ),
    "scan: scales": ("scan", "backbone.layers.0.mixer.x.largest", lambda x: x.expand(2, 1), r"mixer\.x\.labels is missing"),
    "scan: parameter": (
        "scan",
        "backbone.layers.0.mixer.conv1d.weight.scale",
        lambda x: x * torch.nan,
        r"weight\.scale has numbers",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_edited_tensors(case: str, copied: Callable[[str], Path]) -> None:
    """Loading refuses them, dequantized and packed, and so does the check; the message names folder, tensor and remedy."""
    name, tensor, change, message = VALUES[case]
    folder = copied(name)
    edit(folder, tensor, change)
    forget(folder, *(path.name for path in folder.glob("*.safetensors")))
    with pytest.raises(ValueError, match=message) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value) and "again" in str(caught.value)
    problems, hashes = problems_of(str(folder))
    assert hashes and any(str(caught.value).split(" (")[0] in problem or tensor in problem for problem in problems), problems
    if name in ("packed", "scan") or case in ("scale NaN", "library: scale NaN", "largest NaN"):
        with pytest.raises(ValueError, match=message):
            load(str(folder), kernels=True)


def test_padding(copied: Callable[[str], Path]) -> None:
    """Bits behind the last column are zero, or something else was written there."""
    folder = copied("native")
    described = json.loads((folder / "lowbit.json").read_text())["linears"][OUT]["shape"]
    assert described == [64, 64]  # 3 bits: 24 bytes, no padding; so make one
    tensors = {"w.codes": torch.tensor([[7]], dtype=torch.uint8), "w.scale": torch.ones(1, 1)}
    made = {"tensor": "w.weight", "index": None, "transposed": False, "shape": [1, 2], "scheme": "w3a16-channel", "input": None,
            "turned": False, "weight": {"format": "int3", "group": -1, "rows": 1, "symmetric": True, "dynamic": False,
                                        "scale": "float", "rule": "floor"}}  # fmt: skip
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "lowbit.json").write_text(
        json.dumps({"format": "lowbit", "version": 3, "dtype": "float32", "points": {}, "linears": {"w": made}})
    )
    save_file(tensors, folder / "lowbit.safetensors")
    QuantizedSource(folder).quantized("w")
    save_file(tensors | {"w.codes": torch.tensor([[7 | 128]], dtype=torch.uint8)}, folder / "lowbit.safetensors")
    with pytest.raises(ValueError, match=r"lowbit\.safetensors: w: bits behind the last column are not zero"):
        QuantizedSource(folder).quantized("w")


# ------------------------------------------------------------------------------------------------------------- description

AT = ("linears", Q)
SCHEMA: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda x: [x], "holds a list, not a JSON object"),
    "empty": (lambda x: {}, "'format' is None, not 'lowbit'"),
    "of something else": (setting("format", "else"), "'format' is 'else'"),
    "version": (setting("version", 4), "has version 4; this lowbit reads version 3"),
    "version as text": (setting("version", "3"), "has version '3'"),
    "version true": (setting("version", True), "has version True"),
    "no version": (without("version"), "has version None"),
    "no dtype": (without("dtype"), r"has no 'dtype' \(str\)"),
    "dtype unknown": (setting("dtype", "float64"), "'dtype' is 'float64', not one of bfloat16, float16, float32"),
    "dtype a number": (setting("dtype", 16), "'dtype' is 16, not of type str"),
    "dtype another": (setting("dtype", "float32"), r"scale is BF16 .*, but lowbit\.json calls for F32"),
    "no linears": (without("linears"), r"has no 'linears' \(dict\)"),
    "linears a list": (lambda x: x.update(linears=list(x["linears"])), "'linears' is .*, not of type dict"),
    "no entries": (lambda x: x.update(linears={}, points={}), "names no linears and no points"),
    "no points": (without("points"), r"has no 'points' \(dict\)"),
    "entry null": (setting(Q, None, "linears"), r"linears\['.*q_proj'\] is None, not an object"),
    "entry removed": (without(Q, "linears"), r"q_proj\.codes is there, but lowbit\.json does not name .*q_proj"),
    "entry renamed": (lambda x: x["linears"].update(other=x["linears"].pop(Q)), r"other\.codes is missing"),
    **{
        f"no {key}": (without(key, *AT), rf"q_proj'\] has no '{key}'")
        for key in ("tensor", "index", "transposed", "shape", "scheme", "weight", "input", "turned")
    },
    **{
        f"{key} a number": (setting(key, 7, *AT), f"'{key}' is 7, not of type")
        for key in ("tensor", "transposed", "shape", "scheme", "weight", "input", "turned")
    },
    "index a text": (setting("index", "0", *AT), "'index' is '0', not of type int or null"),
    "index 1e9": (setting("index", 10**9, *AT), r"the indices of .*q_proj are not 0 \.\. 0"),
    "shape of three": (setting("shape", [64, 64, 1], *AT), r"'shape' is \[64, 64, 1\], not \[out, in\]"),
    "shape negative": (setting("shape", [-64, 64], *AT), "not a list of sizes from 1 on"),
    "shape 1e9": (setting("shape", [10**9, 10**9], *AT), r"columns \(weight\)|codes is U8 \[64, 32\], but"),
    "shape turned round": (setting("shape", [128, 64], *AT), r"q_proj\.codes is U8 \[64, 32\], but"),
    "tensor of another": (setting("tensor", f"{K}.weight", *AT), "all claim to be tensor"),
    "tensor that the model lacks": (
        setting("tensor", "model.nothing.weight", *AT),
        "the model has no place for it|lacks 1 tensors",
    ),
    "tensor that is stored": (
        setting("tensor", "model.norm.weight", *AT),
        r"model\.norm\.weight is there, but lowbit\.json says that it is quantized",
    ),
    **{
        f"weight without {key}": (without(key, *AT, "weight"), f"'weight': '{key}' is missing")
        for key in ("format", "group", "rows", "symmetric", "dynamic", "scale", "rule")
    },
    **{
        f"weight.{key} a list": (setting(key, [], *AT, "weight"), rf"'weight': '{key}' is \[\], not of type")
        for key in ("format", "group", "rows", "symmetric", "dynamic", "scale", "rule")
    },
    "format unknown": (setting("format", "int9", *AT, "weight"), "unknown number format 'int9'"),
    "format wider": (setting("format", "int8", *AT, "weight"), r"q_proj\.codes is U8 \[64, 32\], but"),
    "format with no zeros": (setting("format", "fp4_e2m1", *AT, "weight"), "float formats have no zero point"),
    "scale unknown": (setting("scale", "e5m2", *AT, "weight"), "'scale' is 'e5m2'; known are float, e8m0, e4m3, int8"),
    "scale of another kind": (setting("scale", "int8", *AT, "weight"), r"q_proj\.scale is BF16"),
    "rule unknown": (setting("rule", "up", *AT, "weight"), "'rule' is 'up'; known are floor, even, ceil"),
    "group negative": (setting("group", -5, *AT, "weight"), "group -5 and rows 1"),
    "group that does not divide": (setting("group", 48, *AT, "weight"), r"groups of 48 do not divide the 64 columns"),
    "group wider": (
        setting("group", 64, *AT, "weight"),
        r"q_proj\.scale is BF16 \[64, 2\], but lowbit\.json calls for BF16 \[64, 1\]",
    ),
    "rows 0": (setting("rows", 0, *AT, "weight"), "group 32 and rows 0"),
    "rows 1e9": (setting("rows", 10**9, *AT, "weight"), "blocks of 1000000000 rows do not divide the 64 rows"),
    "symmetric": (setting("symmetric", True, *AT, "weight"), r"q_proj\.zero is there, but lowbit\.json does not call for it"),
    "dynamic": (setting("dynamic", True, *AT, "weight"), "scales of weights are not dynamic"),
    "input lost": (
        setting("input", None, "linears", K),
        r"k_proj\.input_largest is there, but lowbit\.json does not call for it",
    ),
    "input dynamic": (setting("dynamic", True, "linears", K, "input"), "inputs have dynamic scales for a token"),
    "input asymmetric": (setting("symmetric", False, "linears", K, "input"), "static scales of inputs are one float"),
    "input of a codebook": (
        setting("format", "kmeans3", "linears", K, "input"),
        "'input': a codebook belongs to|inputs cannot be",
    ),
}


@pytest.mark.parametrize("case", SCHEMA)
def test_edited_descriptions(case: str, copied: Callable[[str], Path]) -> None:
    """Without hashes too: what lowbit.json may say is known, and headers contradict most of the rest."""
    change, message = SCHEMA[case]
    folder = copied("native")
    describe(folder, change)
    forget(folder, "lowbit.json")
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value) and time.process_time() - began < 2
    assert problems_of(str(folder))[0]


SILENT: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "transposed": ("native", setting("transposed", True, *AT)),
    "turned": ("native", setting("turned", True, *AT)),
    "input: null": ("native", setting("input", None, "linears", "model.layers.2.self_attn.q_proj")),
    "input: dynamic group": ("native", setting("group", 32, "linears", "model.layers.2.self_attn.q_proj", "input")),
    "name of the scheme": ("native", setting("scheme", "w2a16", *AT)),
}


@pytest.mark.parametrize("case", SILENT)
def test_edits_that_only_the_hash_tells(case: str, copied: Callable[[str], Path]) -> None:
    name, change = SILENT[case]
    folder = copied(name)
    describe(folder, change)
    with pytest.raises(
        ValueError, match=r"lowbit\.json is not the file that was written .*remove its line from \"files\" there"
    ):
        load(str(folder))
    assert any("lowbit.json is not the file" in problem for problem in problems_of(str(folder))[0])
    forget(folder, "lowbit.json")
    load(str(folder))  # it could not be told


QUANTIZATION: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "null": (lambda x: x.update(quantization_config=None), r"k_proj\.weight|lacks|stored as"),
    "a list": (lambda x: x.update(quantization_config=[]), r"'quantization_config' is \[\], not an object"),
    "a text": (lambda x: x.update(quantization_config="gptq"), "'quantization_config' is 'gptq', not an object"),
    "method": (
        setting("quant_method", "gptq", "quantization_config"),
        "quantized already .gptq., which lowbit",
    ),
    "no groups": (without("config_groups", "quantization_config"), "compressed-tensors does not read quantization_config"),
    "groups a list": (
        setting("config_groups", [1], "quantization_config"),
        "compressed-tensors does not read quantization_config",
    ),
    "empty groups": (setting("config_groups", {}, "quantization_config"), "has no group for"),
    "group_size a text": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size="x"),
        "compressed-tensors does not read",
    ),
    "bits": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=8),
        "must be|calls for|but weight_packed",
    ),
    "bits 11": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=11),
        "unknown number format 'int11'|does not read",
    ),
    "symmetric": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=True),
        "says that it is symmetric",
    ),
    "no weights": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(weights=None),
        "reads quantized weights",
    ),
    "format": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(format="dense"),
        "format 'dense' with int weights",
    ),
    "another format": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(format="float-quantized"),
        "float-quantized holds",
    ),
    "outputs": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(
            output_activations={"num_bits": 8, "type": "int"}
        ),
        "no quantized outputs",
    ),
    "transforms": (
        setting("transform_config", {"config_groups": {"u": {}}}, "quantization_config"),
        "has transforms or sparsity",
    ),
    "ignored": (setting("ignore", ["re:.*q_proj"], "quantization_config"), "ignores .*q_proj, but it is stored quantized"),
    "targets of nothing": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(targets=["nothing"]),
        "has no group for",
    ),
    "no expression": (
        lambda x: x["quantization_config"]["config_groups"]["group_0"].update(targets=["re:("]),
        "is not a regular expression",
    ),
    "an expression that takes for ever": (
        lambda x: (
            [
                group.update(targets=[r"re:(([a-z_.0-9])+)+\W$"] * 50)
                for group in x["quantization_config"]["config_groups"].values()
            ]
            and None
        ),
        # refused for its time, or, where the search ends early, because it matches nothing
        r"config\.json: quantization_config(: the regular expression .* takes too long to match| has no group for)",
    ),
    "an expression in ignore": (
        setting("ignore", [r"re:(([a-z_.0-9])+)+\W$"] * 50, "quantization_config"),
        "takes too long to match",
    ),
}


@pytest.mark.parametrize("case", QUANTIZATION)
@pytest.mark.filterwarnings("ignore:.*config.json is not the file that was written")
def test_edited_quantization_configs(case: str, copied: Callable[[str], Path]) -> None:
    change, message = QUANTIZATION[case]
    folder = copied("library")
    describe(folder, change, "config.json")
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        load(str(folder))
    assert time.process_time() - began < 2


# ------------------------------------------------------------------------------------------------------------------ hashes


def test_an_edited_config_is_a_warning(copied: Callable[[str], Path]) -> None:
    """It may be meant; what the tokenizer is does not matter to the weights, and only the check tells."""
    folder = copied("library")
    (folder / "generation_config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(str(folder))
    assert [problem.partition(" is not")[0] for problem in problems_of(str(folder))[0]] == [
        str(folder / "generation_config.json")
    ]
    describe(folder, setting("max_position_embeddings", 512), "config.json")
    with pytest.warns(
        UserWarning, match=r"config\.json is not the file that was written .* if you changed it on purpose, remove"
    ):
        load(str(folder))
    assert len(problems_of(str(folder))[0]) == 2
    forget(folder, "config.json", "generation_config.json")
    assert problems_of(str(folder)) == ([], True)


@pytest.mark.parametrize("name", ["native", "library"])
def test_flipped_codes_are_told_by_the_check(
    name: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Any other code is as good as the right one: only the hash tells. The command prints a line and returns 2."""
    folder = copied(name)
    tensor = f"{Q}.codes" if name == "native" else f"{Q}.weight_packed"
    assert main(["inspect", str(folder), "--check"]) == 0
    assert capsys.readouterr().out == f"{folder}: nothing is wrong\n"
    edit(folder, tensor, lambda x: x ^ 1)
    load(str(folder))
    assert main(["inspect", str(folder), "--check"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [problem for problem in problems_of(str(folder))[0]]
    assert len(out.splitlines()) == 1 and f"{shard_of(folder, tensor)} is not the file that was written" in out
    assert f"lowbit: {folder}: 1 problems" in err
    assert main(["inspect", str(folder), "--check", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["hashes"] is True


def test_all_problems_are_listed(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of headers and of values, without hashes; loading names the first."""
    folder = copied("native")
    (folder / "report.json").unlink()
    for leaf in (Q, K):
        edit(folder, f"{leaf}.scale", lambda x: x * torch.nan)
    assert main(["inspect", str(folder), "--check"]) == 2
    out = capsys.readouterr().out
    assert out.count("a scale is zero, not finite") == 2 and "There is no report.json of lowbit's with hashes" in out
    for leaf in (Q, K):
        edit(folder, f"{leaf}.scale", lambda x: x[:1])
    problems, hashes = problems_of(str(folder))
    assert len(problems) == 2 and not hashes
    with pytest.raises(ValueError, match=r"2 such problems; lowbit inspect --check lists them"):
        load(str(folder))


def test_other_files(copied: Callable[[str], Path]) -> None:
    """Weights that are no part of it, but would be read by engines; what is missing; what is no file."""
    folder = copied("library")
    save_file({"x": torch.zeros(1)}, folder / "extra.safetensors")
    (folder / "generation_config.json").unlink()
    described = json.loads((folder / "report.json").read_text())
    described["files"]["../outside"] = described["files"]["/etc/hostname"] = "0"
    (folder / "report.json").write_text(json.dumps(described))
    problems = problems_of(str(folder))[0]
    assert sum("is missing, or no regular file" in problem for problem in problems) == 3
    assert sum("extra.safetensors is not among the files of report.json" in problem for problem in problems) == 1


def test_what_cannot_be_checked(outs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not quantized; only folders in lowbit.s own format or compressed-"):
        problems_of(str(outs("native").parent / "llama"))
    with pytest.raises(ValueError, match="is no folder"):
        problems_of(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", "null", '{"gate": 1, "lowbit": "1"}', "[" * 100_000])
def test_a_report_of_something_else(content: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Is ignored, with a warning."""
    folder = copied("packed")
    (folder / "report.json").write_text(content)
    with pytest.warns(UserWarning, match=r"report\.json is no report of lowbit's, or a damaged one; it is ignored"):
        assert "gate" not in summary_of(str(folder))
    with pytest.warns(UserWarning, match="it is ignored"):
        assert main(["inspect", str(folder)]) == 0
    damaged = [] if content in ("{}", "[]", "null") else [f"{folder / 'report.json'} is damaged; fetch it again"]
    assert problems_of(str(folder)) == (damaged, False)


@pytest.mark.parametrize(
    ("where", "value"), [("linears", 7), ("gate", None), ("linears", [7]), ("linears", [{"name": "x"}]), ("sizes", 0.5)]
)
def test_a_report_that_is_damaged_elsewhere(where: str, value: Any, copied: Callable[[str], Path]) -> None:
    """Still has its hashes: small files are compared with them when the folder is loaded, and all files by the check."""
    folder = copied("native")
    describe(folder, lambda report: report.update({where: value}), "report.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the rest is ignored
        assert problems_of(str(folder)) == ([f"{folder / 'report.json'} is damaged; fetch it again"], True)
        assert main(["inspect", str(folder), "--check"]) == 2
        edit(folder, f"{Q}.codes", lambda x: x ^ 1)
        assert any("is not the file that was written" in problem for problem in problems_of(str(folder))[0])
        (folder / "lowbit.json").write_text((folder / "lowbit.json").read_text() + " ")
        with pytest.raises(ValueError, match=r"lowbit\.json is not the file that was written"):
            load(str(folder))


# ------------------------------------------------------------------------------------------------------------ corrections

ADAPTER = "adapter/adapter_model.safetensors"


def rewrite_adapter(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    with safe_open(folder / ADAPTER, "pt") as file:
        names = json.loads(file.metadata()["lowbit"])
    tensors = load_file(folder / ADAPTER)
    metadata = change(tensors, names)
    save_file(tensors, folder / ADAPTER, metadata={"lowbit": json.dumps(names)} if metadata is None else metadata)


def _first(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = change(tensors[name]).contiguous()


ADAPTERS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "no metadata": (lambda tensors, names: {}, "its metadata 'lowbit' is no object of modules"),
    "no JSON": (lambda tensors, names: {"lowbit": "{"}, "its metadata 'lowbit' is no object of modules"),
    "a list": (lambda tensors, names: {"lowbit": "[]"}, "its metadata 'lowbit' is no object of modules"),
    "numbers": (lambda tensors, names: {"lowbit": '{"a": 1}'}, "its metadata 'lowbit' is no object of modules"),
    "a name lost": (lambda tensors, names: names.pop(next(iter(names))) and None, "its tensors are not those of its metadata"),
    "a tensor lost": (lambda tensors, names: tensors.pop(next(iter(tensors))) is None or None, "its tensors are not those"),
    "a name of nothing": (
        lambda tensors, names: names.update({next(iter(names)): "nothing"}),
        "corrects nothing, which is no quantized",
    ),
    "shape": (lambda tensors, names: _first(tensors, lambda x: x[:, :-1]), r"the correction of .* is .*, not \["),
    "NaN": (lambda tensors, names: _first(tensors, lambda x: x * torch.nan), "is not of finite floats"),
    "integers": (lambda tensors, names: _first(tensors, lambda x: x.int()), "is not of finite floats"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_edited_adapters(case: str, copied: Callable[[str], Path]) -> None:
    change, message = ADAPTERS[case]
    folder = copied("lorc")
    rewrite_adapter(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(str(folder))
    assert ADAPTER in str(caught.value)


def test_a_missing_adapter(copied: Callable[[str], Path]) -> None:
    """report.json says that there is one, and without it the model is another."""
    folder = copied("lorc")
    shutil.rmtree(folder / "adapter")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing: report\.json says that low-rank corrections"):
        load(str(folder))
    (folder / "adapter").mkdir()
    (folder / ADAPTER).write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        load(str(folder))


# -------------------------------------------------------------------------------------------------------------------- fuzz


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _nodes(inner, (*path, key))


ODD: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 7, 32, 2**31, 10**12, -1.5, [], [1], {}, {"a": 1})
ODD += ("", "int4", "float", "re:.*", "lowbit", "channel", "group")


def mangled(folder: Path, chance: random.Random, root: tuple[str, ...], name: str) -> str:
    """One random edit of a JSON file below `root`."""
    value = json.loads((folder / name).read_text())
    *path, last = chance.choice([*_nodes(entry(*root)(value))])
    at = entry(*root, *path)(value)
    kind = chance.choice(("set", "remove", "swap"))
    if kind == "remove":
        del at[last]
    elif kind == "swap":
        *other, key = chance.choice([*_nodes(entry(*root)(value))])
        at[last] = entry(*root, *other, key)(json.loads((folder / name).read_text()))
    else:
        at[last] = chance.choice(ODD)
    (folder / name).write_text(json.dumps(value))
    return f"{name}: {kind} {[*root, *path, last]}"


def damaged(folder: Path, chance: random.Random) -> str:
    """One random edit of a shard: of its header, of bytes, or of its length."""
    path = chance.choice(sorted(folder.rglob("*.safetensors")))
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    kind = chance.choice(("header", "header", "bytes", "cut"))
    if kind == "header":
        header = json.loads(data[8 : 8 + size])
        name = chance.choice([key for key in header if key != "__metadata__"])
        what = chance.choice(("dtype", "shape", "name", "remove"))
        if what == "dtype":
            header[name]["dtype"] = chance.choice(
                ("F32", "BF16", "F16", "I8", "U8", "I32", "F8_E4M3", "F8_E8M0", "I64", "BOOL")
            )
        elif what == "shape":
            shape = header[name]["shape"]
            header[name]["shape"] = chance.choice((shape[::-1], [*shape, 1], shape[1:], [1, *shape]))
        elif what == "name":
            header[chance.choice((name + "x", name.replace("layers.0", "layers.1"), "codes"))] = header.pop(name)
        else:
            del header[name]
        text = json.dumps(header).encode()
        data[: 8 + size] = len(text).to_bytes(8, "little") + text
        kind += f" {what} {name}"
    elif kind == "bytes":
        at = chance.randrange(8 + size, len(data))
        for i in range(at, min(at + chance.choice((1, 2, 64)), len(data))):
            data[i] = chance.randrange(256)
    else:
        del data[chance.randrange(len(data)) :]
    path.write_bytes(data)
    return f"{path.name}: {kind}"


@pytest.mark.parametrize(
    ("name", "seed"), [*(("native", i) for i in range(3)), *(("library", i) for i in range(3)), ("scan", 0), ("lorc", 0)]
)
@pytest.mark.filterwarnings("ignore:.*config.json is not the file that was written")
def test_random_edits(name: str, seed: int, copied: Callable[[str], Path]) -> None:
    """The same numbers or a ValueError; other numbers only where the check has a line about it."""
    chance = random.Random(seed)
    folder = copied(name)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}
    wanted = numbers(folder)
    root = ("quantization_config",) if name == "library" else ()
    refused = 0
    for _ in range(40):
        hashes = chance.random() < 0.5
        if chance.random() < 0.5:
            what = mangled(folder, chance, root, "config.json" if name == "library" else "lowbit.json")
        else:
            what = damaged(folder, chance)
        if not hashes:
            (folder / "report.json").unlink()
        try:
            found = numbers(folder)
            if hashes and not same(found, wanted):
                assert problems_of(str(folder))[0], what
        except ValueError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what}: {error!r}") from error
        for path, content in kept.items():
            path.write_bytes(content)
    assert refused > 10
