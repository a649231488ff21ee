"""Jobs that are killed at each of their file operations, in a fork."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = 99


def killed_at(number: int, job: Callable[[], object]) -> bool:
    """Run a job that is killed before its `number`-th change of a file; return False if it has
    fewer."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            _kill_before(number)
            job()
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def _kill_before(number: int) -> None:
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event in CHANGES or (event == "open" and args[2] & WRITES):
            seen += 1
            if seen == number:
                os._exit(KILLED)

    sys.addaudithook(watch)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but locks, without the time at which they were made."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {
        path.relative_to(folder).as_posix(): re.sub(rb'"created": "[^"]*"', b"", path.read_bytes())
        for path in files
    }
