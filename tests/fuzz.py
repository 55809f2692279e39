"""Seeded, structured damage to everything that lowbit reads, and what becomes of it.

A case is a number: from it and a seed follow the area (what is damaged), the damage and the command or call, whatever was run
before. `Materials` makes the undamaged models, outputs, recipes and journals once; `case` describes one case; `judged` runs
it in a forked child and says how it ended:

    ran         status 0, and the result is what the damaged input says
    clean       refused in one line that names a file, an option, a key or a value
    bare        refused in words that name nothing, or in several lines
    traceback   any other exception
    wrong       status 0, but the result is another one without a word
    stuck       an unfinished run that neither goes on, nor starts anew with --overwrite
    hang        more than 20 seconds of computing or of waiting for nothing
    memory      more than 4 GB
    signal      SIGSEGV, SIGBUS, SIGABRT ...
    litter      something is left in TMPDIR, or a process, or what was read is changed
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import forked
import tiny
import torch
from forked import Ending
from torch import Tensor

from lowbit.recipe import METHODS

GOOD = ("ran", "clean")
SEED = 20261129

ROUND: tuple[str, ...] = ("--data", "random", "--rows", "4", "--length", "16")
GPTQ = ("quantize", "model", "--out", "out", "--scheme", "w4a16-g32", "--method", "gptq", *ROUND)
RTN = ("quantize", "model", "--out", "out", "--scheme", "w8a16-g32", "--engine", "transformers")
HIDDEN, FFN = 32, 64
RECIPE = """format = "compressed-tensors"
engine = "transformers"

[data]
source = "random"
rows = 4
length = 16

[[rules]]
match = "lm_head|embed_out"
scheme = "float"
optional = true

[[rules]]
match = "down_proj"
scheme = "w8a16-channel"

[[rules]]
match = ""
scheme = "w4a16-g32-asym"

[[steps]]
method = "smooth"
alpha = 0.5

[[steps]]
method = "gptq"
damping = 0.01
"""


@dataclass(frozen=True)
class Damage:
    """One change of a folder.

    Attributes:
        what: in words.
        apply: apply(folder).
        names: a refusal names one of these, or a file of the case, or an option.
        foreign: a file that lowbit did not write and may refuse to touch.
    """

    what: str
    apply: Callable[[Path], None]
    names: tuple[str, ...] = ()
    foreign: str = ""


@dataclass
class Case:
    """What is laid out, how it is damaged, what is run, and how a result is judged.

    Attributes:
        lay: copies of materials, by the name in the case's folder.
        call: a command line, or (function, arguments) of the Python interface.
        judge: judge(folder, materials) says what is wrong with a result, or "".
        again: after a refusal, the command that must succeed, whose result `judge` accepts.
    """

    number: int
    area: str
    lay: dict[str, str]
    damage: list[Damage]
    call: tuple[str, ...] | tuple[str, dict[str, Any]]
    judge: Callable[[Path, "Materials"], str] | None = None
    again: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The call in one line."""
        if len(self.call) == 2 and isinstance(self.call[1], dict):
            return f"lowbit.{self.call[0]}({', '.join(f'{k}={v!r}' for k, v in self.call[1].items())})"[:500]
        return "lowbit " + " ".join(map(repr_word, self.call))

    @property
    def story(self) -> str:
        """The damage and the call in one line."""
        return f"{'; '.join(damage.what for damage in self.damage) or 'nothing damaged'} | {self.command}"


@dataclass
class Verdict:
    """How a case ended.

    Attributes:
        kind: one of those above.
        where: what tells one failure from another: the last frame in lowbit and the exception, or what was wrong.
        message: the first 300 characters of what was said.
    """

    number: int
    area: str
    kind: str
    where: str
    message: str
    story: str
    seconds: float

    @property
    def key(self) -> str:
        """The failure, without line numbers."""
        place = re.sub(r":\d+ ", " ", self.where)
        return f"{self.kind}: {place}"


def repr_word(word: str) -> str:
    """A word of a command line as a shell takes it, or as Python prints it."""
    return word if re.fullmatch(r"[\w./:=+-]+", word) else repr(word)[:200]


# -------------------------------------------------------------------------------------------------------------- materials


class Materials:
    """The undamaged inputs, each a file or folder of `root` by its name, and what is known of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        forked.warm()
        sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2}
        for name, kind, shards in (
            ("llama", "llama", 3),
            ("single", "llama_untied", 1),
            ("moe", "qwen3_moe", 2),
            ("mamba", "mamba2", 1),
            ("bert", "bert", 1),
        ):
            small = {key: value for key, value in sizes.items() if kind != "mamba2" or key != "intermediate_size"}
            if kind == "mamba2":
                small |= {"head_dim": 16}
            save_small(kind, root / name, small, shards)
        (root / "text.txt").write_text("\n\n".join(tiny.TEXT * 20), encoding="utf-8")
        (root / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny.TEXT * 20), encoding="utf-8")
        turns = [{"role": "user", "content": tiny.TEXT[0]}, {"role": "assistant", "content": tiny.TEXT[1]}]
        (root / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 60, encoding="utf-8")
        (root / "recipe.toml").write_text(RECIPE, encoding="utf-8")
        lay = {"model": "llama"}
        self._make("out-4", lay, ("--scheme", "w4a16-g32-asym"))
        self._make("out-8", lay, ("--scheme", "w8a8-astatic", "--method", "gptq", *ROUND))
        self._make("out-fp8", lay, ("--scheme", "fp8", "--kv-cache", "fp8", *ROUND))
        self._make("out-native", lay, ("--scheme", "w3a16-g32-asym", "--format", "lowbit"))
        self._make("out-turned", lay, (*_EMBED, "--format", "lowbit", *ROUND))
        self._make("out-nf4", {"model": "single"}, ("--scheme", "nf4-g32", "--format", "lowbit"))
        self._make("out-lorc", lay, ("--scheme", "w3a16-g32", "--method", "rtn+lorc", "--option", "lorc.rank=4", *_OPEN))
        self._make("out-moe", {"model": "moe"}, ("--scheme", "w4a16-g32", *_OPEN))
        self._make("whole", lay, GPTQ[4:])
        self._unfinished("partial", GPTQ)
        self._make("whole-trained", lay, _TRAINED[4:])
        self._unfinished("partial-trained", _TRAINED)
        self._plan()
        self.logits = {path.name: self._logits(path) for path in sorted(root.glob("out-*"))}

    def lay(self, name: str, target: Path) -> None:
        """Copy one of them."""
        source = self.root / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)

    def _work(self) -> Path:
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def _make(self, name: str, lay: dict[str, str], arguments: Sequence[str]) -> None:
        work = self._work()
        for target, source in lay.items():
            self.lay(source, work / target)
        ending = forked.run(partial(command, "quantize", "model", "--out", "out", *arguments), cwd=work)
        assert ending.value == 0, (name, ending)
        (work / "out").rename(self.root / name)

    def _unfinished(self, name: str, arguments: Sequence[str]) -> None:
        work = self._work()
        self.lay("llama", work / "model")
        ending = forked.run(partial(_killed_after_a_block, arguments), cwd=work)
        assert ending.signal == signal.SIGKILL and list((work / "out.partial").rglob("block-00000.json")), ending
        (work / "out.partial").rename(self.root / name)

    def _plan(self) -> None:
        work = self._work()
        self.lay("llama", work / "model")
        ending = forked.run(partial(command, *_PLAN), cwd=work)
        assert ending.value == 0, ending
        for name in ("plan.toml", "plan.sensitivities.json"):
            (work / name).rename(self.root / name)

    def _logits(self, out: Path) -> Tensor:
        work = self._work()
        ending = forked.run(partial(_save_logits, out, work / "logits.pt"), cwd=work)
        assert ending.kind == "returned", ending
        return torch.load(work / "logits.pt")


_OPEN = ("--engine", "transformers")
_EMBED = ("--scheme", "w4a8-g32", "--method", "embed+hadamard+gptq", "--option", "hadamard.match=down_proj")
_TRAINED = (*GPTQ[:5], "w3a16-g32", "--method", "gptq+signround+end_to_end", *_OPEN, *ROUND) + (
    "--option", "signround.steps=3", "--option", "end_to_end.steps=3",
)  # fmt: skip
_PLAN = ("plan", "model", "--bits", "5", "--out", "plan.toml", "--data", "random", "--rows", "2", "--length", "16") + (
    "--schemes", "w4a16-g32", "w8a16-channel", "--engine", "transformers", "--method", "rtn",
)  # fmt: skip


def save_small(kind: str, folder: Path, sizes: dict[str, Any], shards: int) -> None:
    """A tiny model, smaller still."""
    type_, arguments = tiny._CONFIGS[kind]
    tiny._CONFIGS["fuzz"] = (type_, arguments | sizes)
    try:
        size = "1GB" if shards == 1 else -(-_bytes() // shards)
        tiny.save("fuzz", folder, dtype=torch.bfloat16, seed=4, max_shard_size=size)
    finally:
        del tiny._CONFIGS["fuzz"]
    tiny.save_tokenizer(folder)
    (folder / "README.md").write_text("a model\n")
    (folder / "chat_template.jinja").touch()
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)


def _bytes() -> int:
    """Bytes of the weights in bfloat16."""
    return 2 * sum(parameter.numel() for parameter in tiny.build("fuzz").parameters())


def command(*words: str) -> int:
    """Run a command; returns its status."""
    from lowbit.cli import main

    forked.fork_commands()
    return main(list(words))


def _killed_after_a_block(arguments: Sequence[str]) -> None:
    import lowbit.run

    plain = lowbit.run.quantize

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def quantize(*given: Any, **more: Any) -> dict[str, Any]:
        return plain(*given, **more | {"progress": progress})

    lowbit.run.quantize = quantize  # type: ignore[assignment]
    command(*arguments)


def logits_of(folder: Path) -> Tensor:
    """What a checkpoint computes for a few tokens."""
    from lowbit.export import load

    model = load(str(folder), dtype=torch.float32)
    vocabulary = min(tiny.VOCAB, int(getattr(model.config, "vocab_size", tiny.VOCAB)))
    with torch.no_grad():
        return model(input_ids=tiny.tokens(2, 12, vocab=vocabulary)).logits


def _save_logits(folder: Path, target: Path) -> None:
    torch.save(logits_of(folder), target)


# ------------------------------------------------------------------------------------------------------------- odd values

DEEP = "[" * 3000 + "]" * 3000


def odd(rng: random.Random, old: Any = None) -> Any:
    """A value that hardly belongs there; often near the old one."""
    near: list[Any] = []
    if isinstance(old, bool):
        near = [not old, int(old), str(old)]
    elif isinstance(old, int):
        near = [old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old], 0, 2**31, 10**9]
    elif isinstance(old, float):
        near = [-old, old * 1000, 0.0, math.nan, math.inf, str(old), int(old)]
    elif isinstance(old, str):
        near = [old + "x", old[:-1], old.upper(), "", [old], {"a": old}, old * 100]
    elif isinstance(old, list):
        near = [old[:-1], old + old, [], {}, [*old, None], list(reversed(old)), [old], str(old)]
    elif isinstance(old, dict):
        near = [{}, [], list(old), {**old, "strange": 1}, str(old), {"a": old}]
    far = [
        None, True, False, 0, 1, -1, 3, 7, 3.5, -0.5, 1e308, 2**31, 2**63, 10**30, "", " ", "x", "\u0000", "ä" * 300, "../x",
        "/", [], [1], [[]], [None], {}, {"a": 1}, "(", "float32", "nan", 1e-320, math.nan, math.inf, "\ud7ff", [{}], "0",
    ]  # fmt: skip
    return rng.choice(near) if near and rng.random() < 0.6 else rng.choice(far)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON; of long lists, of the first and last few."""
    found = [path] if path else []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if len(items) > 12:
        items = items[:6] + items[-6:] if isinstance(value, list) else items
    for key, each in items:
        found += places(each, (*path, key))
    return found


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def short(value: Any) -> str:
    """A value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def json_damage(rng: random.Random, root: Path, name: str, target: str, *, top: float = 0.5) -> Damage:
    """Another value, one less or one more in the JSON file `name` of the materials, which lies at `target` in the case."""
    given = json.loads((root / name).read_text(encoding="utf-8"))
    every = places(given)
    firsts = [path for path in every if len(path) == 1]
    path = rng.choice(firsts if firsts and rng.random() < top else every) if every else ()
    where = ".".join(map(str, path))
    how = rng.random()
    old = _at(given, path)
    value: Any = None
    if how < 0.1:
        what = f"{target}: without {where}"
    elif how < 0.18:
        value = odd(rng)
        what = f"{target}: beside {where} a key 'strange' = {short(value)}"
    else:
        value = odd(rng, old)
        if rng.random() < 0.1 and len(every) > 1:
            value = _at(given, rng.choice(every))  # of another place
        what = f"{target}: {where} = {short(value)}"

    def apply(folder: Path) -> None:
        file = folder / target
        changed = json.loads(file.read_text(encoding="utf-8"))
        parent = _at(changed, path[:-1])
        if how < 0.1:
            del parent[path[-1]]
        elif how < 0.18:
            if isinstance(parent, dict):
                parent["strange"] = value
            else:
                parent.append(value)
        else:
            parent[path[-1]] = value
        file.write_text(json.dumps(changed), encoding="utf-8")

    return Damage(what, apply, (Path(target).name, *(str(key) for key in path if isinstance(key, str))))


def file_damage(rng: random.Random, root: Path, name: str, target: str) -> Damage:
    """A file that is cut, empty, missing, of another kind, or has other bytes."""
    size = (root / name).stat().st_size
    at = rng.randrange(max(1, size))
    what, change = rng.choice(
        [
            (f"cut to {at} bytes", lambda file: os.truncate(file, at)),
            (f"cut to {at} bytes", lambda file: os.truncate(file, at)),
            ("empty", lambda file: os.truncate(file, 0)),
            ("missing", lambda file: file.unlink()),
            ("a folder", lambda file: (file.unlink(), file.mkdir())),
            ("a FIFO", lambda file: (file.unlink(), os.mkfifo(file))),
            ("a link to nowhere", lambda file: (file.unlink(), file.symlink_to("nowhere"))),
            ("a link to itself", lambda file: (file.unlink(), file.symlink_to(file.name))),
            ("a link to /dev/null", lambda file: (file.unlink(), file.symlink_to("/dev/null"))),
            ("a link to /dev/zero", lambda file: (file.unlink(), file.symlink_to("/dev/zero"))),
            (f"byte {at} is 0xff", lambda file: _poke(file, at, b"\xff")),
            (f"byte {at} is 0", lambda file: _poke(file, at, b"\0")),
            (f"byte {at} is '{{'", lambda file: _poke(file, at, b"{")),
            (f"the bytes from {at} to {at + 40} are missing", lambda file: _cut_out(file, at, 40)),
            (f"the bytes from {at} to {at + 40} are there twice", lambda file: _double(file, at, 40)),
            ("text behind", lambda file: file.write_bytes(file.read_bytes() + b"\n{}")),
            ("a byte order mark in front", lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())),
            ("in UTF-16", lambda file: file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-16"))),
            ("3,000 brackets", lambda file: file.write_text(DEEP)),
            ("null", lambda file: file.write_text("null")),
            ("[]", lambda file: file.write_text("[]")),
            ("{}", lambda file: file.write_text("{}")),
            ("7", lambda file: file.write_text("7")),
        ]
    )
    return Damage(f"{target}: {what}", lambda folder: void(change(folder / target)), (Path(target).name,))


def void(value: Any) -> None:
    """Nothing."""


def _poke(file: Path, at: int, value: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    file.write_bytes(data)


def _cut_out(file: Path, at: int, count: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:at] + data[at + count :])


def _double(file: Path, at: int, count: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: at + count] + data[at:])


def shard_damage(rng: random.Random, root: Path, name: str, target: str) -> Damage:
    """Another header or other bytes of a safetensors file."""
    data = (root / name).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    tensors = [key for key in header if key != "__metadata__"]
    tensor = rng.choice(tensors)
    other = rng.choice(tensors)
    entry = header[tensor]
    first, last = entry["data_offsets"]
    names = (Path(target).name, tensor)

    def rewritten(what: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
        def apply(folder: Path) -> None:
            again = json.loads(json.dumps(header))
            changed = change(again)
            text = changed if isinstance(changed, bytes) else json.dumps(again).encode()
            (folder / target).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

        return Damage(f"{target}: {what}", apply, names)

    def body(what: str, change: Callable[[bytearray], Any]) -> Damage:
        def apply(folder: Path) -> None:
            changed = bytearray(data)
            change(changed)
            (folder / target).write_bytes(changed)

        return Damage(f"{target}: {what}", apply, names)

    def put(key: str, value: Any) -> Damage:
        return rewritten(f"{tensor}: {key} = {short(value)}", lambda h: h[tensor].__setitem__(key, value))

    shape = entry["shape"]
    start = 8 + length + first
    middle = start + rng.randrange(max(1, last - first))
    dtypes = ["F32", "F16", "BF16", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "F4", "x", 7]
    offsets = [
        [first, last + 2], [first, last - 2], [first + 2, last + 2], [last, first], [-2, last], [first], [first, last, last],
        [0, 2**62], [2**64, 2**65], header[other]["data_offsets"], ["0", "2"], None, [0.0, float(last)], [first, first],
    ]  # fmt: skip
    shapes = [
        shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [], [-n for n in shape], [2**32, 2**32], [float(n) for n in shape],
        [0], None, "x", [n * 2 for n in shape], [shape[0] * 2, *shape[1:]], [math.prod(shape)],
        [shape[0] // 2, *[n * 2 for n in shape[1:2]], *shape[2:]],
    ]  # fmt: skip
    number = rng.choice([0, 1, 2**63, 2**64 - 1, len(data), length - 1, length + 1, 10**8])
    value = rng.choice([b"\xc0\x7f", b"\x80\x7f", b"\xff\xff", b"\x80\xff", b"\0\0"])
    bit = 1 << rng.randrange(8)
    made = [
        *[lambda: put("data_offsets", rng.choice(offsets))] * 3,
        *[lambda: put("shape", rng.choice(shapes))] * 4,
        *[lambda: put("dtype", rng.choice(dtypes))] * 4,
        lambda: rewritten(f"{tensor} and {other} have each other's entry", lambda h: _exchange(h, tensor, other)),
        lambda: rewritten(f"without {tensor}", lambda h: h.pop(tensor)),
        lambda: rewritten(f"{tensor} is named {tensor}x", lambda h: h.__setitem__(tensor + "x", h.pop(tensor))),
        lambda: rewritten(f"{tensor} is there as 'strange' too", lambda h: h.__setitem__("strange", h[tensor])),
        lambda: rewritten(f"{tensor} is null", lambda h: h.__setitem__(tensor, None)),
        lambda: rewritten(
            f"{tensor} is there twice", lambda h: json.dumps(h)[:-1].encode() + f", {json.dumps(tensor)}: {{}}}}".encode()
        ),
        lambda: rewritten("__metadata__ of numbers", lambda h: h.__setitem__("__metadata__", {"format": 1})),
        lambda: rewritten("without __metadata__", lambda h: h.pop("__metadata__", None)),
        lambda: rewritten("__metadata__ says format = tf", lambda h: h.__setitem__("__metadata__", {"format": "tf"})),
        lambda: rewritten("the header is a list", lambda h: json.dumps([h]).encode()),
        lambda: rewritten("the header is empty", lambda h: b"{}"),
        lambda: rewritten("the header is no JSON", lambda h: json.dumps(h)[:-3].encode()),
        lambda: rewritten("the header is deep", lambda h: DEEP.encode()),
        lambda: body(f"the header's length is {number}", lambda b: b.__setitem__(slice(0, 8), struct.pack("<Q", number))),
        lambda: body("bytes behind the last tensor", lambda b: b.extend(b"\0" * 16)),
        *[lambda: body(f"{tensor}: bit {bit} of byte {middle - start} flipped", lambda b: _flip(b, middle, bit))] * 3,
        lambda: body(f"{tensor}: {value.hex()} at {(middle - start) // 2 * 2}", lambda b: _set(b, start, middle, value)),
        lambda: body(f"{tensor}: all zero", lambda b: b.__setitem__(slice(start, 8 + length + last), bytes(last - first))),
        lambda: body(f"{tensor}: all 0x41", lambda b: b.__setitem__(slice(start, 8 + length + last), b"A" * (last - first))),
        *[lambda: file_damage(rng, root, name, target)] * 5,
    ]
    return rng.choice(made)()


def _exchange(header: dict[str, Any], a: str, b: str) -> None:
    header[a], header[b] = header[b], header[a]


def _flip(data: bytearray, at: int, bit: int) -> None:
    if at < len(data):
        data[at] ^= bit


def _set(data: bytearray, start: int, at: int, value: bytes) -> None:
    at = start + (at - start) // 2 * 2
    data[at : at + 2] = value


def text_damage(rng: random.Random, root: Path, name: str, target: str) -> Damage:
    """A line, a value or a character of a text that is another one."""
    text = (root / name).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    line = lines[at]
    kind = rng.randrange(6)
    value = toml_value(rng)
    if kind == 0:
        new, what = "", f"without the line {line.strip()!r}"
    elif kind == 1:
        new, what = line * 2, f"twice the line {line.strip()!r}"
    elif kind == 2:
        new = rng.choice(["=", "[[", "[", '"', "x", "\u0000", "[strange]\na = 1\n", "strange = 1\n", "\ud7ff\n"]) + line
        what = f"{new[:20].strip()!r} in front of {line.strip()!r}"
    elif kind in (3, 4) and "=" in line:
        new = f"{line.partition('=')[0]}= {value}\n"
        what = f"{new.strip()[:80]!r} for {line.strip()!r}"
    else:
        cut = rng.randrange(len(line))
        new = line[:cut] + line[cut + 1 :]
        what = f"{new.strip()!r} for {line.strip()!r}"
    changed = "".join([*lines[:at], new, *lines[at + 1 :]])
    key = line.partition("=")[0].strip() if "=" in line else line.strip(" []\n")
    return Damage(
        f"{target}: {what}",
        lambda folder: void((folder / target).write_text(changed, encoding="utf-8")),
        (Path(target).name, *([key] if key else [])),
    )


def toml_value(rng: random.Random) -> str:
    """The text of a TOML value, or of none."""
    texts = [
        "", "x", "(", "w4a16-g32", "w4a16-g7", "w4a16-channel", "float", "gptq", "mxfp4", "s8", "w99a16", "(a+)+$", "((a+)+)+x",
        "random", "nowhere.txt", "hf:nowhere/nothing", "self", "\u0000", "ä" * 400, "/dev/zero", "lowbit", "vllm",
        "rotate", "lorc",
    ]  # fmt: skip
    others = [
        "7", "-1", "0", "0.5", "nan", "inf", "-inf", "1e400", "true", "[]", "[1]", "{}", "{a=1}", "1979-05-27", "9" * 20,
    ]  # fmt: skip
    return rng.choice([*map(json.dumps, texts), *others, DEEP[:200] + DEEP[-200:]])


# ------------------------------------------------------------------------------------------------------------------ areas


def _sequence(rng: random.Random, make: Callable[[], Damage]) -> list[Damage]:
    """One damage, sometimes two or three."""
    return [make() for _ in range(rng.choice([1, 1, 1, 1, 1, 1, 1, 2, 2, 3]))]


def _config(rng: random.Random, root: Path) -> dict[str, Any]:
    model = rng.choice(["llama", "llama", "single", "moe", "mamba", "bert"])
    damage = _sequence(
        rng,
        lambda: (
            json_damage(rng, root, f"{model}/config.json", "model/config.json")
            if rng.random() < 0.85
            else file_damage(rng, root, f"{model}/config.json", "model/config.json")
        ),
    )
    call = rng.choice([RTN, RTN, RTN, RTN, (*RTN, "--method", "gptq", *ROUND), ("inspect", "model"), _EVAL])
    return {"lay": {"model": model, "text.txt": "text.txt"}, "damage": damage, "call": call, "judge": _judge_source}


_EVAL = ("eval", "model", "--data", "text.txt", "--window", "32", "--limit", "2")
_GENERATE = ("generate", "model", "--prompt", "The quick", "--tokens", "4")


def _shards(rng: random.Random, root: Path) -> dict[str, Any]:
    model = rng.choice(["llama", "llama", "single", "moe", "mamba"])
    files = sorted(path.name for path in (root / model).glob("*.safetensors"))

    def one() -> Damage:
        name = rng.choice(files)
        return shard_damage(rng, root, f"{model}/{name}", f"model/{name}")

    damage = [one()]
    call = rng.choice([RTN, RTN, RTN, RTN, (*RTN, "--method", "gptq", *ROUND), ("inspect", "model"), _EVAL])
    return {"lay": {"model": model, "text.txt": "text.txt"}, "damage": damage, "call": call, "judge": _judge_source}


def _index(rng: random.Random, root: Path) -> dict[str, Any]:
    name = "model.safetensors.index.json"
    files = sorted(path.name for path in (root / "llama").glob("*.safetensors"))
    tensors = json.loads((root / "llama" / name).read_text())["weight_map"]
    tensor = rng.choice(sorted(tensors))
    elsewhere = rng.choice(
        [
            *files,
            "nowhere.safetensors",
            "",
            "../model/" + files[0],
            "config.json",
            "a" * 300,
            "/dev/zero",
            "\u0000",
            ".",
            7,
            None,
        ]
    )

    def point(folder: Path) -> None:
        file = folder / "model" / name
        index = json.loads(file.read_text())
        index["weight_map"][tensor] = elsewhere
        file.write_text(json.dumps(index))

    def one() -> Damage:
        which = rng.random()
        if which < 0.4:
            return Damage(f"model/{name}: {tensor} in {short(elsewhere)}", point, (name, tensor))
        if which < 0.7:
            return json_damage(rng, root, f"llama/{name}", f"model/{name}", top=0.3)
        if which < 0.9:
            return file_damage(rng, root, f"llama/{name}", f"model/{name}")
        a, b = rng.sample(files, 2)
        return Damage(f"model: {a} and {b} have each other's name", lambda folder: _swap(folder / "model", a, b), (a, b))

    return {
        "lay": {"model": "llama", "text.txt": "text.txt"},
        "damage": _sequence(rng, one),
        "call": rng.choice([RTN, RTN, RTN, ("inspect", "model"), _EVAL]),
        "judge": _judge_source,
    }


def _swap(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "between")
    (folder / b).rename(folder / a)
    (folder / "between").rename(folder / b)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _tokenizer(rng: random.Random, root: Path) -> dict[str, Any]:
    name = rng.choice(_TOKENIZER_FILES)
    source, target = f"llama/{name}", f"model/{name}"

    def one() -> Damage:
        if name.endswith(".json") and rng.random() < 0.8:
            return json_damage(rng, root, source, target, top=0.6)
        return file_damage(rng, root, source, target)

    data = rng.choice(["text.txt", "lines.jsonl", "chat.jsonl"])
    rows = ("--data", data, "--rows", "4", "--length", "16")
    calls = [(*RTN, "--method", "gptq", *rows), (*RTN, "--method", "gptq", *rows), _EVAL, _GENERATE]
    return {
        "lay": {"model": "llama", data: data, "text.txt": "text.txt"},
        "damage": _sequence(rng, one),
        "call": rng.choice(calls),
        "names": ("tokenizer",),
    }


def _generation(rng: random.Random, root: Path) -> dict[str, Any]:
    model = rng.choice(["llama", "out-native", "out-4"])
    source, target = f"{model}/generation_config.json", "model/generation_config.json"

    def one() -> Damage:
        if rng.random() < 0.3:
            return file_damage(rng, root, source, target)
        key = rng.choice(
            ["eos_token_id", "pad_token_id", "max_length", "temperature", "top_k", "do_sample", "transformers_version", "x"]
        )
        value = odd(rng, 1)
        return Damage(f"{target}: {key} = {short(value)}", lambda folder: _put(folder / target, key, value), (key,))

    call = rng.choice(
        [RTN, _EVAL, _GENERATE, _GENERATE] if model == "llama" else [_EVAL, _GENERATE, ("load", {"model": "model"})]
    )
    return {
        "lay": {"model": model, "text.txt": "text.txt"},
        "damage": _sequence(rng, one),
        "call": call,
        "judge": _judge_source if model == "llama" else None,
        "names": ("generation_config",),
    }


def _put(file: Path, key: str, value: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def _recipe(rng: random.Random, root: Path) -> dict[str, Any]:
    recipe = rng.choice(["recipe.toml", "recipe.toml", "plan.toml"])
    target = "recipe.toml"

    def structured() -> Damage:
        given = tomllib.loads((root / recipe).read_text())
        every = places(given)
        path = rng.choice(every)
        value = rng.choice([v for v in (odd(rng, _at(given, path)) for _ in range(4)) if _in_toml(v)] or [7])

        def apply(folder: Path) -> None:
            import tomli_w

            changed = tomllib.loads((folder / target).read_text())
            _at(changed, path[:-1])[path[-1]] = value
            (folder / target).write_text(tomli_w.dumps(changed), encoding="utf-8")

        names = (target, *(str(key) for key in path if isinstance(key, str)))
        return Damage(f"{target}: {'.'.join(map(str, path))} = {short(value)}", apply, names)

    which = rng.random()
    if which < 0.5:
        damage = [structured() for _ in range(rng.choice([1, 1, 2]))]
    elif which < 0.9:
        damage = [text_damage(rng, root, recipe, target)]
    else:
        damage = [file_damage(rng, root, recipe, target)]
    call = ("quantize", "model", "--out", "out", "--recipe", target)
    lay = {"model": "llama", target: recipe}
    return {"lay": lay, "damage": damage, "call": call, "judge": _judge_recipe, "names": (*METHODS, "rule ")}


def _in_toml(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _in_toml(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_in_toml, value))
    return value is not None


def _sensitivities(rng: random.Random, root: Path) -> dict[str, Any]:
    target = "plan.sensitivities.json"

    def one() -> Damage:
        if rng.random() < 0.8:
            return json_damage(rng, root, target, target, top=0.15)
        return file_damage(rng, root, target, target)

    compare = ("compare", "model", "--out", "compared", "--recipes", "recipe.toml", "--text", "text.txt", "--window", "16")
    compare = (*compare, "--limit", "1", "--sensitivities", target)
    return {
        "lay": {"model": "llama", target: target, "recipe.toml": "recipe.toml", "text.txt": "text.txt"},
        "damage": _sequence(rng, one),
        "call": compare if rng.random() < 0.15 else _PLAN,
        "judge": _judge_plan,
        "names": ("decisions", "cost"),
    }


def _data(rng: random.Random, root: Path) -> dict[str, Any]:
    name = rng.choice(["text.txt", "lines.jsonl", "lines.jsonl", "chat.jsonl", "chat.jsonl"])
    size = (root / name).stat().st_size

    def one() -> Damage:
        if rng.random() < 0.5 and name.endswith("jsonl"):
            lines = (root / name).read_text().splitlines()
            at = rng.randrange(len(lines))
            record = json.loads(lines[at])
            path = rng.choice(places(record))
            value = odd(rng, _at(record, path))
            whole = rng.random() < 0.2
            if whole:
                record = value
            else:
                _at(record, path[:-1])[path[-1]] = value
            lines[at] = json.dumps(record) if rng.random() < 0.9 else DEEP
            changed = "\n".join(lines)
            where = "the line" if whole else ".".join(map(str, path))
            return Damage(
                f"{name}: {where} = {short(value)} in line {at + 1}{' (deep)' if lines[at] == DEEP else ''}",
                lambda folder: void((folder / name).write_text(changed, encoding="utf-8")),
                (name,),
            )
        if rng.random() < 0.3:
            strange = rng.choice(
                [
                    b"\xff\xfe",
                    b"\0" * 100,
                    b"\r\n\r\n" * 50,
                    "\u2028\u2029\ud7ff".encode(),
                    b" " * 1000,
                    b"a" * 200_000,
                    b"\n" * 9999,
                ]
            )
            at = rng.randrange(size)
            return Damage(
                f"{name}: {len(strange)} bytes {short(strange[:8])}... at {at}",
                lambda folder: void((folder / name).write_bytes(_inserted((folder / name).read_bytes(), at, strange))),
                (name,),
            )
        return file_damage(rng, root, name, name)

    rows = ("--data", name, "--rows", str(rng.choice([1, 4, 4, 50])), "--length", str(rng.choice([2, 16, 16, 200])))
    calls = [
        (*RTN, "--method", "gptq", *rows),
        ("eval", "model", "--data", name, "--window", "32", "--limit", "2"),
        (*_PLAN[:6], "--data", name, *_PLAN[8:]),
    ]
    return {
        "lay": {"model": "llama", name: name},
        "damage": _sequence(rng, one),
        "call": rng.choice(calls),
        "names": ("--rows",),
    }


def _inserted(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at:]


_COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "quantize": (
        ("model", "--out", "out", "--scheme", "w4a16-g32", "--engine", "transformers", *ROUND),
        {
            "--scheme": [
                "w4a16",
                "w8a8",
                "fp8",
                "nvfp4",
                "mxfp4",
                "nf4",
                "w4a4-g32-ag32",
                "s8",
                "w8a8-astatic",
                "bcq2",
                "w0a16",
            ],
            "--method": [
                "rtn",
                "gptq",
                "hqq",
                "awq+rtn",
                "smooth+gptq",
                "rotate+rtn",
                "rtn+lorc",
                "gptq+rtn",
                "embed+rtn",
                "rtn+",
            ],
            "--option": [
                "damping=0.1",
                "damping=x",
                "=",
                "a.b=1",
                "rtn.importance=true",
                "lorc.rank=2",
                "damping=NaN",
                "damping",
            ],
            "--ignore": ["mlp", "", "(", "nothing", "lm_head"],
            "--format": ["lowbit", "compressed-tensors", "gguf"],
            "--engine": ["vllm", "transformers", "x"],
            "--kv-cache": ["fp8", "int8"],
            "--data": ["random", "text.txt", "self", "lines.jsonl", "chat.jsonl", "hf:", "hf:a/b"],
            "--rows": ["1", "4"],
            "--length": ["2", "16", "300"],
            "--seed": ["0", "5"],
            "--parallel": ["1", "0", "-1"],
            "--device": ["cpu", "cuda", "cuda:7", "meta", "tpu"],
            "--revision": ["main"],
            "--recipe": ["recipe.toml", "plan.toml", "model", "text.txt"],
            "--out": [
                "out",
                "model",
                "model/out",
                ".",
                "..",
                "/",
                "text.txt",
                "text.txt/out",
                "/proc/out",
                "x" * 300,
                "/dev/null",
            ],
            "--overwrite": [],
            "--deterministic": [],
        },
    ),
    "plan": (
        _PLAN[1:],
        {
            "--bits": ["4.5", "1", "99", "nan", "inf", "-1", "0"],
            "--size": ["50KB", "1", "0", "1TB", "1e3", "10 KiB", "KB", "-5MB"],
            "--max-ppl-ratio": ["1.5", "1.02", "1", "nan", "inf", "100"],
            "--schemes": ["w4a16-g32", "float", "w8a8", "nf4", "s8", "w4a16-g7"],
            "--signal": ["kl", "fisher", "trace", "eigenvalue", "x"],
            "--per": ["block", "linear", "x"],
            "--data": ["random", "self", "text.txt"],
            "--rows": ["1", "2"],
            "--length": ["2", "16"],
            "--method": ["rtn", "gptq", "embed+rtn", "rotate+rtn", "smooth+rtn", "rtn+mrem"],
            "--ignore": ["mlp", "", "(", "nothing"],
            "--format": ["lowbit", "compressed-tensors"],
            "--sensitivities": ["s.json", "model", "text.txt", "recipe.toml", "nowhere/s.json", "/dev/null"],
            "--out": ["plan.toml", "model", "nowhere/plan.toml", "plan", "/dev/null", "x" * 300, "text.txt"],
            "--overwrite": [],
        },
    ),
    "compare": (
        ("model", "--out", "compared", "--recipes", "recipe.toml", "--text", "text.txt", "--window", "16", "--limit", "1"),
        {
            "--recipes": ["recipe.toml", "plan.toml", "text.txt", "model"],
            "--search": ["0", "-1", "nan", "0.01", "inf"],
            "--text": ["text.txt", "lines.jsonl", "random", "nowhere.txt", "model", "self"],
            "--data": ["random", "text.txt", "nowhere"],
            "--window": ["16", "2", "1", "0", "300"],
            "--limit": ["1", "0", "-1"],
            "--sensitivities": ["plan.sensitivities.json", "recipe.toml", "model/config.json"],
            "--out": ["compared", "model", "text.txt", "/dev/null", "out-4"],
        },
    ),
    "eval": (
        ("model", "--data", "text.txt", "--window", "32", "--limit", "2"),
        {
            "--data": ["text.txt", "lines.jsonl", "chat.jsonl", "random", "self", "hf:", "model", "recipe.toml"],
            "--reference": ["model", "out-4", "nowhere", "text.txt"],
            "--window": ["2", "16", "300", "1"],
            "--stride": ["1", "16", "64", "0"],
            "--bos": ["none", "window", "x"],
            "--limit": ["1", "0"],
            "--kv-cache": ["fp8", "int4-g32", "int3-g16-kchannel-w8", "int8", "int99", "int4-g7", "x", "int4-g0"],
            "--dtype": ["float32", "bfloat16", "float16", "int8"],
            "--tasks": ["hellaswag", "", "x,y"],
            "--json": [],
        },
    ),
    "inspect": (("model",), {"--json": []}),
    "generate": (
        ("model", "--prompt", "The quick", "--tokens", "3"),
        {
            "--prompt": ["", "x" * 2000, "\ud7ff", "ä", "<|eos|>"],
            "--tokens": ["1", "0", "400"],
            "--temperature": ["0", "1", "-1", "nan", "inf", "1e-30"],
            "--seed": ["0", "-1", str(2**64), str(2**70)],
            "--device": ["cpu", "meta", "cuda", "x"],
            "--kernels": [],
            "--no-kernels": [],
        },
    ),
    "bench": (
        ("model", "--batch", "1", "--prompt", "4", "--tokens", "2"),
        {
            "--batch": ["1", "0", "-1"],
            "--prompt": ["1", "4", "0", "300"],
            "--tokens": ["1", "2", "0", "300"],
            "--device": ["cpu", "cuda", "x"],
            "--plot": ["roofline.png", "nowhere/x.png", "x.xyz", "model"],
            "--peers": ["torchao-int4", "x", ""],
            "--shapes": ["llama-7b", "x"],
            "--schemes": ["w8a8", "x"],
            "--json": [],
        },
    ),
}
_NUMBERS = ["-1", "0", "1.5", "x", "", str(2**31), str(2**63), str(10**30), "1e3", "nan", " 4"]


def _commands(rng: random.Random, root: Path) -> dict[str, Any]:
    name = rng.choice([*_COMMANDS, "quantize", "quantize", "plan", "eval"])
    base, options = _COMMANDS[name]
    words = list(base)
    names: list[str] = []
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        if rng.random() < 0.15:
            strange = [
                "out-4",
                "out-native",
                "single",
                "mamba",
                "bert",
                "text.txt",
                "nowhere",
                "",
                "nowhere/nothing",
                "-",
                ".",
                "/",
            ]
            words[0] = rng.choice([*strange, "x" * 300, "\ud7ff", "model.gguf", "a/b/c"])
            names.append(words[0])
            continue
        option = rng.choice(sorted(options))
        values = options[option]
        value = rng.choice(values) if values else None
        if values and all(re.fullmatch(r"[\d.+-]+", v) for v in values) and rng.random() < 0.5:
            value = rng.choice(_NUMBERS)
        names += [option, option.strip("-").replace("-", "_")] + ([value] if value and len(value) > 1 else [])
        at = words.index(option) if option in words else None
        if at is not None and values and rng.random() < 0.9:
            words[at + 1] = str(value)
        elif at is not None and values:
            del words[at : at + 2]
        else:
            words += [option] + ([value] if value is not None else [])
    lay = {n: n for n in ("text.txt", "lines.jsonl", "chat.jsonl", "recipe.toml", "plan.toml", "plan.sensitivities.json")}
    lay |= {"model": "llama"} | {
        word: word for word in words if os.path.isdir(root / word) and "/" not in word and word not in "."
    }
    return {"lay": lay, "damage": [], "call": (name, *words), "names": tuple(names)}


_ARGUMENTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "quantize": (
        {"model": "model", "out": "out", "scheme": "w4a16-g32", "engine": "transformers"},
        ["model", "out", "recipe", "scheme", "method", "options", "ignore", "data", "format", "engine", "kv_cache", "revision"]
        + ["device", "parallel", "deterministic", "overwrite", "progress"],
    ),
    "load": ({"model": "model"}, ["model", "revision", "dtype", "device", "kernels"]),
    "evaluate": (
        {"window": 8, "max_windows": 2},
        ["model", "tokens", "reference", "window", "stride", "bos", "bos_id", "max_windows", "device", "source", "progress"],
    ),
    "plan": (
        {"model": "model", "bits": 5, "data": "text.txt", "rows": 2, "length": 16, "method": "rtn", "engine": "transformers"}
        | {"schemes": ["w4a16-g32", "w8a16-channel"]},
        ["model", "bits", "size", "max_ppl_ratio", "schemes", "signal", "per", "effort", "data", "rows", "length", "method"]
        + ["options", "ignore", "format", "engine", "sensitivities", "device", "overwrite"],
    ),
    "Recipe": (
        {"rules": [{"match": "", "scheme": "w4a16-g32"}], "steps": [{"method": "rtn"}]},
        ["rules", "steps", "data", "format", "engine", "kv_cache"],
    ),
}


def _interface(rng: random.Random, root: Path) -> dict[str, Any]:
    name = rng.choice([*_ARGUMENTS, "quantize"])
    base, every = _ARGUMENTS[name]
    arguments = dict(base)
    names = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        key = rng.choice(every)
        value = odd(rng, base.get(key, {"data": "text.txt", "method": "gptq"}.get(key)))
        arguments[key] = value
        names += [key, *(["source"] if key == "data" else [])]
    lay = {
        "model": rng.choice(["llama", "llama", "out-4"]) if name in ("load", "evaluate") else "llama",
        "text.txt": "text.txt",
    }
    return {"lay": lay, "damage": [], "call": (name, arguments), "names": tuple(names)}


def _outputs(rng: random.Random, root: Path) -> dict[str, Any]:
    outs = ["out-4", "out-4", "out-8", "out-fp8", "out-native", "out-native", "out-turned", "out-nf4", "out-lorc", "out-moe"]
    out = rng.choice(outs)
    files = sorted(path.relative_to(root / out).as_posix() for path in (root / out).rglob("*") if path.is_file())
    jsons = [n for n in files if n.endswith(".json") and "tokenizer" not in n and n != "generation_config.json"]
    shards = [n for n in files if n.endswith(".safetensors")]
    native = [n for n in jsons if n == "lowbit.json"]

    def one() -> Damage:
        which = rng.random()
        if which < 0.35:
            name = rng.choice(shards)
            return shard_damage(rng, root, f"{out}/{name}", f"model/{name}")
        if which < 0.5:
            return tensor_damage(rng, root, f"{out}/{rng.choice(shards)}", "model")
        if which < 0.88:
            name = rng.choice([*jsons, "config.json", *native, *native])
            if name == "config.json" and rng.random() < 0.5:
                return _quantization_damage(rng, root, out)
            return json_damage(rng, root, f"{out}/{name}", f"model/{name}", top=0.3)
        if which < 0.97:
            name = rng.choice(jsons + shards)
            return file_damage(rng, root, f"{out}/{name}", f"model/{name}")
        folder = rng.choice(["adapter"] if (root / out / "adapter").is_dir() else ["report.json", "tokenizer.json"])
        return Damage(f"model/{folder}: missing", lambda f: void(_remove(f / "model" / folder)), (folder,))

    call = rng.choice(
        [("load", {"model": "model"})] * 5 + [("inspect", "model"), ("inspect", "model"), _EVAL, _GENERATE, _KERNELS]
    )
    return {
        "lay": {"model": out, "text.txt": "text.txt"},
        "damage": _sequence(rng, one),
        "call": call,
        "judge": partial(_judge_output, out),
    }


_KERNELS = ("load", {"model": "model", "kernels": True})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _quantization_damage(rng: random.Random, root: Path, out: str) -> Damage:
    """A value inside `quantization_config` or another of the settings that decide what is computed."""
    target = "model/config.json"
    given = json.loads((root / out / "config.json").read_text())
    inner = places(given.get("quantization_config", {}))
    path = ("quantization_config", *rng.choice(inner)) if inner else ("hidden_size",)
    value = odd(rng, _at(given, path))
    if isinstance(value, str) and rng.random() < 0.3:
        value = "re:" + rng.choice(["(", ".*", "(([a-z_.0-9])+)+$x", "x", ".*down_proj"])

    def apply(folder: Path) -> None:
        file = folder / target
        changed = json.loads(file.read_text())
        _at(changed, path[:-1])[path[-1]] = value
        file.write_text(json.dumps(changed))

    return Damage(f"{target}: {'.'.join(map(str, path))} = {short(value)}", apply, ("config.json", str(path[-1])))


def tensor_damage(rng: random.Random, root: Path, name: str, target: str) -> Damage:
    """A tensor of a shard that is another one in a file that is whole."""
    from safetensors.torch import load_file, save_file

    file = Path(name).name if name.count("/") == 1 else name.partition("/")[2]
    tensors = load_file(root / name)
    tensor = rng.choice(sorted(tensors))
    old = tensors[tensor]
    changes: list[tuple[str, Callable[[Tensor], Tensor | None]]] = [
        ("its first row", lambda t: t[:1]),
        ("its first column", lambda t: t[..., :1]),
        ("without its last row", lambda t: t[:-1]),
        ("transposed", lambda t: t.mT.contiguous() if t.dim() > 1 else t[None]),
        ("flat", lambda t: t.flatten()),
        ("negated", lambda t: (-t.float()).to(t.dtype) if t.is_floating_point() else ~t),
        ("zero", lambda t: torch.zeros_like(t)),
        ("as int32", lambda t: t.float().to(torch.int32)),
        ("as float32", lambda t: t.float()),
        ("as float64", lambda t: t.double()),
        ("with a NaN", lambda t: _with_first(t, math.nan)),
        ("with an infinity", lambda t: _with_first(t, math.inf)),
        ("with 127 in front", lambda t: _with_first(t, 127)),
        ("doubled", lambda t: (t.float() * 2).to(t.dtype)),
        ("in reverse", lambda t: t.flip(0)),
        ("a scalar", lambda t: t.flatten()[0].clone() if t.numel() else t),
        ("empty", lambda t: t.new_zeros(0)),
        ("twice as long", lambda t: torch.cat([t, t]) if t.dim() else t[None]),
        ("gone", lambda t: None),
    ]
    what, change = rng.choice(changes)
    with_header = dict(tensors)
    try:
        new = change(old.clone())
    except (RuntimeError, IndexError, ValueError):
        new, what = None, "gone"
    if new is None:
        del with_header[tensor]
    else:
        with_header[tensor] = new.contiguous()
    data_format = {"format": "pt"}

    def apply(folder: Path) -> None:
        path = folder / target / file
        path.unlink()
        metadata = _metadata(root / name) | data_format
        save_file(with_header, path, metadata=metadata)

    return Damage(f"{target}/{file}: {tensor} {what}", apply, (file, tensor, tensor.rpartition(".")[0]))


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def _with_first(tensor: Tensor, value: float) -> Tensor:
    if tensor.numel() and (tensor.is_floating_point() or math.isfinite(value)):
        tensor.view(-1)[0] = value
    return tensor


def _journals(rng: random.Random, root: Path) -> dict[str, Any]:
    partial_name, whole, call = rng.choice([("partial", "whole", GPTQ), ("partial-trained", "whole-trained", _TRAINED)])
    base = root / partial_name
    files = sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    files = [n for n in files if not n.endswith("lock")]
    jsons = [n for n in files if n.endswith(".json")]

    def one() -> Damage:
        which = rng.random()
        if which < 0.3:
            name = rng.choice(jsons)
            return json_damage(rng, root, f"{partial_name}/{name}", f"out.partial/{name}", top=0.4)
        if which < 0.45 and any(n.endswith(".safetensors") for n in files):
            name = rng.choice([n for n in files if n.endswith(".safetensors")])
            return shard_damage(rng, root, f"{partial_name}/{name}", f"out.partial/{name}")
        if which < 0.85:
            name = rng.choice(files)
            return file_damage(rng, root, f"{partial_name}/{name}", f"out.partial/{name}")
        strange = rng.choice(
            ["extra.safetensors", "strange.txt", "x.tmp/y", ".work/block-00007.json", ".work/hidden-7", ".work/x.tmp", "x.tmp"]
            + [".work/solved-00000", ".work/strange", "adapter/x", "config.json", ".work/trial-x.json", "model/x"]
        )

        def add(folder: Path) -> None:
            path = folder / "out.partial" / strange
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("strange")

        foreign = "" if strange.startswith(".work/") else strange.partition("/")[0]
        return Damage(f"out.partial/{strange} is there", add, (strange,), foreign)

    return {
        "lay": {"model": "llama", "out.partial": partial_name},
        "damage": _sequence(rng, one),
        "call": call,
        "judge": partial(_judge_resumed, whole),
        "again": (*call, "--overwrite"),
        "names": ("out.partial",),
    }


AREAS: dict[str, tuple[int, Callable[[random.Random, Path], dict[str, Any]]]] = {
    "config": (14, _config),
    "shards": (12, _shards),
    "index": (4, _index),
    "tokenizer": (7, _tokenizer),
    "generation": (3, _generation),
    "recipe": (12, _recipe),
    "sensitivities": (4, _sensitivities),
    "data": (8, _data),
    "commands": (10, _commands),
    "interface": (8, _interface),
    "outputs": (22, _outputs),
    "journals": (8, _journals),
}


def case(materials: Materials, number: int, seed: int = SEED) -> Case:
    """The case of a number."""
    rng = random.Random(f"{seed}-{number}")
    area = _area(rng)
    return Case(number=number, area=area, **AREAS[area][1](rng, materials.root))


def area(number: int, seed: int = SEED) -> str:
    """What the case of a number damages."""
    return _area(random.Random(f"{seed}-{number}"))


def _area(rng: random.Random) -> str:
    return rng.choices(list(AREAS), [weight for weight, _ in AREAS.values()])[0]


# ---------------------------------------------------------------------------------------------------------------- judging


def _judge_source(folder: Path, materials: Materials) -> str:
    """The output must hold what the shards hold, and compute about what the float model computes."""
    if not (folder / "out").is_dir():
        return ""
    from safetensors.torch import load_file

    from lowbit.export import QuantizedSource, load, open_checkpoint

    source = open_checkpoint(str(folder / "out"))
    assert isinstance(source, QuantizedSource)
    solver = json.loads((folder / "out" / "report.json").read_text())["recipe"]["steps"][0]["method"]
    quantized = {module.tensor for module in source.modules.values()}
    found = source.read(list(source.tensors))
    index = folder / "model" / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    expected = {key: value for name in names for key, value in load_file(folder / "model" / name).items()}
    for key, value in expected.items():
        if key not in found:
            return f"tensor {key} is missing in the output"
        got = found[key]
        if got.shape != value.shape:
            return f"{key} has the shape {tuple(got.shape)}, {tuple(value.shape)} in the source"
        if key in quantized:
            step = float(value.float().abs().amax()) / 127 + 1e-6
            if not float((got.float() - value.float()).abs().amax()) <= (10 if solver == "gptq" else 1.01) * step:
                return f"{key} is further from the source than its scheme explains"
        elif not torch.equal(got.to(value.dtype), value) and not value.isnan().any():
            return f"{key} is another one than in the source"
    plain = load(str(folder / "model"), dtype=torch.float32)
    tokens = tiny.tokens(2, 12, vocab=min(tiny.VOCAB, int(getattr(plain.config, "vocab_size", tiny.VOCAB))))
    with torch.no_grad():
        a = plain(input_ids=tokens)[0].float()
    with torch.no_grad():
        b = load(str(folder / "out"), dtype=torch.float32)(input_ids=tokens)[0].float()
    if not torch.isfinite(a).all():
        return "the float model's logits are not finite, and were quantized without a word"
    change = float((a - b).norm() / a.norm().clamp(min=1e-9))
    return "" if change < 0.3 else f"logits of the output differ by {change:.2g} of their size from the float model's"


def _judge_recipe(folder: Path, materials: Materials) -> str:
    """Every linear must have the scheme of the first rule that matches."""
    if not (folder / "out").is_dir():
        return ""
    given = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    report = json.loads((folder / "out" / "report.json").read_text())
    if report["recipe"]["format"] != given.get("format", "compressed-tensors"):
        return "another format than the recipe's"
    steps = [step["method"] for step in report["recipe"]["steps"]]
    if steps != [step["method"] for step in given["steps"]]:
        return f"steps {steps}, {given['steps']} in the recipe"
    for row in report["linears"]:
        rule = next((rule for rule in given["rules"] if re.search(rule["match"], row["name"])), None)
        if rule is None or rule["scheme"].lower() != row["scheme"]:
            return f"{row['name']} has the scheme {row['scheme']}, but the first rule that matches is {rule}"
    return ""


def _judge_plan(folder: Path, materials: Materials) -> str:
    """A plan keeps within its bits, and reads as a recipe."""
    if not (folder / "plan.toml").is_file():
        return ""
    from lowbit.recipe import read_recipe

    read_recipe(folder / "plan.toml")
    decisions = json.loads((folder / "plan.sensitivities.json").read_text())["decisions"]
    costs = [cost for row in decisions.values() for cost in row["cost"].values()]
    if not all(isinstance(cost, (int, float)) and math.isfinite(cost) for cost in costs):
        return "planned with costs that are no finite numbers"
    return ""


def _judge_output(name: str, folder: Path, materials: Materials) -> str:
    """Logits must be what they were, or `inspect --check` must object."""
    expected = materials.logits[name]
    found = logits_of(folder / "model")
    if found.shape == expected.shape and torch.equal(found, expected):
        return ""
    if _objects(folder / "model"):
        return ""
    if found.shape != expected.shape:
        return f"the logits have the shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    change = float((found - expected).norm() / expected.norm())
    return f"loads with other logits ({change:.2g} of their size), and inspect --check does not object"


def _objects(folder: Path) -> bool:
    """Whether `inspect --check` refuses the folder; False where there is no such option."""
    from lowbit.cli import _parser, main

    actions = next(action for action in _parser()._actions if hasattr(action, "choices") and action.choices)
    assert actions.choices is not None
    if "--check" not in actions.choices["inspect"]._option_string_actions:  # type: ignore[index, union-attr]
        return False
    return main(["inspect", str(folder), "--check"]) == 2


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of every file but the reports, which tell times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.md", "report.html")
    }


def _judge_resumed(whole: str, folder: Path, materials: Materials) -> str:
    """What a resumed run wrote must be what an uninterrupted one writes."""
    found, expected = files_of(folder / "out"), files_of(materials.root / whole)
    unlike = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return f"the result differs from that of an uninterrupted run in {', '.join(unlike)[:200]}" if unlike else ""


def _call(case: Case, folder: Path, materials: Materials) -> Any:
    """What the child does: the call; where it returns a result, its judgement."""
    if len(case.call) == 2 and isinstance(case.call[1], dict):
        status = 0
        try:
            _interface_call(case.call[0], case.call[1])
        except (ValueError, ImportError) as error:
            return {"status": 2, "message": str(error)}
    else:
        status = command(*case.call)  # type: ignore[arg-type]
    if status != 0:
        return {"status": status}
    return {"status": 0, "judged": True}


def _interface_call(name: str, arguments: dict[str, Any]) -> None:
    import lowbit

    if name == "Recipe":
        from lowbit.recipe import recipe_from_dict

        recipe_from_dict(arguments)
    elif name == "plan":
        lowbit.plan(**arguments)
    elif name == "evaluate":
        given = {"model": lowbit.load("model") if "model" not in arguments else None, "tokens": tiny.tokens(1, 30)[0]}
        import_module("lowbit.evaluate").evaluate_model(**given | arguments)
    else:
        getattr(lowbit, name)(**arguments)


def _judgement(case: Case, folder: Path, materials: Materials) -> str:
    """In a child of its own: what lowbit refuses while it is judged, it refuses."""
    assert case.judge is not None
    try:
        return case.judge(folder, materials)
    except (ValueError, ImportError) as error:
        return f"refused: {error}" if case.area != "outputs" else ""


def judged(case: Case, materials: Materials, folder: Path, *, seconds: float = 20.0) -> Verdict:
    """Lay a case out in `folder`, which is removed afterwards, run it, and say how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for target, name in case.lay.items():
            materials.lay(name, folder / target)
        for damage in case.damage:
            if not all(path.is_dir() or path.is_file() and path.resolve().is_relative_to(folder) for path in folder.rglob("*")):
                break  # devices and FIFOs are for the child to read
            try:
                damage.apply(folder)
            except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
                continue  # of several, one that no longer has what it damages
        before = _inputs(case, folder)
        ending = forked.run(partial(_call, case, folder, materials), cwd=folder, seconds=seconds)
        kind, where, message = _verdict(case, ending, folder)
        spent = ending.seconds
        if kind == "ran" and case.judge is not None:
            ending = forked.run(partial(_judgement, case, folder, materials), cwd=folder, seconds=seconds)
            spent += ending.seconds
            if ending.kind != "returned":
                kind, where, message = _verdict(case, ending, folder)
                kind = kind if kind != "ran" else "traceback"
            elif ending.value:
                kind, where, message = "wrong", f"{case.area}: {_without_details(ending.value)}", ending.value
        told = kind == "clean" and any(damage.foreign and damage.foreign in message for damage in case.damage)
        if kind in ("clean", "bare") and case.again and not told:
            ending = forked.run(partial(command, *case.again), cwd=folder, seconds=seconds)
            spent += ending.seconds
            if ending.kind == "returned" and ending.value == 0:
                ending = forked.run(partial(_judgement, case, folder, materials), cwd=folder, seconds=seconds)
                if ending.value:
                    message = str(ending.value)
                    kind, where = "wrong", f"{case.area}, --overwrite: {_without_details(message)}"
            else:
                again = _verdict(case, ending, folder)
                kind, where, message = "stuck", f"{case.area}: refused, then with --overwrite {again[0]} {again[1]}", again[2]
        if kind in GOOD:
            left = sorted(path.name for path in (folder / "tmp").iterdir())
            unlike = sorted(n for n, stamp in _inputs(case, folder).items() if before.get(n, stamp) != stamp)
            gone = sorted(before.keys() - _inputs(case, folder).keys())
            if left or ending.orphans or unlike or gone:
                kind = "litter"
                where = f"{case.area}: in TMPDIR {len(left)}, processes {len(ending.orphans)}, changed {unlike + gone}"
                message = f"left in TMPDIR: {left}; processes: {ending.orphans}; changed: {unlike}; removed: {gone}"
        message = message.replace(f"{folder}/", "").replace(str(folder), ".")
        return Verdict(case.number, case.area, kind, where, message[:300], case.story, spent)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def _without_details(text: str) -> str:
    """The kind of a complaint: numbers and names of tensors and layers left out."""
    text = re.sub(r"\b[\w.]*(layers|embed|norm|lm_head|proj)[\w.]*", "TENSOR", text)
    return re.sub(r"\d[\d.e+-]*", "N", text)[:160]


def _inputs(case: Case, folder: Path) -> dict[str, tuple[int, ...]]:
    """Stamps of what a run must leave alone."""
    found = {}
    for target in case.lay:
        if target in ("out.partial", "plan.sensitivities.json"):
            continue
        for path in [folder / target, *(folder / target).rglob("*")] if (folder / target).is_dir() else [folder / target]:
            try:
                status = path.lstat()
            except OSError:
                continue
            if not path.is_dir() and path.stem != "report":  # eval adds what it measured
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns, status.st_ino)
    if isinstance(case.call, tuple) and "--overwrite" in case.call:
        return {}
    return found


def _verdict(case: Case, ending: Ending, folder: Path) -> tuple[str, str, str]:
    """Kind, place and message of how a child ended."""
    if ending.kind in ("hang", "memory"):
        place = (
            re.sub(r":\d+", "", ending.frame) if ending.frame else "; ".join(d.what for d in case.damage)[:100] or case.command
        )
        return ending.kind, f"{case.area}: {place}", ending.error[1] if ending.error else ""
    if ending.kind == "killed":
        return "signal", f"{case.area}: {signal.Signals(ending.signal).name}", ending.err[-300:]
    if ending.kind == "raised":
        assert ending.error is not None
        return "traceback", f"{ending.frame or ending.inner} {ending.error[0]}", f"{ending.error[1]} (in {ending.inner})"
    value = ending.value
    status = value if isinstance(value, int) else value.get("status") if isinstance(value, dict) else 1
    if status == 0:
        return "ran", "", ""
    if "a fault of lowbit" in ending.err:
        return "traceback", *_logged(ending, folder)
    if "lowbit: out of memory" in ending.err:
        return "memory", f"{case.area}: told", ending.err.strip()
    lines = [line for line in ending.err.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("lowbit")]
    if isinstance(value, dict) and "message" in value:
        message = value["message"]
    elif own and lines[-1] is own[-1]:
        message = own[-1]
    else:
        return "bare", f"{case.area}: the message has several lines", "\n".join(lines[-4:])
    if "Traceback" in ending.err:
        return "traceback", f"{case.area}: printed", ending.err[-300:]
    if not _names_something(case, message, folder):
        text = re.sub(r"^lowbit( \w+)?: (error: )?", "", message)
        return "bare", f"{case.area}: {_without_details(text)[:70]}", message
    return "clean", "", message


def _logged(ending: Ending, folder: Path) -> tuple[str, str]:
    """Place and message of a fault that lowbit told in a line, from the log with its traceback."""
    log = "".join(path.read_text(errors="replace") for path in (folder / "tmp").glob("*.log"))
    frames = re.findall(r'File ".*/lowbit/(?:\w+/)*(\w+\.py)", line (\d+), in (\S+)', log)
    said = (ending.err.strip().splitlines() or [""])[-1]
    error = re.search(r"(\w+(?:Error|Exception|Iteration)\b)", said)
    place = "{}:{} {}".format(*frames[-1]) if frames else "no log"
    return f"{place} {error[1] if error else ''}", said


def _names_something(case: Case, message: str, folder: Path) -> bool:
    """Whether a refusal names a file, an option, a key, a tensor or a value that was given."""
    if "\n" in message or len(message) < 15:
        return False
    words = [*case.names, *(name for damage in case.damage for name in damage.names), *case.lay]
    words += [path.name for target in case.lay for path in (folder / target).rglob("*") if len(path.name) > 4]
    given = [part for part in case.call if isinstance(part, str)]
    if len(case.call) == 2 and isinstance(case.call[1], dict):
        given += [str(value) for value in case.call[1].values()]
    words += [word if len(word) > 3 else repr(word) for word in given]
    return bool(re.search(r"--[a-z]", message)) or any(word and word in message for word in words)


def minimal(case: Case, verdict: Verdict, materials: Materials, folder: Path) -> Verdict:
    """Of a case with several damages, the verdict of one alone that fails alike, if there is one."""
    if len(case.damage) < 2:
        return verdict
    for damage in case.damage:
        alone = Case(**{**vars(case), "damage": [damage]})
        again = judged(alone, materials, folder)
        if again.key == verdict.key:
            return again
    return verdict


@dataclass
class Count:
    """What came of many cases.

    Attributes:
        kinds: by area, how many of each kind.
        failures: by `Verdict.key`, the verdicts.
    """

    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, list[Verdict]] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        """Count one."""
        row = self.kinds.setdefault(verdict.area, {})
        row[verdict.kind] = row.get(verdict.kind, 0) + 1
        if verdict.kind not in GOOD:
            self.failures.setdefault(verdict.key, []).append(verdict)

    def total(self, kind: str) -> int:
        """How many ended so."""
        return sum(row.get(kind, 0) for row in self.kinds.values())

    def lines(self) -> list[str]:
        """The distinct failures, most frequent first: how often, what, and one case."""
        found = []
        for _, verdicts in sorted(self.failures.items(), key=lambda item: (-len(item[1]), item[0])):
            one = min(verdicts, key=lambda v: (v.story.count(";"), len(v.story)))
            found.append(f"{len(verdicts)} x {one.kind}: {one.where}: case {one.number}: {one.story} -> {one.message[:200]!r}")
        return found


def run_cases(
    materials: Materials,
    numbers: Sequence[int],
    *,
    seed: int = SEED,
    say: Callable[[Verdict], None] = lambda verdict: None,
    until: float = math.inf,
    workers: int = 1,
) -> Count:
    """Run cases one after the other, or by several processes, which call `say`; until `until` (of time.monotonic) at most."""
    count = Count()
    if workers > 1:
        shares = [partial(_share, materials, numbers[i::workers], seed, until, say) for i in range(workers)]
        for given in sorted(forked.side_by_side(shares, materials.root), key=lambda given: given["number"]):
            count.add(Verdict(**given))
        return count
    for number in numbers:
        if time.monotonic() > until:
            break
        one = case(materials, number, seed)
        folder = materials.root / f"case-{os.getpid()}"
        verdict = judged(one, materials, folder)
        if verdict.kind not in GOOD:
            verdict = minimal(one, verdict, materials, folder)
        count.add(verdict)
        say(verdict)
    return count


def _share(
    materials: Materials, numbers: Sequence[int], seed: int, until: float, say: Callable[[Verdict], None]
) -> list[dict[str, Any]]:
    """What one of several processes finds."""
    verdicts: list[Verdict] = []

    def keep(verdict: Verdict) -> None:
        verdicts.append(verdict)
        say(verdict)

    run_cases(materials, numbers, seed=seed, say=keep, until=until)
    return [vars(verdict) for verdict in verdicts]
