"""Runs that are killed before every single file that they make, rename or remove: the same command ends them."""

import json
import shutil

import pytest

from tests.files import LONG, content, write_models, write_recipe
from tests.forks import clean_environment

RESULT = {"mergetool.json", "README.md", "model.safetensors"}


@pytest.fixture(scope="module")
def place(forks, tmp_path_factory):
    """Models, a recipe, the result of another recipe, and what an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("moments")
    write_models(folder, names=("a", "b"))
    models = {"models": {"a": "a", "b": "b"}}
    write_recipe(folder / "r.yaml", **models, merge={"method": "linear"})
    write_recipe(folder / "other.yaml", **models, merge={"method": "slerp"})
    for recipe, name in (("r", "undisturbed"), ("other", "other")):
        assert forks.run(["run", f"{recipe}.yaml", "-o", name], cwd=folder, env=clean_environment()).code == 0
    return folder


def begin(place, start):
    """What lies at the output when the command is given first, and its options."""
    for path in place.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if start == "empty":
        (place / "out").mkdir()
    if start == "result":
        shutil.copytree(place / "other", place / "out")
    return ["run", "r.yaml", "-o", "out", *(["--overwrite"] if start == "result" else [])]


def check_never_half(place, start):
    """What has the name is the old or the new result, whole, with nothing beside it that is ours."""
    out = place / "out"
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()}
    assert found == RESULT or (start == "empty" and not found)
    if found:
        assert (
            content(out) in [content(place / "undisturbed"), content(place / "other")][: 2 if start == "result" else 1]
        )


@pytest.mark.parametrize(("start", "first"), [("nothing", 1), ("empty", 7), ("result", 7)])
def test_a_run_killed_at_any_moment_is_ended_by_the_same_command(start, first, forks, place):
    """With something at the output, what differs comes last."""
    said = []
    for moment in range(first, 100, 1 if LONG or start == "nothing" else 2):
        command = begin(place, start)
        env = clean_environment() | {"KILL_AT": str(moment), "KILL_IN": str(place / "out")}
        code = forks.run(command, cwd=place, env=env).code
        check_never_half(place, start)
        again = forks.run(command, cwd=place, env=clean_environment())
        assert again.code == 0, (moment, again.err)
        said.append("done already" in again.err)
        check_never_half(place, start)
        assert content(place / "out") == content(place / "undisturbed")
        assert [path.name for path in place.glob("out*")] == ["out"], moment
        if code == 0:
            break
        assert code == -9
    assert moment >= 10
    assert sum(said) > (1 if LONG or start == "nothing" else 0)


@pytest.mark.parametrize("layout", ["unfinished", "finished", "published"])
def test_what_an_earlier_version_left_is_taken_up(layout, forks, place):
    """It kept its journals inside the folder, also for a moment after that had its name."""
    command = begin(place, "nothing")
    env = clean_environment()
    moment = {"unfinished": 5, "finished": 8, "published": 9}[layout]
    forks.run(command, cwd=place, env=env | {"KILL_AT": str(moment), "KILL_IN": str(place / "out")})
    folder = place / ("out" if layout == "published" else "out.partial")
    (place / "out.partial.journal").rename(folder / "journal.jsonl")
    (folder / ".journal.1.jsonl").write_text("")
    again = forks.run([*command, "--json"], cwd=place, env=env)
    assert again.code == 0, again.err
    assert json.loads(again.out)["resumed"]
    assert content(place / "out") == content(place / "undisturbed")
    assert [path.name for path in place.glob("out*")] == ["out"]


def test_a_result_is_done_already_only_where_it_is_what_the_command_makes(forks, place):
    command, env = begin(place, "nothing"), clean_environment()
    for told in (False, True):
        done = forks.run(command, cwd=place, env=env)
        assert (done.code, "done already" in done.err) == (0, told)
    assert forks.run([*command, "--no-resume"], cwd=place, env=env).code == 6
    assert forks.run(["run", "other.yaml", *command[2:]], cwd=place, env=env).code == 6
    weights = place / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert forks.run(command, cwd=place, env=env).code == 6
    assert forks.run([*command, "--overwrite"], cwd=place, env=env).code == 0
    assert content(place / "out") == content(place / "undisturbed")
