"""A scale that is counted gives task vectors their length back on average."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import mergetool
from mergetool.api import merge_state_dicts
from mergetool.cli.app import app
from mergetool.engine.shelf import Shelves
from mergetool.errors import PlanError, RecipeError
from mergetool.methods.families import recovering
from mergetool.planning.cost import estimate
from mergetool.planning.report import rows, totals
from mergetool.testing.toys import read, toy_models, write
from tests.methods.test_dc_merge import SETS

FACTORS = {
    "tsv-merge": (2.0314641625, 1.1927957884, 2.9482907131, 1.1336767577),
    "iso-c": (1.3529763037, 1.3745134476, 1.5355233366, 1.8612113706),
}
"""Of single tensors, from independent float64 code, for the sets in their order."""
MATRIX = "model.layers.0.mlp.up_proj.weight"


def update(method, states, **fields):
    base = {name: torch.zeros_like(value) for name, value in states[0].items()}
    return merge_state_dicts(method, states, base, dtype="float64", **fields)


def states_of(*sets):
    """Models with a tensor of each set."""
    return [{f"w{i}": torch.as_tensor(each[t]) for i, each in enumerate(sets)} for t in range(len(sets[0]))]


@pytest.mark.parametrize("how", ["model", "tensor"])
@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("name", SETS)
def test_one_tensor_gets_the_factors_of_others(method, name, how):
    states = states_of(SETS[name])
    once, found = (update(method, states, scale=scale)["w0"] for scale in (1.0, {"recover": how, "cap": 9.0}))
    expected = FACTORS[method]["ABCD".index(name)]
    torch.testing.assert_close(found, expected * once, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["tsv-merge", "iso-c", "iso-cts", "dc-merge"])
def test_all_matrices_together_hold_task_vectors_at_their_length(method):
    states = [
        each | {"norm.weight": torch.ones(5).double() * t} for t, each in enumerate(states_of(SETS["A"], SETS["B"]))
    ]
    found = update(method, states, scale={"recover": "model", "cap": 99.0})
    shares = [
        sum(float((found[k] * state[k]).sum()) for k in ("w0", "w1"))
        / sum(float(state[k].square().sum()) for k in ("w0", "w1"))
        for state in states
    ]
    assert sum(shares) / len(shares) == pytest.approx(1.0)
    assert torch.equal(found["norm.weight"], torch.ones(5).double())  # an average is left as it is


def test_weights_lengthen_both_what_is_merged_and_what_is_recovered():
    states = states_of(SETS["A"])
    torch.testing.assert_close(update("iso-c", states, weight=3.0)["w0"], 3 * update("iso-c", states)["w0"])
    models = dict(zip("abc", states, strict=True))
    uneven = update("iso-c", states, weight={"m0": 2.0, "m1": 0.0, "m2": 1.0})["w0"]
    expected = update("iso-c", [{"w0": 2 * models["a"]["w0"]}, models["c"]])["w0"]
    torch.testing.assert_close(uneven, expected)


def test_it_is_capped():
    states = states_of(SETS["C"])
    once = update("tsv-merge", states)["w0"]
    torch.testing.assert_close(update("tsv-merge", states, scale={"recover": "model", "cap": 2.0})["w0"], 2 * once)
    nothing = [{"w0": torch.zeros(4, 4).double()}] * 2
    assert not update("iso-c", nothing)["w0"].any()


def run(tmp_path, output, scale="recover", **more):
    base, models = toy_models("abc", exact=False)
    paths = write(tmp_path / f"in-{output}", {"base": base, **models})
    recipe = {
        "base": str(paths["base"]),
        "models": {name: str(paths[name]) for name in models},
        "merge": {"method": "tsv-merge", "scale": scale, **more},
    }
    return mergetool.run(recipe, output=tmp_path / output), recipe


def test_a_run_tells_the_number_and_a_recipe_with_it_gives_the_same_matrices(tmp_path):
    result, recipe = run(tmp_path, "counted")
    lock = json.loads((result.path / "mergetool.json").read_text())
    (scale,) = {each["scale"] for each in lock["measured"].values() if "scale" in each}
    assert any(note.startswith(f"scale {scale:.3g}, counted over all matrices") for note in result.notes)
    assert "interference" in lock["measured"][MATRIX]  # what is merged while counting leaves its notes, too
    again, _ = run(tmp_path, "told", scale=scale)
    torch.testing.assert_close(read(again.path)[MATRIX], read(result.path)[MATRIX], rtol=1e-5, atol=1e-6)
    plan = mergetool.plan(recipe)
    assert any(row[0] == MATRIX and "scale=recover" in row[-1] for row in rows(plan, full=True))
    (row,) = [told for what, told in totals(plan, estimate(plan, workers=1, memory=None)) if what == "counted first"]
    assert row == f"over {sum('scale' in each for each in lock['measured'].values())} tensors together"


def test_what_is_merged_for_counting_is_not_merged_again(tmp_path, monkeypatch):
    asked = []
    merge = recovering.MatrixMethod.update

    def counted(method, group, p):
        asked.append(group.name)
        return merge(method, group, p)

    monkeypatch.setattr(recovering.MatrixMethod, "update", counted)
    kept, _ = run(tmp_path, "kept")
    assert asked.count(MATRIX) == 1
    monkeypatch.setattr(Shelves, "of", lambda self, index: None)
    asked.clear()
    again, _ = run(tmp_path, "again")
    assert asked.count(MATRIX) == 2
    assert (kept.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()


def test_a_dry_count_finds_the_scale_of_the_run_and_writes_nothing(tmp_path):
    result, recipe = run(tmp_path, "made")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), "--count", "--json"])
    counted = json.loads(shown.stdout)["counted"]
    (scale,) = counted.pop("scale")
    assert counted == {}
    assert scale == pytest.approx(
        json.loads((result.path / "mergetool.json").read_text())["measured"][MATRIX]["scale"], 1e-5
    )
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), "--count"]).stdout
    assert re.search(rf"counted +scale {scale:.4g}\n", told)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_count_is_refused_where_nothing_is_counted_over_the_whole_model(tmp_path):
    _, recipe = run(tmp_path, "made", scale=1.0)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    refused = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), "--count"]).exception
    assert "this recipe counts nothing over the whole model" in str(refused)
    assert CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml")]).exit_code == 0


@pytest.mark.parametrize("scale", ["recover", {"recover": "tensor", "cap": 2.0}])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_sums_and_averages_have_nothing_to_recover(method, scale):
    states = states_of(SETS["A"])
    with pytest.raises(RecipeError, match=r"adds task vectors up or averages them.*\n.*write a number, such as 1\.0"):
        update(method, states, scale=scale)
    update(method, states, scale=1.0)


def test_tensors_that_cannot_be_counted_together_can_be_counted_by_themselves():
    states = states_of(SETS["A"], SETS["B"])
    overrides = [{"match": "w1", "common": 0.5}]
    with pytest.raises(
        PlanError, match=r"looks at the whole model at once.*\n.*\(scale: \{recover: tensor, cap: 3\.0\}"
    ):
        update("iso-cts", states, overrides=overrides)
    update("iso-cts", states, overrides=overrides, scale={"recover": "tensor", "cap": 3.0})


def test_steps_follow_a_counted_scale():
    states = states_of(SETS["A"], SETS["B"])
    once = update("iso-c", states)
    twice = update("iso-c", states, then=[{"step": "lines", "first": 2.0, "last": 2.0}])
    for name, value in once.items():
        torch.testing.assert_close(twice[name], 2 * value)


@pytest.mark.parametrize("scale", ["recover", {"recover": "tensor", "cap": 3.0}])
def test_a_step_that_counts_follows_whatever_was_counted_before(scale):
    states = [
        each | {"norm.weight": torch.ones(5).double() * t} for t, each in enumerate(states_of(SETS["A"], SETS["B"]))
    ]
    found = update("iso-c", states, then=[{"step": "match-norm"}], scale=scale)
    for name, value in found.items():
        lengths = [float(state[name].norm()) for state in states]
        assert float(value.norm()) == pytest.approx(sum(lengths) / len(lengths)), name


def test_a_step_that_counts_follows_thresholds_of_the_whole_model():
    states = states_of(SETS["A"], SETS["B"])
    settings = {"scope": "model", "density": 0.3}
    once = update("ties", states, **settings)
    found = update("ties", states, then=[{"step": "match-norm"}, {"step": "match-norm"}], **settings)
    for name, value in once.items():
        mean = sum(float(state[name].norm()) for state in states) / len(states)
        torch.testing.assert_close(found[name], value * (mean / float(value.norm())))


def test_a_sweep_of_what_is_counted_twice_over_is_refused_with_a_fix_that_helps(tmp_path):
    recipe = {**run(tmp_path, "once", scale=1.0)[1], "then": [{"step": "match-norm"}], "sweep": {"rank": [1, 2]}}
    recipe["merge"] = {"method": "tsv-merge", "scale": "recover"}
    with pytest.raises(PlanError, match=r"write scale: \{recover: tensor, cap: 3\.0\}"):
        mergetool.plan(recipe)
    recipe["merge"]["scale"] = {"recover": "tensor", "cap": 3.0}
    assert len(mergetool.plan(recipe).points) == 2
