"""scripts/gpu_check goes through all its steps where there is no GPU, and says what failed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.files import LONG

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check"


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="scripts/test --long: nine processes that import torch")
def test_all_steps_are_gone_through_on_the_cpu_and_a_failed_one_ends_in_an_error(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--cache", tmp_path, "--output", report]
    command += ["--python", sys.executable, "--peer-python", "/bin/false"]  # no mergekit there
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    found = json.loads(report.read_text())
    outcomes = {step["step"]: step["outcome"] for step in found["steps"]}
    assert done.returncode == 1, done.stderr
    assert {name for name, outcome in outcomes.items() if outcome == "failed"} <= {
        f"{row['merge']}: mergekit" for row in found["table"]
    }, done.stderr
    assert "failed" in outcomes.values()
    assert outcomes["tests"] == "left out"
    assert [row["merge"].split(",")[0] for row in found["table"]] == ["task-arithmetic", "ties", "tsv-merge", "linear"]
    assert found["table"][0]["cpu"] > 0
    assert "| ties, 8 models, 3 layers | " in done.stdout
    assert not (tmp_path / "gpu-check-small").exists()


def test_a_step_that_fails_is_reported_and_ends_in_an_error(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--cache", tmp_path, "--output", report]
    done = subprocess.run([str(part) for part in [*command, "--python", "/bin/false"]], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = {step["step"]: step["outcome"] for step in json.loads(report.read_text())["steps"]}
    assert found == {"facts": "failed", "tests": "left out", "models": "failed", "layer": "failed"}
    assert "failed    models" in done.stderr


def test_a_machine_without_a_gpu_is_told_at_once(tmp_path):
    command = [sys.executable, SCRIPT, "--cache", tmp_path, "--output", tmp_path / "report.json"]
    command += ["--python", sys.executable]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["steps"][-1]["outcome"] == "failed"
