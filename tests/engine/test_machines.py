"""Two machines with a shared file system: two network namespaces, joined by nothing but a cable."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest

import mergetool
from tests.files import content, write_models, write_recipe
from tests.forks import clean_environment
from tests.held import JOURNALLED

ADDRESSES = ("10.213.77.1", "10.213.77.2")
SHAPES = {f"model.layers.{layer}.mlp.weight": (256, 300) for layer in range(60)}


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines():
    """Names of two namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"mt{os.getpid()}{which}" for which in "ab"]
    cables = [f"v{name}"[:15] for name in names]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


@pytest.fixture
def launch(machines, forks, tmp_path):
    """Start a command on both machines, with what `accelerate launch` tells them; `held`: the second one waits."""

    def start(*arguments, held=False):
        told = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": ADDRESSES[0]}
        told |= {"MASTER_PORT": 29513}
        envs = [
            clean_environment() | {key: str(value) for key, value in {**told, "RANK": rank}.items()} for rank in (0, 1)
        ]
        if held:
            envs[1]["HOLD"] = f"{JOURNALLED} 10"
        network = [f"/run/netns/{name}" for name in machines]
        return forks.start(arguments, cwd=tmp_path, envs=envs, network=network, session=True)

    return start


@pytest.fixture
def recipe(tmp_path):
    write_models(tmp_path, shapes=SHAPES)
    merge = {"method": "ties", "density": 0.3, "scope": "model"}
    return write_recipe(tmp_path / "r.yaml", base="base", models={"a": "a", "b": "b"}, merge=merge)


def test_a_machine_that_dies_ends_the_run_and_two_machines_finish_it_with_the_bytes_of_one_process(
    machines, launch, recipe, tmp_path
):
    both = launch("run", recipe, "-o", "two", "--json", held=True)
    journal = tmp_path / "two.partial.journal.1"
    begun = time.monotonic()
    while not journal.exists() or journal.read_bytes().count(b'"unit"') < 10:
        assert time.monotonic() - begun < 100
        time.sleep(0.01)
    os.killpg(both.pids[1], signal.SIGKILL)  # the power goes
    begun = time.monotonic()
    first, _ = both.wait()
    assert time.monotonic() - begun < 60
    assert first.code != 0
    assert "another process of this run has died" in first.out + first.err
    assert "run the same command again" in first.out + first.err
    assert not (tmp_path / "two").exists()
    first, second = launch("run", recipe, "-o", "two", "--json").wait()
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(first.out)["resumed"]
    assert second.out == ""
    assert json.loads((tmp_path / "two" / "mergetool.json").read_text())["run"]["processes"] == 2
    mergetool.run(recipe, output=tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")
