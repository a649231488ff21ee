"""How worker processes start, and what they do about signals.

They start by forkserver (spawn where there is none), never by fork: a training process has threads,
and a lock that one of them holds at a fork stays locked in the child for good. A script that uses
workers therefore needs the usual `if __name__ == "__main__":`.
"""

import multiprocessing
import signal


def start_method() -> str:
    """`forkserver`, with a server that imports torch once for all workers, or else `spawn`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ldm.data.loader"])
    return "forkserver"


def leave_signals_to_parent() -> None:
    """Ignore SIGINT and SIGTERM in this process.

    Ctrl-C and a cluster's warning reach all processes of a job: the parent decides what they mean.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
