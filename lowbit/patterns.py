"""Regular expressions from files of other people, matched against names within a limit of time.

An expression such as (a+)+$ takes a time exponential in the length of the name in any engine that backtracks, `re` among them,
which cannot be interrupted. The package `regex` reads the same expressions and has a timeout.
"""

import re
import time

import regex

SECONDS = 0.3  # that all expressions of one matcher may take beyond the usual
_USUAL = 1e-4  # seconds for one expression and one name; sane ones take a tenth of that


class Matcher:
    """Matches the expressions of one file against names, `SECONDS` in all beyond what sane expressions take.

    Every method raises ValueError where an expression is none, or where the time is up; the message names the expression and
    `where` it stands.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._left = SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def search(self, pattern: str, name: str) -> bool:
        """Whether the expression is found anywhere in the name."""
        return self._run(pattern, name, anywhere=True)

    def match(self, pattern: str, name: str) -> bool:
        """Whether the expression is found at the start of the name."""
        return self._run(pattern, name, anywhere=False)

    def _run(self, pattern: str, name: str, *, anywhere: bool) -> bool:
        if pattern not in self._compiled:
            self._compiled[pattern] = self._compile(pattern)
        compiled = self._compiled[pattern]
        began = time.thread_time()
        try:
            found = (compiled.search if anywhere else compiled.match)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise ValueError(
                f"{self.where}: the regular expression {pattern!r} takes too long to match {name!r}; write it without "
                "repetitions inside repetitions"
            ) from None
        self._left -= max(0.0, time.thread_time() - began - _USUAL)
        return found is not None

    def _compile(self, pattern: str) -> "regex.Pattern[str]":
        try:
            re.compile(pattern)  # what other programs read too
            return regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{self.where}: {pattern!r} is not a regular expression: {error}") from error
