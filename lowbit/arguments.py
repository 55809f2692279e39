"""Arguments as a caller gives them, checked before any work: their types, and devices."""

import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 200
_DEVICES = "allowed are cpu, and on a machine with such GPUs cuda or cuda:N"
_WORDS: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path", type(None): "None",
    dict: "a dict", Callable: "what can be called", Iterable: "a list", Sequence: "a list", list: "a list", tuple: "a tuple",
}  # fmt: skip


def shown(value: Any) -> str:
    """A value for a message, cut where it is long or deep."""
    return _SHOWN.repr(value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are compared with its annotations when it is called; those that are written as text are
    passed over. A ValueError says of which argument the type is another, its value, and what is allowed."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        for name, value in signature.bind(*given, **named).arguments.items():
            hint = signature.parameters[name].annotation
            if not fits(value, hint):
                raise ValueError(f"{name} = {shown(value)}; allowed is {words_of(hint)}")
        return function(*given, **named)

    return call


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of an annotation; True and False are no numbers, a text and a dict are no lists."""
    if hint is Any or isinstance(hint, str):
        return True
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Annotated:
        return fits(value, inner[0])
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if hint is int or hint is float:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is None:
        return value is None
    if not isinstance(value, origin):
        return False
    if isinstance(value, Mapping):
        if origin is not dict:
            return False
        return not inner or all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    if inner and issubclass(origin, Iterable):
        return not isinstance(value, (str, bytes)) and (
            not isinstance(value, Collection) or all(fits(each, inner[0]) for each in value)
        )
    return True


def words_of(hint: Any) -> str:
    """An annotation for people."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Annotated:
        return words_of(inner[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words_of(each) for each in inner))
    words = _WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")
    each = _WORDS.get(inner[0], "") if words == "a list" and inner else ""
    return f"{words}, each {each}" if each else words


def parse_device(device: Any) -> torch.device:
    """The device of this name, on which there can be tensors.

    Raises:
        ValueError: it is no name of a device, there is none of it on this machine, or it has no memory (meta).
    """
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device {shown(device)} is a {type(device).__name__}, not a text; {_DEVICES}")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"device {shown(str(device))} cannot be used: {reason}; {_DEVICES}") from error
    if found.type == "meta":
        raise ValueError(f"device 'meta' cannot be used: it has no memory; {_DEVICES}")
    return found
