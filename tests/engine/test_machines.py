"""Two machines with a shared file system: two network namespaces, joined by nothing but a cable."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

import mergetool
from tests.files import content, write_models, write_recipe
from tests.forks import clean_environment

ADDRESSES = ("10.213.77.1", "10.213.77.2")
SHAPES = {f"model.layers.{layer}.mlp.weight": (256, 300) for layer in range(400)}


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
def launch(machines, tmp_path):
    """Start a command on both machines: by accelerate, or with what it sets, for its import takes seconds."""
    running = []

    def by_accelerate(rank):
        common = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--mixed_precision", "no"]
        common += ["--dynamo_backend", "no", "--main_process_ip", ADDRESSES[0], "--main_process_port", "29513"]
        return ["-m", "accelerate.commands.launch", *common, "--machine_rank", str(rank)]

    def start(*arguments, accelerate=False):
        both = []
        for rank, name in enumerate(machines):
            launcher = by_accelerate(rank) if accelerate else []
            command = ["ip", "netns", "exec", name, sys.executable, *launcher, "-m", "mergetool", *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
            told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            told |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29513}
            env = clean_environment() | ({} if accelerate else {key: str(value) for key, value in told.items()})
            both.append(subprocess.Popen(command, **pipes, cwd=tmp_path, env=env))
        running.extend(both)
        return both

    yield start
    for each in running:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.communicate()


def ended(both):
    told = [each.communicate(timeout=120) for each in both]
    return [SimpleNamespace(code=p.returncode, out=o, err=e) for p, (o, e) in zip(both, told, strict=True)]


@pytest.fixture
def recipe(tmp_path):
    write_models(tmp_path, shapes=SHAPES)
    merge = {"method": "ties", "density": 0.3, "scope": "model"}
    return write_recipe(tmp_path / "r.yaml", base="base", models={"a": "a", "b": "b"}, merge=merge)


def test_a_machine_that_dies_ends_the_run_and_two_machines_finish_it_with_the_bytes_of_one_process(
    machines, launch, recipe, tmp_path
):
    both = launch("run", recipe, "-o", "two", "--json", accelerate=True)
    journal = tmp_path / "two.partial.journal.1"
    begun = time.monotonic()
    while not journal.exists() or journal.stat().st_size < 1500:
        assert time.monotonic() - begun < 100
        time.sleep(0.01)
    for line in subprocess.check_output(["ip", "netns", "pids", machines[1]], text=True).split():  # the power goes
        os.kill(int(line), signal.SIGKILL)
    begun = time.monotonic()
    first, _ = ended(both)
    assert time.monotonic() - begun < 60
    assert first.code != 0
    assert "another process of this run has died" in first.out + first.err
    assert "run the same command again" in first.out + first.err
    assert not (tmp_path / "two").exists()
    first, second = ended(launch("run", recipe, "-o", "two", "--json"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(first.out)["resumed"]
    assert second.out == ""
    assert json.loads((tmp_path / "two" / "mergetool.json").read_text())["run"]["processes"] == 2
    mergetool.run(recipe, output=tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")
