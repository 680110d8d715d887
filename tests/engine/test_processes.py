"""Several processes at one merge: the bytes of one, each error once, and a death that a later run makes good."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mergetool.engine.partition import cost, partition
from mergetool.engine.processes import Team
from mergetool.planning import make_plan
from mergetool.recipe import load_recipe
from tests.files import LONG, content, tensors, write_models, write_recipe
from tests.forks import free_port
from tests.turns import some

SHAPES = {f"model.layers.{layer}.mlp.weight": (24, 16 + layer) for layer in range(9)} | {
    "model.embed_tokens.weight": (2100, 2048),  # two units
    "model.norm.weight": (7,),
    "scale": (),
}
MERGES = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "density": 0.3},
    "ties-model": {"method": "ties", "density": 0.3, "scope": "model"},
    "tsv-merge": {"method": "tsv-merge", "scale": "recover"},
}


SIZES = {"linear": (2,), "ties": (3,), "ties-model": (2, 3), "tsv-merge": (3,)}
"""How many processes merge."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), shapes=SHAPES, dtype=torch.bfloat16)


def recipe_of(folder, name, **sections):
    merge = MERGES[name]
    base = {} if merge["method"] == "linear" else {"base": "base"}
    return write_recipe(folder / f"{name}.yaml", **base, models={"a": "a", "b": "b"}, merge=merge, **sections)


@pytest.mark.parametrize("name", MERGES)
def test_any_number_of_processes_writes_the_bytes_of_one(forks, models, tmp_path, name):
    recipe = recipe_of(models, name, output={"shard_size": "3MB"})
    alone = forks.team(1, ["run", recipe, "-o", tmp_path / "1"], cwd=models).wait()
    assert alone[0].code == 0, alone[0].err
    for size in (2, 3) if LONG else SIZES[name]:
        done = forks.team(size, ["run", recipe, "-o", tmp_path / str(size), "--json"], cwd=models).wait()
        assert [each.code for each in done] == [0] * size, done[0].err + done[1].err
        assert content(tmp_path / str(size)) == content(tmp_path / "1")
        assert json.loads(done[0].out)["tensors"] == len(SHAPES)
        assert [each.out + each.err for each in done[1:]] == [""] * (size - 1)
        locks = [json.loads((tmp_path / n / "mergetool.json").read_text()) for n in ("1", str(size))]
        assert all(locks[0][key] == locks[1][key] for key in ("inputs", "notes", "recipe", "plan"))
        assert locks[0]["output"]["files"].keys() == locks[1]["output"]["files"].keys()


WIDE = {"fc1.weight": (40, 16), "fc1.bias": (40,), "fc2.weight": (3, 40), "fc2.bias": (3,)}
SHARED = {
    "c2m3": {"align": {"starts": 5}, "repair": {"mode": "none"}},
    "git-rebasin": {},
    "mass": {"router": {"features": "merged", "layers": ["*"]}},
    "emr": {"router": {"layers": ["*"]}},
    "twin": {"router": {"layers": ["*"]}},
}
BUNDLES = ("mass", "emr", "twin")
BLOCKS = {f"model.layers.{layer}.mlp.weight": (24, 16 + layer) for layer in range(9)} | {"model.norm.weight": (7,)}


@pytest.mark.parametrize("method", some(SHARED))
def test_a_fit_and_the_factors_of_a_bundle_are_shared_and_the_bytes_are_those_of_one(forks, tmp_path, method):
    write_models(tmp_path, names=("base", "a", "b", "c"), shapes=BLOCKS if method in BUNDLES else WIDE)
    asked = {"base": "base"} if method in BUNDLES else {"architecture": "mlp"}
    models = {name: name for name in "abc"}
    recipe = write_recipe(tmp_path / "r.yaml", **asked, models=models, merge={"method": method, **SHARED[method]})
    for size in (1, 2, 3) if LONG else (1, 3):
        done = forks.team(size, ["run", recipe, "-o", str(size)], cwd=tmp_path).wait()
        assert [each.code for each in done] == [0] * size, done[0].err
        assert content(tmp_path / str(size)) == content(tmp_path / "1")
        assert not list((tmp_path / str(size)).rglob(".*"))
        assert json.loads((tmp_path / str(size) / "mergetool.json").read_text())["run"]["processes"] == size


_TAKING = """
import multiprocessing, os, sys, torch.distributed
from mergetool.engine.processes import joined
from mergetool.errors import MergeError

begun = {(rank, threads): multiprocessing.Event() for rank in range(2) for threads in (1, 2)}

def work(item):
    begun[rank, threads].set()
    assert begun[1 - rank, threads].wait(60), "one did everything"
    if item == int(sys.argv[2]):
        raise MergeError(f"item {item} is bad")
    return item * item, rank

children = []
for rank in range(2):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    if os.fork() == 0:
        try:
            with joined() as team:
                for threads in (1, 2):
                    found = team.share(work, range(40), threads)
                    assert [square for square, _ in found] == [n * n for n in range(40)]
                    assert {taken for _, taken in found} == {0, 1}
                assert len({repr(each) for each in team.all_gather(found)}) == 1
            os._exit(0)
        except MergeError as error:
            os._exit(5 if "item 13 is bad" in str(error) else 1)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
print(codes)
"""


@pytest.mark.parametrize(("bad", "codes"), [(-1, "[0, 0]"), (13, "[5, 5]")])
def test_pieces_are_taken_by_whoever_is_free_and_an_error_of_one_reaches_all(forks, bad, codes):
    (done,) = forks.python("-c", _TAKING, free_port(), bad).wait()
    assert done.out.strip() == codes, done.err


@pytest.mark.parametrize("terminated", [False, True])
def test_a_process_that_dies_ends_the_run_and_the_next_one_resumes(forks, tmp_path, terminated):
    shapes = {f"model.layers.{layer}.mlp.weight": (64, 75) for layer in range(80)}
    write_models(tmp_path, shapes=shapes)
    recipe = recipe_of(tmp_path, "ties")
    running = forks.team(2, ["run", recipe, "-o", "out"], cwd=tmp_path, held=1)
    journal = tmp_path / "out.partial.journal.1"
    while not journal.exists() or journal.read_bytes().count(b'"unit"') < 20:
        time.sleep(0.005)
    os.kill(running.pids[1], signal.SIGKILL)
    if terminated:  # as a launcher does with the others
        os.kill(running.pids[0], signal.SIGTERM)
    leader, other = running.wait()
    assert (leader.code, other.code) == (6, -signal.SIGKILL)
    assert leader.err.count("error:") == 1
    assert "has died" in leader.err
    assert "run the same command again" in leader.err
    assert not (tmp_path / "out").exists()
    again = forks.team(1 if terminated else 3, ["run", recipe, "-o", "out", "--json"], cwd=tmp_path).wait()
    assert again[0].code == 0, again[0].err
    assert json.loads(again[0].out)["resumed"]
    assert forks.team(1, ["run", recipe, "-o", "alone"], cwd=tmp_path).wait()[0].code == 0
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert not list((tmp_path / "out").glob(".*"))


def test_an_error_of_any_process_is_told_once_and_stops_all(forks, tmp_path):
    shapes = {f"model.layers.{layer}.mlp.weight": (64, 64) for layer in range(40)}
    write_models(tmp_path, shapes=shapes)
    recipe = recipe_of(tmp_path, "linear")
    plan = make_plan(load_recipe(recipe), tmp_path / "out")
    theirs = next(iter(partition(plan, member(1, 2)).units))[0]
    state = tensors(1, shapes)
    state[plan.steps[theirs].spec.name][3, 3] = float("nan")
    write_models(tmp_path, names=("base",), shapes=shapes)
    from tests.files import write_model

    write_model(tmp_path / "a", state)
    leader, other = forks.team(2, ["run", recipe, "-o", "out", "--json"], cwd=tmp_path).wait()
    assert (leader.code, other.code) == (5, 0)
    answer = json.loads(leader.out)
    assert (answer["error"], answer["where"]) == ("MergeError", plan.steps[theirs].spec.name)
    assert leader.err.count("error:") == 1
    assert other.out + other.err == ""
    assert not (tmp_path / "out.partial").exists()
    wrong = forks.team(2, ["run", recipe, "-o", "a"], cwd=tmp_path).wait()
    assert [each.code for each in wrong] == [6, 0]
    assert wrong[1].err == ""


def test_accelerate_launches_it(models, tmp_path):
    recipe = recipe_of(models, "ties-model")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options,
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    command += ["-m", "mergetool", "run", str(recipe), "-o", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "two")
    lock = json.loads((tmp_path / "two" / "mergetool.json").read_text())
    assert lock["run"]["processes"] == 2


def member(rank, size):
    """A stand-in for one of several processes, where only its number matters."""
    team = Team()
    team.rank, team.size = rank, size
    return team


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_unit_and_every_file_is_dealt_once_and_the_shares_are_alike(models, size):
    for name in MERGES:
        plan = make_plan(load_recipe(recipe_of(models, name, output={"path": "x", "shard_size": "3MB"})))
        shares = [partition(plan, member(rank, size)) for rank in range(size)]
        costs = {
            (step.index, start): cost(plan, step, start, stop) for step in plan.steps for start, stop in step.pieces()
        }
        assert all(sum(share.has(*unit) for share in shares) == 1 for unit in costs)
        paths = [str(stamp.path) for stamps in plan.stamps.values() for stamp in stamps]
        assert all(sum(share.hashes_input(path) for share in shares) == 1 for path in paths)
        assert all(sum(share.hashes_output(shard) for share in shares) == 1 for shard in range(len(plan.shards)))
        for step in plan.steps:  # a survey of one tensor stays in one process
            holders = {
                rank for rank, share in enumerate(shares) if any(share.has(step.index, s) for s, _ in step.pieces())
            }
            assert len(holders) == 1 or name != "ties"


@pytest.mark.parametrize("dies", some([0, 1]))
def test_a_process_that_dies_inside_a_recipe_inside_is_made_good_by_the_next_run(forks, tmp_path, dies):
    shapes = {f"model.layers.{layer}.mlp.weight": (64, 75) for layer in range(80)}
    write_models(tmp_path, shapes=shapes)
    mean = {"recipe": {"models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}}}
    recipe = write_recipe(tmp_path / "r.yaml", base="base", models={"mix": mean, "b": "b"}, merge=MERGES["ties"])
    running = forks.team(2, ["run", recipe, "-o", "out"], cwd=tmp_path, held=dies)
    pattern = "out.partial.parts/*.partial.journal.1" if dies else "out.partial.parts/*.partial.journal"
    while sum(path.read_bytes().count(b'"unit"') for path in tmp_path.glob(pattern)) < 20:
        time.sleep(0.005)
    os.kill(running.pids[dies], signal.SIGKILL)
    assert [each.code for each in running.wait()][dies] == -signal.SIGKILL
    again = forks.team(3, ["run", recipe, "-o", "out", "--json"], cwd=tmp_path).wait()
    assert again[0].code == 0, again[0].err
    assert forks.team(1, ["run", recipe, "-o", "alone"], cwd=tmp_path).wait()[0].code == 0
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert not list(tmp_path.glob("out.*"))
