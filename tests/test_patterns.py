"""Regular expressions of strangers: the same as `re` has them, and never for long."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.patterns import Matcher

NAME = "model.layers.0.self_attn.q_proj"
EVIL = (r"(([a-z_.0-9])+)+\W$", r"(([a-z_.0-9])+)+$x|(([a-z_.0-9])+)+[A-Z]$", r"([a-z_.0-9]+)*!|(\w|[a-z.]+)*[A-Z]")


@given(
    st.sampled_from(
        [
            "",
            "q_proj",
            r"\.0\.",
            r"re",
            r".*proj$",
            r"^model\.layers\.\d+\.(self_attn|mlp)\.",
            "(?i)MODEL",
            "[qk]_proj$",
            "o_proj",
        ]
    ),
    st.sampled_from([NAME, "lm_head", "model.layers.10.mlp.gate_proj", ""]),
)
def test_as_re_has_it(pattern: str, name: str) -> None:
    matcher = Matcher("a recipe")
    assert matcher.search(pattern, name) == (re.search(pattern, name) is not None)
    assert matcher.match(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize("pattern", EVIL)
def test_time_is_limited(pattern: str) -> None:
    """Over all names together; the message names the file, the expression and the name."""
    names = [f"model.layers.{i}.self_attn.q_proj.and.something.long.behind.it" * 4 for i in range(1000)]
    matcher = Matcher("config.json")
    began = time.process_time()
    with pytest.raises(ValueError, match=f"^config.json: the regular expression {re.escape(repr(pattern))} takes too long"):
        for name in names:
            matcher.search(pattern, name)
    assert time.process_time() - began < 1


def test_sane_expressions_of_a_large_model() -> None:
    """Take none of the time, however many names there are."""
    matcher = Matcher("a recipe")
    found = sum(matcher.search(r"layers\.\d+\.mlp\.(gate|up)_proj$", f"model.layers.{i}.mlp.up_proj") for i in range(50_000))
    assert found == 50_000


@pytest.mark.parametrize("pattern", ["(", "[a", "a{2,1}", "(" * 5000])
def test_no_expression(pattern: str) -> None:
    with pytest.raises(ValueError, match="a recipe: .* is not a regular expression"):
        Matcher("a recipe").search(pattern, NAME)
