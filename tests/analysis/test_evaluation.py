"""Curves, barriers, pairs and calibration, held against figures that are known because answers are planted."""

import json
import sqlite3
import sys
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from mergetool import EvaluationError, OutputError, RecipeError
from mergetool.analysis.curve import along, barrier, curve, line
from mergetool.analysis.evaluation_page import page_of_curve
from mergetool.analysis.interference import interference
from mergetool.cli import main
from mergetool.evaluate.assess import assess
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.reliability import calibration_error, reliability
from mergetool.recipe import load_recipe
from tests.tuning.planted import World, write_task

WORLD = World()
TASKS = [TaskOptions(name=name, include="tasks") for name in WORLD.tasks]
HALVES = dict(zip(WORLD.tasks, (WORLD.half, ~WORLD.half), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`mergetool evaluate` in the folder: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["mergetool", "evaluate", *map(str, arguments), "--include", "tasks"])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr()
        return stopped.value.code or 0, told.out, told.err

    return run


def test_scores_and_losses_along_a_line_are_those_that_were_planted(folder):
    recipes = line(folder / "models" / "base", folder / "models" / "left", 5)
    found = curve("share", recipes, TASKS, folder=folder)
    base, left = WORLD.margins["base"], WORLD.margins["left"]
    assert [row["x"] for row in found.rows if row["task"] == "lefts"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for row in found.rows:
        margins = (base + row["x"] * (left - base))[HALVES[row["task"]]]
        assert row["score"] == (margins > 0).mean() == pytest.approx(1 - row["error"])
        assert row["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-4)
    for told in found.barriers:
        own = [row for row in found.rows if row["task"] == told["task"]]
        losses = np.array([row["loss"] for row in own])
        above = losses - np.linspace(losses[0], losses[-1], 5)
        assert told["loss_barrier"] == pytest.approx(max(0, above.max()))
        assert told["best_score"] == max(row["score"] for row in own)


def test_a_barrier_is_the_height_above_the_line_between_the_ends():
    assert barrier([0, 0.5, 1], [1.0, 4.0, 3.0]) == (2.0, 0.5)
    assert barrier([2, 3, 6], [0.0, 1.0, 4.0]) == (0.0, 2.0)  # the line itself
    assert barrier([0, 1, 2], [5.0, 0.0, 5.0]) == (0.0, 0.0)  # a valley
    with pytest.raises(EvaluationError, match="one point"):
        barrier([1], [1.0])


def sections(folder, **models):
    paths = {name: str(folder / "models" / path) for name, path in models.items()}
    return {"base": str(folder / "models" / "base"), "models": paths}


def test_a_number_of_a_recipe_runs_along_a_curve(folder):
    recipe = {**sections(folder, left="left", right="right"), "merge": {"method": "task-arithmetic", "scale": 1.0}}
    found = curve("merge.scale", along(recipe, "merge.scale", (0, 2), 3), TASKS, folder=folder)
    for row in found.rows:
        assert row["score"] == WORLD.correct((row["x"], row["x"]))[HALVES[row["task"]]].mean()
    assert json.loads(found.to_json())["along"] == "merge.scale"
    with pytest.raises(RecipeError, match="tsv-compress makes no checkpoint"):
        curve("x", {0.0: load_recipe({**recipe, "merge": {"method": "tsv-compress"}})}, TASKS, folder=folder)


def test_pairs_keep_what_their_merges_score_over_the_better_one_alone(folder):
    weight = {"left": 1.0, "right": 2.0, "start": 1.0}
    recipe = {
        **sections(folder, left="left", right="right", start="base"),
        "merge": {"method": "task-arithmetic", "weight": weight},
        "evaluate": [{"name": "lefts"}],
    }
    found = interference(load_recipe(recipe), TASKS, folder=folder)
    assert [(row["a"], row["b"]) for row in found.pairs[::2]] == [
        ("left", "right"),
        ("left", "start"),
        ("right", "start"),
    ]
    margins = WORLD.margins | {"start": WORLD.margins["base"]}
    for row in found.pairs:
        own = HALVES[row["task"]]
        merged = margins["base"] + sum(weight[n] * (margins[n] - margins["base"]) for n in (row["a"], row["b"]))
        better = max((margins[name] > 0)[own].mean() for name in (row["a"], row["b"]))
        assert (row["score"], row["better_alone"]) == ((merged > 0)[own].mean(), better)
        assert row["kept"] == (None if better == 0 else pytest.approx(row["score"] / better))
    kept = [row["kept"] for row in found.pairs if (row["a"], row["b"]) == ("left", "right")]
    assert found.matrix[0][1] == found.matrix[1][0] == pytest.approx(np.mean(kept))
    assert found.matrix[0][0] is None
    one = load_recipe({**recipe, "models": {"left": recipe["models"]["left"]}, "merge": {"method": "ties"}})
    with pytest.raises(RecipeError, match="no pairs"):
        interference(one, [])


def test_calibration_errors_are_those_of_guo_et_al():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1.0, 400)
    right = (rng.random(400) < sure**2).astype(float)
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        own = (sure > low) & (sure <= high)
        if own.any():
            expected += own.mean() * abs(right[own].mean() - sure[own].mean())
    rows = reliability(right, sure)
    assert calibration_error(rows) == pytest.approx(expected)
    assert sum(row["items"] for row in rows) == 400
    assert reliability(np.array([1.0, 0.0]), np.array([0.0, 1.0]))[0]["low"] == 0.0
    assert reliability(np.array([1.0]), np.array([0.65]))[0]["low"] == 0.6
    assert reliability(np.array([1.0]), np.array([0.6]))[0]["high"] == 0.6  # an end belongs to the bin below it


def test_how_sure_a_model_is_comes_from_its_answers_and_from_the_cache(folder, tmp_path):
    left = folder / "models" / "left"
    for _ in range(2):
        found = assess(left, TASKS, folder=folder, cache=tmp_path)
        for task, own in HALVES.items():
            margins = WORLD.margins["left"][own]
            sure = 1 / (1 + np.exp(-np.abs(margins)))
            np.testing.assert_allclose(found.tasks[task].chances.likeliest, sure, atol=1e-4)
            wanted = calibration_error(reliability((margins > 0).astype(float), sure))
            assert found.tasks[task].calibration_error == pytest.approx(wanted, abs=1e-3)
    assert [row["reliability"] != [] for row in found.facts()["tasks"]] == [True, True]


def test_answers_of_an_earlier_version_are_asked_again_for_how_sure_the_model_is(folder, tmp_path):
    left = folder / "models" / "left"
    wanted = assess(left, TASKS, folder=folder, cache=tmp_path).facts()
    with closing(sqlite3.connect(tmp_path / "responses.sqlite")) as kept:
        kept.execute("ALTER TABLE answers DROP COLUMN confidence")
        kept.execute("UPDATE answers SET value = 0.5")  # must not be believed
        kept.commit()
    assert assess(left, TASKS, folder=folder, cache=tmp_path).facts() == wanted


def test_free_answers_have_no_calibration_error_and_no_loss(folder):
    items = np.flatnonzero(WORLD.half)
    write_task(folder / "free", "spoken", items, WORLD.gold, kind="generate_until")
    options = [TaskOptions(name="spoken", include="free")]
    left = folder / "models" / "left"
    (facts,) = assess(left, options, folder=folder).facts()["tasks"]
    assert (facts["score"], facts["ece"]) == ((WORLD.margins["left"] > 0)[items].mean(), None)
    found = curve("share", line(folder / "models" / "base", left, 2), options, folder=folder)
    assert (found.barriers[0]["error_barrier"], found.barriers[0]["loss_barrier"]) == (0.0, None)
    text = page_of_curve(found.as_dict())
    assert "Barriers" in text
    assert "cross entropy" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--along", "merge.scale"), 2, "write e.g. --along merge.scale=0:2"),
        (("--along", "merge.scale=1:1"), 2, "both ends are 1.0"),
        (("--along", "merge.scale=0:1"), 2, "name the recipe's file"),
        (("--pairs",), 2, "name the recipe's file"),
        (("--along", "merge.scale=0:1", "--pairs"), 2, "leave out --pairs"),
        (("--line-to", "models/right", "--parent", "models/right"), 4, "would have no effect"),
        (("--line-to", "models/gone"), 3, "there is no such folder"),
        (("-o", "tasks/lefts.yaml"), 6, "choose another place"),
    ],
)
def test_questions_that_make_no_sense_are_told_with_a_fix(run, arguments, code, words):
    told = run("models/left", "--tasks", "lefts", *arguments)
    assert (told[0], words in told[2]) == (code, True), told[2]


def test_without_jinja_the_install_line_is_told(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run("models/left", "--tasks", "lefts", "-o", tmp_path / "page")
    assert (code, "pip install 'mergetool[report]'" in err) == (OutputError.exit_code, True)
    assert (tmp_path / "page" / "evaluation.json").is_file()
