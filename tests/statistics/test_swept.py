"""Sweeps of methods that need data: measured once, or refused where one measure would not do for all."""

import pytest
from safetensors.torch import load_file

import mergetool
from mergetool import PlanError, RecipeError
from tests.statistics.networks import write_classifier, write_rows


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    place = tmp_path_factory.mktemp("swept")
    for seed, name in enumerate("ab"):
        write_classifier(place / name, seed)
    write_rows(place / "rows.jsonl")
    models = {name: str(place / name) for name in "ab"}
    return {"models": models, "calibration": {"data": str(place / "rows.jsonl")}}


def test_each_result_is_that_of_a_run_of_its_own(asked, tmp_path):
    swept = {**asked, "merge": {"method": "regmean"}, "sweep": {"alpha": [0.5, 0.9]}}
    mergetool.run(swept, output=tmp_path / "swept", cache=tmp_path)
    first, second = (load_file(tmp_path / f"swept/alpha-{value}/model.safetensors") for value in (0.5, 0.9))
    one = {**asked, "merge": {"method": "regmean", "alpha": 0.9}}
    alone = load_file(mergetool.run(one, output=tmp_path / "one", cache=tmp_path).path / "model.safetensors")
    assert all(each.equal(alone[name]) for name, each in second.items())
    assert not all(each.equal(second[name]) for name, each in first.items())


def test_numbers_that_decide_what_is_measured_are_refused(asked):
    with pytest.raises(PlanError, match="measures depends on its numbers") as error:
        mergetool.plan({**asked, "merge": {"method": "regmean-plus"}, "sweep": {"alpha": [0.5, 0.9]}})
    assert "--set merge.FIELD=VALUE" in error.value.fix


def test_a_search_over_them_is_refused_with_another_way(asked):
    inner = {"method": "regmean", "alpha": {"search": [0, 1]}}
    tasks = [{"name": "any", "task": "any", "metric": "acc"}]
    models = {"models": asked["models"]}
    with pytest.raises(RecipeError, match="needs data") as error:
        mergetool.plan({**models, "merge": {"method": "merge3", "inner": inner, "tasks": tasks}})
    assert "sweep" in str(error.value)
