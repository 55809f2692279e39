"""Checkpoint folders, whole and damaged in every way that a reader meets."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit import source as source_module
from lowbit.source import Source, TensorInfo, deeper_than, index_name, open_source, read_json, shard_name

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A few tensors of a model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (32, 8), "layers.0.up.weight": (16, 8), "layers.0.down.weight": (8, 16), "norm.weight": (8,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_single(folder: Path, values: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A checkpoint of one shard without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama"} | config)
    save_file(tensors() if values is None else values, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    """A checkpoint of two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama"})
    values = tensors()
    names = list(values)
    save_file({name: values[name] for name in names[:2]}, folder / FIRST)
    save_file({name: values[name] for name in names[2:]}, folder / SECOND)
    weight_map = dict.fromkeys(names[:2], FIRST) | dict.fromkeys(names[2:], SECOND)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model")


def refused(folder: Path, *parts: str) -> None:
    """Opening fails with a message that has these parts, folder included."""
    with pytest.raises(ValueError) as caught:
        open_source(str(folder))
    for part in (str(folder), *parts):
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------------- whole folders
def test_shards(sharded: Path) -> None:
    """Every tensor's place, shape, dtype and value."""
    source = open_source(str(sharded))
    assert source.folder == sharded
    assert source.config == {"model_type": "llama"}
    assert source.shards == [FIRST, SECOND]
    assert source.tensors["embed.weight"] == TensorInfo(FIRST, (32, 8), "BF16")
    assert source.tensors["norm.weight"] == TensorInfo(SECOND, (8,), "BF16")
    assert source.tensors["layers.0.down.weight"].nbytes == 8 * 16 * 2
    assert set(source.tensors) == set(tensors())
    assert source.nbytes() == sum(value.nbytes for value in tensors().values())
    names = ["norm.weight", "embed.weight", "layers.0.down.weight"]
    read = source.read(names)
    assert set(read) == set(names)
    for name, value in read.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, tensors()[name])
    assert source.read([]) == {}


def test_single_file(tmp_path: Path) -> None:
    source = open_source(str(write_single(tmp_path)))
    assert source.shards == ["model.safetensors"]
    assert {name: info.shard for name, info in source.tensors.items()} == dict.fromkeys(tensors(), "model.safetensors")


def test_index_before_single_file(sharded: Path) -> None:
    """Where both are there, the index decides."""
    save_file({"other": torch.zeros(2, 2)}, sharded / "model.safetensors")
    assert set(open_source(str(sharded)).tensors) == set(tensors())


def test_other_stem(tmp_path: Path) -> None:
    write_single(tmp_path)
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "lowbit.safetensors")
    assert set(Source(tmp_path, "lowbit").tensors) == {"x"}
    assert index_name() == "model.safetensors.index.json"
    assert index_name("lowbit") == "lowbit.safetensors.index.json"
    assert shard_name(1, 2) == FIRST
    assert shard_name(12, 345, "lowbit") == "lowbit-00012-of-00345.safetensors"


def test_read_is_a_copy(tmp_path: Path) -> None:
    """What was read stays when the file is overwritten in place, and changing it does not change the file."""
    source = open_source(str(write_single(tmp_path)))
    value = source.read(["norm.weight"])["norm.weight"]
    value += 1
    kept = source.read(["norm.weight"])["norm.weight"]
    assert torch.equal(kept, tensors()["norm.weight"])
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.write(bytes(size))
    assert torch.equal(kept, tensors()["norm.weight"])


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(tmp_path / "models" / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("~/models/a").folder == tmp_path / "models" / "a"


# -------------------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    """Cut inside the length, the header or the data."""
    path = sharded / SECOND
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    refused(sharded, str(path), "truncated or not a safetensors file", "fetch this file again")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] - 5) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b"BF16", b"XX16"),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        lambda data: data + b"more",
    ],
)
def test_corrupt_header(sharded: Path, damage: Callable[[bytes], bytes]) -> None:
    path = sharded / FIRST
    path.write_bytes(damage(path.read_bytes()))
    refused(sharded, str(path), "truncated or not a safetensors file", "fetch this file again")


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, f"1 of 2 shards are missing: {SECOND}")


def test_absent_tensor(sharded: Path) -> None:
    """The index names a tensor that no shard has."""
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layers.1.up.weight"] = SECOND
    write_json(path, index)
    refused(sharded, f"says layers.1.up.weight is in {SECOND}, but it is not there", f"fetch {SECOND} again")


def test_duplicate_tensor(sharded: Path) -> None:
    values = {name: value for name, value in tensors().items() if name.startswith("layers")}
    save_file(values | {"norm.weight": torch.zeros(8)}, sharded / SECOND)
    refused(sharded, f"tensor layers.0.up.weight is in both {FIRST} and {SECOND}")


def test_index_that_is_not_json(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {')
    refused(sharded, "model.safetensors.index.json is not valid JSON", "the shard index")


def test_index_without_map(sharded: Path) -> None:
    write_json(sharded / "model.safetensors.index.json", {"metadata": {}})
    refused(sharded, "model.safetensors.index.json")


def test_damaged_after_opening(sharded: Path) -> None:
    """A shard that changes under the reader is an error with its name, not a crash."""
    source = open_source(str(sharded))
    path = sharded / FIRST
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read .*; fetch this file again"):
        source.read(["embed.weight"])
    assert torch.equal(source.read(["norm.weight"])["norm.weight"], tensors()["norm.weight"])
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read"):
        source.read(["embed.weight"])


# ------------------------------------------------------------------------------------------------------ other refusals
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, "pickled weights (*.bin) only, which lowbit never loads", "save_pretrained")


def test_pickled_weights_beside_others(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert open_source(str(tmp_path)).shards == ["model.safetensors"]


def test_no_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "has no model.safetensors and no model.safetensors.index.json")


def test_missing_config(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    refused(sharded, "config.json is missing: the model's configuration")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": \xff}', b"<html>"])
def test_bad_config(sharded: Path, content: bytes) -> None:
    (sharded / "config.json").write_bytes(content)
    refused(sharded, "config.json is not valid JSON", "the model's configuration")


@pytest.mark.parametrize("content", ["[]", "3", '"quantization_config"'])
def test_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        read_json(path, "the model's configuration")


@pytest.mark.parametrize(("quantization", "method"), [({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "unknown")])
def test_quantized_already(tmp_path: Path, quantization: dict[str, Any], method: str) -> None:
    write_single(tmp_path, quantization_config=quantization)
    refused(tmp_path, f"is quantized already ({method}), which lowbit cannot dequantize; quantize the original")
    assert Source(tmp_path).config["quantization_config"] == quantization


def test_not_quantized(tmp_path: Path) -> None:
    """Some programs write the key with null."""
    write_single(tmp_path, quantization_config=None)
    assert open_source(str(tmp_path)).dtype() == torch.bfloat16


def test_folder_has_no_revision(sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"is a local folder, which has no revisions; leave out --revision v1\.0$"):
        open_source(str(sharded), revision="v1.0")


@pytest.mark.parametrize("model", ["no/such/folder", "/no/such/folder", "a b"])
def test_neither_folder_nor_hub_id(model: str) -> None:
    with pytest.raises(ValueError, match=f"^{model} is neither a folder nor a hub id such as org/name$"):
        open_source(model)


def test_hub_out_of_reach() -> None:
    """The tests have no network."""
    with pytest.raises(ValueError, match=r"^no-such-org/no-such-model is not a local folder, and the hub did not deliver it: "):
        open_source("no-such-org/no-such-model", revision="main")


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub's client fetched is opened; the revision is passed on, and pickles are not fetched."""
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(write_single(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("org/name", revision="abc")
    assert source.folder == tmp_path / "snapshot"
    assert (asked["model"], asked["revision"]) == ("org/name", "abc")
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "modeling_x.py", "weights.pkl"):
        assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name
    for name in (FIRST, "model.safetensors.index.json", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name


# --------------------------------------------------------------------------------------------------------------- dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """That of most bytes in matrices; vectors and a few small matrices do not count."""
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    values = tensors(dtype=dtype) | {"gate": torch.zeros(4, 4, dtype=other), "bias": torch.zeros(5000, dtype=other)}
    values["positions"] = torch.arange(4000)
    assert open_source(str(write_single(tmp_path, values))).dtype() == dtype


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ({"a": torch.zeros(8, 8, dtype=torch.int8)}, "I8"),
        ({"a": torch.zeros(8, 8, dtype=torch.float64)}, "F64"),
        ({"a": torch.zeros(8)}, "none"),
    ],
)
def test_dtype_refused(tmp_path: Path, values: dict[str, Tensor], stored: str) -> None:
    source = open_source(str(write_single(tmp_path, values)))
    with pytest.raises(ValueError, match=f"weights are stored as {stored}; lowbit quantizes BF16, F16 and F32 checkpoints"):
        source.dtype()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float8_e5m2, torch.uint32]
)
def test_bytes_of_a_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.zeros(3, 5, dtype=dtype)
    source = Source(write_single(tmp_path, {"a": value, "scalar": torch.zeros((), dtype=dtype)}))
    assert source.tensors["a"].nbytes == value.nbytes
    assert source.tensors["scalar"].nbytes == value.element_size()


def test_dtype_of_another_kind(tmp_path: Path) -> None:
    source = Source(write_single(tmp_path, {"a": torch.ones(8, 8).to(torch.float8_e8m0fnu)}))
    with pytest.raises(ValueError, match="weights are stored as F8_E8M0"):
        source.dtype()


# ---------------------------------------------------------------------------------------------------------- side files
def test_side_files(sharded: Path) -> None:
    """Everything but config, weights of any program, their indexes and hidden files; folders keep their place."""
    wanted = [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "modules/1_Pooling/config.json",
        "original/params.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    unwanted = [
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
        "original/.hidden/file.txt",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "rank0.pt",
        "last.ckpt",
    ]
    for name in wanted + unwanted:
        path = sharded / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (sharded / "assets").mkdir()
    found = open_source(str(sharded)).side_files()
    assert [path.relative_to(sharded).as_posix() for path in found] == sorted(wanted)


def test_side_files_of_the_hub(tmp_path: Path) -> None:
    """A snapshot in the hub's cache, which is hidden and has links to the blobs beside it."""
    repository = tmp_path / ".cache" / "models--org--name"
    folder = write_single(repository / "snapshots" / "123")
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("x")
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    (folder / "more").mkdir()
    (folder / "more" / "vocab.txt").symlink_to("../../../blobs/abc")
    (tmp_path / "link").symlink_to(folder)
    assert open_source(str(folder)).side_files() == [folder / "more" / "vocab.txt", folder / "tokenizer.json"]
    assert len(open_source(str(tmp_path / "link")).side_files()) == 2
    (folder / "more" / "stolen").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(ValueError, match=r"more/stolen is a link to .*/secret, outside the model's folder"):
        open_source(str(folder)).side_files()


def test_side_files_are_no_links(tmp_path: Path) -> None:
    """Within the folder they may be; elsewhere not, whatever the folder around is called; broken ones are nothing."""
    folder = write_single(tmp_path / "snapshots" / "model")
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "broken.txt").symlink_to("nothing")
    assert [path.name for path in open_source(str(folder)).side_files()] == ["a.txt", "b.txt"]
    (tmp_path / "blobs.txt").write_text("x")
    (folder / "c.txt").symlink_to("../../blobs.txt")
    with pytest.raises(ValueError, match=r"c\.txt is a link to "):
        open_source(str(folder)).side_files()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "more/x.jinja", "linked"])
def test_pipes_are_not_opened(tmp_path: Path, name: str) -> None:
    """Opening one would wait for a writer for ever."""
    folder = write_single(tmp_path / "model")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name == "linked":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        os.mkfifo(path)
    refused(folder, f"{name} is a pipe, not a file; remove it")


def test_devices_are_not_opened(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model")
    (folder / "vocab.txt").symlink_to("/dev/zero")
    refused(folder, "vocab.txt is a device, not a file")


def test_a_folder_for_a_file(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "config.json is a folder, not a file")


@pytest.mark.parametrize(
    "name", ["../elsewhere/x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "a\0b", "x" * 300]
)
def test_an_index_names_files_of_its_folder(sharded: Path, name: str) -> None:
    index = sharded / index_name()
    weights = json.loads(index.read_text())["weight_map"]
    write_json(index, {"weight_map": weights | {"norm.weight": name}})
    refused(sharded, f"names the shard {name[:60]!r}; allowed are names of files in its folder")


def test_an_index_may_name_a_folder_within(sharded: Path) -> None:
    index = sharded / index_name()
    weights = json.loads(index.read_text())["weight_map"]
    (sharded / "more").mkdir()
    (sharded / SECOND).rename(sharded / "more" / SECOND)
    write_json(index, {"weight_map": {k: f"more/{v}" if v == SECOND else v for k, v in weights.items()}})
    assert torch.equal(open_source(str(sharded)).read(["norm.weight"])["norm.weight"], tensors()["norm.weight"])


@pytest.fixture
def nobody() -> Iterator[None]:
    """Not to be root, who may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def open_to_all(tmp_path: Path) -> None:
    """Let any user into a folder of pytest's."""
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(0o755)
        if folder.name.startswith("pytest-of-"):
            return


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_unreadable(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    """What may not be read is not called damaged."""
    folder = write_single(tmp_path / "model")
    open_to_all(tmp_path)
    (folder / name).chmod(0)
    request.getfixturevalue("nobody")
    refused(folder, f"{name} cannot be read (Permission denied)")


def test_unreadable_side_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Found when the run starts, not when it ends."""
    folder = write_single(tmp_path / "model")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "README.md").touch(mode=0)
    open_to_all(tmp_path)
    request.getfixturevalue("nobody")
    with pytest.raises(ValueError, match=r"README.md cannot be read"):
        open_source(str(folder)).side_files()


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' + "[" * 150 + "]" * 150 + "}"], ids=["far", "some"])
def test_deep_json(tmp_path: Path, text: str) -> None:
    """Python's own reader, or whoever walks through the value, runs out of stack."""
    folder = write_single(tmp_path / "model")
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "")
    with pytest.raises(ValueError, match=r"config.json (is nested more than 100 levels deep|is not valid JSON)"):
        read_json(folder / "config.json", "x")


def test_deeper_than() -> None:
    assert not deeper_than({"a": [1, {"b": 2}]}, 3) and deeper_than({"a": [1, {"b": 2}]}, 2)
    assert not deeper_than(1, 0) and deeper_than([], 0)


@pytest.mark.parametrize("value", ["text", {"quant_method": "x"}, ["a"]])
def test_quantized_however_described(tmp_path: Path, value: Any) -> None:
    refused(write_single(tmp_path, quantization_config=value), "is quantized already")


def test_a_folder_with_the_mark_of_the_own_format(tmp_path: Path) -> None:
    (write_single(tmp_path) / "lowbit.json").write_text("{}")
    refused(tmp_path, "is quantized already (it has lowbit.json)")


# --------------------------------------------------------------------------------------------------------- fingerprint
def test_fingerprint_of_a_copy(sharded: Path, tmp_path: Path) -> None:
    """The place, the time and the files beside the weights do not matter."""
    before = open_source(str(sharded)).fingerprint()
    copy = tmp_path / "elsewhere"
    shutil.copytree(sharded, copy, copy_function=shutil.copyfile)
    (copy / "README.md").write_text("new")
    assert open_source(str(copy)).fingerprint() == before
    assert set(before) == {"config.json", FIRST, SECOND}
    assert json.loads(json.dumps(before)) == before


def test_fingerprint_of_another_weight(sharded: Path) -> None:
    """One weight of one shard: that shard's print changes, and no other."""
    before = open_source(str(sharded)).fingerprint()
    for shard, names in ((FIRST, list(tensors())[:2]), (SECOND, list(tensors())[2:])):
        for name in names:
            for place in (0, -1):
                values = {key: tensors()[key].clone() for key in names}
                save_file(values, sharded / shard)
                assert open_source(str(sharded)).fingerprint() == before
                values[name].view(-1)[place] += 1
                save_file(values, sharded / shard)
                after = open_source(str(sharded)).fingerprint()
                assert {key for key in before if before[key] != after[key]} == {shard}
        save_file({key: tensors()[key] for key in names}, sharded / shard)


def test_fingerprint_of_another_config(sharded: Path) -> None:
    before = open_source(str(sharded)).fingerprint()
    write_json(sharded / "config.json", {"model_type": "llama", "rope_theta": 5})
    after = open_source(str(sharded)).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"config.json"}


def test_fingerprint_of_other_names(tmp_path: Path) -> None:
    """The same bytes under another tensor name are another model."""
    before = open_source(str(write_single(tmp_path, {"a": torch.ones(4, 4)}))).fingerprint()
    after = open_source(str(write_single(tmp_path, {"b": torch.ones(4, 4)}))).fingerprint()
    assert before["model.safetensors"] != after["model.safetensors"]


@pytest.mark.parametrize("place", [0, 1000, 2**21 + 77_777, 4 * 2**20 - 1])
def test_fingerprint_of_a_large_shard(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte counts, also where tensors are hashed in several chunks."""
    monkeypatch.setattr(source_module, "_CHUNK", 2**20)
    values = {name: torch.zeros(1024, 1024, dtype=torch.uint8) for name in "abcd"}
    before = open_source(str(write_single(tmp_path, values))).fingerprint()
    values["abcd"[place // 2**20]].view(-1)[place % 2**20] = 1
    after = open_source(str(write_single(tmp_path, values))).fingerprint()
    assert before["model.safetensors"] != after["model.safetensors"]


def test_fingerprint_of_a_tokenizer(sharded: Path) -> None:
    """It is of the files that decide about tokens, as they were when it was first asked for."""
    source = open_source(str(sharded))
    before = source.fingerprint()
    (sharded / "tokenizer.json").write_text("{}")
    assert source.fingerprint() == before
    assert open_source(str(sharded)).fingerprint().keys() - before.keys() == {"tokenizer.json"}


# ------------------------------------------------------------------------------------------------------- a changed model
def swapped(folder: Path, name: str) -> None:
    """Another value for a tensor, in a shard of the same size."""
    mine = next(names for names in (list(tensors())[:2], list(tensors())[2:]) if name in names)
    values = {key: tensors()[key].clone() for key in mine}
    values[name].view(-1)[-1] += 1
    save_file(values, folder / (FIRST if name in list(tensors())[:2] else SECOND))


def test_a_tensor_that_is_read_again_is_the_same(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hashed once, and again only when its shard was touched; another one is refused."""
    hashed: list[str] = []
    plain = source_module._tensor_hashes
    monkeypatch.setattr(source_module, "_tensor_hashes", lambda found: hashed.extend(found) or plain(found))
    source = open_source(str(sharded))
    name, other = list(tensors())[:2]
    source.read([name])
    assert hashed == []  # only where it is asked for
    source.track()
    for _ in range(3):
        source.read([name])
    assert hashed == [name]
    (sharded / FIRST).touch()
    source.read([name, other])
    assert hashed == [name, name, other]
    swapped(sharded, name)
    assert torch.equal(source.read([other])[other], tensors()[other])
    with pytest.raises(ValueError, match=f"{FIRST}: tensor {name} is not what it was when it was read before"):
        source.read([name])


def test_changes_of_a_model(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what was known in another process: a copy and a touch are the same model, a weight, a name and the tokenizer are
    not; an untouched shard is not read."""
    known = json.loads(json.dumps(open_source(str(sharded)).contents()))
    names = list(tensors())
    assert set(known["tensors"]) == set(names)
    read: list[str] = []
    plain = source_module._tensor_hashes
    monkeypatch.setattr(source_module, "_tensor_hashes", lambda found: read.extend(found) or plain(found))
    assert open_source(str(sharded)).changes(known) == [] and read == []
    (sharded / SECOND).touch()
    touched = open_source(str(sharded))
    assert touched.changes(known) == [] and set(read) == set(names[2:])
    read.clear()
    touched.read(names)
    assert touched.contents()["tensors"] == known["tensors"] and read == []  # known, so not hashed again
    copy = Path(shutil.copytree(sharded, tmp_path / "copy", copy_function=shutil.copyfile))
    assert open_source(str(copy)).changes(known) == []
    swapped(copy, names[2])
    assert open_source(str(copy)).changes(known) == [names[2]]
    assert open_source(str(copy)).changes(known | {"tensors": known["tensors"] | {"gone": ""}}) == ["gone", names[2]]
    opened = open_source(str(sharded))
    opened.track()
    write_json(sharded / "config.json", {"model_type": "llama", "rope_theta": 5})
    (sharded / "tokenizer.json").write_text("{}")
    assert opened.changes(known) == ["config.json", "tokenizer.json"]
