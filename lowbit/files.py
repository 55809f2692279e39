"""Files that appear under their name whole or not at all, whenever the process is killed: JSON and safetensors."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = ".tmp"
_LONGEST = 240  # bytes of an output's name, which leaves room for ".partial" and the like in the 255 of file systems
_MOST = 2**28  # bytes of a JSON file: enough for that of any model
_STEM = 100  # characters of the file's name that its temporary name has, so that that is not too long
_TEMPORARY_NAME = re.compile(r"(.+)\.[0-9a-f]{16}" + re.escape(TEMPORARY), re.DOTALL)


def check_name(path: Path) -> None:
    """Refuse the path of an output that no file system would take.

    Raises:
        ValueError: a name in it is too long, endings of temporary names included.
    """
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST:
            raise ValueError(f"{part[:40]}... has {len(os.fsencode(part))} bytes; allowed are names of at most {_LONGEST}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file to write to; when the block ends well, it is flushed to disk and renamed to `path`.

    The file is new and its name cannot be guessed, so that nobody can put a link there. It ends in `TEMPORARY`, and is removed
    when the block raises. Its permissions are what the umask leaves, whatever the writer sets. A link at `path` is replaced.
    """
    temporary = path.with_name(f"{path.name[:_STEM]}.{secrets.token_hex(8)}{TEMPORARY}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)  # a new one: safetensors replaces the file
        try:
            os.fchmod(handle, mode)
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def permanent_name(name: str) -> str:
    """The name of the file that a temporary one of `replacing` was to become, its first `_STEM` characters; other names as they
    are."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found[1] if found else name


def is_temporary(path: Path, names: Collection[str]) -> bool:
    """Whether `path` is a temporary file of `replacing` for one of these file names."""
    found = _TEMPORARY_NAME.fullmatch(path.name)
    return found is not None and found[1] in {name[:_STEM] for name in names}


def read_small(path: Path) -> str:
    """The text of a file, in UTF-8.

    Raises:
        OSError: there is none, or it is a pipe, a device or a folder, or larger than any JSON file of a checkpoint.
        ValueError: it is not UTF-8.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which does not wait for the writer of a pipe
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST:
            raise OSError(errno.EINVAL, f"not a regular file of at most {_MOST >> 20} MiB", str(path))
        with os.fdopen(handle, encoding="utf-8", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove what killed processes had written in part of the files in `folder` whose whole names match a regular expression.

    Only for files that no other process is writing now.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        known = permanent_name(path.name)
        if known != path.name and re.fullmatch(pattern, known) and path.is_file():
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, marked as PyTorch's as transformers expects."""
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def save_sealed(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, with a hash of their content by which `load_sealed` finds damage."""
    given = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(given, temporary, metadata={"sha256": _content_hash(given)})


def load_sealed(path: Path) -> dict[str, Tensor] | None:
    """What `save_sealed` wrote; None where the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        return None
    return tensors if _content_hash(tensors) == expected else None


def _content_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
