"""Runs that are killed, interrupted, crowded or starved: nothing is lost, done twice, or half-written under its name"""

import hashlib
import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch

import mergetool
from mergetool.errors import OutputError
from tests.files import write_model, write_recipe
from tests.held import JOURNALLED

NUM_TENSORS, SHAPE = 48, (175, 1000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tunes in bfloat16, large enough for workers of their own."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(SHAPE, generator=generator) for i in range(NUM_TENSORS)}
    write_model(folder / "base", {name: value.bfloat16() for name, value in base.items()})
    for model in "ab":
        tuned = {name: value + 0.1 * torch.randn(SHAPE, generator=generator) for name, value in base.items()}
        write_model(folder / model, {name: value.bfloat16() for name, value in tuned.items()})
    return folder


def recipe_for(folder, models, **merge):
    return write_recipe(
        folder / "r.yaml",
        base=str(models / "base"),
        models={"a": str(models / "a"), "b": str(models / "b")},
        merge={"method": "ties", "density": 0.3, **merge},
        output={"path": str(folder / "out"), "shard_size": "5MB"},
    )


@pytest.fixture
def start(forks):
    """A run of its own; with `units`, one that waits for a signal once so many units are done."""

    def run(recipe, *arguments, units=None):
        return forks.open("run", recipe, *arguments, held=units and (JOURNALLED, units))

    return run


def ended(process, with_signal=None):
    """(exit code, stderr) of a process that ends by itself or by a signal."""
    if with_signal is not None:
        process.send_signal(with_signal)
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def weights(folder):
    """SHA-256 of every weight file and of the index."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json")])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def units(folder):
    """The units that the journal of an unfinished output calls done."""
    try:
        journal = folder.with_name(f"{folder.name}.partial.journal").read_bytes()
    except FileNotFoundError:  # not begun, or ended at this very moment
        return []
    found = []
    for line in journal.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found += [tuple(record["unit"])] if "unit" in record else []
    return found


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        scope: weights(mergetool.run(recipe_for(folder, models, scope=scope), output=folder / scope).path)
        for scope in ("tensor", "model")
    }


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_run_killed_again_and_again_gives_the_same_bytes_and_repeats_no_unit(
    scope, models, undisturbed, tmp_path, start
):
    recipe, output = recipe_for(tmp_path, models, scope=scope), tmp_path / "out"
    moments = random.Random(scope)
    kills = 0
    for _ in range(20):
        before = units(output)
        more = moments.randrange(4, 9)
        process = start(recipe, "--workers", "2", units=more + 1)  # it waits one unit later, but for the last of them
        wanted = len(before) + more
        wait_for(lambda enough=wanted: len(units(output)) >= enough, process)
        time.sleep(moments.random() * 0.02)
        if ended(process, signal.SIGKILL)[0] == 0:
            break
        kills += 1
        assert not output.exists()
        after = units(output)
        assert len(set(after)) == len(after)
        assert set(before) <= set(after)
    else:
        assert ended(start(recipe))[0] == 0
    assert kills >= 4
    assert weights(output) == undisturbed[scope]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_interrupted_run_says_so_and_goes_on(models, undisturbed, tmp_path, start):
    recipe, output = recipe_for(tmp_path, models), tmp_path / "out"
    process = start(recipe, units=4)
    wait_for(lambda: len(units(output)) > 3, process)
    code, told = ended(process, signal.SIGINT)
    assert code == 130
    assert "goes on from there" in told
    assert "Traceback" not in told
    assert mergetool.run(recipe).resumed
    assert weights(output) == undisturbed["tensor"]


def stopped_midway(start, models, folder):
    """A recipe, and the unfinished output that a kill left."""
    recipe = recipe_for(folder, models)
    process = start(recipe, units=6)
    wait_for(lambda: len(units(folder / "out")) > 5, process)
    ended(process, signal.SIGKILL)
    return recipe, folder / "out.partial"


def test_after_a_reboot_only_synced_units_are_trusted(models, undisturbed, tmp_path, start):
    recipe, partial = stopped_midway(start, models, tmp_path)
    journal = tmp_path / "out.partial.journal"
    lines = journal.read_text().splitlines()
    header = json.loads(lines[0]) | {"boot": "another"}
    done = [line for line in lines[1:] if "synced" not in line]
    journal.write_text(
        "\n".join([json.dumps(header), *done[:2], json.dumps({"synced": 3, "seconds": 1.0}), *done[2:], ""])
    )
    with (partial / "model-00001-of-00004.safetensors").open("r+b") as file:  # a power cut took what was not synced
        file.seek(-250_000, os.SEEK_END)
        file.write(bytes(250_000))
    assert mergetool.run(recipe).resumed == any('"unit"' in line for line in done[:2])
    assert weights(tmp_path / "out") == undisturbed["tensor"]


LIMITED = """
import resource, signal, sys
from mergetool.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1200 * 1024, resource.RLIM_INFINITY))
sys.argv[0] = "mergetool"
main()
"""


def test_a_file_size_limit_is_met_before_any_work_and_leaves_no_output(models, tmp_path, forks):
    code, told = ended(forks.python("-c", LIMITED, "run", recipe_for(tmp_path, models)))
    assert code == 6
    assert "fix:" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 10 MB: too small for a result of 17 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:  # not allowed here: a limit on file sizes starves the run all the same (test above)
        pytest.skip("mounting is not allowed")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_noticed_before_any_work(models, small_disk, tmp_path):
    with pytest.raises(OutputError, match="are free on that disk"):
        mergetool.run(recipe_for(tmp_path, models), output=small_disk / "out")
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_meanwhile_is_told_and_resumed_from(
    models, small_disk, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr("mergetool.engine.run.check_disk", lambda plan, output: None)
    recipe = recipe_for(tmp_path, models)
    with pytest.raises(OutputError, match="no space left"):
        mergetool.run(recipe, output=small_disk / "out")
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    mergetool.run(recipe, output=small_disk / "out")
    assert weights(small_disk / "out") == undisturbed["tensor"]
