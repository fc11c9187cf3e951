"""One thread for each of several test processes (`make test`): two with two threads each wait for one another."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it as it is imported, and processes of tests inherit it
