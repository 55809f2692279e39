"""Recipe: what is to be done to a model, checked before any work.

A recipe is a list of rules (which linears get which scheme) and a list of steps (which methods run, in order), with the
calibration data and the output format. It is written as TOML or built in Python:

    format = "compressed-tensors"         # or "lowbit"
    engine = "vllm"                       # or "transformers": who must load a compressed-tensors checkpoint
    kv_cache = "fp8"                      # calibrate scales for it; none by default
    all_experts = true                    # statistics of experts from all tokens; by default from those the router sends

    [data]
    source = "calibration.jsonl"          # text file, jsonl, "hf:dataset", "self" (the model writes it), or "random"
    rows = 128
    length = 1024

    [[rules]]                             # the first rule whose regular expression is found in a linear's name wins
    match = "lm_head|embed_out"           # the head, where it is a matrix of its own
    scheme = "float"                      # leave it as it is
    optional = true                       # it may match nothing

    [[rules]]
    match = ""                            # found in every name
    scheme = "w4a16-g128-asym"

    [[steps]]
    method = "gptq"
    damping = 0.01
"""

import hashlib
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lowbit.arguments import checked, shown
from lowbit.data import DataSpec
from lowbit.methods.awq import awq
from lowbit.methods.block_ap import block_ap
from lowbit.methods.embed import embed
from lowbit.methods.end_to_end import end_to_end
from lowbit.methods.gptq import gptq
from lowbit.methods.hadamard import hadamard
from lowbit.methods.hqq import hqq
from lowbit.methods.lkd import lkd
from lowbit.methods.lorc import lorc
from lowbit.methods.mrem import mrem
from lowbit.methods.omniquant import omniquant
from lowbit.methods.reorder import reorder
from lowbit.methods.rotate import rotate
from lowbit.methods.rtn import rtn
from lowbit.methods.signround import signround
from lowbit.methods.smooth import smooth
from lowbit.methods.smooth_search import smooth_search
from lowbit.methods.tesseraq import tesseraq
from lowbit.patterns import Matcher
from lowbit.qtensor import PointScheme, Scheme, parse_point, parse_scheme
from lowbit.source import deeper_than
from lowbit.unit import Between, Input


@dataclass(frozen=True, kw_only=True)
class Method:
    """A technique.

    Attributes:
        apply: apply(unit, **options) for every block; of kinds "model" and "outside", apply(arch, **options) once, which
            returns the checkpoint to go on with; of kind "search", apply(trial, **options) once, which returns the steps to
            take in its place and a row of the report (see `run`); of kind "trainer", apply(units, **options) for every few
            blocks.
        calibrated: calibrated(options) tells whether it needs calibration data.
        teacher: teacher(options) tells whether it needs the hidden states of the float model too.
        kind: "model" and "transform" rewrite float weights and leave the function as it was, "search" finds out how best to,
            "outside" rounds what is outside the blocks, "solver" assigns every weight in them, "trainer" goes on from there by
            gradients, "correction" adds to the result, "finish" trains all blocks at once.
    """

    apply: Callable[..., Any]
    calibrated: Callable[[dict[str, Any]], bool]
    kind: Literal["model", "outside", "search", "transform", "solver", "trainer", "correction", "finish"]
    teacher: Callable[[dict[str, Any]], bool] = lambda options: False


def _always(options: dict[str, Any]) -> bool:
    return True


def _never(options: dict[str, Any]) -> bool:
    return False


METHODS = {
    "rotate": Method(apply=rotate, calibrated=_never, kind="model"),
    "embed": Method(apply=embed, calibrated=_never, kind="outside"),
    "smooth_search": Method(apply=smooth_search, calibrated=_always, kind="search"),
    "smooth": Method(apply=smooth, calibrated=_always, kind="transform"),
    "awq": Method(apply=awq, calibrated=_always, kind="transform"),
    "reorder": Method(apply=reorder, calibrated=_always, kind="transform"),
    "hadamard": Method(apply=hadamard, calibrated=_never, kind="transform"),
    "rtn": Method(apply=rtn, calibrated=lambda options: bool(options.get("importance")), kind="solver"),
    "hqq": Method(apply=hqq, calibrated=_never, kind="solver"),
    "gptq": Method(apply=gptq, calibrated=_always, kind="solver", teacher=lambda options: bool(options.get("asymmetry"))),
    **{
        trainer.__name__: Method(apply=trainer, calibrated=_always, kind="trainer", teacher=_always)
        for trainer in (lkd, mrem, omniquant, signround, tesseraq, block_ap)
    },
    "end_to_end": Method(apply=end_to_end, calibrated=_always, kind="finish", teacher=_always),
    "lorc": Method(apply=lorc, calibrated=lambda options: bool(options.get("whiten")), kind="correction"),
}
_ORDER = ("model", "outside", "search", "transform", "solver", "trainer", "correction", "finish")
FORMATS = ("compressed-tensors", "lowbit")
ENGINES = ("vllm", "transformers")
FLOAT = "float"
_DEEPEST = 16  # levels of tables and lists in a recipe
_HEADS = "lm_head|embed_out"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Linears in whose name the regular expression `match` is found get `scheme` ("float": none). Schemes of points (s8) are
    for the points of state space mixers instead, and pass linears by.

    An `optional` rule may match nothing.
    """

    match: str
    scheme: str
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not isinstance(self.scheme, str):
            raise ValueError(f"rule {shown(self.match)} -> {shown(self.scheme)}: match and scheme are texts")
        if not isinstance(self.optional, bool):
            raise ValueError(f"rule {shown(self.match)}: optional = {shown(self.optional)}; allowed are true and false")
        try:
            re.compile(self.match)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"rule {shown(self.match)} is not a regular expression: {error}") from error
        if self.scheme != FLOAT and self.point is None:
            parse_scheme(self.scheme)

    @property
    def point(self) -> PointScheme | None:
        """The scheme of the points it matches, if it is not for linears."""
        return parse_point(self.scheme)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One method with its options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"unknown method {shown(self.method)}; allowed are {', '.join(METHODS)}")
        if not isinstance(self.options, dict):
            raise ValueError(f"{self.method}: options are a table of names and values, not {shown(self.options)}")
        check_options(self.method, METHODS[self.method].apply, self.options)

    @property
    def calibrated(self) -> bool:
        """Whether the step needs calibration data."""
        return METHODS[self.method].calibrated(self.options)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result, apart from the model itself."""

    rules: tuple[Rule, ...]
    steps: tuple[Step, ...]
    data: DataSpec | None = None
    format: str = "compressed-tensors"
    engine: str = "vllm"
    kv_cache: str | None = None
    all_experts: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache not in (None, "fp8"):
            raise ValueError(
                f"kv_cache = {shown(self.kv_cache)}: engines load fp8 only; others can be simulated by lowbit eval"
            )
        if self.kv_cache is not None and (self.format, self.engine) != ("compressed-tensors", "vllm"):
            raise ValueError("kv_cache: only vLLM reads its scales; use format compressed-tensors and engine vllm")
        for value, allowed, what in ((self.format, FORMATS, "format"), (self.engine, ENGINES, "engine")):
            if value not in allowed:
                raise ValueError(f"unknown {what} {shown(value)}; allowed are {', '.join(allowed)}")
        if not isinstance(self.all_experts, bool):
            raise ValueError(f"all_experts = {shown(self.all_experts)}; allowed are true and false")
        if not self.rules or not self.steps:
            raise ValueError("a recipe needs at least one rule ([[rules]]) and one step ([[steps]])")
        kinds = [METHODS[step.method].kind for step in self.steps]
        if kinds.count("solver") != 1 or kinds != sorted(kinds, key=_ORDER.index):
            solvers = ", ".join(name for name, method in METHODS.items() if method.kind == "solver")
            trainers = ", ".join(name for name, method in METHODS.items() if method.kind == "trainer")
            given = ", ".join(step.method for step in self.steps)
            raise ValueError(
                f"steps {given}: first what rewrites the model (rotate), then embed, then what rewrites blocks (smooth_search, "
                f"smooth, awq), then one that rounds every weight ({solvers}), what trains it further ({trainers}), last what "
                "corrects it (lorc) or trains all at once (end_to_end)"
            )
        if {"correction", "finish"} <= set(kinds):
            raise ValueError("end_to_end trains scales, on which the corrections of lorc would no longer fit; leave one out")
        if kinds.count("finish") > 1:
            raise ValueError("end_to_end is there twice; leave one out")
        if any(rule.point for rule in self.rules):
            if self.format != "lowbit":
                raise ValueError('schemes of points (s8) have no layout in compressed-tensors; use format = "lowbit"')
            if {"trainer", "finish"} & set(kinds):
                raise ValueError(
                    "steps that train do not know the points of a scan; use rtn, hqq or gptq alone, or no s8 rules"
                )
        if any(step.method == "hadamard" for step in self.steps) and self.format != "lowbit":
            raise ValueError('hadamard: no engine turns inputs at run time; use format = "lowbit"')
        if "outside" in kinds and self.format != "lowbit":
            raise ValueError('embed: no engine loads quantized embeddings; use format = "lowbit"')
        needs = self.needs_data()
        if needs and self.data is None:
            raise ValueError(f"{needs[0]} needs calibration data: --data FILE, or [data] in the recipe")
        if self.all_experts and not needs:
            raise ValueError("all_experts: no step looks at calibration data; leave it out, or use gptq")

    @property
    def calibrated(self) -> bool:
        """Whether anything in the recipe looks at calibration data."""
        return bool(self.needs_data())

    @property
    def teacher(self) -> bool:
        """Whether a step compares with the hidden states of the float model."""
        return any(METHODS[step.method].teacher(step.options) for step in self.steps)

    @property
    def finish(self) -> Step | None:
        """The step that trains the whole model, if there is one."""
        return next((step for step in self.steps if METHODS[step.method].kind == "finish"), None)

    @property
    def span(self) -> int:
        """How many consecutive blocks are quantized together."""
        return max((step.options.get("blocks", default_of(step, "blocks") or 1) for step in self.steps), default=1)

    def needs_data(self) -> list[str]:
        """Everything in it that needs calibration data: methods of steps, schemes, kv_cache."""
        steps = [step.method for step in self.steps if step.calibrated]
        linears = [rule.scheme for rule in self.rules if rule.scheme != FLOAT and rule.point is None]
        inputs = {name: parse_scheme(name).input for name in linears}
        points = [f"scheme {rule.scheme}" for rule in self.rules if rule.point is not None]
        schemes = [f"scheme {name}" for name, spec in inputs.items() if spec is not None and Input(spec).calibrated]
        return [*steps, *schemes, *points, *(["kv_cache"] if self.kv_cache else [])]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def to_toml(self) -> str:
        """What `read_recipe` reads as this recipe."""
        import tomli_w

        plain = self.to_dict()
        plain["steps"] = [{"method": step["method"], **step["options"]} for step in plain["steps"]]
        plain["rules"] = [{key: value for key, value in rule.items() if value is not False} for rule in plain["rules"]]
        return tomli_w.dumps(_without_none(plain))

    def hash(self) -> str:
        """sha256 of the recipe."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def quantized(self, names: Iterable[str]) -> set[str]:
        """Those of the named linears that get a scheme; what `schemes` requires of the names is not asked.

        Raises:
            ValueError: an expression takes too long.
        """
        rules = [rule for rule in self.rules if rule.point is None]
        found = Matcher("the recipe").search
        first = {name: next((rule for rule in rules if found(rule.match, name)), None) for name in names}
        return {name for name, rule in first.items() if rule is not None and rule.scheme != FLOAT}

    def point_schemes(self, points: Iterable[str]) -> dict[str, PointScheme]:
        """Which of the named points get which scheme; points left float are absent."""
        rules = [rule for rule in self.rules if rule.point is not None or rule.scheme == FLOAT]
        found = Matcher("the recipe").search
        first = {name: next((rule.point for rule in rules if found(rule.match, name)), None) for name in points}
        return {name: scheme for name, scheme in first.items() if scheme is not None}

    def named(self, aside: Iterable[str], names: Iterable[str]) -> list[str]:
        """Those linears of `aside`, which stay float by default, that a rule gives a scheme which is for none of `names`."""
        names = list(names)
        found = Matcher("the recipe").search
        taken = []
        for name in aside:
            rule = next((rule for rule in self.rules if rule.point is None and found(rule.match, name)), None)
            if rule is not None and rule.scheme != FLOAT and not any(found(rule.match, other) for other in names):
                taken.append(name)
        return taken

    def schemes(
        self, names: Iterable[str], points: Iterable[str] = (), *, tied_head: str | None = None, left: Iterable[str] = ()
    ) -> dict[str, Scheme]:
        """Which of the named linears get which scheme; linears left float are absent. `points` may use rules too.

        Args:
            tied_head: name of a head that is no linear of its own, for the message to who asks for it.
            left: names of matrices that stay float anyhow; a rule that leaves them float is in place.

        Raises:
            ValueError: a rule decides about no linear, no linear is left to quantize, or an expression takes too long.
        """
        names, points = list(names), list(points)
        found = Matcher("the recipe").search
        chosen: dict[str, Scheme] = {}
        used: set[int] = set()
        for name in names:
            for i, rule in enumerate(self.rules):
                if rule.point is None and found(rule.match, name):
                    used.add(i)
                    if rule.scheme != FLOAT:
                        chosen[name] = parse_scheme(rule.scheme)
                    break
        for name in points:
            of_points = [i for i, rule in enumerate(self.rules) if rule.point is not None or rule.scheme == FLOAT]
            used.update([i for i in of_points if found(self.rules[i].match, name)][:1])
        for name in left:
            used.update([i for i, rule in enumerate(self.rules) if rule.scheme == FLOAT and found(rule.match, name)][:1])
        for i, rule in enumerate(self.rules):
            if i not in used and not rule.optional:
                if rule.point is not None:
                    known = ", ".join(_families(points)) or "none: it has no scan lowbit knows"
                    raise ValueError(
                        f"rule {rule.match!r} -> {rule.scheme} is never used: no point has such a name, or an earlier rule "
                        f"takes it; the model's points are {known}"
                    )
                anywhere = any(found(rule.match, name) for name in names)
                why = "an earlier rule takes every linear it matches" if anywhere else "no linear has such a name"
                if tied_head is not None and not anywhere and found(rule.match, tied_head):
                    why = f"{tied_head} is the matrix of the embedding, which engines keep float (or round it with embed)"
                raise ValueError(
                    f"rule {rule.match!r} -> {rule.scheme} is never used: {why}; the model's linears are "
                    f"{', '.join(_families(names))}"
                )
        if not chosen:
            raise ValueError("the rules leave every linear float; nothing to quantize")
        return chosen


def _without_none(value: Any) -> Any:
    """TOML has no null; what is None is the default."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, (list, tuple)) else value


@checked
def short_recipe(
    *,
    scheme: str,
    method: str = "rtn",
    ignore: Iterable[str] | None = None,
    data: DataSpec | None = None,
    format: str = "compressed-tensors",
    engine: str = "vllm",
    kv_cache: str | None = None,
    all_experts: bool = False,
    options: dict[str, Any] | None = None,
) -> Recipe:
    """One scheme for every linear but the ignored ones, one method or several in their order.

    Args:
        method: such as "gptq", or "smooth+gptq".
        options: of the method that rounds, or of another as "method.option".
        ignore: regular expressions of linears to leave float; None stands for the head, "lm_head" or "embed_out", if there is
            one.
        kv_cache: "fp8" for scales of an FP8 key-value cache, which vLLM uses with kv_cache_dtype="fp8".
        all_experts: gather the statistics of every expert from all tokens, not only from those that the router sends it.
    """
    if ignore is None:
        left = [Rule(match=_HEADS, scheme=FLOAT, optional=True)]
    else:
        left = [Rule(match=pattern, scheme=FLOAT) for pattern in ignore]
    return Recipe(
        rules=(*left, Rule(match="", scheme=scheme)),
        steps=_steps(method, options or {}),
        data=data,
        format=format,
        engine=engine,
        kv_cache=kv_cache,
        all_experts=all_experts,
    )


def _steps(methods: str, options: dict[str, Any]) -> tuple[Step, ...]:
    """The steps "first+second", with options by "method.option", or of the solver."""
    names = methods.split("+")
    for name in names:
        Step(method=name)
    solver = next((name for name in names if METHODS[name].kind == "solver"), names[-1])
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        method, _, option = key.rpartition(".")
        if (method or solver) not in given:
            raise ValueError(f"option {shown(key)}: the steps are {', '.join(names)}")
        given[method or solver][option] = value
    return tuple(Step(method=name, options=given[name]) for name in names)


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        ValueError: missing file, not TOML, unknown keys, or values out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from error
    return recipe_from_dict(given, where=str(path))


def recipe_from_dict(given: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from the tables of a TOML file; the inverse of `Recipe.to_dict` up to the form of steps."""
    _check_keys(given, [f.name for f in fields(Recipe)], where)
    for name in ("rules", "steps"):
        if not isinstance(given.get(name, []), (list, tuple)):
            raise ValueError(f"{where}: {name} = {shown(given[name])}; allowed is a list of tables, [[{name}]]")
    if deeper_than(given, _DEEPEST):
        raise ValueError(f"{where}: values are nested more than {_DEEPEST} levels deep")
    rules = []
    for table in given.get("rules", []):
        _check_keys(table, [f.name for f in fields(Rule)], f"{where}, [[rules]]", required=("match", "scheme"))
        rules.append(Rule(**table))
    steps = []
    for table in given.get("steps", []):
        if not isinstance(table, dict) or "method" not in table:
            raise ValueError(f"{where}, [[steps]]: method is missing; allowed are {', '.join(METHODS)}")
        options = table.get("options", {})
        if not isinstance(options, dict):
            raise ValueError(f"{where}, [[steps]]: options = {shown(options)} is not a table")
        inline = {key: value for key, value in table.items() if key not in ("method", "options")}
        steps.append(Step(method=table["method"], options=inline | options))
    data = None
    if given.get("data") is not None:
        _check_keys(given["data"], [f.name for f in fields(DataSpec)], f"{where}, [data]", required=("source",))
        data = DataSpec(**given["data"])
    rest = {key: given[key] for key in ("format", "engine", "kv_cache", "all_experts") if key in given}
    return Recipe(rules=tuple(rules), steps=tuple(steps), data=data, **rest)


def default_of(step: Step, option: str) -> Any:
    """The default of an option of a step, None where it has no such option."""
    given = inspect.signature(METHODS[step.method].apply).parameters.get(option)
    return None if given is None else given.default


def check_options(method: str, apply: Callable[..., None], options: dict[str, Any]) -> None:
    """Check options against the keyword-only parameters of a method, their types and `Between` bounds."""
    hints = typing.get_type_hints(apply, include_extras=True)
    allowed = [p.name for p in inspect.signature(apply).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(f"{method} has no option {shown(name)}; allowed are {', '.join(allowed) or 'none'}")
        problem = _type_problem(value, hints[name])
        if problem:
            raise ValueError(f"{method}: {name} = {shown(value)} {problem}")


def _type_problem(value: Any, hint: Any) -> str | None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        problem = _type_problem(value, arguments[0])
        for bound in arguments[1:]:
            if problem is None and isinstance(bound, Between) and not bound.low <= value <= bound.high:
                problem = f"is not between {bound.low} and {bound.high}"
        return problem
    if origin is typing.Literal:
        return None if value in arguments else f"is not one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        problems = [_type_problem(value, argument) for argument in arguments if argument is not type(None)]
        return None if None in problems else problems[0]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return None
    good = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    return None if good else f"is not a {getattr(hint, '__name__', hint)}"


def _check_keys(table: Any, allowed: list[str], where: str, required: tuple[str, ...] = ()) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {shown(table)} is not a table")
    unknown = [key for key in table if key not in allowed]
    if unknown:
        raise ValueError(f"{where}: unknown key {shown(unknown[0])}; allowed are {', '.join(allowed)}")
    missing = [key for key in required if key not in table]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")


def _families(names: list[str]) -> list[str]:
    """Names with their numbers replaced by N, each once: a short list that tells what a rule could match."""
    seen = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
    return list(seen)[:20]
