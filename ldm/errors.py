"""Errors for people to read: one line that says what, where and what to do."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def escape(text: object, keep: str = "") -> str:
    """Make text from a file safe to print: what moves the cursor, hides or reorders other text
    becomes a visible escape; characters in `keep` stay. A byte that is no UTF-8 becomes \\xff."""
    return "".join(c if c.isprintable() or c in keep else _visible(c) for c in str(text))


def _visible(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as Python decodes file names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return ascii(character)[1:-1]


class LdmError(Exception):
    """A file, device or value with which the job cannot continue; exit code 1."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever a file put into it."""
        return escape(super().__str__())


class UsageError(LdmError):
    """A command or configuration that is invalid: a key, a type, a range; exit code 2."""

    exit_code = 2


class Interrupted(Exception):
    """A job was stopped by Ctrl-C, SIGTERM or SIGHUP, and has saved its state."""


def try_call(call: Callable[..., T], *args: object, **options: object) -> "T | LdmError":
    """Call a function; return its result, or the LdmError that it raises."""
    try:
        return call(*args, **options)
    except LdmError as error:
        return error


MOST = dict.fromkeys(("resolution", "size", "batch_size", "batch", "timed"), 2**14)
MOST |= {"workers": 2**10, "n": 10**7}
"""Largest values of options by which memory is requested; of others a billion."""


def check_at_least(least: int, **options: int | tuple[int, int] | None) -> None:
    """Raise a UsageError for an option that is below its least value, or absurdly large.

    `batch_size=0` is reported as `--batch-size 0`; None passes. Of a size, both sides are checked.
    """
    for name, value in options.items():
        numbers = value if isinstance(value, tuple) else (value,)
        given, most = "x".join(map(str, numbers)), MOST.get(name, 10**9)
        option = f"--{name.replace('_', '-')} {given}"
        for number in numbers:
            if number is not None and number < least:
                raise UsageError(f"{option}: must be at least {least}")
            if number is not None and number > most:
                raise UsageError(f"{option}: must be at most {most:,}")


def refuse_newer(path: object, found: int, known: int) -> None:
    """Raise an LdmError for a file whose format is of a later version."""
    if found > known:
        raise LdmError(f"{path} has format {found}, this version reads up to {known}: upgrade ldm")


def brief(error: Exception) -> str:
    """Return the system's reason of an error, the first line of its text, or its type."""
    first = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return first.rstrip(".:") or type(error).__name__


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join the first names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
