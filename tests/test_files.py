"""Files that are whole or absent, whatever happens while they are written."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.files import TEMPORARY, remove_unfinished, replacing, save_shard, write_json, write_text


def test_replacing_writes(tmp_path: Path) -> None:
    """Nothing under the name before the end; then the new content, and nothing else in the folder."""
    path = tmp_path / "model.safetensors"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("model.safetensors.") and temporary.name.endswith(TEMPORARY)
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
    assert list(tmp_path.iterdir()) == [old]
    with replacing(old) as temporary:
        temporary.write_bytes(b"new")
    assert old.read_bytes() == b"new"


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


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_replacing_obeys_the_umask(tmp_path: Path, umask: int) -> None:
    """Whatever the permissions with which the writer creates files, and those of the file before."""
    path, shard = tmp_path / "a", tmp_path / "shard"
    path.touch(mode=0o640)
    before = os.umask(umask)
    try:
        with replacing(path) as temporary:
            temporary.chmod(0o600)
        save_shard({"x": torch.zeros(2)}, shard)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, shard)] == [0o666 & ~umask] * 2


def test_replacing_follows_no_link(tmp_path: Path) -> None:
    """A link at the name is replaced; a link at the temporary name is never written through, and left alone."""
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("precious")
    victim.chmod(0o600)
    path.symlink_to(victim)
    guess = tmp_path / ("a" + TEMPORARY)
    guess.symlink_to(victim)
    write_json(path, {})
    assert not path.is_symlink() and json.loads(path.read_text()) == {}
    assert victim.read_text() == "precious" and stat.S_IMODE(victim.stat().st_mode) == 0o600 and guess.is_symlink()


def test_replacing_refuses_a_taken_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody guesses it."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0")
    (tmp_path / f"a.0{TEMPORARY}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a", {})
    assert victim.read_text() == "precious" and (tmp_path / f"a.0{TEMPORARY}").is_symlink()


def test_replacing_a_long_name(tmp_path: Path) -> None:
    """As long as the file system allows."""
    path = tmp_path / ("x" * 250 + ".json")
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "Größe\n")
    assert (tmp_path / "a").read_bytes() == "Größe\n".encode()


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


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """Of the named files alone; what is called alike is somebody else's."""
    left = f"plan.toml.{'0a' * 8}{TEMPORARY}"
    others = ("plan.toml", f"other.toml.{'0a' * 8}{TEMPORARY}", f"plan.toml{TEMPORARY}", f"plan.toml.x{TEMPORARY}")
    for name in (left, *others):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path, r"plan\.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
