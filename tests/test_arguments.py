"""Arguments: which values fit which annotations, and what a refusal says."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lowbit.arguments import checked, fits, parse_device, words_of


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -1], [True, 1.0, "1", None]),
        (float, [0, 1.5], [False, "1"]),
        (bool, [True], [1, None]),
        (str | Path | None, ["a", Path("a"), None], [b"a", 1, []]),
        (Literal["a", "b"], ["a"], ["c", ["a"], None]),
        (Iterable[str], [[], ["a"], ("a",), {"a"}, iter("a")], ["a", {"a": 1}, [1], 7]),
        (dict[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, []]),
        (Callable[[int], None], [print], [3.5, "x"]),
        (torch.dtype | None, [torch.float32, None], [" "]),
        (Any, [1, None], []),
        ("Later", [1], []),
    ],
)
def test_fits(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, hint) for value in good) and not any(fits(value, hint) for value in bad)


def test_words() -> None:
    assert words_of(Iterable[str] | None) == "a list, each a text or None"
    assert words_of(Literal["a", "b"]) == "one of 'a', 'b'"


def test_checked() -> None:
    @checked
    def double(x: int, *, times: int = 2) -> int:
        return x * times

    assert double(3) == 6 and double(x=3, times=3) == 9 and double.__name__ == "double"
    for call in (lambda: double("a"), lambda: double(x="a")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="x = 'a'; allowed is a whole number"):
            call()


def test_parse_device() -> None:
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")
    for device in (None, True, -0.5, "", "meta", "x", "cuda:77"):
        with pytest.raises(ValueError, match="device .*allowed are cpu"):
            parse_device(device)
