"""Tests side by side (`pytest -n 2`) have a core each: more threads would get in the way."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands inherit it
