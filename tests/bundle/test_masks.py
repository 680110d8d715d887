"""Bundles of masks (EMR-Merging, TALL masks) against their formulas in float64, in plain models of transformers."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool.bundle.manifest import read_manifest
from mergetool.engine.against import verify_against
from mergetool.engine.growing import change_bundle, dense_recipe
from mergetool.engine.run import Flags, run_recipe
from mergetool.errors import PlanError
from mergetool.outputs.differing_bundles import difference_of_bundles
from mergetool.recipe.load import load_recipe
from mergetool.testing.classifiers import expert_answer, save_experts, text_inputs, tiny_config
from tests.bundle.test_adapters import write_adapters
from tests.bundle.tiny import tiny_inputs, tiny_model, write_models
from tests.files import LONG

KIND = transformers.BertForSequenceClassification
KINDS = ("emr", "tall-masks")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return save_experts(folder, KIND, tiny_config(KIND), transformers.BertModel, tasks="abc", a=2)


@pytest.fixture(scope="module")
def bundles(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: make(paths, folder / kind, method=kind, factors="float32") for kind in KINDS}


def recipe(paths, tasks="abc", **merge):
    return {"base": str(paths["base"]), "models": {task: str(paths[task]) for task in tasks}, "merge": merge}


def make(paths, output, tasks="abc", **merge):
    return mergetool.run(recipe(paths, tasks, **merge), output=output).path


def changes_of(paths, tasks="abc"):
    """Task vectors of the encoder in float64, by task and name in the base."""
    base = {name: value.double() for name, value in load_file(paths["base"] / "model.safetensors").items()}
    experts = {task: load_file(paths[task] / "model.safetensors") for task in tasks}
    return base, {
        task: {name: own[f"bert.{name}"].double() - base[name] for name in base if not name.startswith("pooler")}
        for task, own in experts.items()
    }


def emr(changes):
    """EMR-Merging as its card says: what every expert's change becomes."""
    rebuilt = {task: {} for task in changes}
    sizes, kept = dict.fromkeys(changes, 0.0), dict.fromkeys(changes, 0.0)
    for name in next(iter(changes.values())):
        every = torch.stack([change[name] for change in changes.values()])
        flag = torch.where(every.sum(0) > 0, 1.0, -1.0).double()
        unified = flag * torch.where(every * flag > 0, every.abs(), 0).amax(0)
        for task, change in changes.items():
            rebuilt[task][name] = torch.where(change[name] * flag > 0, unified, 0)
            sizes[task] += change[name].abs().mean()
            kept[task] += rebuilt[task][name].abs().mean()
    return {
        task: {name: value * (sizes[task] / kept[task]) for name, value in own.items()} for task, own in rebuilt.items()
    }


def tall_masks(changes, margin=0.4):
    total = {name: sum(change[name] for change in changes.values()) for name in next(iter(changes.values()))}
    return {
        task: {n: torch.where(own[n].abs() > margin * (total[n] - own[n]).abs(), total[n], 0) for n in own}
        for task, own in changes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_task_is_answered_by_what_the_formula_makes_of_its_expert(paths, bundles, kind, tmp_path):
    base, changes = changes_of(paths)
    rebuilt = {"emr": emr, "tall-masks": tall_masks}[kind](changes)
    model, inputs = mergetool.load_bundle(bundles[kind]), text_inputs()
    for task in "abc":
        plain = KIND.from_pretrained(paths[task]).double().eval()
        plain.bert.load_state_dict({n: base[n] + change for n, change in rebuilt[task].items()}, strict=False)
        with torch.no_grad():
            expected = plain(**inputs).logits
        for _ in range(2):  # nothing is changed by being asked
            found = model(tasks=[task], **inputs).logits[:, : expected.shape[1]]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    half = model.to(torch.bfloat16)(tasks=["c"], **inputs).logits
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_all_tasks_go_where_the_directions_send_them(kind, tmp_path):
    """The router is that of `mass`, on the same directions; a mixed batch is answered row by row."""
    places = write_models(tmp_path, tiny_model("bert"))
    heads = {task: {"weights": str(tmp_path / f"{task}.head.safetensors"), "pool": "mean"} for task in "abc"}
    asked = recipe(places, factors="float32", router={"norm": "l2", "mode": "topk", "top_k": 2})
    asked["models"] = {task: {"source": str(places[task]), "head": heads[task]} for task in "abc"}
    mass, found = (
        mergetool.load_bundle(
            mergetool.run({**asked, "merge": asked["merge"] | more}, output=tmp_path / more["method"]).path
        )
        for more in ({"method": "mass", "size": 100.0}, {"method": kind})
    )
    inputs = tiny_inputs("bert", 12)
    routing, expected = found.route(**inputs), mass.route(**inputs)
    torch.testing.assert_close(routing.distances, expected.distances)
    assert routing.tasks == expected.tasks
    assert len(set(routing.tasks)) > 1
    answer = found(**inputs)
    for row, tasks in enumerate(answer.tasks):
        alone = found(tasks=tasks, **{key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(answer.features[row], alone.features[0], rtol=0, atol=1e-5)


def test_several_tasks_have_the_mean_of_their_changes(paths, bundles):
    _, changes = changes_of(paths)
    rebuilt = emr(changes)
    factors = mergetool.load_bundle(bundles["emr"])._factors
    for name in ("embeddings.LayerNorm.weight", "encoder.layer.0.output.dense.weight"):
        expected = (rebuilt["a"][name] + rebuilt["c"][name]) / 2
        torch.testing.assert_close(factors.dense_change((0, 2), name).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_take_a_bit_an_entry(paths, kind, tmp_path):
    bundle = make(paths, tmp_path / "out", method=kind, router=None)
    entries = sum(change.numel() for change in changes_of(paths)[1]["a"].values())
    masks = load_file(bundle / "factors/a.safetensors")
    assert sum(mask.numel() for mask in masks.values()) <= entries / 8 + len(masks)
    shared = load_file(bundle / "shared.safetensors")
    assert sum(value.numel() * value.element_size() for value in shared.values()) == 2 * entries
    manifest = read_manifest(bundle)
    assert manifest.format_version == 3
    assert [task.scale is not None for task in manifest.tasks] == [kind == "emr"] * 3
    with pytest.raises(PlanError, match=f"no router .it was made by {kind}"):
        mergetool.load_bundle(bundle).route(**text_inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_comes_out_as_a_checkpoint_and_the_bundle_is_what_its_recipe_makes(paths, bundles, kind, tmp_path):
    bundle, inputs = bundles[kind], text_inputs()
    run_recipe(dense_recipe(bundle, "b"), Flags(tmp_path / "b"))
    found = expert_answer(tmp_path / "b", KIND, inputs).logits
    expected = mergetool.load_bundle(bundle)(tasks=["b"], **inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    asked = recipe(paths, method=kind, factors="float32")
    assert verify_against(bundle, load_recipe(asked, folder=tmp_path)).answer == "yes"
    other = make(paths, tmp_path / "other", method=kind, factors="float32", router={"layers": ["*0*attention*"]})
    assert verify_against(other, load_recipe(asked, folder=tmp_path)).answer == "no"
    told = difference_of_bundles(str(bundle), str(other))
    assert all(each.sums.changed == 0 for each in told.tensors)
    assert {each.key.split(".")[0] for each in told.files} == {"router", "ranks"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_of_an_expert_can_be_merged_again(paths, bundles, kind, tmp_path):
    """As any model: what its directions are told from is its change, not what the router reads beside it."""
    model = {"source": str(bundles[kind]), "select": "b"}
    asked = {"base": str(paths["base"]), "models": {"b": model}, "merge": {"method": "task-arithmetic"}}
    merged = load_file(mergetool.run(asked, output=tmp_path / "out").path / "model.safetensors")
    factors = mergetool.load_bundle(bundles[kind])._factors
    base, changes = changes_of(paths)
    for name in changes["b"]:
        torch.testing.assert_close(merged[name], base[name].float() + factors.in_full(1, name), rtol=0, atol=1e-6)
    again = recipe(paths, "a", method="tsv-compress", rank=1.0, factors="float32", size=100.0)
    again["models"]["b"] = model
    library = mergetool.load_bundle(mergetool.run(again, output=tmp_path / "again").path)
    inputs = text_inputs()
    expected = mergetool.load_bundle(bundles[kind])(tasks=["b"], **inputs).logits
    torch.testing.assert_close(library(tasks=["b"], **inputs).logits, expected, rtol=0, atol=1e-4)


CHANGED = [("emr", {"d": "b"}, []), ("tall-masks", {}, ["a"])]
if LONG:
    CHANGED += [("emr", {}, ["a"]), ("tall-masks", {"d": "b"}, [])]


@pytest.mark.parametrize(("kind", "add", "remove"), CHANGED)
def test_experts_that_come_or_go_are_refused_with_what_to_do_instead(paths, bundles, kind, add, remove, tmp_path):
    with pytest.raises(PlanError) as raised:
        change_bundle(bundles[kind], {name: str(paths[source]) for name, source in add.items()}, remove)
    assert "masks of one change that all experts have a part in" in str(raised.value)
    assert "the recipe that made it" in str(raised.value)
    asked = recipe(paths, [task for task in "abc" if task not in remove], method=kind, router=None)
    asked["models"] |= {name: str(paths[source]) for name, source in add.items()}
    assert read_manifest(mergetool.run(asked, output=tmp_path / "out").path).names == tuple(asked["models"])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_no_adapter_changes_take_no_space(kind, tmp_path):
    write_adapters(tmp_path, "llama")
    models = {task: {"adapter": str(tmp_path / task)} for task in "ab"}
    asked = {"base": str(tmp_path / "base"), "models": models, "merge": {"method": kind, "factors": "float32"}}
    bundle = mergetool.run(asked, output=tmp_path / "out").path
    shared = load_file(bundle / "shared.safetensors")
    assert {name.split(".")[-2] for name in shared} == {"q_proj", "o_proj", "down_proj", "up_proj"}
    model = mergetool.load_bundle(bundle)
    assert {name.split(".")[-2] for name in model.manifest.router.matrices} == {"o_proj"}
    assert len(model.generate(**tiny_inputs("llama", 3), max_new_tokens=3, do_sample=False)) == 3
