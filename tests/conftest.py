"""Tests run side by side on few cores: one OpenMP thread each, here and in what they start. None goes online.

What mergetool remembers between runs lies in a folder of this test run.
"""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mergetool-tests-")
