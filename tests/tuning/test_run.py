"""Searches over planted models, end to end."""

import json

import numpy as np
import pytest

import mergetool
import mergetool.evaluate.items as items_module
from mergetool import EvaluationError, PlanError, RecipeError
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import TaskItems
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from mergetool.tensors.folder import open_model
from mergetool.testing.toys import assert_same_bytes, read
from mergetool.tuning.in_memory import Candidates, saved_digest
from tests.files import LONG, Watch
from tests.tuning.planted import World

pytestmark = pytest.mark.slow  # searches, and there are many
WORLD = World(count=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
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
            "estimator": {"kind": "full"},
            **merge,
        },
    }


def test_the_winner_beats_parents_and_average_and_its_plain_recipe_makes_the_same_bytes(folder, tmp_path):
    result = mergetool.run(recipe(folder), output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    compared = {row["name"]: row["report_mean"] for row in report["compared"]}
    assert compared.keys() == {"base", "left", "right", "start of the search"}
    assert report["winner"]["report_mean"] > max(compared.values())
    correct = WORLD.correct(report["winner"]["values"])
    assert np.mean(report["winner"]["search"] + report["winner"]["report"]) == pytest.approx(correct.mean())
    again = mergetool.run(tmp_path / "out.search" / "recipe.yaml", output=tmp_path / "again")
    assert_same_bytes(read(result.path), read(again.path))
    files = [(path / "model.safetensors").read_bytes() for path in (result.path, again.path)]
    assert files[0] == files[1]


class Told(Watch):
    """Keeps the stages that a run went through, with what was to be done and what was done in each."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def start(self, total, label, unit="B"):
        self.stages.append([label, unit, total, 0])

    def advance(self, count):
        self.stages[-1][-1] += count


@pytest.mark.parametrize("estimator", [{"kind": "full"}, {"items": 15, "calibration": 4, "guard": False}])
def test_a_search_shows_at_once_and_all_along_how_far_it_is(folder, tmp_path, estimator):
    progress = Told()
    asked = recipe(folder, search={"generations": 2}, estimator=estimator)
    mergetool.run(asked, output=tmp_path / "out", progress=progress)
    (opening, searching, merging) = progress.stages
    assert (opening[0], merging[0]) == ("opening models and tasks", "merging")
    label, unit, total, done = searching
    assert (label, unit) == ("searching", "items")
    assert total / 2 < done <= total


def journal(folder):
    """The lines of a search's journal, without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


ESTIMATED = {"items": 15, "calibration": 4, "guard": False}


@pytest.mark.parametrize(
    "inner",
    [
        {"method": "linear", "weight": {"search": [0.1, 2.0]}, "normalize": False},
        {"method": "slerp", "t": {"search": [0, 1]}},
        {"method": "ties", "density": {"search": [0.1, 0.9]}, "scale": {"search": [0.5, 2.0]}, "boundary": "random"},
        {"method": "dare-ties", "density": {"search": [0.1, 0.9]}, "weight": {"search": [0.5, 2.0]}},
        {
            "method": "task-arithmetic",
            "weight": {"search": [0.0, 2.0]},
            "overrides": [{"match": "lm_head.*", "use": {"choices": ["left", "right"]}}],
        },
    ],
    ids=lambda inner: inner["method"],
)
def test_what_is_scored_is_what_is_saved(folder, tmp_path, inner):
    asked = recipe(folder, inner=inner, search={"population": 3, "generations": 1, "rerank": 1})
    asked["merge"]["estimator"] = {"kind": "mean", "subset": "random", "items": 5}
    if inner["method"] in ("linear", "slerp"):
        del asked["base"]
    result = mergetool.run(asked, output=tmp_path / "out")  # raises if the digests differ
    assert any("digest" in line for line in journal(tmp_path / "out.search"))
    fresh = LanguageModel(result.path, batch_size=32)
    last = next(line for line in journal(tmp_path / "out.search") if line.get("question", [""])[0] == "report")
    for task, items in last["question"][2].items():
        options = TaskOptions(name=task, include=str(folder / "tasks"))
        again = TaskItems(options, load_task(options, tmp_path), fresh.lm).score(fresh.lm, items)
        assert [again[item].value for item in items] == last["scores"][task][0]


@pytest.mark.parametrize("algorithm", ["cma-es", "nsga2"] if LONG else ["nsga2"])
def test_every_request_is_counted_and_none_is_made_twice(folder, tmp_path, monkeypatch, algorithm):
    made = []
    answer = items_module._answer
    monkeypatch.setattr(
        items_module, "_answer", lambda lm, requests: (made.append(len(requests)), answer(lm, requests))
    )
    asked = recipe(folder, search={"algorithm": algorithm, "generations": 2, "rerank": 2}, estimator=ESTIMATED)
    mergetool.run(asked, output=tmp_path / "out")
    lines = [line["question"] for line in journal(tmp_path / "out.search") if "question" in line]
    asked_of = [(str(who), task, item) for _, who, ids in lines for task, items in ids.items() for item in items]
    assert len(asked_of) == len(set(asked_of))
    assert sum(made) == 2 * len(asked_of)
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    spent = report["spent"]["items"]
    assert sum(spent.values()) == len(asked_of)
    pool, subset = 40, 30
    assert spent["calibration"] == (3 + 1 + 4) * pool
    candidates = {str(who) for stage, who, _ in lines if stage == "search"}
    assert spent["search"] == len(candidates) * subset
    made.clear()
    mergetool.run(asked, output=tmp_path / "out", overwrite=True)
    assert made == []


def test_a_seed_settles_the_journal(folder, tmp_path):
    asked = recipe(folder, search={"algorithm": "ga", "population": 4, "generations": 2}, estimator=ESTIMATED)
    for name in ("first", "again"):
        mergetool.run(asked, output=tmp_path / name)
    mergetool.run(asked | {"compute": {"seed": 1}}, output=tmp_path / "other")
    first, again, other = (journal(tmp_path / f"{name}.search") for name in ("first", "again", "other"))
    assert first == again
    assert [line["question"][1] for line in other[1:]] != [line["question"][1] for line in first[1:]]


def test_a_candidate_that_fails_is_noted_and_the_search_goes_on(folder, tmp_path, monkeypatch):
    put = Candidates.put

    def sometimes(self, values, **options):
        if values[0] > 1.0:
            raise RuntimeError("out of memory")
        return put(self, values, **options)

    monkeypatch.setattr(Candidates, "put", sometimes)
    result = mergetool.run(recipe(folder, search={"algorithm": "cma-es"}, estimator=ESTIMATED), output=tmp_path / "out")
    failures = [line for line in journal(tmp_path / "out.search") if "failure" in line]
    assert failures
    assert {line["failure"] for line in failures} == {"out of memory"}
    assert json.loads((tmp_path / "out.search" / "report.json").read_text())["winner"]["values"][0] <= 1.0
    assert result.path.is_dir()


def test_if_everything_fails_the_error_says_why(folder, tmp_path, monkeypatch):
    def never(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Candidates, "put", never)
    with pytest.raises(EvaluationError, match="all 6 candidates failed: out of memory"):
        mergetool.run(recipe(folder, search={"generations": 1}, estimator={"kind": "full"}), output=tmp_path / "out")
    assert len(journal(tmp_path / "out.search")) == 7


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"estimator": {"kind": "mean", "items": 21}}, "20 search items, fewer than the 21"),
        ({"tasks": [{"name": "leftz", "include": "tasks"}]}, "no task 'leftz'"),
        ({"tasks": [{"name": "lefts", "include": "tasks", "metric": "f1"}]}, "no metric 'f1'"),
        ({"search": {"report": 0.99}}, "too few to keep 99%"),
        ({"estimator": {"kind": "mean", "ids": {"lefts": [0, 1, 2, 3, 4, 5]}}}, "not search items|no ids"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_is_written(folder, tmp_path, change, what):
    asked = recipe(folder)
    for key, value in change.items():
        asked["merge"][key] = value if key == "tasks" else asked["merge"].get(key, {}) | value
    for task in asked["merge"]["tasks"]:
        task["include"] = str(folder / "tasks")
    with pytest.raises(EvaluationError, match=what):
        mergetool.run(asked, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_that_cannot_be_used_is_refused_before_the_search(folder, tmp_path):
    with pytest.raises(PlanError, match="device 'nonsense' cannot be used"):
        mergetool.run(recipe(folder), output=tmp_path / "out", device="nonsense")
    assert list(tmp_path.iterdir()) == []


def test_several_objectives_give_a_front_of_which_any_member_can_be_written(folder, tmp_path, pictures):
    asked = recipe(folder, search={"algorithm": "nsga2", "generations": 3, "rerank": 4}, estimator=ESTIMATED)
    mergetool.run(asked, output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    scores = [member["search"] for member in report["front"]]
    assert len(scores) >= 2
    for one in scores:
        assert not any(all(x >= y for x, y in zip(o, one, strict=True)) and o != one for o in scores)
    written = mergetool.run(tmp_path / "out.search" / "front" / "01.yaml", output=tmp_path / "second").path
    assert saved_digest(open_model(written)) == report["front"][1]["digest"]
    page = (tmp_path / "out.search" / "report.html").read_text()
    assert page.count("<svg") == 4
    for told in ("Pareto front", "front/01.yaml", f"{report['winner']['report_mean']:.3f}"):
        assert told in page


def test_a_greedy_soup_ends_by_itself(folder, tmp_path):
    inner = {"method": "linear", "weight": {"search": [0, 1]}}
    asked = recipe(folder, inner=inner, search={"algorithm": "greedy", "generations": 1})
    del asked["base"]
    mergetool.run(asked, output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    assert [trial["values"] for trial in report["trials"]] == [[1, 0], [0, 1], [1, 1]]


def test_a_penalty_is_for_small_numbers(folder, tmp_path):
    """A large one makes the smallest numbers win, whatever they score; what was scored stays what it is."""
    inner = {"method": "task-arithmetic", "weight": {"search": [-1.0, 1.0], "step": 1.0}}
    some = {"kind": "mean", "items": 10}
    free = recipe(folder, inner=inner, search={"algorithm": "grid"}, estimator=some)
    costly = recipe(folder, inner=inner, search={"algorithm": "grid", "penalty": 9.0}, estimator=some)
    reports = []
    for name, asked in (("free", free), ("costly", costly)):
        mergetool.run(asked, output=tmp_path / name)
        reports.append(json.loads((tmp_path / f"{name}.search" / "report.json").read_text()))
    assert reports[0]["winner"]["values"] != [0.0, 0.0]
    assert reports[1]["winner"]["values"] == [0.0, 0.0]
    known = {tuple(trial["values"]): trial for trial in reports[0]["trials"]}
    for trial in reports[1]["trials"]:
        plain = known[tuple(trial["values"])]
        assert trial["estimate"] == plain["estimate"]
        assert trial["fitness"] == pytest.approx(plain["fitness"] - 9.0 * np.mean(np.abs(trial["values"])))
    with pytest.raises(RecipeError, match="`penalty` is taken off one score"):
        mergetool.load_recipe(recipe(folder, search={"algorithm": "nsga2", "penalty": 0.1}))


def test_a_grid_asks_all_its_points_and_wants_steps(folder, tmp_path):
    weight = {"search": [0.0, 2.0], "step": 1.0}
    asked = recipe(folder, inner={"method": "task-arithmetic", "weight": weight}, search={"algorithm": "grid"})
    mergetool.run(asked, output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    assert sorted(trial["values"] for trial in report["trials"]) == [[x, y] for x in (0, 1, 2) for y in (0, 1, 2)]
    assert report["winner"]["values"] == [2, 2]
    del weight["step"]
    with pytest.raises(RecipeError, match=r"inner\.weight has any number of values: with `algorithm: grid`"):
        mergetool.run(asked, output=tmp_path / "other")
