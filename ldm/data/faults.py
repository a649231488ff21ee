"""Corrupt images: each named once and skipped; too many of them stop the job."""

import logging
from collections.abc import Mapping

from ldm.errors import LdmError

TOLERATED = 0.01
"""Share of a source's images that may be corrupt before a job stops."""

Faults = Mapping[str, str]
"""Name of each corrupt image → the reason."""

log = logging.getLogger("ldm")


class FaultCount:
    """The distinct corrupt images one process has met among the `total` of a source."""

    def __init__(self, total: int):
        self.total = total
        self.found: dict[str, str] = {}

    def add(self, faults: Faults) -> None:
        """Log each new one as a warning.

        Raises:
            LdmError: they are more than 1 % of the source now.
        """
        for name, reason in faults.items():
            if name not in self.found:
                self.found[name] = reason
                log.warning("skipped a corrupt image: %s (%s)", name, reason)
        stop_if_too_many(self.found, self.total)


def stop_if_too_many(faults: Faults, total: int) -> None:
    """Raise an LdmError naming the first ten where faults exceed 1 % of `total` images."""
    if len(faults) <= TOLERATED * total:
        return
    names = list(faults)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    raise LdmError(
        f"{len(names)} of {total} images are corrupt, more than {TOLERATED:.0%}: "
        f"{', '.join(names[:10])}{more}; repair or remove them"
    )
