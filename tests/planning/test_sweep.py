"""A sweep: every result has the bytes of a run of its own, and what they share is done once."""

import json
from copy import deepcopy

import pytest

import mergetool
from mergetool import RecipeError, SourceError
from mergetool.engine.against import verify_against
from mergetool.engine.memory import merge_in_memory
from mergetool.methods.families.matrix import MatrixMethod
from mergetool.outputs.verify import verify_output
from mergetool.planning import make_plan
from mergetool.planning.report import rows
from mergetool.recipe.load import load_recipe
from mergetool.testing.toys import assert_same_bytes, read, toy_models
from tests.files import content, write_model, write_recipe
from tests.forks import clean_environment

SCALES = [0.5, 1.0, 1.5]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base, tuned = toy_models("ab", exact=False)
    for name, state in {"base": base, **tuned}.items():
        write_model(folder / name, {key: each.bfloat16() for key, each in state.items()}, {"model_type": "toy"})
    return folder


def recipe_of(folder, method, sweep, **sections):
    base = {} if method in ("linear", "slerp") else {"base": str(folder / "base")}
    return {
        **base,
        "models": {name: str(folder / name) for name in "ab"},
        "merge": {"method": method, **sections.pop("merge", {})},
        **({"sweep": sweep} if sweep else {}),
        **sections,
    }


CASES = {
    "ties grid": ("ties", {"density": [0.2, 0.6], "scale": [0.5, 1.0]}, {}),
    "ties rank of the model": ("ties", {"density": [0.2, 0.6], "scale": [0.5, 1.0]}, {"merge": {"scope": "model"}}),
    "della 1/p": ("della-linear", {"scale": SCALES}, {"merge": {"rescale": "1/p"}}),
    "tsv": ("tsv-merge", {"scale": SCALES, "weight": [1.0, {"a": 1.0, "b": 0.5}]}, {}),
    "nothing": ("tsv-merge", {"scale": SCALES}, {"merge": {"weight": 0.0}}),
    "slerp": ("slerp", {"t": [0.0, 0.3, {"gradient": [0.1, 0.9]}]}, {}),
    "steps": (
        "ties",
        {"scale": SCALES},
        {"then": [{"step": "match-norm"}, {"step": "lines", "first": 0.5, "last": 1.0}]},
    ),
    "numbers of steps": (
        "task-arithmetic",
        {"scale": [0.5, 1.0], "lines.last": [1.0, 2.0], "truncate-2.rank": [1, 2]},
        {"then": [{"step": "truncate", "energy": 0.9}, {"step": "lines", "first": 0.5}, {"step": "truncate"}]},
    ),
    "overrides": ("ties", {"scale": SCALES}, {"merge": {"overrides": [{"match": "*q_proj*", "scale": 0.2}]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_result_has_the_bytes_of_a_merge_of_its_own(models, tmp_path, case):
    method, sweep, more = CASES[case]
    recipe = load_recipe(recipe_of(models, method, sweep, **deepcopy(more)))
    result = mergetool.run(recipe, output=tmp_path / "out")
    assert [path.name for path in result.results] == list(recipe.points)
    states = {name: read(models / name) for name in ("base", "a", "b")}
    for name, point in recipe.points.items():
        needed = {each: states[each] for each in (*(["base"] if point.base else []), *point.models)}
        assert_same_bytes(read(result.path / name), merge_in_memory(point, needed))


def test_every_result_is_whole_with_the_lock_of_a_run_of_its_own(models, tmp_path):
    recipe = load_recipe(recipe_of(models, "ties", {"scale": SCALES[:2]}, then=[{"step": "match-norm"}]))
    result = mergetool.run(recipe, output=tmp_path / "out")
    assert sorted(path.name for path in result.path.iterdir() if path.is_dir()) == sorted(recipe.points)
    same = ("plan", "recipe", "resolved_sha256", "inputs", "notes", "measured")
    for name, point in recipe.points.items():
        alone = mergetool.run(point, output=tmp_path / "alone" / name).path
        lock, own = (json.loads((each / "mergetool.json").read_text()) for each in (result.path / name, alone))
        assert {key: lock[key] for key in same} == {key: own[key] for key in same}
        assert lock["output"]["files"]["model.safetensors"] == own["output"]["files"]["model.safetensors"]
        assert lock["output"]["files"].keys() == own["output"]["files"].keys()
    unclear = verify_against(result.path, recipe)
    assert (unclear.answer, unclear.fix) == ("cannot tell", f"mergetool verify {result.path}")
    found = verify_output(result.path)
    assert (found["results"], found["tensors"]) == (list(recipe.points), len(toy_models()[0]))
    (result.path / "scale-1" / "README.md").write_text("other")
    with pytest.raises(SourceError, match="changed or damaged"):
        verify_output(result.path)


def test_a_kill_is_made_good(forks, models, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", **recipe_of(models, "ties", {"density": [0.2, 0.6]}))
    whole = content(mergetool.run(recipe, output=tmp_path / "whole").path)
    for moment in ("mergetool.outputs.journal:Journal.unit 5", "mergetool.outputs.output:describe_run 2"):
        command = ["run", recipe, "-o", tmp_path / "out", "--overwrite"]
        killed = forks.run(command, cwd=tmp_path, env=clean_environment() | {"KILL_AFTER": moment})
        assert killed.code == -9, killed.err
    assert not (tmp_path / "out").exists()
    again = forks.run(["run", recipe, "-o", tmp_path / "out"], cwd=tmp_path, env=clean_environment())
    assert again.code == 0, again.err
    assert content(tmp_path / "out") == whole


def test_results_are_called_by_their_numbers(models):
    def names(method, sweep):
        return list(load_recipe(recipe_of(models, method, sweep)).points)

    assert names("ties", {"scale": [0.5, 1, {"gradient": [0.3, 1.0]}]}) == [
        "scale-0.5",
        "scale-1",
        "scale-gradient-0.3-1",
    ]
    assert names("ties", {"scale": [0.5], "density": [0.1, 0.2]}) == ["scale-0.5_density-0.1", "scale-0.5_density-0.2"]
    assert names("linear", {"weight": {"simplex": 2}}) == ["weight-a-1", "weight-a-0.5-b-0.5", "weight-b-1"]
    assert names("ties", {"scale": [0.50001, 0.500011]}) == ["scale-0.50001", "scale-0.500011"]
    long = [{"gradient": [n / 7 for n in range(start, start + 20)]} for start in (1, 2)]
    assert names("ties", {"scale": long}) == ["scale-1-of-2", "scale-2-of-2"]  # not as if their scales were 1 and 2


def test_what_scales_share_is_made_once(models, tmp_path, monkeypatch):
    made = []
    change = MatrixMethod.change
    monkeypatch.setattr(MatrixMethod, "change", lambda *each: made.append(each[1].name) or change(*each))
    recipe = recipe_of(models, "tsv-merge", {"scale": SCALES, "weight": [1.0, 0.5]})
    mergetool.run(recipe, output=tmp_path / "out", workers=1)
    plan = make_plan(load_recipe(recipe))
    assert len(made) == 2 * sum(step.operation.arithmetic for step in plan.steps)


def test_what_is_counted_is_counted_once_where_no_number_decides_it(models):
    scales = make_plan(load_recipe(recipe_of(models, "ties", {"scale": SCALES})))
    densities = make_plan(load_recipe(recipe_of(models, "ties", {"density": [0.2, 0.4]})))
    name = "lm_head.weight"
    one, two = (next(step for step in plan.steps if step.name == name) for plan in (scales, densities))
    assert one.operation.stats_of(2, {"threshold": (0.5,)}) == {"threshold": (0.5,)}
    assert two.operation.stats_of(1, {"1 threshold": (0.5,)}) == {"threshold": (0.5,)}
    assert two.operation.counts.every[0] != two.operation.counts.every[1]


def test_plan_tells_the_results_and_their_numbers(models, tmp_path):
    plan = make_plan(load_recipe(recipe_of(models, "ties", {"scale": SCALES}, output={"path": str(tmp_path / "out")})))
    assert any("scale=(0.5, 1, 1.5)" in row[6] for row in rows(plan))
    assert {name: each.output for name, each in plan.points.items()} == {
        f"scale-{scale:g}": tmp_path / "out" / f"scale-{scale:g}" for scale in SCALES
    }


def test_workers_do_not_matter_and_an_earlier_sweep_is_replaced_when_asked(models, tmp_path):
    recipe = recipe_of(models, "ties", {"density": [0.2, 0.6]})
    first = content(mergetool.run(recipe, output=tmp_path / "out", workers=1).path)
    assert mergetool.run(recipe, output=tmp_path / "out").resumed
    again = mergetool.run(recipe, output=tmp_path / "out", workers=3, overwrite=True).path
    assert content(again) == first


WRONG = {
    "no mapping": ("ties", [1.0], {}, "expected numbers of the method"),
    "no list": ("ties", {"scale": 1.0}, {}, "expected a list of values"),
    "unknown": ("ties", {"scal": [1.0]}, {}, "no number 'scal'"),
    "twice": ("ties", {"scale": [1.0]}, {"merge": {"scale": 0.5}}, "is swept"),
    "a value": ("ties", {"density": [0.5, 2.0]}, {}, "must be less than or equal to 1"),
    "a choice": ("ties", {"scope": ["tensor", "model"]}, {}, "no number that a sweep could vary"),
    "too many": ("ties", {"scale": [n / 100 for n in range(65)]}, {}, "at most 64"),
    "far too many": ("linear", {"weight": {"simplex": 64}}, {"models": dict.fromkeys("abcdefgh", "x")}, "at most 64"),
    "the same twice": ("ties", {"scale": [0.5, 1.0, 0.5]}, {}, "the value 0.5 is there already"),
    "a bundle": ("mass", {"rank": [1, 2]}, {}, "one result a run"),
    "whole models": ("git-rebasin", {"weight": [0.5]}, {}, "looks at whole models"),
    "a step that is not there": ("ties", {"lines.last": [0.5]}, {}, r"add then: \[{step: lines}\]"),
    "a step misspelt": ("ties", {"line.last": [0.5]}, {"then": [{"step": "lines"}]}, "did you mean 'lines'"),
    "no number of a step": ("ties", {"lines.end": [0.5]}, {"then": [{"step": "lines"}]}, "lines has no number 'end'"),
    "twice in a step": (
        "ties",
        {"lines.last": [0.5]},
        {"then": [{"step": "lines", "first": 1.0, "last": 2.0}]},
        "in `then` it would have no effect",
    ),
    "a value of a step": ("ties", {"lines.last": ["x"]}, {"then": [{"step": "lines", "first": 1.0}]}, "number"),
    "a repository": ("ties", {"scale": [1.0]}, {"output": {"hub": {"repo": "a/b"}}}, "holds one model"),
    "scores": ("ties", {"scale": [1.0]}, {"evaluate": [{"name": "t"}]}, "scored one by one"),
    "a simplex": ("linear", {"weight": {"simplex": 0}}, {}, "whole number of steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(models, tmp_path, case):
    method, sweep, sections, what = WRONG[case]
    path = write_recipe(tmp_path / "r.yaml", **recipe_of(models, method, sweep, **dict(sections)))
    with pytest.raises(RecipeError, match=what) as caught:
        load_recipe(path)
    assert all(problem.fix and f"{path}:" in problem.where for problem in caught.value.problems)


def test_what_makes_one_result_a_run_is_told_with_the_command_that_does(models):
    data = recipe_of(models, "tsv-compress", {"rank": [1, 2]})
    with pytest.raises(RecipeError, match=r"--set merge\.rank=1 -o PATH/1") as caught:
        load_recipe(data)
    assert "--cache FOLDER" in str(caught.value)
    del data["sweep"]
    assert load_recipe(data, ["merge.rank=1"]).method.rank == 1


def test_a_wrong_value_is_told_at_its_line(models, tmp_path):
    path = tmp_path / "r.yaml"
    write_recipe(path, **recipe_of(models, "ties", None))
    text = path.read_text() + "sweep:\n  density:\n    - 0.5\n    - 2.0\n"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.where.startswith(f"{path}:{len(text.splitlines())}:")


def test_a_sweep_is_no_model_of_another_recipe(models):
    inner = recipe_of(models, "ties", {"scale": SCALES})
    with pytest.raises(RecipeError, match="makes several models"):
        load_recipe({"models": {"x": {"recipe": inner}, "y": str(models / "a")}, "merge": {"method": "linear"}})


def test_an_error_says_which_result_it_is_about(models, tmp_path):
    with pytest.raises(mergetool.MergeError, match=r"scale-1e\+30"):
        mergetool.run(
            recipe_of(models, "task-arithmetic", {"scale": [1.0, 1e30]}, output={"dtype": "float16"}),
            output=tmp_path / "o",
        )
    assert not list(tmp_path.iterdir())
