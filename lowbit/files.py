"""Files that appear under their name whole or not at all, whenever the process is killed: JSON and safetensors."""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = ".tmp"
_STEM = 100  # characters of the file's name that its temporary name has, so that that is not too long


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
    _sync_folder(path.parent)


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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
