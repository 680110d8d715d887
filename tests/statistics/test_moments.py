"""Statistics where something comes in between: other processes, a full disk, a search, a look at the result."""

import json
import shutil
import threading

import pytest
import yaml

import mergetool
from mergetool import OutputError, PlanError, RecipeError
from mergetool.planning.cost import estimate
from tests.files import LONG, content
from tests.limits import files_of_at_most
from tests.statistics.networks import TEXTS, write_classifier, write_dense, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    for seed, name in enumerate("ab"):
        write_classifier(folder / name, seed)
        write_rows(folder / f"{name}.jsonl", TEXTS[3 * seed :])
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    def make(method="regmean", **more):
        document = {
            "models": {name: str(place / name) for name in "ab"},
            "calibration": {name: {"data": str(place / f"{name}.jsonl")} for name in "ab"},
            "merge": {"method": method},
            **more,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return make


@pytest.mark.parametrize("method", ["regmean", "fisher"] if LONG else ["fisher"])
def test_two_processes_measure_once_and_write_the_bytes_of_one(network_forks, recipe, tmp_path, method):
    path = recipe(method)
    done = network_forks.team(
        2, ["run", path, "-o", tmp_path / "two", "--cache", tmp_path / "cache"], cwd=tmp_path
    ).wait()
    assert [each.code for each in done] == [0, 0], done[0].err + done[1].err
    assert done[0].err.count("measured on") == 2
    mergetool.run(path, output=tmp_path / "one", cache=tmp_path / "cache")
    assert content(tmp_path / "two") == content(tmp_path / "one")
    lock = json.loads((tmp_path / "two" / "mergetool.json").read_text())
    assert {told["rows"] for told in lock["statistics"].values()} == {7, 4}


def test_runs_at_once_measure_the_same_without_harm(recipe, tmp_path):
    path = recipe()
    outputs = [tmp_path / name for name in ("one", "two")]
    threads = [
        threading.Thread(target=mergetool.run, args=(path,), kwargs={"output": each, "cache": tmp_path / "cache"})
        for each in outputs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(outputs[0]) == content(outputs[1])
    kept = [each.name for each in (tmp_path / "cache" / "statistics").iterdir()]
    assert len(kept) == 2
    assert all(name.endswith(".safetensors") for name in kept)


def test_a_full_disk_is_told_and_leaves_nothing_half_done(place, tmp_path):
    with files_of_at_most(3000), pytest.raises(OutputError, match="larger than this system allows") as error:
        mergetool.measure(place / "a", "gram", place / "a.jsonl", cache=tmp_path)  # a statistic has more bytes
    assert error.value.fix.endswith("--cache DIR")
    assert not list((tmp_path / "statistics").iterdir())
    mergetool.measure(place / "a", "gram", place / "a.jsonl", cache=tmp_path)


def test_memory_that_is_too_little_is_refused_before_anything_is_measured(place, tmp_path):
    write_dense(tmp_path / "wide", hidden_size=1024, intermediate_size=4096, num_hidden_layers=1)
    document = {
        "models": {name: str(tmp_path / "wide") for name in "ab"},
        "calibration": {"data": str(place / "a.jsonl")},
        "merge": {"method": "fisher"},
    }
    most = estimate(mergetool.plan(document), workers=1, memory=None).peak_memory
    little = most - 200 * 2**20  # for parts of its one layer, too
    with pytest.raises(PlanError, match="to measure its fisher") as error:
        mergetool.run(document, output=tmp_path / "out", memory=little, cache=tmp_path / "cache")
    assert "--memory" in error.value.fix
    assert not (tmp_path / "cache").exists()


def test_a_search_cannot_measure(place, tmp_path):
    document = {
        "models": {name: str(place / name) for name in "ab"},
        "calibration": {"data": str(place / "a.jsonl")},
        "merge": {
            "method": "merge3",
            "tasks": [{"name": "t"}],
            "inner": {"method": "fisher", "weight": {"a": 1.0, "b": {"search": [0.0, 1.0]}}},
        },
    }
    with pytest.raises(RecipeError, match="only the method of the whole recipe"):
        mergetool.load_recipe(document)


def test_a_result_can_be_held_against_its_recipe(network_forks, recipe, tmp_path):
    path = recipe()
    result = mergetool.run(path, output=tmp_path / "out", cache=tmp_path / "cache")
    (done,) = network_forks.team(1, ["verify", result.path, "--against", path, "--json"], cwd=tmp_path).wait()
    assert json.loads(done.out)["answer"] == "yes", done.err


def test_locked_runs_refuse_other_rows(network_forks, place, recipe, tmp_path):
    shutil.copytree(place, tmp_path / "models")
    path = recipe(
        models={name: str(tmp_path / "models" / name) for name in "ab"},
        calibration={name: {"data": str(tmp_path / "models" / f"{name}.jsonl")} for name in "ab"},
        output={"path": str(tmp_path / "out")},
    )
    mergetool.run(path, cache=tmp_path / "cache")
    shutil.copy(tmp_path / "out" / "mergetool.json", tmp_path / "mergetool.json")
    write_rows(tmp_path / "models" / "b.jsonl", TEXTS[:2])
    (done,) = network_forks.team(1, ["run", path, "--locked", "--overwrite", "--json"], cwd=tmp_path).wait()
    assert done.code != 0
    assert "'calibration.b.data': sizes differ" in done.err
