"""The environment of every test, set before torch is imported: here, and in what the tests fork or start."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost more than they save at this size
