"""Searches over planted models, end to end."""

import json

import numpy as np
import pytest

import mergetool
from tests.evolve.planted import World
from tests.toys import assert_same_bytes, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    World().write(folder)
    return folder


def recipe(folder, *, inner=None, search=None, **merge):
    return {
        "base": str(folder / "models" / "base"),
        "models": {name: str(folder / "models" / name) for name in World.names},
        "merge": {
            "method": "merge3",
            "inner": inner or {"method": "task-arithmetic", "weight": {"search": [0.0, 2.0]}},
            "tasks": [{"name": name, "include": str(folder / "tasks")} for name in World.tasks],
            "search": {"algorithm": "random", "population": 6, "generations": 3, **(search or {})},
            **merge,
        },
    }


def test_the_winner_beats_parents_and_average_and_its_plain_recipe_makes_the_same_bytes(folder, tmp_path):
    result = mergetool.run(recipe(folder), output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    scores = {name: np.mean(values) for name, values in report["report"].items()}
    winner = scores[json.dumps(report["winner"])]
    assert all(winner > scores[name] for name in ("left", "right", "base", "[1.0, 1.0]"))
    again = mergetool.run(tmp_path / "out.search" / "recipe.yaml", output=tmp_path / "again")
    assert_same_bytes(read(result.path), read(again.path))
    files = [(path / "model.safetensors").read_bytes() for path in (result.path, again.path)]
    assert files[0] == files[1]
