"""Errors for people to read: one line that says what, where and what to do."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

# C0, C1; soft hyphen, zero widths, line separators, reversals of direction, the byte order mark;
# lone surrogates
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def escape(text: object, keep: str = "") -> str:
    """Make text from a file safe to print: what moves the cursor, hides or reorders other text
    becomes a visible escape; characters in `keep` stay. A byte that is no UTF-8 becomes \\xff."""

    def visible(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        is_byte = "\udc80" <= character <= "\udcff"  # as Python decodes file names
        return f"\\x{ord(character) - 0xDC00:02x}" if is_byte else ascii(character)[1:-1]

    return UNSAFE.sub(visible, str(text))


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


def check_at_least(least: int, **options: int | None) -> None:
    """Raise a UsageError for an option that is below its least value, or absurdly large.

    `batch_size=0` is reported as `--batch-size 0`; None passes.
    """
    for name, value in options.items():
        option, most = f"--{name.replace('_', '-')} {value}", MOST.get(name, 10**9)
        if value is not None and value < least:
            raise UsageError(f"{option}: must be at least {least}")
        if value is not None and value > most:
            raise UsageError(f"{option}: must be at most {most:,}")


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join the first names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
