"""Tests run side by side on few cores: one OpenMP thread each, here and in the processes they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
