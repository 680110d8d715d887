"""A little of the fault campaign; all of it is `scripts/faults`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.held import is_measured

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(is_measured(), reason="a fork that begins to be measured holds the lock meanwhile")
def test_a_small_campaign_loses_nothing():
    command = [sys.executable, "-m", "tests.faults", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 lost" in done.stdout
    assert "a Hub that answers 500" in done.stdout
