"""Every error a user can meet, and the one shape of its message: what was tried, what came, what was wanted, what to do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import inf
from typing import Any


class ConceptSegError(Exception):
    """Base of all errors that a user can fix; the command line prints them without a traceback."""


class ConfigError(ConceptSegError):
    """A setting is misspelt, out of range, or does not go with another."""


class DataError(ConceptSegError):
    """A data set, or one sample of it, is missing, truncated, or not in the layout it claims."""


class ViewError(ConceptSegError):
    """A view asks for cells that the extractor does not have."""


class TapError(ConceptSegError):
    """A host model does not have the modules that a tap needs."""


class StoreError(ConceptSegError):
    """A run folder can't be written, or holds rows that contradict each other."""


class ResumeError(StoreError):
    """A run folder was written by other code or another configuration."""


class ReportError(ConceptSegError):
    """A finished table, or the report written from it, does not hold together."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM while rows are computed; code: with which the process ends."""

    def __init__(self, kept: int, code: int = 130) -> None:
        super().__init__(f"{kept:,} rows kept; run the same command again to go on")
        self.kept, self.code = kept, code


def did_you_mean(got: str, offered: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest choice, then all of them (at most 20).

    >>> did_you_mean("outptu", ["output", "value"])
    'Did you mean "output"? Choices: output, value.'
    """
    choices = sorted(offered)
    near = get_close_matches(got, choices, n=1) or [c for c in choices if c.lower() == got.lower()]
    listed = ", ".join(choices[:20]) + (f", and {len(choices) - 20} more" if len(choices) > 20 else "")
    return (f'Did you mean "{near[0]}"? ' if near else "") + f"Choices: {listed}."


def one_of(key: str, value: Any, choices: Iterable[str], error: type[ConceptSegError] = ConfigError) -> None:
    """Raise `error` if the setting `key` has a value that is none of the choices.

    >>> one_of("extractor.noise", "sharde", ["shared", "per_sample"])
    Traceback (most recent call last):
    conceptseg.errors.ConfigError: extractor.noise: unknown "sharde". Did you mean "shared"? Choices: per_sample, shared.
    """
    offered = list(choices)
    if value not in offered:
        raise error(f'{key}: unknown "{value}". {did_you_mean(str(value), offered)}')


def in_range(key: str, value: float | None, least: float, most: float) -> None:
    """Raise ConfigError if the setting `key` is not from `least` to `most`; None means that it is not set.

    >>> in_range("extractor.grid", 0, 1, 1024)
    Traceback (most recent call last):
    conceptseg.errors.ConfigError: extractor.grid is 0; wanted 1 to 1,024.
    """
    if value is not None and not least <= value <= most:
        raise ConfigError(f"{key} is {value}; wanted {least:,} to {most:,}.")


def real_number(key: str, value: Any, least: float = -inf, most: float = inf) -> float:
    """The setting `key` as a float. Raise ConfigError for what is no finite number from `least` to `most`.

    >>> real_number("views.blur", -1, 0)
    Traceback (most recent call last):
    conceptseg.errors.ConfigError: views.blur is -1; wanted a number of at least 0.
    """
    bounds = f"of at least {least:,}" if most == inf else f"from {least:,} to {most:,}"
    fits = isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf and least <= value <= most
    if not fits:
        raise ConfigError(f"{key} is {value!r}; wanted a number{'' if least == -inf else f' {bounds}'}.")
    return float(value)


def whole_number(key: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """The setting `key` as an int. Raise ConfigError for what is no whole number from `least` to `most`.

    >>> whole_number("extractor.seed", "abc", 0)
    Traceback (most recent call last):
    conceptseg.errors.ConfigError: extractor.seed is 'abc'; wanted a whole number of at least 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        bound = f" and at most {most:,}" if isinstance(value, int) and value > most else ""
        raise ConfigError(f"{key} is {value!r}; wanted a whole number of at least {least:,}{bound}.")
    return value


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text with control characters other than newline and tab written out: a terminal or a page would obey them.

    The marks that turn the direction of writing and lone surrogates are written out too.

    >>> printable("cat\x1b[2J")
    'cat\\x1b[2J'
    """
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def guarded(main: Callable[[], int | None]) -> Callable[[], None]:
    """Print our own errors, and what the system refuses, bare on stderr, and exit with 1; on Ctrl-C with 130, on SIGTERM 143.

    The rest shows its traceback.
    """

    def wrapped() -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal that can't show a letter is no reason to fail
        try:
            _check_working_directory()
            code = main() or 0
            sys.stdout.flush()
            sys.exit(code)
        except ConceptSegError as error:
            _end_with(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt as stop:
            print(printable(str(stop)) or "interrupted; what was written is kept", file=sys.stderr)
            sys.exit(getattr(stop, "code", 130))
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(141)
        except OSError as error:
            place = f" {error.filename}" if error.filename is not None else ""
            _end_with(f"{type(error).__name__}:{place or ' a file or output'}: {error.strerror or error}.")
        except RuntimeError as error:
            if "can't start new thread" not in str(error):
                raise
            _end_with("OSError: the system starts no further thread (ulimit -u). Allow more, or set OMP_NUM_THREADS=1.")

    return wrapped


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working directory no longer exists. Change to another one and run the command again.") from error


def _end_with(message: str) -> None:
    """Print a message on stderr and exit with 1, also where stdout can't be written any more."""
    try:
        sys.stdout.flush()
    except OSError:  # what is left in its buffer would be tried again at exit, and told as an ignored exception
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print(printable(message), file=sys.stderr)
    sys.exit(1)
