"""Files that are whole or absent, whatever happens while they are written."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lowbit.files import TEMPORARY, replacing, write_json


def test_replacing_writes(tmp_path: Path) -> None:
    """Nothing under the name before the end; then the new content, and nothing else in the folder."""
    path = tmp_path / "model.safetensors"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.name == "model.safetensors" + TEMPORARY
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_keeps_the_old_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_replacing_and_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    """The exception gets out, the old file stays, and no file appears where none was; the next attempt is undisturbed."""
    old, absent = tmp_path / "old", tmp_path / "absent"
    old.write_bytes(b"old")
    for path in (old, absent):
        with pytest.raises(error), replacing(path) as temporary:
            temporary.write_bytes(b"half of what was to be wri")
            raise error
    assert old.read_bytes() == b"old"
    assert not absent.exists()
    with replacing(old) as temporary:
        temporary.write_bytes(b"new")
    assert old.read_bytes() == b"new"


def test_replacing_nothing_written(tmp_path: Path) -> None:
    """A block that writes nothing does not make a file, and leaves the old one."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_bytes() == b"old"


def test_replacing_flushes_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the file, then the name, then the folder: after a power cut the name stands for the old or the new content."""
    path = tmp_path / "a"
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle: int) -> None:
        events.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"flush {os.fstat(handle).st_size} bytes")
        fsync(handle)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    with replacing(path) as temporary:
        temporary.write_bytes(b"12345")
    assert events == ["flush 5 bytes", "rename to a", "flush folder"]


def test_replacing_lets_others_read(tmp_path: Path) -> None:
    """Whatever the permissions with which the writer creates files."""
    path = tmp_path / "a"
    with replacing(path) as temporary:
        temporary.touch(mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "value", [{}, {"a": [1, 2.5, None, True], "ü": {"nested": "Größe\n|"}}, [1, "x"], "text", None, 1.25e-300, 2**63]
)
def test_json(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("\n")
    assert list(tmp_path.iterdir()) == [path]


def test_json_of_something_else(tmp_path: Path) -> None:
    """A value that is not JSON is refused, and the old file stays."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": Path("b")})
    assert json.loads(path.read_text()) == {"a": 1}
