"""The small table of a card: how far a merge lies from what it was made of."""

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool.outputs.changed import changes_by_role
from mergetool.planning import make_plan
from mergetool.recipe import load_recipe
from tests.files import tensors, write_model, write_models

LAYERS = {f"model.layers.{layer}.{part}": (64, 32) for layer in range(12) for part in ("mlp.weight", "attn.weight")}


def merged(folder, **sections):
    recipe = {"models": {name: str(folder / name) for name in "ab"}, **sections}
    path = mergetool.run(recipe, output=folder / "out").path
    return {each.role: each for each in changes_by_role(make_plan(load_recipe(recipe), folder / "out"), path)}, path


def test_small_tensors_are_looked_at_whole(tmp_path):
    write_models(tmp_path)
    base = {"base": str(tmp_path / "base")}
    found, path = merged(tmp_path, **base, merge={"method": "task-arithmetic", "weight": 0.3})
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", path))
    assert {role: each.tensors for role, each in found.items()} == {
        "mlp.weight": 2,
        "norm.weight": 2,
        "model.embed_tokens.weight": 1,
        "lm_head.weight": 1,
    }
    for role, each in found.items():
        names = [name for name in after if name.endswith(role)]
        off = sum(float((after[name] - before[name]).double().square().sum()) for name in names)
        whole = sum(float(before[name].double().square().sum()) for name in names)
        assert each.apart == {"base": pytest.approx((off / whole) ** 0.5, rel=1e-5)}
    rows = [line for line in (path / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows[0].split(" | ")[:2] == [f"| `{next(iter(found))}`", str(next(iter(found.values())).tensors)]
    assert len(rows) >= 4


def test_without_a_base_it_is_the_models_and_what_is_estimated_is_near(tmp_path):
    for seed, name in enumerate("ab"):
        big = tensors(seed, LAYERS | {"lm_head.weight": (900, 64)})
        write_model(tmp_path / name, {key: value * (1 + seed) for key, value in big.items()})
    found, path = merged(tmp_path, merge={"method": "linear", "weight": {"a": 0.9, "b": 0.1}})
    after = load_file(path / "model.safetensors")
    for name in "ab":
        before = load_file(tmp_path / name / "model.safetensors")
        for role, each in found.items():
            own = [key for key in after if key.endswith(role)]
            one, other = (torch.cat([state[key].flatten() for key in own]) for state in (after, before))
            assert each.apart[name] == pytest.approx(float((one - other).norm() / other.norm()), rel=0.05)
    assert found["mlp.weight"].apart["a"] < found["mlp.weight"].apart["b"]
    assert "| role | tensors | from a | from b |" in (path / "README.md").read_text()


def test_what_has_no_numbers_is_left_out_and_costs_no_result(tmp_path):
    write_models(tmp_path)
    state = tensors(1) | {"model.layers.0.steps": torch.arange(4), "odd|name": torch.full((3,), float("nan"))}
    for name in "ab":
        write_model(tmp_path / name, state)
    found, path = merged(tmp_path, merge={"method": "linear"}, check={"non_finite": "keep"})
    assert "steps" not in found
    assert set(found) >= {"mlp.weight"}
    card = (path / "README.md").read_text()
    assert "| `mlp.weight` | 2 | 0 | 0 |" in card
    recipe = load_recipe({"models": {"a": str(tmp_path / "a")}, "merge": {"method": "linear"}})
    plan = make_plan(recipe, tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "gone")
    assert changes_by_role(plan, path) == []


def test_adapters_and_bundles_have_no_such_table(tmp_path):
    write_models(tmp_path)
    base = {"base": str(tmp_path / "base")}
    found, path = merged(tmp_path, **base, merge={"method": "tsv-compress"})
    assert found == {}
    assert "What changed" not in (path / "README.md").read_text()


def test_names_of_models_are_shown_as_they_are(tmp_path):
    write_models(tmp_path)
    models = {"<script>alert(1)</script>": str(tmp_path / "a"), "x|`y": str(tmp_path / "b")}
    path = mergetool.run({"models": models, "merge": {"method": "linear"}}, output=tmp_path / "out").path
    card = (path / "README.md").read_text().partition("## Recipe")[0]
    assert r"| \<script\>alert(1)\</script\> |" in card
    assert r"| from \<script\>alert(1)\</script\> | from x\|\`y |" in card
    assert "<script>" not in card
