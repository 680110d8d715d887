"""The Python face: flags that a type checker and an editor see, and that mean what the command's mean."""

import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import mergetool
from mergetool.engine import Flags
from tests.files import content, write_models

SNIPPET = """
import mergetool
result: mergetool.Result = mergetool.run("r.yaml", output="out", workers=2, memory="8GiB", overwrite=True)
mergetool.run("r.yaml", worker=2)
mergetool.run("r.yaml", overwrite="yes")
mergetool.load_bundle("b", verfy=False)
"""


def test_a_type_checker_sees_the_flags(tmp_path):
    """In the face of the package; what lies behind it is not looked at again."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    face = [str(Path(mergetool.__file__).parent / name) for name in ("__init__.py", "api.py", "bundle/opening.py")]
    options = ["--follow-imports=skip", f"--cache-dir={os.devnull}"]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "snippet.py"), *face]
    told = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
    found = [line.split(": ", 2)[2] for line in told.splitlines() if "snippet.py" in line and ": error: " in line]
    assert len(found) == 3, told
    assert 'Unexpected keyword argument "worker"' in found[0]
    assert '"overwrite"' in found[1]
    assert 'Unexpected keyword argument "verfy"' in found[2]


def test_every_flag_of_a_run_can_be_given_and_has_the_same_default():
    known = inspect.signature(mergetool.run).parameters
    assert {flag.name: flag.default for flag in fields(Flags)} == {
        name: known[name].default for name in known if name not in ("recipe", "settings", "progress")
    }


def test_memory_may_be_written_as_in_the_command(tmp_path):
    write_models(tmp_path)
    recipe = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": {"method": "linear"}}
    with pytest.raises(mergetool.PlanError, match="--memory allows"):
        mergetool.run(recipe, output=tmp_path / "out", memory="1MB")
    mergetool.run(recipe, output=str(tmp_path / "out"), memory="2GiB")
    assert content(tmp_path / "out")
