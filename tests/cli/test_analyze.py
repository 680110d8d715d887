"""`mergetool analyze RECIPE` as its users meet it."""

import json

import pytest

import mergetool
from tests.files import tensors, write_model, write_models, write_recipe

MERGE = {"method": "task-arithmetic"}


@pytest.fixture
def recipe(tmp_path):
    """A base, and two models that are close to it."""
    write_models(tmp_path, names=("base",))
    for seed, name in enumerate("ab", 1):
        base, noise = tensors(0), tensors(seed)
        write_model(tmp_path / name, {key: base[key] + 0.1 * noise[key] for key in base})
    return write_recipe(tmp_path / "r.yaml", base="./base", models={"a": "./a", "b": "./b"}, merge=MERGE)


def test_the_summary_comes_first_then_advice_with_its_evidence(call, recipe):
    code, out, err = call("analyze", recipe, "-q")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("a, b and the base: 6 tensors")
    assert "task vectors, relative to the base: a 0.1" in out
    for each in mergetool.analyze(recipe).advice:
        assert f"{each['weight']}: {each['title']}" in lines
        assert f"  {each['formula']}" in lines
        assert f"  fix: {each['fix']}" in lines
    assert lines[lines.index("Models") + 1].split()[:3] == ["model", "norm", "relative"]
    assert lines[lines.index("Pairs") + 1].split()[:3] == ["a", "b", "cosine"]


def test_json_and_a_folder_hold_the_same(call, recipe, tmp_path):
    code, out, err = call("analyze", recipe, "--json", "-o", tmp_path / "report")
    assert code == 0
    assert f"written: {tmp_path / 'report' / 'analysis.html'}, and analysis.json" in err
    assert "Analysis of" in (tmp_path / "report" / "analysis.html").read_text()
    printed, kept = json.loads(out), json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert printed == kept
    assert printed["compared_with"] == "base"
    assert [row["model"] for row in printed["rows"]["models"]] == ["a", "b"]


def test_what_differs_beside_the_weights_and_what_is_missing(call, recipe, tmp_path):
    state = {name: value for name, value in tensors(0).items() if "norm" not in name}
    write_model(tmp_path / "base", tensors(0), {"model_type": "toy", "rope_theta": 1e4})
    write_model(tmp_path / "b", state, {"model_type": "toy", "rope_theta": 1e6})
    _, out, _ = call("analyze", recipe)
    assert "2 tensors are not in all models in one shape, and are left out" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["b", "config.json", "rope_theta", "1e+04", "1e+06"] in lines
    assert ["model.layers.0.norm.weight", "missing", "b"] in lines


def test_settings_of_the_command_line_count(call, recipe, tmp_path):
    write_model(tmp_path / "c", tensors(0))
    _, out, _ = call("analyze", recipe, "--json", "--set", f"models.b={tmp_path / 'c'}", "--workers", "1")
    assert json.loads(out)["advice"][0]["kind"] == "dead"


def test_what_is_missing_has_its_exit_code_and_fix(call, tmp_path):
    write_models(tmp_path)
    path = write_recipe(tmp_path / "r.yaml", models={"a": "./a", "b": "./gone"}, merge={"method": "linear"})
    code, out, err = call("analyze", path)
    assert (code, out, "fix: " in err) == (3, "", True)
