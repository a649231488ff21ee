import logging

import pytest

from ldm.data.loader import FaultCount
from ldm.errors import LdmError


def test_each_fault_is_logged_once_and_one_percent_is_tolerated(caplog):
    faults = FaultCount(200)
    with caplog.at_level(logging.WARNING, "ldm"):
        faults.add({"a.png": "truncated"})
        faults.add({"a.png": "truncated", "b.png": "empty"})
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a corrupt image: a.png (truncated)",
        "skipped a corrupt image: b.png (empty)",
    ]
    with pytest.raises(LdmError, match=r"^3 of 200 images are corrupt, more than 1%: a.png, b.png"):
        faults.add({"c.png": "empty"})


def test_ten_are_named_and_the_rest_counted():
    with pytest.raises(LdmError, match=r"0\.png, .*9\.png and 3 more; repair or remove them$"):
        FaultCount(100).add({f"{n}.png": "empty" for n in range(13)})
