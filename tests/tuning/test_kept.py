"""What a search keeps: an edited or extended one asks nothing twice, and what cannot count any more is told."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import mergetool
import mergetool.evaluate.items as items_module
from tests.files import LONG
from tests.tuning.planted import World, write_task
from tests.tuning.test_processes import findings
from tests.tuning.test_run import ESTIMATED, journal, recipe

pytestmark = pytest.mark.slow  # searches, and there are many

WORLD = World(count=40)
FEW = {"algorithm": "random", "population": 3, "generations": 2, "rerank": 1}


class Listener:
    """Keeps what a run says."""

    def __init__(self):
        self.told = []

    def start(self, *_):
        pass

    def advance(self, *_):
        pass

    def stop(self):
        pass

    def say(self, text):
        self.told.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "planted")


@pytest.fixture
def requests(monkeypatch):
    """How many requests were made, call by call."""
    made = []
    answer = items_module._answer
    monkeypatch.setattr(items_module, "_answer", lambda lm, asked: (made.append(len(asked)), answer(lm, asked)))
    return made


def run(asked, output, **flags):
    """(result, what was said) of a search that may write over an earlier one."""
    listener = Listener()
    return mergetool.run(asked, output=output, overwrite=True, progress=listener, **flags), "\n".join(listener.told)


def number_before(words, text):
    """The number in front of these words."""
    return int(text.split(f" {words}")[0].split()[-1].replace(",", ""))


@pytest.mark.parametrize("algorithm", ["random", "sobol", "ga", "cma-es", "nsga2"] if LONG else ["ga"])
def test_more_generations_go_on_from_a_finished_search(folder, tmp_path, requests, algorithm):
    def asked(generations):
        search = FEW | {"algorithm": algorithm, "generations": generations, "population": 4}
        estimator = {"kind": "mean", "items": 5, "calibration": 2}
        return recipe(folder, search=search, estimator=estimator)

    run(asked(3), tmp_path / "fresh")
    in_one = sum(requests)
    requests.clear()
    run(asked(1), tmp_path / "out")
    before = (tmp_path / "out.search" / "search.jsonl").read_bytes()
    first = sum(requests)
    result, told = run(asked(3), tmp_path / "out")
    assert (tmp_path / "out.search" / "search.jsonl").read_bytes().startswith(before)
    assert findings(tmp_path / "out.search") == findings(tmp_path / "fresh.search")
    assert first < sum(requests) <= in_one + 2 * 20 * 2  # the first winner was asked the items of its final score
    (note,) = [note for note in result.notes if "taken over" in note]
    assert 2 * number_before("are new", note) == sum(requests) - first
    assert "the recipe or its inputs have changed" in told


EDITS = {
    "population": lambda asked: asked["merge"]["search"].update(population=5),
    "algorithm": lambda asked: asked["merge"]["search"].update(algorithm="sobol"),
    "estimator": lambda asked: asked["merge"].update(estimator=ESTIMATED | {"items": 3}),
    "report": lambda asked: asked["merge"]["search"].update(report=0.4),
    "batch": lambda asked: asked["merge"]["search"].update(batch_size=7),
    "output": lambda asked: asked.update(output={"shard_size": "1MB"}),
    "weights of tasks": lambda asked: asked["merge"]["tasks"][0].update(weight=2.0),
}


@pytest.mark.parametrize("names", [[name] for name in EDITS] if LONG else [list(EDITS)], ids=", ".join)
def test_a_search_that_is_edited_again_and_again_asks_nobody_twice(folder, tmp_path, requests, names):
    asked = recipe(folder, search=dict(FEW), estimator={"kind": "mean", "items": 8, "subset": "random"})
    run(asked, tmp_path / "out")
    for name in names:
        EDITS[name](asked)
        result, _ = run(asked, tmp_path / "out")
        assert any("taken over" in note for note in result.notes), name
    lines = (json.loads(line) for line in (tmp_path / "out.search" / "search.jsonl").read_text().splitlines())
    answered, keys = [], {}
    for line in lines:
        keys = line.get("tasks", keys)
        for task, items in line["question"][2].items() if "question" in line else ():
            answered += [(line["of"], keys[task][item]) for item in items]
    assert len(answered) == len(set(answered))
    assert 2 * len(answered) == sum(requests)


def change(folder, name, factor):
    """Give a model other weights, in a file of the same size."""
    path = folder / "models" / name / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"] * factor
    save_file(weights, path, {"format": "pt"})


def test_answers_of_a_model_that_has_changed_do_not_count_and_that_is_said(own_folder, tmp_path):
    asked = recipe(own_folder, search=FEW)
    run(asked, tmp_path / "out")
    first = [line for line in journal(tmp_path / "out.search") if "question" in line]
    change(own_folder, "left", 0.5)
    _, told = run(asked, tmp_path / "out")
    size = {who if isinstance(who, str) else "merges": 0 for _, who, _ in (line["question"] for line in first)}
    for line in first:
        who = line["question"][1]
        size[who if isinstance(who, str) else "merges"] += sum(map(len, line["question"][2].values()))
    assert number_before("of them do not count: model 'left' has changed since", told) == size["left"] + size["merges"]
    run(asked | {"merge": asked["merge"] | {"search": FEW | {"generations": 3}}}, tmp_path / "anew", resume=False)
    run(asked | {"merge": asked["merge"] | {"search": FEW | {"generations": 3}}}, tmp_path / "out")
    assert findings(tmp_path / "out.search") == findings(tmp_path / "anew.search")


def test_models_and_tasks_that_lie_elsewhere_are_the_same(own_folder, tmp_path, requests):
    run(recipe(own_folder, search=FEW), tmp_path / "out")
    requests.clear()
    moved = own_folder.rename(tmp_path / "elsewhere")
    for file in moved.rglob("*"):
        file.touch()
    run(recipe(moved, search=FEW), tmp_path / "out")
    assert requests == []


def test_a_task_with_more_items_keeps_the_answers_to_those_it_had(own_folder, tmp_path):
    asked = recipe(own_folder, search=FEW)
    run(asked, tmp_path / "out")
    write_task(own_folder / "tasks", "lefts", [*range(20), 38, 39], WORLD.gold)
    run(asked, tmp_path / "out")
    lines = journal(tmp_path / "out.search")
    second = next(place for place, line in enumerate(lines) if place and "question" not in line)
    new = [line for line in lines[second + 1 :] if line["question"][1] == "left"]
    assert sum(len(items) for line in new for items in line["question"][2].values()) <= 2
    write_task(own_folder / "tasks", "lefts", range(20), 1 - WORLD.gold)  # another question with the same name
    run(asked, tmp_path / "out")
    again = [line for line in journal(tmp_path / "out.search")[len(lines) + 1 :] if line["question"][1] == "left"]
    assert sum(len(line["question"][2].get("lefts", ())) for line in again) == 10


def test_a_failure_is_an_answer_to_the_same_search_only(folder, tmp_path, monkeypatch):
    from mergetool.tuning.in_memory import Candidates

    put = Candidates.put

    def sometimes(self, values, **options):
        if values[0] > 1.0:
            raise RuntimeError("out of memory")
        return put(self, values, **options)

    asked = recipe(folder, search=FEW | {"generations": 3})
    monkeypatch.setattr(Candidates, "put", sometimes)
    run(asked, tmp_path / "out")
    assert any("failure" in line for line in journal(tmp_path / "out.search"))
    monkeypatch.setattr(Candidates, "put", put)
    run(asked, tmp_path / "out")
    assert any("failure" in trial for trial in findings(tmp_path / "out.search")["trials"])
    asked["merge"]["search"]["batch_size"] = 16
    run(asked, tmp_path / "out")
    assert not any("failure" in trial for trial in findings(tmp_path / "out.search")["trials"])


def test_answers_are_dropped_only_where_that_is_asked_for_and_that_is_said(folder, tmp_path, requests):
    asked = recipe(folder, search=FEW)
    run(asked, tmp_path / "out")
    count = sum(requests)
    _, told = run(asked, tmp_path / "out", resume=False)
    assert sum(requests) == 2 * count
    assert 2 * number_before("answers of earlier runs", told) == count


def test_a_damaged_line_loses_itself_alone(folder, tmp_path, requests):
    asked = recipe(folder, search=FEW)
    run(asked, tmp_path / "out")
    path = tmp_path / "out.search" / "search.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = 2 * sum(map(len, json.loads(lines[2])["question"][2].values()))
    lines[2] = lines[2][: len(lines[2]) // 2] + "\n"
    path.write_text("".join(lines))
    requests.clear()
    run(asked, tmp_path / "out")
    assert sum(requests) == lost
    assert path.read_text().startswith("".join(lines))


def test_a_journal_of_an_older_version_is_left_and_that_is_said(folder, tmp_path):
    place = tmp_path / "out.search"
    place.mkdir()
    old = {"search": {}, "inputs": [["left", "/m", 1, 2]], "tasks": {"lefts": "ab"}, "versions": {}, "pools": {}}
    line = {"question": ["search", [0.5], {"lefts": [0, 1]}], "scores": {"lefts": [[1, 0], [1, 0]]}, "seconds": [0, 0]}
    (place / "search.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(line)}\n")
    _, told = run(recipe(folder, search=FEW), tmp_path / "out")
    assert "2 of them do not count: it was written by another version" in told
    assert json.loads((place / "search.jsonl").read_text().splitlines()[1]) == line


def test_the_order_of_models_is_part_of_what_a_candidate_is(folder, tmp_path):
    inner = {"method": "slerp", "t": {"search": [0.2, 0.4], "step": 0.2}}
    asked = recipe(folder, inner=inner, search=FEW)
    del asked["base"]
    run(asked, tmp_path / "out")
    asked["models"] = dict(reversed(asked["models"].items()))
    run(asked, tmp_path / "out")
    run(asked, tmp_path / "fresh")
    assert findings(tmp_path / "out.search") == findings(tmp_path / "fresh.search")


def test_scores_that_were_taken_over_are_those_that_the_merges_have(folder, tmp_path):
    run(recipe(folder, search=FEW), tmp_path / "out")
    run(recipe(folder, search=FEW | {"generations": 4}), tmp_path / "out")
    for trial in findings(tmp_path / "out.search")["trials"]:
        correct = WORLD.correct(trial["values"])
        splits = journal(tmp_path / "out.search")[0]["pools"]["search"]
        planted = [correct[np.array(splits["lefts"])].mean(), correct[20 + np.array(splits["rights"])].mean()]
        assert trial["search"] == pytest.approx(planted)
