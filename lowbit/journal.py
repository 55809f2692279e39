"""The journal: where a run keeps what is finished, goes on after a kill, and gives the result its name.

A run works in OUT.partial; where OUT cannot be replaced by a rename, because it is a mount point or the folder around it is not
writable, in OUT/.partial. The checkpoint grows there, and beside it lies the journal, the folder `.work`:

    lock                 held while a process writes, and inherited by the processes that it starts
    job.json             what is being done, and the names of all files that the checkpoint may have
    model.json           the hashes of the model's tensors, and size, times and inode of its shards
    notes.json           what the report has to say about damage and what was left out
    block-K.json         block K is finished; the head counts as the last one
    whole.json           the step that trains all blocks at once is finished
    parallel-done.json   the processes of a parallel training are finished
    replaced.json        names of folders beside OUT that a run moved away from there to replace them
    moving.json          the files of OUT/.partial are being moved up to OUT
    hidden-K, teacher-K  hidden states that enter block K; the other names are those of `_LAYOUT`

A record (`Journal.record`) holds the hashes of the files that it vouches for, which were on disk before it. When a run goes on,
these are compared; what is damaged is solved again from the last block whose files are good, else from the start. Every JSON
file carries a hash of its own content.

What a run did not write is never removed or replaced: OUT only if it is empty or, with --overwrite, a folder that lowbit wrote
and that holds nothing else; a file in OUT.partial that has none of the names above stops the run.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowbit.export import NATIVE_FILE
from lowbit.files import TEMPORARY, is_temporary, load_sealed, permanent_name, read_small, sha256_of, sync_folder, write_json
from lowbit.report import JSON_NAME, MARKDOWN_NAME, PAGE_NAME
from lowbit.source import Source

WORK = ".work"
_INSIDE = ".partial"  # in OUT, where there can be no OUT.partial
_REPORTS = frozenset({JSON_NAME, MARKDOWN_NAME, PAGE_NAME})
_STATES = r"(hidden|teacher|arguments)-\d{5}|carried-((teacher-)?\d{5}|short)-.+"
_LAYOUT = re.compile(
    r"lock|(job|model|notes|whole|parallel|parallel-done|replaced|moving|block-\d{5}|trial-[0-9a-f]+)\.json|parallel-done"
    rf"|{_STATES}"
    r"|written-[0-9a-f]+|(head|logits|(correction|solved)-\d{5})\.safetensors|training-\d{5}-.+"
    r"|whole|trained|trial|trial-float-\d+|tokens|meeting-.+|rank-\d+(\.log)?"
)
_PATIENCE = 2.0  # seconds that a killed process and those it started may take to let go of a lock


# ---------------------------------------------------------------------------------------------------------------- the place


@dataclass(frozen=True)
class Place:
    """Where a run writes.

    Attributes:
        out: the folder of the result; of a link, what it points to.
        folder: where it is made.
    """

    out: Path
    folder: Path

    @property
    def inside(self) -> bool:
        """Whether `folder` lies in `out`."""
        return self.folder.parent == self.out


def place_of(out: str | Path) -> Place:
    """The place for a result that is to lie at `out`.

    Raises:
        ValueError: there can be no such folder.
    """
    path = Path(os.path.abspath(out))
    try:
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; choose another folder")
        fixed = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK | os.X_OK))
        if fixed or (path / _INSIDE / WORK).is_dir():
            return Place(path, path / _INSIDE)
    except OSError as error:
        raise ValueError(f"{out} cannot be a folder ({error.strerror}); choose another --out") from error
    return Place(path, path.with_name(path.name + ".partial"))


def check_out(place: Place, overwrite: bool) -> None:
    """Refuse to begin a run whose result could not get its name. What a run left that was killed while it published its
    result is no hindrance; `Journal.begin` decides about it.

    Raises:
        ValueError: what lies at OUT may not be replaced; what to do.
    """
    if _interrupted(place):
        return
    try:
        _check_free(place, overwrite, {})
    except ValueError as error:
        if _report_in(place.folder) is None:
            raise
        raise ValueError(f"{error}. {place.folder} holds a checkpoint that was finished for this name") from error


def check_apart(place: Place, model: Path) -> None:
    """The model must outlive the run, and its folder must not grow during it.

    Raises:
        ValueError: what the run writes and the folder `model` overlap.
    """
    kept = model.resolve()
    for path in (place.out.resolve(), place.folder.resolve()):
        if path.is_relative_to(kept) or kept.is_relative_to(path):
            raise ValueError(f"{path}, which this run writes, and the model's folder {model} overlap; choose another --out")


def _interrupted(place: Place) -> bool:
    """Whether a run was killed while it published its result here, or before its journal was removed."""
    left = place.folder / WORK if place.inside else place.out / WORK
    if place.inside and place.folder.is_dir() and not any(place.folder.iterdir()):
        return True
    if not left.is_dir() or _strange_work(left):
        return False
    if place.inside:  # else it may be an unfinished run
        return (left / "moving.json").exists() or not any(left.iterdir())
    return (_report_in(place.out) or {}).get("job") is not None


def _check_free(place: Place, overwrite: bool, seen: dict[str, list[int]]) -> None:
    """Raise a ValueError unless OUT is empty or may be replaced; `seen`: see `_unlisted`."""
    out = place.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another folder")
    own = {_INSIDE} if place.inside else set()
    if os.path.ismount(out):
        own.add("lost+found")
    if not out.is_dir() or not {path.name for path in out.iterdir()} - own:
        return
    if not overwrite:
        raise ValueError(f"{out} exists and is not empty; choose another folder, or replace it with --overwrite")
    unlisted = _unlisted(out, own, seen)
    if unlisted:
        raise ValueError(
            f"{out} holds what lowbit did not write there: {some(unlisted)}. --overwrite would remove it; move it away, or "
            "choose another --out"
        )


def _report_in(folder: Path) -> dict[str, Any] | None:
    """The report that lowbit wrote into a folder; None too where it is damaged, or names files that are not in the folder."""
    try:
        report = json.loads(read_small(folder / JSON_NAME))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or not isinstance(report.get("lowbit"), str):
        return None
    files = report.get("files")
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files or ())
    return report if files is None or (isinstance(files, dict) and inside) else None


def _unlisted(out: Path, own: set[str], seen: dict[str, list[int]]) -> list[str]:
    """What is in a folder besides the files that its report lists, and listed files with other content.

    Args:
        own: names in the folder that are left out.
        seen: size, times and inode of files whose content was compared, which is not done again.

    Raises:
        ValueError: it has no such list.
    """
    report = _report_in(out)
    if report is None:
        raise ValueError(
            f"{out} has no {JSON_NAME} of lowbit, so it is not a result that --overwrite may replace; move it away, or choose "
            "another --out"
        )
    files = report.get("files")
    if not isinstance(files, dict):
        raise ValueError(
            f"{out} was written by lowbit {report['lowbit']}, whose report does not say which files are its own, so "
            "--overwrite does not remove it; delete it or move it away, or choose another --out"
        )
    unlisted = _strange(out, set(files) | _REPORTS, own)
    for name, expected in files.items():
        path = out / name
        if name in unlisted or not path.is_file() or seen.get(name) == (now := _identity(path)):
            continue
        if sha256_of(path) == expected:
            seen[name] = now
        else:
            unlisted.append(f"{name} (it was changed)")
    return unlisted


def _strange(folder: Path, names: set[str], own: set[str]) -> list[str]:
    """What is in a folder besides files of these names (with /) and the folders that they lie in; `own` is not looked into."""
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in own or any(name.startswith(other) for other in found if other.endswith("/")):
            continue
        if path.is_dir() and not path.is_symlink():
            if name not in folders:
                found.append(name + "/")
        elif name not in names:
            found.append(name)
    return found


def _strange_work(work: Path) -> list[str]:
    """What is in a folder `.work` that no run puts there."""
    names = sorted(path.name for path in work.iterdir()) if work.is_dir() else []
    return [f"{WORK}/{name}" for name in names if not _LAYOUT.fullmatch(permanent_name(name))]


def _identity(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def some(names: list[str]) -> str:
    """The first of some names, as a list for people."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _remove_written(folder: Path) -> None:
    """Remove the files that the report in a folder lists, and the folder, unless something else is left in it."""
    report = _report_in(folder)
    for name in [] if report is None else [*report["files"], *sorted(_REPORTS - {JSON_NAME}), JSON_NAME]:
        _remove_file(folder / name, folder)
    if folder.is_dir():
        if any(folder.iterdir()):
            warnings.warn(f"{folder} was replaced, but holds files that lowbit did not write, so it stays", stacklevel=2)
        else:
            folder.rmdir()


def _remove_file(path: Path, root: Path) -> None:
    """Remove a file, and the folders in `root` that it leaves empty."""
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == root or not parent.is_dir() or any(parent.iterdir()):
            return
        parent.rmdir()


# -------------------------------------------------------------------------------------------------------------- the journal


@contextmanager
def open_journal(place: Place, overwrite: bool) -> Iterator["Journal"]:
    """The journal of a place, for this process alone. After an error, one that holds no work is removed.

    Raises:
        ValueError: another process is at work there, or the folder holds something else or cannot be written.
    """
    folder, work = place.folder, place.folder / WORK
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is needed for unfinished work, but is a file; move it away")
    strange = _strange_work(work) or ([] if work.is_dir() else sorted(path.name for path in folder.glob("*")))
    if strange:
        raise ValueError(f"{folder} is needed for unfinished work, but holds something else: {some(strange)}. Move it away")
    new, interrupted = not work.is_dir(), _interrupted(place)
    with _locked(work, f"another process is writing {folder}; wait for it, or choose another --out") as lock:
        ended = False
        try:
            journal = Journal(place, overwrite, lock.fileno(), interrupted)
            journal._repair()
            yield journal
            ended = True
        finally:
            if new and not ended:
                _remove_idle(folder)


def _remove_idle(folder: Path, *more: str) -> None:
    """Remove a folder with a journal of no work, and nothing else. `more`: names in it that are no work either."""
    idle = {WORK, *(f"{WORK}/{name}" for name in ("lock", "job.json", "model.json", "notes.json")), *more}
    if folder.is_dir() and {path.relative_to(folder).as_posix() for path in folder.rglob("*")} <= idle:
        shutil.rmtree(folder / WORK)
        folder.rmdir()


@contextmanager
def _locked(folder: Path, busy: str) -> Iterator[IO[str]]:
    """Hold the file `lock` in a folder, which is made.

    Raises:
        ValueError: `busy`, if another process holds it; or it cannot be written.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "a", opener=_without_waiting)  # noqa: PTH123, SIM115 (Path.open has no opener)
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --out") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = _identity(folder / "lock")[3] == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:  # whoever held it has published the folder and removed the journal
                mine = False
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ValueError(busy) from error
                mine = False
            except OSError as error:
                raise ValueError(f"{folder / 'lock'} cannot be locked ({error.strerror}); choose another --out") from error
            if mine:
                yield lock
                return
        time.sleep(0.05)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe without a reader is an error then."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


@contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """A folder for hidden states, for this process alone, removed at the end; what a killed process left there goes first.

    Raises:
        ValueError: another process is at work there, or it holds something else.
    """
    with _locked(folder, f"another process is at work in {folder}; wait for it, or choose another --out"):
        present = sorted(path for path in folder.iterdir() if path.name != "lock")
        strange = [path.name for path in present if not re.fullmatch(_STATES, permanent_name(path.name))]
        if strange:
            raise ValueError(f"{folder} is needed for hidden states, but holds {some(strange)}; move it away")
        for path in present:
            path.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


class Journal:
    """What a run has finished.

    Attributes:
        folder, work: where the checkpoint is made, and the journal in it.
        lock: the descriptor of its lock, for processes that must hold it too.
        job: once `begin` was called, the hash of what the run is.
        done: once `begin` was called, how many blocks need not be solved again.
        notes: what the report has to say, in sentences.
    """

    def __init__(self, place: Place, overwrite: bool, lock: int, interrupted: bool) -> None:
        self.place, self.overwrite, self.lock = place, overwrite, lock
        self.folder, self.work = place.folder, place.folder / WORK
        self.job, self.done = "", 0
        self.notes: list[str] = []
        self._names: set[str] = set()
        self._damage: list[str] = []
        self._seen: dict[str, list[int]] = {}
        self._interrupted, self._published = interrupted, False

    @property
    def left(self) -> Path:
        """Where the journal of a published checkpoint is, until it is removed."""
        return self.work if self.place.inside else self.place.out / WORK

    # ------------------------------------------------------------------------------------------------------------- records

    def record(self, name: str, value: dict[str, Any], files: Iterable[Path] = (), states: Iterable[Path] = ()) -> None:
        """Write a record: what `value` tells is finished, and these files in `folder` are its results.

        States are files too, which are deleted once the next record is there.
        """
        self._write(name, {"value": value, "files": self._hashes(files), "states": self._hashes(states)})

    def recorded(self, name: str) -> bool:
        """Whether there is such a record; those that are damaged are gone after `begin`."""
        return self._path(name).exists()

    def value(self, name: str) -> dict[str, Any]:
        """What was told to `record`."""
        found: dict[str, Any] = self._record(name)["value"]
        return found

    def hashes(self, name: str) -> dict[str, str]:
        """SHA-256 of the files of a record, by their names in `folder`."""
        found: dict[str, str] = self._record(name)["files"]
        return found

    def note(self, text: str) -> None:
        """Warn the user, and have the report say it, also if the run is killed meanwhile."""
        if text not in self.notes:
            warnings.warn(text, stacklevel=2)
            self.notes.append(text)
            self._write("notes", {"notes": self.notes})

    def know_model(self, source: Source) -> None:
        """Write down what the model is, once it was read."""
        if not self.recorded("model"):
            self._write("model", source.contents())

    def _path(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        content = json.loads(json.dumps(content))  # as it is read again
        write_json(self._path(name), {"sha256": _digest(content), "content": content})

    def _read(self, name: str) -> dict[str, Any] | None:
        """What `_write` wrote; None where it is missing or damaged. Damage is put down."""
        found = _unsealed(self._path(name))
        if found is None and self._path(name).exists():
            self._damage.append(f"{self._name(self._path(name))} cannot be read")
        return found

    def _record(self, name: str) -> dict[str, Any]:
        found = self._read(name)
        if found is None:
            raise ValueError(f"{self._path(name)} was damaged while the run went on; run the same command again")
        return found

    def _hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        given = list(paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(map(self._name, given), pool.map(sha256_of, given), strict=True))

    def _unlike(self, files: dict[str, str]) -> list[str]:
        """Which of these files are not as they were."""
        found = self._hashes(path for name in files if (path := self.folder / name).is_file())
        unlike = [name for name, expected in files.items() if found.get(name) != expected]
        return [f"{name} is {'damaged' if name in found else 'missing'}" for name in unlike]

    # ------------------------------------------------------------------------------------------------------------ going on

    def begin(
        self, job: dict[str, Any], names: Iterable[str], source: Source, *, blocks: int, span: int
    ) -> dict[str, Any] | None:
        """Go on with what was begun, if it was this job, else begin it. If only `publish` is left, return the report.

        Args:
            job: what makes two runs the same run, as JSON.
            names: of all files that the checkpoint may have, with /; those of the report are known.
            source: the model, tracked.
            blocks, span: how many blocks there are, and how many are solved together.

        Raises:
            ValueError: it is something else that was begun, the model has changed, there are files that no run wrote, or OUT
                may not be replaced.
        """
        job = json.loads(json.dumps(job))
        self.job, self._names = _digest(job), {*names} | _REPORTS
        report = _report_in(self.place.out) if self._interrupted else None
        if report is not None and report.get("job") == self.job:
            self._published = True
            return report
        if report is not None and self.overwrite and not self.place.inside:
            self._remove_left()
        _check_free(self.place, self.overwrite, self._seen)
        known = self._read("job") or {"job": None, "names": []}
        self._check_own(known["names"])
        self._remove_temporary()
        if known["job"] is None:
            if self._worked() and not self._damage:
                self._damage.append(f"{WORK}/job.json is missing")
            self._anew(job)
            return None
        if known["job"] != job:
            unlike = "; ".join(differences(known["job"], job))
            self._other(f"an unfinished run of something else: {unlike}. Run that again to finish it", job)
            return None
        for name in {*known["names"]} - self._names:  # of a file that the model has no longer
            _remove_file(self.folder / name, self.folder)
        self.notes = (_unsealed(self._path("notes")) or {"notes": []})["notes"]
        model = self._read("model")
        if model is None:
            if self._worked() and not self._damage:
                self._damage.append(f"{WORK}/model.json is missing")
            self._anew(job)
            return None
        changed = source.changes(model)
        if changed:
            self._other(
                f"an unfinished run of another model: of {source.folder}, {some(changed)} changed. Put the model back and run "
                "the same command again",
                job,
            )
            return None
        report = _report_in(self.folder)
        if report is not None and report.get("job") == self.job and not self._unlike(report.get("files") or {JSON_NAME: ""}):
            return report
        self._take_up(blocks, span, job)
        return None

    def _worked(self) -> bool:
        """Whether there is work that it would be a pity to lose."""
        return any(any(self.work.glob(pattern)) for pattern in ("block-*.json", "trial-*.json", "**/training-*"))

    def _other(self, reason: str, job: dict[str, Any]) -> None:
        """Forget a run of something else, if it has no work yet or --overwrite allows it."""
        if not self.overwrite and self._worked():
            raise ValueError(f"{self.folder} holds {reason}, or start anew with --overwrite")
        self._damage = []
        self._anew(job)

    def _anew(self, job: dict[str, Any], *kept: str) -> None:
        """Begin, and forget all but what has these names and text that the model wrote, whose name says what it is of."""
        self._path("job").unlink(missing_ok=True)  # from here on, whatever else is left counts for nothing
        self._remove_all_but(self._present("lock", "replaced.json", "written-*", *kept))
        self._write("job", {"job": job, "names": sorted(self._names)})
        self.done, self.notes = 0, []
        if self._damage:
            self.note(f"{self.folder} was damaged ({some(self._damage)}), so everything is solved again")
            self._damage = []

    def _take_up(self, blocks: int, span: int, job: dict[str, Any]) -> None:
        """Find out how many blocks need not be solved again, and forget what is damaged."""
        kept = self._check_records(blocks, span)
        if self._damage and (self.overwrite or self.done == 0 or job.get("parallel")):
            # The states of a parallel training are gone by now, so that it cannot be repeated in part.
            self._anew(job, *(() if self.overwrite else ("trial-*.json",)))
        elif self._damage:
            kept |= self._present("lock", "job.json", "model.json", "notes.json", "replaced.json", "written-*", "trial-*.json")
            kept |= self._present("arguments-*", "carried-*")
            self._remove_all_but(kept)
            self.note(
                f"{self.folder} was damaged ({some(self._damage)}), so block {self.done} and what follows is solved again"
            )
            self._damage = []
        elif self.done == 0:  # what enters the first block is quickly made, and nothing vouches for it
            for name in self._present("hidden-*", "teacher-*", "arguments-*", "carried-*"):
                (self.folder / name).unlink()
        for name in self._present("training-*", "*/training-*"):
            if load_sealed(self.folder / name) is None:
                (self.folder / name).unlink()
                self.note(f"{self.folder / name} was damaged, so this training begins anew")

    def _check_records(self, blocks: int, span: int) -> set[str]:
        """Set `done`, put down what is damaged, and return the names of the files that are good."""
        if self._whole_is_good():
            self.done = blocks
            return set()
        last = max((int(path.stem[-5:]) for path in self.work.glob("block-*.json")), default=-1)
        records: list[dict[str, Any]] = []
        for index in range(min(last + 1, blocks)):
            record = self._read(f"block-{index:05d}")
            unlike = [f"{WORK}/block-{index:05d}.json is missing"] if record is None else self._unlike(record["files"])
            if record is None or unlike:
                self._damage += unlike if record is not None or not self._damage else []
                break
            records.append(record)
        whole = [count for count in range(len(records) + 1) if count % span == 0 or count == blocks]
        unlike = self._unlike(records[whole[-1] - 1]["states"]) if whole[-1] else []
        self._damage += unlike
        # Before the last record, states are deleted, unless a kill came between.
        good = [count for count in whole if count == 0 or not self._unlike(records[count - 1]["states"])] if unlike else whole
        self.done = good[-1]
        head = f"block-{blocks:05d}"
        if self.recorded(head) and self.done == blocks:
            record = self._read(head)
            self._damage += [] if record is None else self._unlike(record["files"])
        if self.recorded("parallel-done"):
            trained = (self._read("parallel-done") or {"files": {}})["files"]
            self._damage += self._unlike({name: found for name, found in trained.items() if _block_of(name) >= self.done})
        kept = {name for record in records[: self.done] for name in record["files"]}
        kept |= {f"{WORK}/block-{index:05d}.json" for index in range(self.done)}
        return kept | ({*records[self.done - 1]["states"]} if self.done else set())

    def _present(self, *patterns: str) -> set[str]:
        """Names in `folder` of what is in the journal."""
        return {self._name(path) for pattern in patterns for path in self.work.glob(pattern)}

    # ----------------------------------------------------------------------------------------- all blocks trained at once

    def whole(self, path: Path) -> Path:
        """Where the step that trains all blocks at once writes what will be at `path`."""
        return self.work / "whole" / path.name

    def record_whole(self, value: dict[str, Any], paths: Iterable[Path]) -> None:
        """Record that step; its results will be at these paths when `move_whole` was called."""
        given = list(paths)
        files = dict(zip(map(self._name, given), self._hashes(map(self.whole, given)).values(), strict=True))
        self._write("whole", {"value": value, "files": files})

    def move_whole(self) -> None:
        """Put the results of that step into the place of those before, as far as a killed process has not."""
        for path in (self.folder / name for name in self.hashes("whole")):
            if self.whole(path).exists():
                self.whole(path).replace(path)

    def _whole_is_good(self) -> bool:
        record = self._read("whole")
        if record is None:
            return False
        paths = {name: self.whole(self.folder / name) for name in record["files"]}
        now = {self._name(own) if own.exists() else name: record["files"][name] for name, own in paths.items()}
        unlike = self._unlike(now)
        self._damage += unlike
        return not unlike

    # --------------------------------------------------------------------------------------------------------- own and other

    def check_own(self) -> None:
        """Refuse to make a checkpoint of files that this run did not write.

        Raises:
            ValueError: names them.
        """
        self._check_own(())

    def _check_own(self, known: Iterable[str]) -> None:
        names = self._names | {*known}
        strange = _strange(self.folder, names | self._temporary(names), {WORK}) + _strange_work(self.work)
        if strange:
            raise ValueError(
                f"{self.folder} holds what this run did not write: {some(strange)}. Move it away and run the same command "
                "again, which goes on from here"
            )

    def _temporary(self, names: Iterable[str]) -> set[str]:
        """Names in `folder` of what a killed process had written in part of the files of these names."""
        siblings: dict[Path, list[str]] = {}
        for name in names:
            siblings.setdefault((self.folder / name).parent, []).append(Path(name).name)
        present = (path for path in self.folder.rglob("*" + TEMPORARY) if self.work not in path.parents)
        return {self._name(path) for path in present if is_temporary(path, siblings.get(path.parent, []))}

    def _remove_temporary(self) -> None:
        """Remove what a killed process had written in part."""
        for name in self._temporary(self._names):
            (self.folder / name).unlink()
        for path in self.work.rglob("*" + TEMPORARY):
            if permanent_name(path.name) != path.name and path.is_file():
                path.unlink()

    def _remove_all_but(self, kept: set[str]) -> None:
        """Remove what runs wrote, which is all there is (see `check_own`), but files of these names in `folder`."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if path != self.work and not any(path.iterdir()):
                    path.rmdir()
            elif self._name(path) not in kept:
                path.unlink()

    # ----------------------------------------------------------------------------------------------------------- publishing

    def publish(self, report: dict[str, Any]) -> None:
        """Give the finished checkpoint, whose report is written, its name; only then is the journal of no more use.

        Raises:
            ValueError: what lies at OUT may not be replaced. Nothing is touched then, and `begin` and this publish it later.
        """
        out = self.place.out
        if not self._published:
            try:
                self.check_own()
                _check_free(self.place, self.overwrite, self._seen)
                if self.place.inside:
                    older = _report_in(out)
                    new = [*report["files"], *sorted(_REPORTS)]
                    self._write("moving", {"old": [*older["files"], *sorted(_REPORTS)] if older else [], "new": new})
                    self._move_up()
                else:
                    self._rename()
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{error}. The checkpoint is finished and kept in {self.folder}; when the way is free, the same command "
                    f"gives it the name {out} at once"
                ) from error
        # First what this process made to find that out: as long as the other journal is there, the next run comes here again.
        if self._published and not self.place.inside:
            _remove_idle(self.folder, *([] if self.recorded("job") else self._present("written-*")))
        self._remove_left()

    def _rename(self) -> None:
        """Put `folder` into the place of OUT, which is moved away first if it is not empty."""
        out, old = self.place.out, None
        if out.is_dir() and any(out.iterdir()):
            old = out.with_name(f"{out.name}.replaced-{secrets.token_hex(8)}")
            self._write("replaced", {"names": [*self._replaced(self.work), old.name]})
            out.rename(old)
        try:
            late = [] if old is None else _unlisted(old, set(), self._seen)  # nobody adds to it under this name any more
            if late:
                raise ValueError(f"{out} holds what lowbit did not write there: {some(late)}; move it away")
            if self.folder.is_symlink() and out.is_dir():
                out.rmdir()
            self.folder.rename(out)  # fails if there is anything but an empty folder
        except (ValueError, OSError) as error:
            if old is not None:
                try:
                    old.rename(out)
                except OSError:
                    raise ValueError(f"{error}; what was at {out} before is now at {old}") from error
            raise
        sync_folder(out.parent)

    def _move_up(self) -> None:
        """Move the checkpoint from `folder` to OUT around it, last what makes it load; go on where a killed process was."""
        out, moving = self.place.out, self._read("moving")
        if moving is None:
            raise ValueError(f"{self._path('moving')} cannot be read; move the files in {self.folder} to {out} yourself")
        last = [name for name in moving["new"] if _loads(name)]
        last.sort(key=lambda name: name == "config.json")
        for name in moving["old"]:
            if _loads(name) and (self.folder / name).exists():
                (out / name).unlink(missing_ok=True)
        for name in [*(name for name in moving["new"] if name not in last), *last]:
            if name == (last or [None])[0]:
                for old in set(moving["old"]) - set(moving["new"]):
                    _remove_file(out / old, out)
            if (self.folder / name).exists():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).replace(out / name)
        sync_folder(out)

    def _repair(self) -> None:
        """Finish or undo what a process was at when it was killed while it published."""
        if self.place.inside and self._path("moving").exists():
            self._move_up()
        for name in reversed(self._replaced(self.work)):
            if not self.place.out.exists() and self.place.out.with_name(name).is_dir():
                self.place.out.with_name(name).rename(self.place.out)

    @staticmethod
    def _replaced(work: Path) -> list[str]:
        """Names of folders that were moved away from OUT, the last one last."""
        return (_unsealed(work / "replaced.json") or {"names": []})["names"]

    def _remove_left(self) -> None:
        """Remove the journal of the checkpoint at OUT, and what it replaced."""
        left = self.left
        if not left.is_dir():
            return
        if (left / "lock").exists() and _identity(left / "lock")[3] == os.fstat(self.lock).st_ino:
            self._remove_journal(left)
            return
        with _locked(left, f"another process is writing {self.place.out}; wait for it"):
            self._remove_journal(left)

    def _remove_journal(self, left: Path) -> None:
        for name in self._replaced(left):
            _remove_written(self.place.out.with_name(name))
        moving = left / "moving.json"  # says until the end that the checkpoint is where it should be
        present = sorted(left.rglob("*"), reverse=True)
        # Last the text that the model wrote: without it, the next run writes it again to find out that all is done.
        for path in sorted(present, key=lambda path: path.match("written-*")):
            if path.is_dir():
                path.rmdir()
            elif path != moving:
                path.unlink()
        if self.place.inside:  # the checkpoint's folders are empty by now
            for path in sorted((path for path in left.parent.rglob("*") if path.is_dir() and path != left), reverse=True):
                path.rmdir()
        moving.unlink(missing_ok=True)
        left.rmdir()
        if self.place.inside:
            left.parent.rmdir()


def _digest(value: Any) -> str:
    """The hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _unsealed(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of the journal; None where it is missing, or not what was written."""
    try:
        found = json.loads(read_small(path))
        content: dict[str, Any] = found["content"]
        return content if _digest(content) == found["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _block_of(name: str) -> int:
    """The first block of a record of a training, by its name."""
    return int(Path(name).name.split("-")[1])


def _loads(name: str) -> bool:
    """Whether this is one of the files by which a checkpoint is found and loaded."""
    return name == "config.json" or name.endswith(".index.json") or name == NATIVE_FILE


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as 'path was old, is new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
