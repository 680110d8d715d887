"""A run's torch leaves for later what computing does not need, and lacks nothing."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mergetool.cli import bundle as commands
from tests.files import write_models, write_recipe

WITHOUT_DATA = "torch.roll(torch.empty(2, device='meta'), 1)"
"""What torch can only do with all of it."""
RUN = """
import atexit, sys
from mergetool.cli import start

def look():
    import torch
    print("alone" if "mergetool.methods.ties" not in sys.modules else "beside others")
    print("left" if "torch._refs" not in sys.modules else "all")
    torch.export.Dim
    {0}
    print("all" if "torch._refs" in sys.modules else "left")

atexit.register(look)
sys.argv[0] = "mergetool"
start()
"""
BESIDE = """
import importlib.util
from mergetool.cli.quick import shorten_torch

shorten_torch()
import torch
importlib.util.find_spec("accelerate")
{0}
"""


def python(code, *arguments):
    code = code.format(WITHOUT_DATA)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_run_waits_for_less_and_the_rest_comes_when_it_is_used(tmp_path):
    write_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", models={"a": "./a", "b": "./b"}, merge={"method": "linear"})
    assert python(RUN, "run", str(recipe), "-o", str(tmp_path / "out"))[-3:] == ["alone", "left", "all"]


def test_libraries_of_networks_find_all_of_it():
    assert python(BESIDE) == []


@pytest.mark.parametrize("words", ["add nowhere a=b", "remove nowhere a", "dense nowhere a -o elsewhere"])
def test_bundles_change_with_the_same_start(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(commands, "prepare_torch", lambda *, whole: begun.append(whole))
    assert CliRunner().invoke(commands.app, words.split()).exit_code
    assert begun == [False]
