"""The two errors a person is meant to read: one line that says what, where and what to do."""


class LdmError(Exception):
    """Something in the world is not as the job needs it: a file, a device, a number. Exit 1."""

    exit_code = 1


class UsageError(LdmError):
    """The command or configuration asks for what cannot be: a key, a type, a range. Exit 2."""

    exit_code = 2


class Interrupted(Exception):
    """A job was asked to stop (Ctrl-C, SIGTERM) and has saved itself."""
