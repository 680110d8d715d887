"""The laws that every method obeys whose result is a bundle, under every choice of every option (see cases.py).

sound         what a run made, verify finds sound, and inspect can tell of
workers       the number of workers does not matter, to the bit
order         the order of the tasks does not matter to what is kept of each, to the bit
independent   how many directions an expert keeps is all that it takes from the others, to the bit, where it is `apart`
whole         at full rank in float32 an expert comes back
non-finite    a value that is not finite is never lost: the build stops and says whose it is
"""

import pytest
import torch
from safetensors import safe_open

import mergetool
from mergetool import MergeError
from mergetool.bundle.manifest import read_manifest
from mergetool.bundle.verify import facts_about_bundle, verify_bundle
from mergetool.methods import registry
from mergetool.methods.families.bundle import BundleMethod
from mergetool.testing.cases import MethodCase, bundle_cases, each_once
from mergetool.testing.toys import INTEGERS, assert_near, read, write
from tests.files import LONG

CASES = bundle_cases() if LONG else each_once(bundle_cases())
every_case = pytest.mark.parametrize("case", CASES, ids=str)
BUNDLES = [MethodCase(kind) for kind in registry().values() if issubclass(kind, BundleMethod)]
every_bundle = pytest.mark.parametrize("case", BUNDLES, ids=str)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    base, models = MethodCase(BundleMethod).toys(exact=False)
    states = {name: state | INTEGERS for name, state in {"base": base, **models}.items()}
    return states, write(tmp_path_factory.mktemp("toys"), states)


def make(case, paths, output, names="abc", **flags):
    recipe = {"base": str(paths["base"]), "models": {n: str(paths[n]) for n in names}, "merge": case.section()}
    return mergetool.run(recipe, output=output, **flags).path


def num_tensors(path):
    with safe_open(path, "pt") as file:
        return len(file.keys())


@every_case
def test_a_bundle_is_sound_and_neither_workers_nor_the_order_of_the_tasks_matter_to_it(case, toys, tmp_path):
    three = make(case, toys[1], tmp_path / "three", workers=3)
    assert verify_bundle(three)["tensors"] == sum(map(num_tensors, three.rglob("*.safetensors")))
    facts = facts_about_bundle(three)
    assert [task["name"] for task in facts["tasks"]] == ["a", "b", "c"]
    weights = [path.stat().st_size for path in three.rglob("*.safetensors") if "base" not in path.parts]
    assert sum(weights) <= facts["bytes_beside_base"] <= sum(weights) + 100_000
    back = make(case, toys[1], tmp_path / "back", "cba", workers=1)
    for kept in (f"factors/{task}.safetensors" for task in "abc"):
        assert (three / kept).read_bytes() == (back / kept).read_bytes()
    if not case.option:
        one = make(case, toys[1], tmp_path / "one", workers=1)
        assert read_manifest(one) == read_manifest(three)


@pytest.mark.parametrize("case", [each for each in BUNDLES if each.kind.apart], ids=str)
def test_the_number_of_directions_is_all_that_an_expert_takes_from_the_others(case, toys, tmp_path):
    case = case.with_settings(rank=2)
    three, two = (make(case, toys[1], tmp_path / names, names) for names in ("abc", "ab"))
    assert (three / "factors/b.safetensors").read_bytes() == (two / "factors/b.safetensors").read_bytes()


@every_bundle
def test_at_full_rank_an_expert_comes_back(case, toys, tmp_path):
    states, paths = toys
    folder = make(case.neutral().with_settings(rank=1.0, factors="float32"), paths, tmp_path / "out", "a")
    recipe = {"models": {"a": {"source": str(folder), "select": "a"}}, "merge": {"method": "passthrough"}}
    assert_near(read(mergetool.run(recipe, output=tmp_path / "a").path), states["a"])


@every_bundle
@pytest.mark.parametrize("culprit", ["b", "base"])
def test_a_value_that_is_not_finite_is_never_lost(case, culprit, toys, tmp_path):
    states = {name: dict(state) for name, state in toys[0].items()}
    name = "model.layers.1.mlp.up_proj.weight"
    states[culprit][name] = states[culprit][name].clone().index_fill(0, torch.tensor([3]), float("nan"))
    with pytest.raises(MergeError) as raised:
        make(case, write(tmp_path / "models", states), tmp_path / "out")
    assert name in str(raised.value)
    assert culprit in str(raised.value)
    assert not (tmp_path / "out").exists()
