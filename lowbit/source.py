"""Lazy reading of a Hugging Face checkpoint: safetensors shards, config, and the files beside them.

A `Source` knows every tensor's place, shape and dtype from the shard headers and reads tensors only when asked. Nothing is kept
open between reads, so no memory-mapped page outlives the call that needed it. Pickled checkpoints are refused.
"""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

STEM = "model"  # shards are STEM.safetensors, or STEM-00001-of-00003.safetensors listed in STEM.safetensors.index.json
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "C64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32}
_DTYPE_BITS |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
_DTYPE_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DEEPEST = 100  # levels of a JSON file: enough for any configuration, too few to exhaust Python's stack
_LONGEST = 255  # bytes of a file's name that file systems take
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_SAMPLES = 16  # places in every shard that the fingerprint reads
_SAMPLE_BYTES = 65536
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; dtype as safetensors spells it ("BF16", "F32", ...)."""

    shard: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the shard."""
        return math.prod(self.shape) * _DTYPE_BITS[self.dtype] // 8


class Source:
    """A checkpoint folder, opened for reading.

    Attributes:
        folder: the local folder.
        config: config.json as a dict.
        tensors: every tensor of every shard, by name.
        overrides: what the model's configuration must say instead of config.json.
        trust_remote_code: whether Python code of the folder may run, for a model or a tokenizer that transformers lacks.
        unrounded: tensors that may be read in a wider dtype than is stored; of use where weights were rewritten.
    """

    def __init__(self, folder: Path, stem: str = STEM, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        _check_special(folder)
        self.config: dict[str, Any] = read_json(folder / "config.json", "the model's configuration")
        self._index = folder / index_name(stem)
        self.shards = _shards(folder, stem)
        self.overrides: dict[str, Any] = {}
        self.unrounded: frozenset[str] = frozenset()
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in _headers(folder, shard).items():
                if name in self.tensors:
                    raise ValueError(f"{folder}: tensor {name} is in both {self.tensors[name].shard} and {shard}")
                self.tensors[name] = info
        self._check_index()

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors in their stored dtype.

        Raises:
            ValueError: a tensor cannot be read (a truncated or damaged shard).
        """
        out: dict[str, Tensor] = {}
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.tensors[name].shard, []).append(name)
        for shard, wanted in by_shard.items():
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name in wanted:
                        out[name] = file.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / shard} cannot be read ({error}); fetch this file again") from error
        return out

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def side_files(self) -> list[Path]:
        """Every file beside the weights: tokenizer, chat template, generation config, README ... (not config.json).

        Raises:
            ValueError: a file cannot be read, or is a link to what is neither in the folder nor in the hub's cache of this
                model. Side files are copied, so a link could have any file of this machine published with the output.
        """
        skip = {"config.json", *self.shards}
        weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
        found = []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            foreign = path.name.endswith(weights) or path.name.endswith(".index.json")
            if path.is_file() and not hidden and not foreign and str(relative) not in skip:
                _check_copied(self.folder, path)
                found.append(path)
        return found

    def dtype(self) -> torch.dtype:
        """The dtype of most weights, which the quantized checkpoint keeps for scales and float tensors.

        Raises:
            ValueError: the weights are not bfloat16, float16 or float32.
        """
        count: dict[str, int] = {}
        for info in self.tensors.values():
            if len(info.shape) >= 2:
                count[info.dtype] = count.get(info.dtype, 0) + math.prod(info.shape)
        most = max(count, key=lambda name: count[name], default="none")
        if most not in FLOAT_DTYPES:
            raise ValueError(f"{self.folder}: weights are stored as {most}; lowbit quantizes BF16, F16 and F32 checkpoints")
        return FLOAT_DTYPES[most]

    def fingerprint(self) -> dict[str, str]:
        """Hashes that tell two models apart without reading all of them: config, and each shard's header and samples."""
        config = (self.folder / "config.json").read_bytes()
        prints = {"config.json": hashlib.sha256(config).hexdigest()}
        for shard in self.shards:
            prints[shard] = _sampled_hash(self.folder / shard)
        return prints

    def _check_index(self) -> None:
        if not self._index.exists():
            return
        for name, shard in _weight_map(self._index).items():
            if name not in self.tensors:
                raise ValueError(f"{self._index} says {name} is in {shard}, but it is not there; fetch {shard} again")


def open_source(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Open a local folder, or fetch a hub id ("org/name", optionally at `revision`) into the hub's cache and open that.

    Args:
        trust_remote_code: let the Python code in the folder or repository run, with the rights of this process, where
            transformers does not know the model or its tokenizer itself.

    Raises:
        ValueError: no such folder or hub model, no safetensors weights, missing, truncated or damaged files, or a model
            that is quantized already.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision, [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS)
    elif revision is not None:
        raise ValueError(f"{model} is a local folder, which has no revisions; leave out --revision {revision}")
    if (folder / "lowbit.json").exists():
        raise ValueError(f"{model} is quantized already (it has lowbit.json); quantize the original checkpoint instead")
    source = Source(folder, trust_remote_code=trust_remote_code)
    if described := source.config.get("quantization_config"):
        method = described.get("quant_method", "unknown") if isinstance(described, dict) else described
        raise ValueError(f"{model} is quantized already ({method}); quantize the original checkpoint instead")
    return source


def _fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"{model} is neither a folder nor a hub id such as org/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{model} is not a local folder, and the hub did not deliver it: {str(error).splitlines()[0]}"
        ) from error


def refused_code(file: Path) -> ValueError:
    """The error for a config.json or tokenizer_config.json whose `auto_map` names code that may not run."""
    code = ", ".join(sorted(set(_references(read_json(file, "a configuration of the model").get("auto_map")))))
    return ValueError(
        f"{file} asks for Python code that is not part of transformers ({code}); lowbit does not run it unless you give "
        "--trust-remote-code (in Python trust_remote_code=True); it then has your rights, so do that only for sources you trust"
    )


def _references(auto_map: Any) -> Iterator[str]:
    """The classes that an `auto_map` names, as "file.Class" or "org/name--file.Class"."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, (dict, list)):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(value)


def index_name(stem: str = STEM) -> str:
    """The file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def shard_name(number: int, count: int, stem: str = STEM) -> str:
    """The usual name of shard `number` (from 1) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file as a dict; ValueError, saying what the file is, when it is missing, unreadable or damaged."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {what}")
    if not path.is_file():
        raise ValueError(f"{path} is {_kind_of(path)}, not a file: {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {what}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: {what}")
    if deeper_than(value, _DEEPEST):
        raise ValueError(f"{path} is nested more than {_DEEPEST} levels deep: {what}")
    return value


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and dicts in `value` are nested in more levels; found without recursion."""
    inner = [value]
    for _ in range(levels):
        inner = [
            each
            for outer in inner
            if isinstance(outer, (dict, list))
            for each in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(each, (dict, list)) for each in inner)


def in_short(error: BaseException) -> str:
    """What an error of a library says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _kind_of(path: Path) -> str:
    return _SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "a folder")


def _check_special(folder: Path) -> None:
    """Refuse pipes, sockets and devices, which lowbit or a library would open and wait for, or read without an end."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.exists() and not path.is_file():
                raise ValueError(f"{path} is {_kind_of(path)}, not a file; remove it from the folder")


def _check_copied(folder: Path, path: Path) -> None:
    """Refuse a side file that is elsewhere or unreadable. In the hub's cache files are links to blobs beside the snapshots."""
    root, place = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not place.is_relative_to(root) and place.parent != blobs:
        raise ValueError(
            f"{path} is a link to {place}, outside the model's folder, and would be copied into the output; put the file "
            "itself there, or remove the link"
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), but is to be copied into the output; allow it") from error


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index, "the shard index").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to shards; fetch it again")
    for name in dict.fromkeys(found.values()):
        path = PurePosixPath(name)
        long = any(len(os.fsencode(part)) > _LONGEST for part in path.parts)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or long:
            raise ValueError(f"{index} names the shard {name[:60]!r}; allowed are names of files in its folder; fetch it again")
    return found


def _shards(folder: Path, stem: str) -> list[str]:
    index = folder / index_name(stem)
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
        return names
    if (folder / f"{stem}.safetensors").exists():
        return [f"{stem}.safetensors"]
    if any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has pickled weights (*.bin) only, which lowbit never loads; save them as safetensors first "
            "(transformers: model.save_pretrained)"
        )
    raise ValueError(f"{folder} has no {stem}.safetensors and no {index.name}")


def _headers(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = folder / shard
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); allow it, or fetch this file again") from error
    try:
        with safe_open(path, framework="pt") as file:
            infos = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                view = file.get_slice(name)
                infos[name] = TensorInfo(shard, tuple(view.get_shape()), view.get_dtype())
            return infos
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch this file again") from error


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header = struct.unpack("<Q", file.read(8))[0]
        digest.update(file.read(header))
        for i in range(_SAMPLES):
            file.seek(8 + header + (size - 8 - header) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
