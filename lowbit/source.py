"""Lazy reading of a Hugging Face checkpoint: safetensors shards, config, and the files beside them.

A `Source` knows every tensor's place, shape and dtype from the shard headers and reads tensors only when asked. Nothing is kept
open between reads, so no memory-mapped page outlives the call that needed it. Pickled checkpoints are refused. Weights that
others quantized are dequantized as they are read (`dequantize`).
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.files import read_small, sha256_of

STEM = "model"  # shards are STEM.safetensors, or STEM-00001-of-00003.safetensors listed in STEM.safetensors.index.json
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "C64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32}
_DTYPE_BITS |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
_DTYPE_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DEEPEST = 100  # levels of a JSON file: enough for any configuration, too few to exhaust Python's stack
_LONGEST = 255  # bytes of a file's name that file systems take
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# What a tokenizer is made of; which of them there are depends on its kind.
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_CHUNK = 2**28  # bytes of tensors that are hashed at a time
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
        stored: every tensor of every shard, by name.
        tensors: every tensor that `read` gives, by name; the stored ones, where a subclass shows no others.
        quantization: how others quantized the checkpoint, in words; None if no one did.
        overrides: what the model's configuration must say instead of config.json.
        trust_remote_code: whether Python code of the folder may run, for a model or a tokenizer that transformers lacks.
        identities: size, times and inode of every shard when it was opened; see `track`.
        unrounded: tensors that may be read in a wider dtype than is stored; of use where weights were rewritten.
    """

    def __init__(self, folder: Path, stem: str = STEM, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.config: dict[str, Any] = read_json(folder / "config.json", "the model's configuration")
        _check_special(folder)  # walks through all folders: not before this is known to be a model
        self._index = folder / index_name(stem)
        self.shards = _shards(folder, stem)
        self.identities = {shard: _identity(folder / shard) for shard in self.shards}
        self._hashes: dict[str, str] | None = None  # of tensors, while they are tracked
        self._files: dict[str, str] = {}
        self.overrides: dict[str, Any] = {}
        self.unrounded: frozenset[str] = frozenset()
        self.quantization: str | None = None
        self.stored: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in _headers(folder, shard).items():
                if name in self.stored:
                    raise ValueError(f"{folder}: tensor {name} is in both {self.stored[name].shard} and {shard}")
                self.stored[name] = info
        self.tensors = self.stored
        self._check_index()

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read the named tensors in the dtype that `tensors` says.

        Raises:
            ValueError: a tensor cannot be read (a truncated or damaged shard), or is tracked and has changed.
        """
        return self.read_stored(names)

    def read_stored(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors as they are stored; see `read`."""
        out: dict[str, Tensor] = {}
        for shard, wanted in self._by_shard(names).items():
            found = self._stored(shard, wanted)
            if self._hashes is not None:
                self._check(shard, found)
            out |= found
        return out

    def _by_shard(self, names: Iterable[str]) -> dict[str, list[str]]:
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.stored[name].shard, []).append(name)
        return by_shard

    def _stored(self, shard: str, names: list[str]) -> dict[str, Tensor]:
        try:
            with safe_open(self.folder / shard, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / shard} cannot be read ({error}); fetch this file again") from error

    def track(self, known: dict[str, Any] | None = None) -> None:
        """From now on, keep the hash of every stored tensor that is read, and refuse one that is read again and is another one.

        A tensor whose hash is known is hashed again only if the size, the times or the inode of its shard are others by then.

        Args:
            known: what `contents` gave for this folder, in another process.
        """
        self._hashes = dict(known["tensors"]) if known else {}
        self.identities |= known["shards"] if known else {}
        self._files = self._hashed_files()

    def contents(self) -> dict[str, Any]:
        """What tells this model from any other, as JSON: "tensors", their hashes, and "shards", see `identities`.

        Tensors that were not read yet are read for it.
        """
        if self._hashes is None:
            self.track()
        assert self._hashes is not None
        self._hashes |= self._hashed(name for name in self.stored if name not in self._hashes)
        return {"shards": dict(self.identities), "tensors": dict(self._hashes)}

    def files(self) -> dict[str, str]:
        """SHA-256 of config.json, the tokenizer's files and Python code, as they were when `track` was called."""
        self._files = self._files or self._hashed_files()
        return dict(self._files)

    def changes(self, known: dict[str, Any]) -> list[str]:
        """The tensors that are not what they were when `contents` gave `known`, are new or gone; and the changed `files`.

        Tensors are read again only from shards whose size, times or inode changed. Where there is no change, the tensors
        are tracked from now on, with these hashes.
        """
        hashes: dict[str, str] = known["tensors"]
        now = {shard: _identity(self.folder / shard) for shard in self.shards}
        changed = sorted(hashes.keys() ^ self.stored.keys())
        suspect = [name for name in hashes if name in self.stored]
        suspect = [name for name in suspect if known["shards"].get(shard := self.stored[name].shard) != now[shard]]
        changed += [name for name, found in self._hashed(suspect).items() if found != hashes[name]]
        files = self._hashed_files()
        changed += sorted(name for name in files.keys() | self.files().keys() if files.get(name) != self._files.get(name))
        if not changed:
            self.identities, self._hashes = now, dict(hashes)
        return changed

    def _check(self, shard: str, found: dict[str, Tensor]) -> None:
        """Compare tensors that were just read with their hashes, or keep these."""
        assert self._hashes is not None
        same = _identity(self.folder / shard) == self.identities[shard]
        unsure = {name: tensor for name, tensor in found.items() if not (same and name in self._hashes)}
        for name, found_hash in _tensor_hashes(unsure).items():
            if self._hashes.setdefault(name, found_hash) != found_hash:
                raise ValueError(
                    f"{self.folder / shard}: tensor {name} is not what it was when it was read before, so the model has "
                    "changed; put the model back as it was and run the same command again, or start anew with --overwrite"
                )

    def _hashed(self, names: Iterable[str]) -> dict[str, str]:
        """The hashes of tensors, which are in memory a few at a time."""
        hashes: dict[str, str] = {}
        for shard, wanted in self._by_shard(names).items():
            for chunk in self._chunks(wanted):
                hashes |= _tensor_hashes(self._stored(shard, chunk))
        return hashes

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        size = 0
        for name in names:
            size += self.stored[name].nbytes
            if chunk and size > _CHUNK:
                yield chunk
                chunk, size = [], self.stored[name].nbytes
            chunk.append(name)
        yield chunk

    def _hashed_files(self) -> dict[str, str]:
        names = sorted(path.name for path in self.folder.iterdir() if path.suffix == ".py" or path.name in TOKENIZER_FILES)
        return {name: sha256_of(self.folder / name) for name in ("config.json", *names) if (self.folder / name).is_file()}

    def nbytes(self) -> int:
        """Bytes of all tensors as `read` gives them."""
        return sum(info.nbytes for info in self.tensors.values())

    def stored_bytes(self) -> int:
        """Bytes of all tensors in the shards."""
        return sum(info.nbytes for info in self.stored.values())

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
        """Hashes that tell two models apart: of `files`, and for each shard of all its tensors with their names.

        It is that of what was read, if the tensors are tracked; those that were not read yet are read for it.
        """
        hashes = self.contents()["tensors"]
        prints = self.files()
        for shard in self.shards:
            names = sorted(name for name, info in self.stored.items() if info.shard == shard)
            prints[shard] = hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in names).encode()).hexdigest()
        return prints

    def _check_index(self) -> None:
        if not self._index.exists():
            return
        for name, shard in _weight_map(self._index).items():
            if name not in self.stored:
                raise ValueError(f"{self._index} says {name} is in {shard}, but it is not there; fetch {shard} again")


def open_source(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """Open a local folder, or fetch a hub id ("org/name", optionally at `revision`) into the hub's cache and open that.

    Weights that others quantized are dequantized as they are read; `dequantize` has what is known.

    Args:
        trust_remote_code: let the Python code in the folder or repository run, with the rights of this process, where
            transformers does not know the model or its tokenizer itself.

    Raises:
        ValueError: no such folder or hub model, no safetensors weights, missing, truncated or damaged files, or a model
            that is quantized in another way.
    """
    from lowbit.dequantize import dequantized  # which imports this module

    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision, [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS)
    elif revision is not None:
        raise ValueError(f"{model} is a local folder, which has no revisions; leave out --revision {revision}")
    if (folder / "lowbit.json").exists():
        raise ValueError(f"{model} is quantized already (it has lowbit.json); quantize the original checkpoint instead")
    return dequantized(Source(folder, trust_remote_code=trust_remote_code), model)


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
        raise ValueError(f"{path} is {_kind_of(path)}, not a file; remove it: {what}")
    try:
        value = json.loads(read_small(path))
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


def _is_special(path: Path) -> bool:
    """Whether something that can be looked at is neither a file nor a folder."""
    try:
        return stat.S_IFMT(path.stat().st_mode) in _SPECIAL
    except OSError:
        return False


def _check_special(folder: Path) -> None:
    """Refuse pipes, sockets and devices, which lowbit or a library would open and wait for, or read without an end."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and _is_special(path):
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


def _identity(path: Path) -> list[int]:
    """What is another after a file was written or replaced: size, times and inode."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _tensor_hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of dtype, shape and content by name; several at a time, since hashing lets other threads run."""
    if not tensors:
        return {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_tensor_hash, tensors.values()), strict=True))


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
