"""What is scored after a merge is pushed with its scores."""

from tests.files import write_recipe
from tests.hub.server import TOKEN
from tests.tuning.planted import World


def test_a_result_is_pushed_when_it_is_scored(hub, call, tmp_path):
    world = World()
    models = world.write(tmp_path)
    sections = {
        "models": {name: models[name] for name in ("left", "right")},
        "merge": {"method": "linear"},
        "output": {"path": "out", "hub": {"repo": "me/merged", "create": True}},
        "evaluate": [{"name": "lefts", "include": "tasks"}],
    }
    recipe = write_recipe(tmp_path / "scored.yaml", **sections)
    done = call("run", recipe, "--json", token=TOKEN)
    assert done.code == 0, done.err + done.out
    assert done.answer["pushed"]["repo"] == "me/merged"
    card = hub.read("me/merged", "README.md").decode()
    assert "| lefts | acc | 60 |" in card
    assert hub.read("me/merged", "mergetool.json") == (tmp_path / "out" / "mergetool.json").read_bytes()
    told = call("run", recipe, "--overwrite", "--json")  # nobody is logged in: told before anything is merged
    assert (told.code, "log in" in told.answer["fix"]) == (8, True)
