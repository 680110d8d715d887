"""What a run says of itself."""

import subprocess
import sys

PARENT = """
import subprocess, sys
held = bytearray(600_000_000)
held[::4096] = bytes(len(held[::4096]))
print(subprocess.check_output([sys.executable, "-c", sys.argv[1]], text=True))
"""
CHILD = "from mergetool.outputs.record import peak_memory; print(peak_memory())"


def test_memory_of_the_process_that_started_this_one_is_not_counted():
    told = int(subprocess.check_output([sys.executable, "-c", PARENT, CHILD], text=True))
    assert 5_000_000 < told < 400_000_000
