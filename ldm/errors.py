"""The two errors a person is meant to read: one line that says what, where and what to do."""


class LdmError(Exception):
    """Something in the world is not as the job needs it: a file, a device, a number. Exit 1."""

    exit_code = 1


class UsageError(LdmError):
    """The command or configuration asks for what cannot be: a key, a type, a range. Exit 2."""

    exit_code = 2


class Interrupted(Exception):
    """A job was asked to stop (Ctrl-C, SIGTERM) and has saved itself."""


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse options below their least value; `batch_size=0` is reported as `--batch-size 0`.

    Raises:
        UsageError: one of them is; None passes.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
