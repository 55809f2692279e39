"""Lazy reading of a Hugging Face checkpoint: safetensors shards, config, and the files beside them.

A `Source` knows every tensor's place, shape and dtype from the shard headers and reads tensors only when asked. Nothing is kept
open between reads, so no memory-mapped page outlives the call that needed it. Pickled checkpoints are refused. Weights that
others quantized are dequantized as they are read (`Dequantized`).
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.adapter import FOLDER as ADAPTER
from lowbit.dequantize import Packing, packing_of

STEM = "model"  # shards are STEM.safetensors, or STEM-00001-of-00003.safetensors listed in STEM.safetensors.index.json
_DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "C64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32}
_DTYPE_BITS |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
_DTYPE_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
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
        stored: every tensor of every shard, by name.
        tensors: every tensor that `read` gives, by name; the stored ones, where a subclass shows no others.
        quantization: how others quantized the checkpoint, in words; None if no one did.
        overrides: what the model's configuration must say instead of config.json.
        unrounded: tensors that may be read in a wider dtype than is stored; of use where weights were rewritten.
    """

    def __init__(self, folder: Path, stem: str = STEM) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json", "the model's configuration")
        self._index = folder / index_name(stem)
        self.shards = _shards(folder, stem)
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
            ValueError: a tensor cannot be read (a truncated or damaged shard).
        """
        return self.read_stored(names)

    def read_stored(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors as they are stored; see `read`."""
        out: dict[str, Tensor] = {}
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.stored[name].shard, []).append(name)
        for shard, wanted in by_shard.items():
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name in wanted:
                        out[name] = file.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / shard} cannot be read ({error}); fetch this file again") from error
        return out

    def nbytes(self) -> int:
        """Bytes of all tensors as `read` gives them."""
        return sum(info.nbytes for info in self.tensors.values())

    def stored_bytes(self) -> int:
        """Bytes of all tensors in the shards."""
        return sum(info.nbytes for info in self.stored.values())

    def side_files(self) -> list[Path]:
        """Every file beside the weights: tokenizer, chat template, generation config, README ... (not config.json)."""
        skip = {"config.json", *self.shards}
        weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
        found = []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            foreign = path.name.endswith(weights) or path.name.endswith(".index.json")
            if path.is_file() and not hidden and not foreign and str(relative) not in skip:
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
            if name not in self.stored:
                raise ValueError(f"{self._index} says {name} is in {shard}, but it is not there; fetch {shard} again")


class Dequantized(Source):
    """A checkpoint that others quantized, shown as a float one: weights are dequantized as they are read."""

    def __init__(self, plain: Source, packing: Packing) -> None:
        self.__dict__.update(plain.__dict__)
        self.plain = plain
        self.quantization = packing.words
        self._packing = packing
        dtype = next(name for name, each in FLOAT_DTYPES.items() if each == packing.dtype)
        parts = {part for packed in packing.weights.values() for part in packed.parts.values()}
        self.tensors = {name: info for name, info in self.stored.items() if name not in parts | packing.dropped}
        for name, packed in packing.weights.items():
            shard = self.stored[next(iter(packed.parts.values()))].shard
            self.tensors[name] = TensorInfo(shard, packed.shape, dtype)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors, dequantized where they are quantized."""
        weights = self._packing.weights
        out = self.read_stored([name for name in names if name not in weights])
        for name in names:
            if name in weights:
                stored = self.read_stored(list(weights[name].parts.values()))
                given = {part: stored[each] for part, each in weights[name].parts.items()}
                out[name] = weights[name].decode(given).to(self._packing.dtype)
        return out


def open_source(model: str, revision: str | None = None) -> Source:
    """Open a local folder, or fetch a hub id ("org/name", optionally at `revision`) into the hub's cache and open that.

    Weights that others quantized are dequantized as they are read; `dequantize` has what is known.

    Raises:
        ValueError: no such folder or hub model, no safetensors weights, missing, truncated or damaged files, or a model
            that is quantized in another way.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(model, revision)
    elif revision is not None:
        raise ValueError(f"{model} is a local folder, which has no revisions; leave out --revision {revision}")
    source = Source(folder)
    packing = packing_of(model, source.config, source.stored, source.read_stored)
    if packing is None:
        return source
    if (folder / ADAPTER / "adapter_config.json").exists():
        raise ValueError(
            f"{model} is quantized with a low-rank adapter beside it ({ADAPTER}/); quantize the original checkpoint"
        )
    return Dequantized(source, packing)


def _fetch(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise ValueError(f"{model} is neither a folder nor a hub id such as org/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{model} is not a local folder, and the hub did not deliver it: {str(error).splitlines()[0]}"
        ) from error


def index_name(stem: str = STEM) -> str:
    """The file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def shard_name(number: int, count: int, stem: str = STEM) -> str:
    """The usual name of shard `number` (from 1) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file as a dict; ValueError, saying what the file is, when it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {what}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: {what}")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index, "the shard index").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to shards; fetch it again")
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
