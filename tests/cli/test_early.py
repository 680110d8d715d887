"""What is begun before torch is imported must not change how it is imported."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from mergetool.cli.early import load_libraries

thread = load_libraries()
thread.join()
assert "torch" not in sys.modules
print("libtorch_cpu" in Path("/proc/self/maps").read_text())
import torch
print(float((torch.ones(3) @ torch.ones(3)).sum()))
print(load_libraries())
"""
STAND_IN = """
import sys
sys.modules["torch"] = None
from mergetool.cli.early import load_libraries
print(load_libraries())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how libraries are loaded on Linux")
def test_torchs_libraries_are_there_before_torch_is_and_torch_works_with_them():
    assert run(SCRIPT) == ["True", "3.0", "None"]


def test_without_a_torch_nothing_is_begun():
    assert run(STAND_IN) == ["None"]


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
