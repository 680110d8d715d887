"""Answers of other models: read from a file, or collected from a cache, they stand in for merges that calibrate."""

import json

import numpy as np
import pytest

import mergetool
from mergetool import EvaluationError
from tests.tuning.planted import World
from tests.tuning.test_run import journal, recipe

WORLD = World(count=60)
SMALL = {"algorithm": "random", "population": 3, "generations": 1, "rerank": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


def lines(count=12, **change):
    """What planted models would answer, by item number."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        right = WORLD.correct(rng.uniform(0, 2, 2)).astype(int)
        for task, half in zip(World.tasks, (WORLD.half, ~WORLD.half), strict=True):
            rows.append({"model": f"m{number}", "task": task, "answers": right[half].tolist(), **change})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def searched(folder, output, responses, cache=None, **estimator):
    asked = recipe(folder, search=SMALL, estimator={"items": 5, "responses": responses, **estimator})
    mergetool.run(asked, output=output, cache=cache)
    found = output.with_name(output.name + ".search")
    return json.loads((found / "report.json").read_text()), journal(found)


def test_with_answers_of_other_models_item_response_theory_is_used_and_no_merge_calibrates(folder, tmp_path):
    path = write(tmp_path / "answers.jsonl", lines())
    report, _ = searched(folder, tmp_path / "out", path)
    assert {task["estimator"] for task in report["tasks"]} == {"gmp-irt"}
    pool = sum(task["search_items"] for task in report["tasks"])
    assert report["spent"]["items"]["calibration"] == 3 * pool


def test_what_other_models_answer_changes_what_is_asked(folder, tmp_path):
    rows = lines()
    turned = [{**row, "answers": [1 - answer for answer in row["answers"]]} for row in rows]
    asked = []
    for name, part in (("as-they-are", rows), ("turned", turned)):
        _, told = searched(folder, tmp_path / name, write(tmp_path / f"{name}.jsonl", part))
        asked.append(next(line["question"][2] for line in told if line.get("question", [""])[0] == "search"))
    assert asked[0] != asked[1]


def test_merges_that_calibrate_are_no_candidates_of_a_search_that_asks_everything(folder, tmp_path):
    asked = recipe(folder, search=SMALL, estimator={"kind": "gmp-irt", "items": 5, "calibration": 4, "guard": False})
    mergetool.run(asked, output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    pool = sum(task["search_items"] for task in report["tasks"])
    tried = {tuple(trial["values"]) for trial in report["trials"] if trial["generation"] >= 0}
    assert len(report["trials"]) > len(tried)
    assert report["spent"]["full_search"] == len(tried) * pool


def test_a_cache_gives_what_earlier_searches_asked_and_the_search_keeps_it(folder, tmp_path):
    cache = tmp_path / "cache"
    mergetool.run(recipe(folder, search=SMALL | {"population": 6}), output=tmp_path / "earlier", cache=cache)
    _, first = searched(folder, tmp_path / "out", "cache", cache)
    kept = tmp_path / "out.search" / "responses.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 2 * 6  # not what this recipe's own models answered
    mergetool.run(recipe(folder, search=SMALL | {"population": 5}), output=tmp_path / "later", cache=cache)
    before = kept.read_bytes()
    asked = recipe(folder, search=SMALL, estimator={"items": 5, "responses": "cache"})
    mergetool.run(asked, output=tmp_path / "out", cache=cache, overwrite=True)
    assert kept.read_bytes() == before
    assert journal(tmp_path / "out.search") == first


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (["no answers"], "is not the answers of one model to one task"),
        (lines(1, answers=[1, 0]), "gives 2 answers to task 'lefts', which has 30 items"),
        (lines(1, answers="all"), "gives no list of answers"),
        (lines(1, answers=[2] * 30), "scores item 0 with 2, not with a number from 0 to 1"),
        (lines(1, answers=[None] * 30), "holds no model's answers to half of the 15 search items of task 'lefts'"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_with_their_line(folder, tmp_path, rows, what):
    path = write(tmp_path / "answers.jsonl", rows)
    with pytest.raises(EvaluationError, match=what) as error:
        searched(folder, tmp_path / "out", path)
    assert "answers.jsonl" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_cache_and_answers_without_use_are_refused(folder, tmp_path):
    with pytest.raises(EvaluationError, match=r"(?s)there is no cache.*--cache FOLDER"):
        searched(folder, tmp_path / "out", "cache")
    with pytest.raises(mergetool.RecipeError, match="`responses` would have no effect"):
        searched(folder, tmp_path / "out", "cache", kind="full")
