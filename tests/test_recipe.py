"""Recipes: what is read, what is refused before any work, and which linear gets which scheme."""

import re
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from lowbit.data import DataSpec
from lowbit.methods.gptq import gptq
from lowbit.qtensor import parse_scheme
from lowbit.recipe import (
    METHODS,
    Recipe,
    Rule,
    Step,
    check_options,
    read_recipe,
    recipe_from_dict,
    short_recipe,
)
from lowbit.unit import Between

NAMES = [
    *[f"model.layers.{n}.{part}" for n in range(12) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")],
    "lm_head",
]
TOML = r"""
format = "lowbit"
engine = "transformers"

[data]
source = "calibration.jsonl"
rows = 7
length = 33
seed = 5
text_key = "content"
split = "test"

[[rules]]
match = "lm_head"
scheme = "float"
optional = true

[[rules]]
match = '\.(1|2)\.'
scheme = "w8a8"

[[rules]]
match = ""
scheme = "w4a16-g64-asym"

[[steps]]
method = "gptq"
damping = 0.02
order = "natural"
shrink_steps = 40
"""
FULL = Recipe(
    rules=(
        Rule(match="lm_head", scheme="float", optional=True),
        Rule(match=r"\.(1|2)\.", scheme="w8a8"),
        Rule(match="", scheme="w4a16-g64-asym"),
    ),
    steps=(Step(method="gptq", options={"damping": 0.02, "order": "natural", "shrink_steps": 40}),),
    data=DataSpec(source="calibration.jsonl", rows=7, length=33, seed=5, text_key="content", split="test"),
    format="lowbit",
    engine="transformers",
)
EVERY = Rule(match="", scheme="w4a16")


def recipe(*rules: Rule) -> Recipe:
    return Recipe(rules=rules, steps=(Step(method="rtn"),))


# ----------------------------------------------------------------------------------------------------------------- TOML
def test_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML, encoding="utf-8")
    assert read_recipe(path) == read_recipe(str(path)) == FULL


def test_read_the_least(tmp_path: Path) -> None:
    """Everything that has a default may be left out."""
    path = tmp_path / "recipe.toml"
    path.write_text('[[rules]]\nmatch = ""\nscheme = "w8a16"\n[[steps]]\nmethod = "rtn"\n')
    expected = Recipe(rules=(Rule(match="", scheme="w8a16", optional=False),), steps=(Step(method="rtn", options={}),))
    assert read_recipe(path) == expected
    assert (expected.data, expected.format, expected.engine) == (None, "compressed-tensors", "vllm")


@pytest.mark.parametrize("given", [FULL, recipe(EVERY), short_recipe(scheme="fp8", options={"shrink_steps": 3})])
def test_dict_there_and_back(given: Recipe) -> None:
    again = recipe_from_dict(given.to_dict())
    assert again == given
    assert again.hash() == given.hash()


def test_read_the_example_of_the_documentation(tmp_path: Path) -> None:
    """The recipe in the module's docstring is one."""
    import lowbit.recipe

    path = tmp_path / "recipe.toml"
    example = str(lowbit.recipe.__doc__).split("\n\n", 2)[2]
    path.write_text(re.sub(r"^    ", "", example, flags=re.MULTILINE), encoding="utf-8")
    read = read_recipe(path)
    assert [rule.scheme for rule in read.rules] == ["float", "w4a16-g128-asym"]
    assert read.steps == (Step(method="gptq", options={"damping": 0.01}),)
    assert read.data == DataSpec(source="calibration.jsonl", rows=128, length=1024)


def test_read_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^recipe .*no\.toml does not exist$"):
        read_recipe(tmp_path / "no.toml")
    with pytest.raises(ValueError, match="does not exist"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("content", [b"rules = [", b"{}", b"a = 1\na = 2", b'format = "\xff"'])
def test_read_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^recipe .*recipe\.toml is not TOML: "):
        read_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'format = "lowbit"',
            'formt = "lowbit"',
            "recipe.toml: unknown key 'formt'; allowed are rules, steps, data, format, eng",
        ),
        ('format = "lowbit"', 'format = "gguf"', "unknown format 'gguf'; allowed are compressed-tensors, lowbit"),
        ('engine = "transformers"', 'engine = "tgi"', "unknown engine 'tgi'; allowed are vllm, transformers"),
        ('engine = "transformers"', "engine = 1", "unknown engine 1; allowed"),
        (
            "rows = 7",
            "row = 7",
            "recipe.toml, [data]: unknown key 'row'; allowed are source, rows, length, seed, text_key, split",
        ),
        ("rows = 7", "rows = 0", "rows = 0: give a whole number of at least 1"),
        ('source = "calibration.jsonl"', "", "recipe.toml, [data]: source is missing"),
        ('source = "calibration.jsonl"', 'source = "x.pdf"', "source = 'x.pdf' is of no known kind"),
        (
            "optional = true",
            "optionel = true",
            "recipe.toml, [[rules]]: unknown key 'optionel'; allowed are match, scheme, opt",
        ),
        ('match = ""', "", "recipe.toml, [[rules]]: match is missing"),
        ('scheme = "w8a8"', "", "recipe.toml, [[rules]]: scheme is missing"),
        ('scheme = "w8a8"', 'scheme = "w8a9"', "scheme 'w8a9': activations have 3 to 8 bits, or 16 (left float), not 9"),
        ('scheme = "w8a8"', 'scheme = "Float"', "unknown scheme 'Float'"),
        ('match = ""', 'match = "("', "rule '(' is not a regular expression: "),
        ('method = "gptq"', "", "recipe.toml, [[steps]]: method is missing; allowed are rotate, "),
        ('method = "gptq"', 'method = "magic"', "unknown method 'magic'; allowed are rotate, "),
        ('method = "gptq"', 'method = "rtn"', "rtn has no option 'damping'; allowed are shrink_steps"),
        ("damping = 0.02", "dampening = 0.02", "gptq has no option 'dampening'; allowed are damping, order, shrink_steps"),
        ("damping = 0.02", "unit = 1", "gptq has no option 'unit'; allowed are damping, order, shrink_steps"),
        ("damping = 0.02", "damping = 0", "gptq: damping = 0 is not between 1e-06 and 1"),
        ("damping = 0.02", "damping = 1.5", "gptq: damping = 1.5 is not between 1e-06 and 1"),
        ("damping = 0.02", "damping = nan", "gptq: damping = nan is not between 1e-06 and 1"),
        ("damping = 0.02", 'damping = "0.02"', "gptq: damping = '0.02' is not a float"),
        ("damping = 0.02", "damping = true", "gptq: damping = True is not a float"),
        ('order = "natural"', 'order = "random"', "gptq: order = 'random' is not one of 'activation', 'natural'"),
        ("shrink_steps = 40", "shrink_steps = 40.0", "gptq: shrink_steps = 40.0 is not a int"),
        ("shrink_steps = 40", "shrink_steps = true", "gptq: shrink_steps = True is not a int"),
        ("shrink_steps = 40", "shrink_steps = 96", "gptq: shrink_steps = 96 is not between 0 and 95"),
        ("shrink_steps = 40", "shrink_steps = -1", "gptq: shrink_steps = -1 is not between 0 and 95"),
        (TOML[TOML.index("[data]") : TOML.index("[[rules]]")], "", "gptq needs calibration data: --data FILE, or [data]"),
        (TOML[TOML.index("[[steps]]") :], "", "a recipe needs at least one rule ([[rules]]) and one step ([[steps]])"),
        (TOML[TOML.index("[[rules]]") : TOML.index("[[steps]]")], "", "a recipe needs at least one rule"),
        (
            '[[steps]]\nmethod = "gptq"',
            '[[steps]]\nmethod = "rtn"\n[[steps]]\nmethod = "gptq"',
            "steps rtn, gptq: first what rewrites the model (rotate), then",
        ),
    ],
)
def test_read_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Each mistake is named with where it is and what is allowed instead."""
    assert TOML.count(old) == 1
    path = tmp_path / "recipe.toml"
    path.write_text(TOML.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"rules": [{"match": 3, "scheme": "w4a16"}]},
        {"rules": [{"match": "", "scheme": 4}]},
        {"rules": [3]},
        {"steps": [{"method": ["rtn"]}]},
        {"steps": [{"method": "rtn", "options": 3}]},
        {"data": 3},
    ],
)
def test_values_of_another_type(given: dict[str, Any]) -> None:
    whole = {"rules": [{"match": "", "scheme": "w4a16"}], "steps": [{"method": "rtn"}]}
    with pytest.raises(ValueError):
        recipe_from_dict(whole | given)


# ----------------------------------------------------------------------------------------------------------------- hash
def changes() -> list[tuple[str, Callable[[Recipe], Recipe]]]:
    """Every field of a recipe and of its parts, changed alone."""

    def rule(**change: Any) -> Callable[[Recipe], Recipe]:
        return lambda r: replace(r, rules=(r.rules[0], replace(r.rules[1], **change), r.rules[2]))

    def data(**change: Any) -> Callable[[Recipe], Recipe]:
        return lambda r: replace(r, data=replace(r.data, **change))

    def option(**change: Any) -> Callable[[Recipe], Recipe]:
        return lambda r: replace(r, steps=(Step(method="gptq", options=r.steps[0].options | change),))

    return [
        ("format", lambda r: replace(r, format="compressed-tensors")),
        ("engine", lambda r: replace(r, engine="vllm")),
        ("no data", lambda r: replace(r, data=None, steps=(Step(method="rtn"),))),
        ("rules order", lambda r: replace(r, rules=r.rules[::-1])),
        ("rules fewer", lambda r: replace(r, rules=r.rules[:2])),
        ("rule match", rule(match=r"\.(1|3)\.")),
        ("rule scheme", rule(scheme="w8a16")),
        ("rule optional", rule(optional=True)),
        ("step method", lambda r: replace(r, steps=(Step(method="rtn", options={"shrink_steps": 40}),))),
        ("step options", lambda r: replace(r, steps=(Step(method="gptq"),))),
        *[(f"option {name}", option(**{name: value})) for name, value in GPTQ_CHANGES.items()],
        *[(f"data {name}", data(**{name: value})) for name, value in DATA_CHANGES.items()],
    ]


GPTQ_CHANGES = {"damping": 0.021, "order": "activation", "shrink_steps": 41}
DATA_CHANGES = {"source": "other.jsonl", "rows": 8, "length": 34, "seed": 6, "text_key": "text", "split": "train"}


def test_hash_depends_on_everything() -> None:
    """No two of the changed recipes are taken for each other."""
    assert set(DATA_CHANGES) == {field.name for field in fields(DataSpec)}
    hashes = {name: change(FULL).hash() for name, change in changes()} | {"": FULL.hash()}
    assert len(set(hashes.values())) == len(hashes)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values())


def test_hash_of_equal_recipes() -> None:
    """The order in which options were given does not matter."""
    options = dict(reversed(FULL.steps[0].options.items()))
    assert replace(FULL, steps=(Step(method="gptq", options=options),)).hash() == FULL.hash()


# -------------------------------------------------------------------------------------------------------------- schemes
def test_first_rule_wins() -> None:
    given = recipe(
        Rule(match="lm_head", scheme="float"),
        Rule(match=r"\.1\.", scheme="w8a8"),
        Rule(match="q_proj|k_proj$", scheme="w4a16-g32"),
        Rule(match="", scheme="w3a16"),
    )
    found = given.schemes(NAMES)
    for name in NAMES:
        if name == "lm_head":
            assert name not in found
        elif ".1." in name:
            assert found[name] == parse_scheme("w8a8")
        elif "down" in name:
            assert found[name] == parse_scheme("w3a16")
        else:
            assert found[name] == parse_scheme("w4a16-g32")
    assert list(found) == NAMES[:-1]


def test_match_is_searched_anywhere() -> None:
    """Not only at the beginning; anchors work; case counts."""
    names = ["a.proj", "b.proj", "proj.c"]
    assert set(recipe(Rule(match="proj", scheme="w8a16")).schemes(names)) == set(names)
    assert set(recipe(Rule(match="proj$", scheme="w8a16")).schemes(names)) == {"a.proj", "b.proj"}
    assert set(recipe(Rule(match="^proj", scheme="w8a16")).schemes(names)) == {"proj.c"}
    with pytest.raises(ValueError, match="no linear has such a name"):
        recipe(Rule(match="Proj", scheme="w8a16")).schemes(names)


def test_linears_of_no_rule_stay_float() -> None:
    assert list(recipe(Rule(match="lm_head", scheme="w8a16")).schemes(iter(NAMES))) == ["lm_head"]


def test_rule_that_matches_nothing() -> None:
    """The message lists the kinds of linears there are, not each of them."""
    message = (
        "rule 'o_proj' -> w8a8 is never used: no linear has such a name; the model's linears are "
        "model.layers.N.self_attn.q_proj, model.layers.N.self_attn.k_proj, model.layers.N.mlp.down_proj, lm_head"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        recipe(Rule(match="o_proj", scheme="w8a8"), EVERY).schemes(NAMES)


def test_rule_behind_another() -> None:
    rules = (Rule(match="proj", scheme="w8a8"), Rule(match="q_proj", scheme="float"), Rule(match="lm_head", scheme="w8a8"))
    with pytest.raises(ValueError, match="rule 'q_proj' -> float is never used: an earlier rule takes every linear it matches"):
        recipe(*rules).schemes(NAMES)
    assert recipe(rules[1], rules[0], rules[2]).schemes(NAMES).keys() == {name for name in NAMES if "q_proj" not in name}


def test_optional_rules_may_be_unused() -> None:
    """Both those that match nothing and those behind another."""
    unmatched = Rule(match="o_proj", scheme="w8a8", optional=True)
    behind = Rule(match="lm_head", scheme="float", optional=True)
    assert recipe(unmatched, EVERY, behind).schemes(NAMES) == recipe(EVERY).schemes(NAMES)


@pytest.mark.parametrize("rules", [(Rule(match="", scheme="float"),), (Rule(match="x", scheme="w4a16", optional=True),)])
def test_nothing_to_quantize(rules: tuple[Rule, ...]) -> None:
    with pytest.raises(ValueError, match="^the rules leave every linear float; nothing to quantize$"):
        recipe(*rules).schemes(NAMES)


# ----------------------------------------------------------------------------------------------------------- short form
def test_short_form() -> None:
    """Without a word about it the head stays float, and may be absent."""
    data = DataSpec(source="random")
    given = short_recipe(scheme="w4a16", method="gptq", data=data, format="lowbit", engine="transformers")
    assert given == Recipe(
        rules=(Rule(match="lm_head|embed_out", scheme="float", optional=True), EVERY),
        steps=(Step(method="gptq"),),
        data=data,
        format="lowbit",
        engine="transformers",
    )
    assert list(given.schemes(NAMES)) == NAMES[:-1]
    assert list(given.schemes(NAMES[:-1])) == NAMES[:-1]


def test_short_form_ignores() -> None:
    """What is named must be there; nothing else is left out."""
    given = short_recipe(scheme="w4a16", ignore=["q_proj", "k_proj"])
    assert list(given.schemes(NAMES)) == [name for name in NAMES if "down" in name or name == "lm_head"]
    assert list(short_recipe(scheme="w4a16", ignore=[]).schemes(NAMES)) == NAMES
    with pytest.raises(ValueError, match="rule 'o_proj' -> float is never used"):
        short_recipe(scheme="w4a16", ignore=["o_proj"]).schemes(NAMES)
    assert short_recipe(scheme="w4a16").steps == (Step(method="rtn", options={}),)


def test_short_form_refused() -> None:
    with pytest.raises(ValueError, match="gptq needs calibration data"):
        short_recipe(scheme="w4a16", method="gptq")
    with pytest.raises(ValueError, match="unknown scheme 'int4'"):
        short_recipe(scheme="int4")
    with pytest.raises(ValueError, match=r"^rule '\[' is not a regular expression"):
        short_recipe(scheme="w4a16", ignore=["["])
    with pytest.raises(ValueError, match="rtn has no option 'order'"):
        short_recipe(scheme="w4a16", options={"order": "natural"})


# -------------------------------------------------------------------------------------------------------------- options
def method(
    unit: Any,
    *,
    real: Annotated[float, Between(0, 1)] = 0.5,
    whole: int = 1,
    flag: bool = False,
    word: Literal["a", "b"] = "a",
    perhaps: int | None = None,
    text: str = "",
) -> None:
    """A method with an option of every kind."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"real": 0, "whole": -5, "flag": True, "word": "b", "perhaps": 0, "text": "x"},
        {"real": 1.0, "perhaps": 7},
        {"real": 1},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    check_options("method", method, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"real": 1.0001}, "method: real = 1.0001 is not between 0 and 1"),
        ({"real": "1"}, "method: real = '1' is not a float"),
        ({"real": False}, "method: real = False is not a float"),
        ({"whole": 1.0}, "method: whole = 1.0 is not a int"),
        ({"whole": True}, "method: whole = True is not a int"),
        ({"flag": 1}, "method: flag = 1 is not a bool"),
        ({"word": "c"}, "method: word = 'c' is not one of 'a', 'b'"),
        ({"perhaps": 1.5}, "method: perhaps = 1.5 is not a int"),
        ({"text": 1}, "method: text = 1 is not a str"),
        ({"unit": 1}, "method has no option 'unit'; allowed are real, whole, flag, word, perhaps, text"),
        ({"real": 0.1, "other": 1}, "method has no option 'other'"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_options("method", method, options)
    assert message in str(caught.value)


def test_option_of_none() -> None:
    check_options("method", method, {"perhaps": None})


def test_method_without_options() -> None:
    def bare(unit: Any) -> None:
        """Nothing to choose."""

    with pytest.raises(ValueError, match="^bare has no option 'x'; allowed are none$"):
        check_options("bare", bare, {"x": 1})


def test_methods() -> None:
    """Which of them need data; all their options can be checked."""
    assert not Step(method="rtn").calibrated
    assert not Step(method="rtn", options={"importance": False}).calibrated
    assert Step(method="rtn", options={"importance": True}).calibrated
    assert Step(method="gptq").calibrated
    assert METHODS["gptq"].apply is gptq
    for name, entry in METHODS.items():
        check_options(name, entry.apply, {})


# ------------------------------------------------------------------------------------------------------------ short form
def test_several_steps_in_one_word() -> None:
    """Options belong to the solver, or to the step they name."""
    options = {"damping": 0.02, "smooth.alpha": "auto", "lorc.rank": 8}
    found = short_recipe(scheme="w4a8", method="smooth+gptq+lorc", options=options, data=DataSpec(source="random"))
    assert found.steps == (
        Step(method="smooth", options={"alpha": "auto"}),
        Step(method="gptq", options={"damping": 0.02}),
        Step(method="lorc", options={"rank": 8}),
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("smooth+zip", {}, "unknown method 'zip'"),
        ("gptq+smooth", {}, "steps gptq, smooth: first what"),
        ("smooth", {}, "steps smooth: first what"),
        ("rtn", {"awq.links": "all"}, "option 'awq.links': the steps are rtn"),
        ("awq+rtn", {"alpha": 1.0}, "rtn has no option 'alpha'"),
    ],
)
def test_several_steps_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        short_recipe(scheme="w4a8", method=method, options=options, data=DataSpec(source="random"))


def test_an_expression_that_would_take_for_ever() -> None:
    """As a recipe of someone else may have it; whatever other rules find."""
    given = recipe(Rule(match=r"(([a-z_.0-9])+)+\W$", scheme="w8a8"), Rule(match="", scheme="w4a16"))
    names = [f"model.layers.{i}.self_attn.with_a_name_that_is_long.q_proj" for i in range(1000)]
    began = time.process_time()
    with pytest.raises(ValueError, match="the recipe: the regular expression .* takes too long to match"):
        given.schemes(names)
    assert time.process_time() - began < 1
