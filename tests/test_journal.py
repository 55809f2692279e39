"""What a run keeps, and that nothing is lost: names that are taken, damage, models that change, kills while publishing."""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowbit import journal, reconstruct, run
from lowbit.data import DataSpec
from lowbit.files import load_sealed, save_sealed
from lowbit.journal import differences, place_of, working_folder
from lowbit.planner import plan
from lowbit.recipe import Recipe, Rule, Step
from lowbit.run import quantize
from lowbit.source import open_source
from lowbit.unit import Unit

DATA = DataSpec(source="random", rows=2, length=16)
SHORT: dict[str, Any] = {"scheme": "w4a16-g32", "data": DATA}
OTHER: dict[str, Any] = {"scheme": "w8a16-g32", "data": DATA}
CORRECTED: dict[str, Any] = {"scheme": "w3a16-g32", "method": "rtn+lorc", "format": "lowbit", "data": DATA}
WHOLE: dict[str, Any] = {
    "scheme": "w4a16-g32",
    "method": "rtn+end_to_end",
    "options": {"end_to_end.steps": 3, "end_to_end.batch": 2},
    "data": DataSpec(source="random", rows=4, length=16),
}
REPORTS = {"report.json", "report.md", "report.html"}
BLOCK_1 = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """No bars of libraries."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be read only."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny.save("llama", folder, dtype=torch.bfloat16, seed=4)
    tiny.save_tokenizer(folder)
    (folder / "README.md").write_text("a model\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "table.json").write_text("{}")
    return folder


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "own-llama"))


@pytest.fixture(scope="module")
def result(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """The files of an uninterrupted run."""
    made: dict[str, dict[str, str]] = {}

    def get(what: dict[str, Any] = SHORT) -> dict[str, str]:
        if str(what) not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            quantize(str(llama), out, **what)
            made[str(what)] = content(out)
        return made[str(what)]

    return get


def content(folder: Path) -> dict[str, str]:
    """Hashes of every file but the reports, which tell times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in REPORTS
    }


def notes_of(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "report.json").read_text())["notes"]
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stopped(BaseException):
    """Thrown by a test in the middle of a run."""


def stopped(model: Path, out: Path, block: int = 2, **what: Any) -> Path:
    """Run until `block` begins; returns the unfinished folder."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == block:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(str(model), out, progress=progress, **(what or SHORT))
    return out.with_name(out.name + ".partial")


def refused(model: Path, out: Path, *parts: str, **what: Any) -> str:
    with pytest.raises(ValueError) as caught:
        quantize(str(model), out, **(SHORT | what))
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def at(stage: str, act: Callable[[], Any], done: int = 0) -> Callable[[str, int, int], None]:
    """A progress callback that acts once, at a stage."""
    left = [act]

    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (stage, done) and left:
            left.pop()()

    return progress


def killed(act: Callable[[], Any], when: Callable[[str, list[str]], bool]) -> None:
    """Act in a child that is killed right before it renames, removes or makes what `when` says."""
    pid = os.fork()
    if pid == 0:

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event.startswith(("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and when(event, [*map(str, given)]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            act()
        finally:
            os._exit(7)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are solved from now on."""
    found: list[int] = []

    class Counted(Unit):
        def __init__(self, arch: Any, block: Any, *rest: Any, **more: Any) -> None:
            found.append(block.index)
            super().__init__(arch, block, *rest, **more)

    monkeypatch.setattr(run, "Unit", Counted)
    return found


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that cannot be renamed or replaced, as where a disk is mounted."""
    out = tmp_path / "out"
    out.mkdir()
    plain, rename = os.path.ismount, os.rename

    def moved(source: Any, target: Any, **more: Any) -> None:
        if str(out) in (str(source), str(target)):
            raise OSError(16, "Device or resource busy")
        rename(source, target, **more)

    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out) or plain(path))
    monkeypatch.setattr(os, "rename", moved)
    return out


# -------------------------------------------------------------------------------------------------------------- its name


def test_a_name_that_is_taken_meanwhile(
    llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """What lies there at the end stays; the result is kept, and gets its name without being solved again."""
    out = tmp_path / "out"

    def taken() -> None:
        out.mkdir()
        (out / "notes.txt").write_text("mine")

    parts = ("exists and is not empty", "finished and kept in", "out.partial", "at once")
    refused(llama, out, *parts, progress=at("checking the output", taken))
    assert names_in(out) == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"
    refused(llama, out, "exists and is not empty", "out.partial holds a checkpoint that was finished for this name")
    refused(llama, out, "has no report.json of lowbit", overwrite=True)
    assert names_in(out) == ["notes.txt"]
    out.rename(tmp_path / "mine")
    solved.clear()
    report = quantize(str(llama), out, **SHORT)
    assert solved == [] and content(out) == result() and report == json.loads((out / "report.json").read_text())
    assert names_in(tmp_path) == ["mine", "out"]


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_name_that_something_else_takes(
    what: str, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    out = tmp_path / "out"
    take = (lambda: out.write_text("mine")) if what == "file" else (lambda: out.symlink_to(tmp_path / "nowhere"))
    refused(llama, out, "finished and kept in", progress=at("checking the output", take))
    assert out.read_text() == "mine" if what == "file" else out.is_symlink()
    out.unlink()
    quantize(str(llama), out, **SHORT)
    assert content(out) == result()


def test_a_finished_result_that_is_damaged_is_not_published(
    llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    out = tmp_path / "out"
    refused(llama, out, "finished and kept", progress=at("checking the output", out.touch))
    out.unlink()
    flip(next(tmp_path.joinpath("out.partial").glob("*.safetensors")))
    with pytest.warns(UserWarning, match="was damaged"):
        quantize(str(llama), out, **SHORT)
    assert content(out) == result()


def test_two_runs_to_one_name(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second, which had found nothing there when it began, does not replace the result of the first."""
    out = tmp_path / "out"
    plain = run.open_journal

    def late(*given: Any) -> Any:
        monkeypatch.setattr(run, "open_journal", plain)
        quantize(str(llama), out, **OTHER)
        return plain(*given)

    monkeypatch.setattr(run, "open_journal", late)
    refused(llama, out, "exists and is not empty")
    assert json.loads((out / "report.json").read_text())["linears"][0]["scheme"] == "w8a16-g32"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_other_names_are_not_touched(kind: str, llama: Path, tmp_path: Path) -> None:
    """A backup beside it stays, whether there is an older result to replace or not."""
    out, backup, elsewhere = tmp_path / "out", tmp_path / "out.old", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "folder":
        backup.mkdir()
        (backup / "backup.txt").write_text("precious")
    elif kind == "file":
        backup.write_text("precious")
    else:
        backup.symlink_to(elsewhere)
    for _ in range(2):
        quantize(str(llama), out, overwrite=True, **SHORT)
        assert names_in(tmp_path) == ["elsewhere", "out", "out.old"]
        if kind != "link":
            assert (backup / "backup.txt" if kind == "folder" else backup).read_text() == "precious"


# ------------------------------------------------------------------------------------------------------------- overwriting


@pytest.fixture
def older(llama: Path, tmp_path: Path) -> Path:
    """The result of an earlier run, at `out`."""
    quantize(str(llama), tmp_path / "out", **OTHER)
    return tmp_path / "out"


@pytest.mark.parametrize("what", ["file", "deep file", "empty folder", "link", "edited", "no report", "older lowbit"])
def test_overwrite_replaces_nothing_else(what: str, llama: Path, older: Path) -> None:
    """Only a folder of which the report lists every file; else an error names what it is, before the work."""
    report = json.loads((older / "report.json").read_text())
    named = {"deep file": "extra/mine.txt", "empty folder": "mine/", "edited": "README.md (it was changed)"}.get(what, "mine")
    if what == "file":
        (older / "mine").write_text("precious")
    elif what == "deep file":
        (older / "extra" / "mine.txt").write_text("precious")
    elif what == "empty folder":
        (older / "mine").mkdir()
    elif what == "link":
        (older / "mine").symlink_to(llama)
    elif what == "edited":
        (older / "README.md").write_text("my words")
    elif what == "no report":
        (older / "report.json").rename(older / "mine")
        named = "has no report.json of lowbit"
    else:
        del report["files"]
        (older / "report.json").write_text(json.dumps(report))
        named = "does not say which files are its own"
    before = content(older)
    said: list[str] = []
    refused(llama, older, named, "move", overwrite=True, progress=lambda stage, done, total: said.append(stage))
    assert content(older) == before and said == [] and not older.with_name("out.partial").exists()


def test_overwrite_an_evaluated_result(llama: Path, older: Path, result: Callable[..., dict[str, str]]) -> None:
    """What `eval` writes is lowbit's own."""
    from lowbit.report import add_evaluation

    row = dict.fromkeys(("source", "window", "stride", "bos", "reference_perplexity", "kl", "top1_agreement"))
    add_evaluation(older, row | {"windows": 1, "tokens": 1, "perplexity": 2.0})
    quantize(str(llama), older, overwrite=True, **SHORT)
    assert content(older) == result() and names_in(older.parent) == ["out"]


def test_what_appears_in_an_older_result(
    llama: Path, older: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """A file that is put there during the run stays where it is, with the older result around it."""
    before = content(older)

    def put() -> None:
        (older / "mine.txt").write_text("precious")

    refused(llama, older, "mine.txt", "finished and kept in", overwrite=True, progress=at("checking the output", put))
    assert content(older) == before | {"mine.txt": hashlib.sha256(b"precious").hexdigest()}
    (older / "mine.txt").unlink()
    solved.clear()
    quantize(str(llama), older, overwrite=True, **SHORT)
    assert content(older) == result() and solved == [] and names_in(older.parent) == ["out"]


def test_what_appears_at_the_last_moment(llama: Path, older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last look at the older result, before it is moved away."""
    before, plain = content(older), Path.rename

    def rename(self: Path, target: Any) -> Path:
        if self == older:
            (older / "mine.txt").write_text("precious")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    refused(llama, older, "mine.txt", "finished and kept in", overwrite=True)
    assert content(older) == before | {"mine.txt": hashlib.sha256(b"precious").hexdigest()}
    assert names_in(older.parent) == ["out", "out.partial"]


@pytest.mark.parametrize("then", ["same", "other", "another with overwrite"])
def test_killed_between_two_renames(
    then: str, llama: Path, older: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """The older result is not under its name then; the next run puts it back or replaces it, and leaves nothing beside."""
    before = content(older)
    killed(
        lambda: quantize(str(llama), older, overwrite=True, **SHORT),
        lambda event, given: event == "os.rename" and given[0].endswith("out.partial"),
    )
    assert not older.exists() and len(names_in(older.parent)) == 2
    if then == "same":
        quantize(str(llama), older, overwrite=True, **SHORT)
        assert content(older) == result() and solved == []
    elif then == "other":
        refused(llama, older, "exists and is not empty", **OTHER)
        assert content(older) == before and names_in(older.parent) == ["out", "out.partial"]
        return
    else:
        quantize(str(llama), older, overwrite=True, **CORRECTED)
        assert content(older) == result(CORRECTED)
    assert names_in(older.parent) == ["out"]


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("last", ["first", "job.json", "lock", ".work"])
def test_killed_behind_the_last_rename(
    last: str, replacing: bool, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """The same command only cleans up; another says that there is a result."""
    out = tmp_path / "out"
    if replacing:
        quantize(str(llama), out, **OTHER)
    what = SHORT | {"overwrite": replacing}

    def when(event: str, given: list[str]) -> bool:
        mine = event in ("os.remove", "os.rmdir") and str(out) in given[0] and not (tmp_path / "out.partial").exists()
        return mine and (last == "first" or given[0].endswith(last))

    killed(lambda: quantize(str(llama), out, **what), when)
    assert (out / ".work").is_dir() and (out / "config.json").exists()
    solved.clear()
    refused(llama, out, "exists and is not empty", **OTHER)
    report = quantize(str(llama), out, **what)
    assert report == json.loads((out / "report.json").read_text()) and solved == []
    assert content(out) == result() and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("last", [*range(8)])
def test_killed_again_while_it_cleans_up(last: int, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    """At the first removals of the second run, which only cleans up: the third leaves nothing."""
    out, seen = tmp_path / "out", [0]
    killed(
        lambda: quantize(str(llama), out, **SHORT),
        lambda event, given: event == "os.remove" and given[0].startswith(str(out / ".work")),
    )

    def when(event: str, given: list[str]) -> bool:
        seen[0] += event in ("os.remove", "os.rmdir")
        return seen[0] > last

    killed(lambda: quantize(str(llama), out, **SHORT), when)
    assert (out / ".work").is_dir()
    quantize(str(llama), out, **SHORT)
    assert content(out) == result() and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("last", ["written", "lock"])
def test_killed_while_text_of_the_model_is_removed(last: str, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is left beside the result, and text that is still there is not written again."""
    out = tmp_path / "out"
    what = {"scheme": "w4a16-g32", "method": "gptq", "data": DataSpec(source="self", rows=2, length=12)}

    def when(event: str, given: list[str]) -> bool:
        mine = event == "os.remove" and str(out / ".work") in given[0]
        return mine and (
            last in given[0] if last == "lock" else any((out / ".work").glob("written-*")) and "written" in given[0]
        )

    killed(lambda: quantize(str(llama), out, **what), when)
    assert any((out / ".work").glob("written-*"))
    with monkeypatch.context() as patch:
        patch.setattr("lowbit.run.written_tokens", lambda *given, **more: pytest.fail("written again"))
        quantize(str(llama), out, **what)
    assert names_in(tmp_path) == ["out"] and not (out / ".work").exists()


def test_killed_when_text_of_the_model_was_removed(llama: Path, tmp_path: Path) -> None:
    """It is written again to find out that all is done, and nothing of it stays."""
    out = tmp_path / "out"
    what = {"scheme": "w4a16-g32", "method": "gptq", "data": DataSpec(source="self", rows=2, length=12)}
    killed(
        lambda: quantize(str(llama), out, **what),
        lambda event, given: event == "os.rmdir" and given[0] == str(out / ".work"),
    )
    assert (out / ".work").is_dir() and not any((out / ".work").iterdir())
    quantize(str(llama), out, **what)
    assert names_in(tmp_path) == ["out"] and not (out / ".work").exists()


def test_killed_behind_the_last_rename_and_replaced(llama: Path, tmp_path: Path) -> None:
    """By another command with --overwrite, which finishes the first before it begins."""
    out = tmp_path / "out"
    quantize(str(llama), out, **CORRECTED)
    killed(
        lambda: quantize(str(llama), out, overwrite=True, **SHORT),
        lambda event, given: event == "os.remove" and "replaced" in given[0],
    )
    assert len(names_in(tmp_path)) == 2
    quantize(str(llama), out, overwrite=True, **OTHER)
    assert names_in(tmp_path) == ["out"] and not (out / ".work").exists()
    assert json.loads((out / "report.json").read_text())["linears"][0]["scheme"] == "w8a16-g32"


# ------------------------------------------------------------------------------------------------- mount points and links


def test_mount_point(
    mounted: Path, llama: Path, result: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is done inside, on the disk that is mounted; twice, because the second replaces the first."""
    asked: list[Path] = []
    plain = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or plain(path))
    (mounted / "lost+found").mkdir()
    for what in (SHORT, CORRECTED, SHORT):
        quantize(str(llama), mounted, overwrite=what is not SHORT or len(asked) > 0, **what)
        (mounted / "lost+found").rmdir()
        assert content(mounted) == result(what) and names_in(mounted.parent) == ["out"]
        assert not any(path.is_dir() and not any(path.iterdir()) for path in mounted.rglob("*"))
        (mounted / "lost+found").mkdir()
    assert {path for path in asked if path.is_relative_to(mounted.parent)} == {mounted / ".partial"}
    refused(llama, mounted, "exists and is not empty")


def test_folder_whose_parent_is_not_writable(
    llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: path != tmp_path and plain(path, mode, **more))
    partial = tmp_path / "out" / ".partial"
    with pytest.raises(Stopped):
        quantize(str(llama), tmp_path / "out", progress=at("quantizing", lambda: (_ for _ in ()).throw(Stopped), 2), **SHORT)
    assert names_in(tmp_path / "out") == [".partial"]
    monkeypatch.setattr(os, "access", plain)  # what was begun there is gone on with there
    assert place_of(tmp_path / "out").folder == partial
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result() and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_while_files_are_moved_up(
    replacing: bool, llama: Path, mounted: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """At every step: what loads is whole, and the next run, whichever it is, finishes."""
    what = SHORT | {"overwrite": replacing}
    if replacing:
        quantize(str(llama), mounted, **CORRECTED)
    moving = mounted / ".partial" / ".work" / "moving.json"

    def begins(event: str, given: list[str]) -> bool:
        return moving.exists() and event in ("os.rename", "os.remove") and str(mounted) in given[0]

    killed(lambda: quantize(str(llama), mounted, **what), begins)
    kept = Path(shutil.copytree(mounted, mounted.with_name("kept")))
    steps = [1, 2, 3, *range(5, 100, 4)]
    for step in steps:
        shutil.rmtree(mounted)
        shutil.copytree(kept, mounted)
        count = 0

        def when(event: str, given: list[str]) -> bool:
            nonlocal count
            count += event in ("os.rename", "os.remove", "os.rmdir") and str(mounted) in given[0]
            return count == step  # noqa: B023 (called before the next step)

        try:
            killed(lambda: quantize(str(llama), mounted, **what), when)
        except AssertionError:
            break
        if (mounted / "config.json").exists():
            found = content(mounted).items()
            assert result().items() <= found or (replacing and result(CORRECTED).items() <= found)
        if step % 3 == 0:
            refused(llama, mounted, "exists and is not empty", **OTHER)
        solved.clear()
        quantize(str(llama), mounted, **what)
        assert content(mounted) == result() and names_in(mounted) == sorted({name.split("/")[0] for name in result()} | REPORTS)
        assert solved == []
    assert step > 15


def test_link_to_a_folder_elsewhere(
    llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result lies on the disk of the folder that the link names, and the link stays."""
    elsewhere = tmp_path / "large-disk" / "folder"
    elsewhere.mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(elsewhere)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=10**9))
    quantize(str(llama), out, **SHORT)
    assert asked == [tmp_path / "large-disk" / "folder.partial"]
    assert out.is_symlink() and content(elsewhere) == result()
    quantize(str(llama), out, overwrite=True, **SHORT)
    assert out.is_symlink() and names_in(tmp_path / "large-disk") == ["folder"] and names_in(tmp_path) == ["large-disk", "out"]


def test_partial_folder_that_is_a_link(llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "elsewhere") == result()


def test_name_that_is_too_long(llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path / ("x" * 300), "has 300 bytes; allowed are names of at most 240")


# ----------------------------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize("name", ["extra.safetensors", "model-00009-of-00009.safetensors", "deep/x.txt", "x.tmp/", ".work/x"])
def test_files_that_no_run_wrote(name: str, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    """Beside unfinished work they are named, and neither removed nor published."""
    partial = stopped(llama, tmp_path / "out")

    def put() -> None:
        path = partial / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("precious")

    put()
    before = content(partial)
    for overwrite in (False, True):
        refused(llama, tmp_path / "out", "holds", name if "deep" not in name else "deep/", "ove it away", overwrite=overwrite)
        assert content(partial) == before and (partial / name).exists()
    path = partial / name
    shutil.rmtree(path.parent if "deep" in name else path) if "/" in name and name != ".work/x" else path.unlink()
    refused(llama, tmp_path / "out", "holds what this run did not write", progress=at("checking the output", put))
    assert (partial / name).exists() and not (tmp_path / "out").exists()
    shutil.rmtree(path.parent if "deep" in name else path) if "/" in name and name != ".work/x" else path.unlink()
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result()


def test_a_folder_work_of_something_else(llama: Path, tmp_path: Path) -> None:
    """That OUT.partial has a folder .work does not make it one of lowbit's."""
    (tmp_path / "out.partial" / ".work").mkdir(parents=True)
    (tmp_path / "out.partial" / ".work" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        refused(
            llama, tmp_path / "out", "holds something else", overwrite=overwrite, data=DataSpec(source="self", rows=2, length=8)
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["out.partial", ".work", "thesis.tex"]


@pytest.mark.parametrize("name", ["report.json", "report.html", "adapter/adapter_config.json"])
def test_files_of_the_model_that_are_called_as_lowbits(
    name: str, own_llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    """They are left out, and the report says so."""
    (own_llama / name).parent.mkdir(exist_ok=True)
    (own_llama / name).write_text('{"lowbit": "0", "files": {}}')
    with pytest.warns(UserWarning, match=f"{name} is left out"):
        quantize(str(own_llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result()
    assert len(notes_of(tmp_path / "out")) == 1 and name in (tmp_path / "out" / "report.md").read_text()


def test_file_that_the_model_has_no_longer(own_llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    """It was copied before the kill, and is not in the result."""
    (own_llama / "old").mkdir()
    (own_llama / "old" / "notes.txt").write_text("old")
    with pytest.raises(Stopped):
        quantize(str(own_llama), tmp_path / "out", progress=at("checking the output", stop), **SHORT)
    assert (tmp_path / "out.partial" / "old" / "notes.txt").exists()
    shutil.rmtree(own_llama / "old")
    quantize(str(own_llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result() and not (tmp_path / "out" / "old").exists()


def test_file_of_the_model_that_cannot_be_read(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is written."""
    plain = Path.open

    def locked(self: Path, *given: Any, **more: Any) -> Any:
        if self.name == "table.json":
            raise PermissionError(13, "Permission denied")
        return plain(self, *given, **more)

    monkeypatch.setattr(Path, "open", locked)
    refused(llama, tmp_path / "out", "extra/table.json", "cannot be read (Permission denied)")
    assert names_in(tmp_path) == []


def test_mistakes_leave_nothing_behind(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small, or a scheme that does not fit, is found before there is any work to keep."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(llama, tmp_path / "out", "1.00 kB are free, but up to ", " kB are needed")
    monkeypatch.undo()
    refused(llama, tmp_path / "out", "do not divide", scheme="w4a16-g48")
    assert names_in(tmp_path) == []


# -------------------------------------------------------------------------------------------------------- a changed model


def change(folder: Path, tensor: str = BLOCK_1) -> Path:
    """Another value in the middle of a tensor; returns the file that was changed."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = Path(folder / index["weight_map"][tensor])
    tensors = load_file(shard)
    flat = tensors[tensor].view(-1)
    flat[len(flat) // 2] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard


@pytest.mark.parametrize("tensor", [BLOCK_1, "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_model_that_changed_before_it_goes_on(
    tensor: str, own_llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    """Refused with the names of the tensors; put back, it goes on."""
    partial = stopped(own_llama, tmp_path / "out")
    shard = own_llama / open_source(str(own_llama)).tensors[tensor].shard
    whole, before = shard.read_bytes(), content(partial)
    change(own_llama, tensor)
    refused(own_llama, tmp_path / "out", "another model", f"{tensor} changed", "Put the model back", "--overwrite")
    assert content(partial) == before
    shard.write_bytes(whole)
    quantize(str(own_llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result() and notes_of(tmp_path / "out") == []


def test_changed_model_and_overwrite(own_llama: Path, tmp_path: Path) -> None:
    stopped(own_llama, tmp_path / "out")
    change(own_llama)
    quantize(str(own_llama), tmp_path / "out", overwrite=True, **SHORT)
    quantize(str(own_llama), tmp_path / "fresh", **SHORT)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("how", ["copy", "touch"])
def test_same_model_elsewhere(
    how: str, own_llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], solved: list[int]
) -> None:
    """A copy of the model and one with new times are gone on with."""
    stopped(own_llama, tmp_path / "out")
    model = own_llama
    if how == "copy":
        model = Path(shutil.copytree(own_llama, tmp_path / "copy", copy_function=shutil.copyfile))
    else:
        for path in own_llama.glob("*.safetensors"):
            path.touch()
    solved.clear()
    quantize(str(model), tmp_path / "out", **SHORT)
    assert solved == [2] and content(tmp_path / "out") == result()


@pytest.mark.parametrize(
    ("stage", "done", "tensor"),
    [("quantizing", 1, BLOCK_1), ("checking the output", 1, "model.layers.0.mlp.up_proj.weight")],
    ids=["before it is read again", "after it was read"],
)
def test_model_that_changes_during_the_run(
    stage: str, done: int, tensor: str, own_llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    shard = own_llama / open_source(str(own_llama)).tensors[tensor].shard
    whole = shard.read_bytes()
    refused(own_llama, tmp_path / "out", tensor, "hanged", progress=at(stage, lambda: change(own_llama, tensor), done))
    assert not (tmp_path / "out").exists()
    refused(own_llama, tmp_path / "out", tensor, "hanged")
    shard.write_bytes(whole)
    report = quantize(str(own_llama), tmp_path / "out", **SHORT)
    assert content(tmp_path / "out") == result()
    assert report["model"]["fingerprint"] == open_source(str(own_llama)).fingerprint()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_configuration_that_changes_during_the_run(name: str, own_llama: Path, tmp_path: Path) -> None:
    def edit() -> None:
        (own_llama / name).write_text((own_llama / name).read_text() + "\n")

    refused(own_llama, tmp_path / "out", f"has changed while it was quantized: {name}", progress=at("quantizing", edit, 1))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- a damaged journal


def flip(path: Path) -> None:
    """Another last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def braces(path: Path) -> None:
    path.write_text("{}")


def half(path: Path) -> None:
    path.write_text("{")


def edited(path: Path) -> None:
    """A digit of a number."""
    text = path.read_text()
    at = text.index('"error": 0.') + len('"error": 0.')
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def huge(path: Path) -> None:
    os.truncate(path, 2**40)


DAMAGES = [
    ("model-00001-of-00004.safetensors", Path.unlink, 0),
    ("model-00001-of-00004.safetensors", flip, 0),
    ("model-00002-of-00004.safetensors", truncate, 0),
    (".work/hidden-00002", flip, 0),
    (".work/hidden-00002", truncate, 0),
    (".work/hidden-00002", Path.unlink, 0),
    (".work/block-00000.json", braces, 0),
    (".work/block-00000.json", emptied, 0),
    (".work/block-00001.json", half, 0),
    (".work/block-00001.json", edited, 0),
    (".work/block-00000.json", Path.unlink, 0),
    (".work/job.json", emptied, 0),
    (".work/job.json", half, 0),
    (".work/job.json", Path.unlink, 0),
    (".work/model.json", half, 0),
    (".work/model.json", Path.unlink, 0),
    (".work/model.json", endless, 0),
    (".work/model.json", pipe, 0),
    (".work/job.json", pipe, 0),
    (".work/block-00001.json", huge, 0),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("name", "damage", "first"), DAMAGES, ids=[f"{d[1].__name__}-{d[0].lstrip('.')}" for d in DAMAGES])
def test_damage_heals(
    name: str,
    damage: Callable[[Path], None],
    first: int,
    overwrite: bool,
    llama: Path,
    tmp_path: Path,
    result: Callable[..., dict[str, str]],
    solved: list[int],
) -> None:
    """What was damaged is solved again, the result is the same to the bit, and the user is told, at once and in the report."""
    partial = stopped(llama, tmp_path / "out")
    damage(partial / name)
    solved.clear()
    with pytest.warns(UserWarning, match=rf"out.partial was damaged \({name} (is|cannot)"):
        quantize(str(llama), tmp_path / "out", overwrite=overwrite, **SHORT)
    assert solved == [*range(first, 3)] and content(tmp_path / "out") == result()
    (note,) = notes_of(tmp_path / "out")
    assert name in note and note in (tmp_path / "out" / "report.md").read_text()


def test_the_last_good_boundary(
    llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]], solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where hidden states before the damage are still there, blocks are solved again from those on."""
    from lowbit.unit import Stream

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "drop", lambda self, boundary: None)  # as if killed before
        partial = stopped(llama, tmp_path / "out")
    flip(partial / "model-00002-of-00004.safetensors")
    solved.clear()
    with pytest.warns(UserWarning, match="so block 1 and what follows is solved again"):
        quantize(str(llama), tmp_path / "out", **SHORT)
    assert solved == [1, 2] and content(tmp_path / "out") == result()


def test_a_note_outlives_a_kill(llama: Path, tmp_path: Path) -> None:
    partial = stopped(llama, tmp_path / "out")
    flip(partial / "model-00001-of-00004.safetensors")
    with pytest.warns(UserWarning, match="was damaged"):
        stopped(llama, tmp_path / "out")
    quantize(str(llama), tmp_path / "out", **SHORT)
    assert len(notes_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", [".work/correction-00001.safetensors", "lowbit-00002-of-00004.safetensors"])
def test_damaged_corrections(name: str, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    partial = stopped(llama, tmp_path / "out", **CORRECTED)
    flip(partial / name)
    with pytest.warns(UserWarning, match="was damaged"):
        quantize(str(llama), tmp_path / "out", **CORRECTED)
    assert content(tmp_path / "out") == result(CORRECTED)


@pytest.mark.parametrize("name", ["head.safetensors", "logits.safetensors", "block-00003.json"])
def test_a_damaged_head(name: str, tmp_path: Path, solved: list[int]) -> None:
    """It alone is solved again."""
    tiny.save("llama_untied", tmp_path / "model", dtype=torch.bfloat16, seed=4)
    rules = (Rule(match="", scheme="w4a16-g32"),)
    what = {"recipe": Recipe(rules=rules, steps=(Step(method="gptq"),), data=DATA)}
    quantize(str(tmp_path / "model"), tmp_path / "whole", **what)
    with pytest.raises(Stopped):
        quantize(str(tmp_path / "model"), tmp_path / "out", progress=at("checking the output", stop), **what)
    flip(tmp_path / "out.partial" / ".work" / name)
    solved.clear()
    with pytest.warns(UserWarning, match="so block 3 and what follows is solved again"):
        quantize(str(tmp_path / "model"), tmp_path / "out", **what)
    assert solved == [3] and content(tmp_path / "out") == content(tmp_path / "whole")


def stop() -> None:
    raise Stopped


@pytest.mark.parametrize("moved", [0, 2, 4])
@pytest.mark.parametrize("damage", [None, "shard", "hidden", "whole.json"])
def test_blocks_that_were_trained_at_once(
    damage: str | None, moved: int, llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]
) -> None:
    """Killed while their shards are put in the place of those before, and damaged then: all is solved again."""
    out, count = tmp_path / "out", 0

    def when(event: str, given: list[str]) -> bool:
        nonlocal count
        if moved == 4:
            return event == "os.rename" and given[1].endswith("report.json")
        count += event == "os.rename" and "/whole/" in given[0] and "/whole/" not in given[1]
        return count > moved

    killed(lambda: quantize(str(llama), out, **WHOLE), when)
    work = tmp_path / "out.partial" / ".work"
    assert len([*(work / "whole").glob("model-*")]) == max(3 - moved, 0)
    if damage is None:
        quantize(str(llama), out, **WHOLE)
        assert notes_of(out) == []
    else:
        names = {"shard": "model-00003-of-00004.safetensors", "hidden": "hidden-00003", "whole.json": "whole.json"}
        places = (work / "whole" / names[damage], work.parent / names[damage], work / names[damage])
        flip(next(path for path in places if path.exists()))
        with pytest.warns(UserWarning, match="was damaged"):
            quantize(str(llama), out, **WHOLE)
    assert content(out) == result(WHOLE)


def test_killed_before_the_record_of_the_whole(llama: Path, tmp_path: Path, result: Callable[..., dict[str, str]]) -> None:
    """The hidden states that end the training do not replace those that the blocks' records vouch for."""
    killed(
        lambda: quantize(str(llama), tmp_path / "out", **WHOLE),
        lambda event, given: event == "os.rename" and given[1].endswith("whole.json"),
    )
    quantize(str(llama), tmp_path / "out", **WHOLE)
    assert content(tmp_path / "out") == result(WHOLE) and notes_of(tmp_path / "out") == []


def test_damaged_text_of_the_model(llama: Path, tmp_path: Path) -> None:
    """It is written again, the same."""
    what = {"scheme": "w4a16-g32", "method": "gptq", "data": DataSpec(source="self", rows=2, length=12)}
    partial = stopped(llama, tmp_path / "out", **what)
    (text,) = (partial / ".work").glob("written-*")
    kept = load_sealed(text)
    for damage in (truncate, flip):
        damage(text)
        assert load_sealed(text) is None
        stopped(llama, tmp_path / "out", block=2, **what)
        again = load_sealed(text)
        assert kept is not None and again is not None and torch.equal(again["tokens"], kept["tokens"])


def test_damaged_training(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose state is damaged begins anew."""
    what = {
        "scheme": "w3a16-g32",
        "method": "rtn+mrem",
        "options": {"mrem.steps": 4, "mrem.batch": 2, "mrem.blocks": 2},
        "data": DataSpec(source="random", rows=12, length=16),
        "engine": "transformers",
    }
    quantize(str(llama), tmp_path / "whole", **what)
    monkeypatch.setattr(reconstruct, "_SAVED", -1.0)  # after every step
    saved = 0

    def when(event: str, given: list[str]) -> bool:
        nonlocal saved
        saved += event == "os.rename" and given[1].endswith("training-00000-mrem")
        return saved == 3

    killed(lambda: quantize(str(llama), tmp_path / "out", **what), when)
    state = tmp_path / "out.partial" / ".work" / "training-00000-mrem"
    flip(state)
    with pytest.warns(UserWarning, match="training-00000-mrem was damaged, so this training begins anew"):
        quantize(str(llama), tmp_path / "out", **what)
    assert content(tmp_path / "out") == content(tmp_path / "whole") and len(notes_of(tmp_path / "out")) == 1


def test_sealed_tensors(tmp_path: Path) -> None:
    """Any other byte is found, also of the names."""
    path = tmp_path / "x"
    save_sealed({"a": torch.arange(6.0), "b": torch.ones((), dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    found = load_sealed(path)
    assert found is not None and torch.equal(found["a"], torch.arange(6.0)) and found["b"].shape == ()
    for place in (data.index(b'"a"') + 1, len(data) - 1, len(data) - 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert load_sealed(path) is None
    path.write_bytes(b"")
    assert load_sealed(path) is None and load_sealed(tmp_path / "nothing") is None


# ------------------------------------------------------------------------------------------------------------------ the rest


def test_lock_of_a_folder_that_was_published(tmp_path: Path) -> None:
    """Whoever gets the lock of a folder that was renamed meanwhile has nothing, and makes a new one."""
    work = tmp_path / "out.partial" / ".work"
    with journal._locked(work, "busy"):
        (tmp_path / "out.partial").rename(tmp_path / "out")
        with journal._locked(work, "busy"):
            assert (work / "lock").exists()
        with pytest.raises(ValueError, match="busy"), journal._locked(tmp_path / "out" / ".work", "busy"):
            pass


def test_working_folder(tmp_path: Path) -> None:
    """It holds nothing of a killed process, and nothing is left of it; what is no one's hidden states is not removed."""
    folder = tmp_path / "s.json.work"
    folder.mkdir()
    for name in ("hidden-00001", f"hidden-00002.{8 * 'a7'}.tmp", "lock"):
        (folder / name).write_text("left")
    with working_folder(folder) as found:
        assert found == folder and names_in(folder) == ["lock"]
        (folder / "hidden-00000").write_text("new")
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds mine\.txt; move it away"), working_folder(folder):
        pass
    assert (folder / "mine.txt").read_text() == "precious"


def test_killed_plan(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hidden states lie beside its measurements, where the next plan removes them; in the folder for temporary files there
    is nothing."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    given: dict[str, Any] = {"bits": 5, "schemes": ["w4a16-g32", "w8a16-g32"], "data": DATA, "rows": 2, "length": 8}

    def measured() -> Any:
        return plan(str(llama), sensitivities=tmp_path / "s.json", **given)

    killed(measured, lambda event, paths: event == "os.rename" and paths[1].endswith("hidden-00002"))
    assert names_in(tmp_path / "temporary") == []
    assert names_in(tmp_path) == ["s.json", "s.json.work", "temporary"]
    with working_folder(tmp_path / "s.json.work"), pytest.raises(ValueError, match="another process is at work in"):
        measured()
    measured()
    assert names_in(tmp_path) == ["s.json", "temporary"]


def test_differences() -> None:
    old = {"a": 1, "b": [1, {"c": 2}], "d": [1]}
    assert differences(old, old) == []
    new = {"a": 1, "b": [1, {"c": 3}], "d": [1, 2], "e": None, "f": "x"}
    assert differences(old, new) == ["b[1].c was 2, is 3", "d was [1], is [1, 2]", 'f was null, is "x"']
