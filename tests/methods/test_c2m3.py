"""C2M3 on real checkpoints: planted orders, listing order, fine-tunes of one base, and the files it leaves."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool.engine.run import Silent
from mergetool.errors import PlanError, RecipeError, SourceError
from mergetool.testing.toys import assert_near, assert_same_bytes
from tests.alignment import nets
from tests.arch.networks import MLP
from tests.files import LONG


def merge(models, architecture="mlp", method="c2m3", **parameters):
    return mergetool.merge_state_dicts(method, models, architecture=architecture, **parameters)


def recipe(folder, models, config=None, architecture="mlp", **section):
    return {
        "models": nets.write(folder / "models", models, config),
        **({"architecture": architecture} if architecture else {}),
        "merge": {"method": "c2m3", **section},
        "output": {"path": str(folder / "out")},
    }


@pytest.mark.parametrize("num_models", [2, 3, 5])
def test_copies_of_one_network_in_any_order_merge_to_it(num_models):
    models = nets.copies(nets.mlp(), num_models, architecture="mlp")
    assert_near(merge(models, align={"anchor": "b"}), models["b"], 1e-6)


def test_noisy_copies_merge_to_less_noise_where_their_plain_average_is_nothing():
    clean = nets.mlp(widths=(6, 40, 40, 4))
    models = nets.copies(clean, 5, architecture="mlp", noise=0.1)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))

    def error(state):
        net = MLP((6, 40, 40, 4))
        net.load_state_dict(clean)
        truth = net(x)
        net.load_state_dict(state)
        return float((net(x) - truth).norm() / truth.norm())

    with torch.no_grad():
        assert error(merge(models)) < 0.8 * min(error(model) for model in models.values())
        assert error(mergetool.merge_state_dicts("linear", models)) > 0.7


def test_batch_norm_statistics_move_with_their_channels_and_counters_are_copied():
    models = nets.copies(nets.resnet(), 3, architecture="resnet")
    merged = merge(models, "resnet", align={"anchor": "a", "releases": 4})
    assert_near(merged, models["a"], 1e-5)
    assert merged["bn1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "class_name", ["LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel", "ViTForImageClassification"]
)
def test_transformers_with_heads_and_signs_come_back(class_name, tmp_path):
    layers = {} if LONG else {("n_layer" if class_name.startswith("GPT2") else "num_hidden_layers"): 1}
    state, config, _, _ = nets.tiny_transformer(class_name, **layers)
    models = nets.copies(state, 3, config=config)
    document = recipe(tmp_path, models, config, architecture=None, align={"anchor": "c", "releases": 4})
    result = mergetool.run(document)
    assert_near(load_file(result.path / "model.safetensors"), models["c"], 1e-5)


def unrelated(num_models=3):
    return {"abc"[i]: nets.mlp(seed=i) for i in range(num_models)}


def test_the_order_in_which_models_are_listed_does_not_matter():
    models = unrelated()
    turned = {name: models[name] for name in "cab"}
    assert_near(merge(turned), merge(models), 1e-6)
    pair = {name: models[name] for name in "ab"}
    assert_same_bytes(merge(dict(reversed(pair.items()))), merge(pair))


def test_the_permutations_do_not_depend_on_the_order_of_listing_to_the_bit(tmp_path):
    models = unrelated()
    files = []
    for order in ("abc", "bca"):
        listed = {name: models[name] for name in order}
        path = mergetool.run(recipe(tmp_path / order, listed)).path
        files.append((path / "alignment" / "permutations.safetensors").read_bytes())
    assert files[0] == files[1]


def test_fine_tunes_of_one_network_are_left_where_they_are():
    base = nets.mlp()
    models = {name: nets.noisy(base, seed, 0.02) for seed, name in enumerate("abc")}
    assert_same_bytes(merge(models), mergetool.merge_state_dicts("linear", models))


def test_a_run_says_that_models_are_in_one_order_already(tmp_path):
    told = Told()
    models = {name: nets.noisy(nets.mlp(), seed, 0.02) for seed, name in enumerate("abc")}
    result = mergetool.run(recipe(tmp_path, models), progress=told)
    assert any("in one order already" in line for line in told.lines)
    report = json.loads((result.path / "alignment" / "report.json").read_text())
    assert len(report["history"]) == 1
    assert not any(report["moved"]["b"].values())


class Told(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_file_of_ones_own_is_tried_on_the_network_that_config_json_tells(tmp_path):
    state, config, _, _ = nets.tiny_transformer("LlamaForCausalLM")
    models = {"ab"[i]: nets.noisy(state, i, 0.5) for i in range(2)}
    for name, line in (("right", ""), ("wrong", "tensors:\n  norm.weight: residual\n")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: llama\n{line}")
    path = mergetool.run(recipe(tmp_path / "right", models, config, str(tmp_path / "right.yaml"))).path
    assert 0 < json.loads((path / "alignment" / "report.json").read_text())["verification"]["outputs"] < 1e-10
    with pytest.raises(PlanError, match="the outputs change") as caught:
        mergetool.run(recipe(tmp_path / "wrong", models, config, str(tmp_path / "wrong.yaml")))
    assert "model.norm.weight, axis 0 (has its signs wrong)" in caught.value.where


def test_weights_of_the_inner_method_apply_to_the_aligned_models():
    models = nets.copies(nets.mlp(), 3, architecture="mlp", noise=0.05)
    only_b = merge(models, align={"anchor": "a"}, combine={"method": "linear", "weight": {"a": 0, "b": 1, "c": 0}})
    assert not torch.allclose(only_b["layers.0.weight"], models["b"]["layers.0.weight"])
    assert (only_b["layers.0.weight"] - models["a"]["layers.0.weight"]).norm() < 1


def test_other_methods_can_merge_what_was_aligned():
    models = nets.copies(nets.mlp(), 2, architecture="mlp")
    merged = merge(models, align={"anchor": "a"}, combine={"method": "slerp", "t": 0.3})
    assert_near(merged, models["a"], 1e-5)


def test_permutations_and_report_lie_beside_the_weights_and_are_in_the_lock(tmp_path):
    result = mergetool.run(recipe(tmp_path, unrelated()))
    report = json.loads((result.path / "alignment" / "report.json").read_text())
    assert report["architecture"] == "mlp"
    assert report["objective"]["after"] > report["objective"]["before"]
    assert report["history"][-1]["objective"] >= report["history"][0]["objective"]
    assert report["distance"]["after"][0][1] < report["distance"]["before"][0][1]
    assert 0 < max(report["moved"]["b"].values()) <= 1
    assert report["verification"] == {"outputs": None, "there and back": 0.0}
    lock = json.loads((result.path / "mergetool.json").read_text())
    assert {"alignment/permutations.safetensors", "alignment/report.json"} <= set(lock["output"]["files"])


def test_permutations_can_be_used_again(tmp_path):
    models = unrelated()
    first = mergetool.run(recipe(tmp_path / "first", models)).path
    again = recipe(
        tmp_path / "again", models, align={"permutations": str(first / "alignment" / "permutations.safetensors")}
    )
    path = mergetool.run(again).path
    assert (path / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_run_that_was_killed_does_not_search_again(tmp_path, monkeypatch):
    document = recipe(tmp_path, unrelated())
    monkeypatch.setattr("mergetool.engine.worker.Worker.merge", _killed)
    with pytest.raises(KeyboardInterrupt):
        mergetool.run(document)
    monkeypatch.undo()
    monkeypatch.setattr("mergetool.kernels.frank_wolfe.align", _killed)
    resumed = mergetool.run(document)
    monkeypatch.undo()
    fresh = mergetool.run(document, output=tmp_path / "fresh")
    assert (resumed.path / "model.safetensors").read_bytes() == (fresh.path / "model.safetensors").read_bytes()


def _killed(*_, **__):
    raise KeyboardInterrupt


def test_memory_and_files_give_the_same_bits(tmp_path):
    models = unrelated()
    path = mergetool.run(recipe(tmp_path, models)).path
    assert_same_bytes(load_file(path / "model.safetensors"), merge(models))


def refused(**section):
    with pytest.raises(RecipeError) as error:
        mergetool.load_recipe(
            {"models": {"a": "x", "b": "y", "c": "z"}, "architecture": "mlp", "merge": {"method": "c2m3", **section}}
        )
    return str(error.value)


def test_settings_without_effect_and_unfit_methods_are_refused_before_anything_is_read():
    assert "polish would have no effect" in refused(align={"permutations": "p.safetensors", "polish": False})
    assert "did you mean 'anchor'?" in refused(align={"ancor": "a"})
    assert "needs a common ancestor" in refused(combine={"method": "ties"})
    assert "at most 2 models" in refused(combine={"method": "slerp"})
    assert "expected one of the methods" in refused(combine={"method": "c2m3"})
    assert "there is no model 'd'" in refused(combine={"method": "linear", "weight": {"a": 1, "b": 1, "c": 1, "d": 1}})
    assert "weigt" in refused(combine={"method": "linear", "weigt": 1})


def test_an_unknown_anchor_is_named_before_anything_is_read():
    assert "there is no model 'd'" in refused(align={"anchor": "d"})


def test_an_architecture_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="llama"):
        merge(unrelated(), "llama")


def test_permutations_of_other_models_are_refused(tmp_path):
    models = unrelated()
    path = mergetool.run(recipe(tmp_path / "first", models)).path / "alignment" / "permutations.safetensors"
    with pytest.raises(PlanError, match="it holds permutations of a, b, c"):
        merge({"a": models["a"], "b": models["b"]}, align={"permutations": str(path)})
    wider = {name: nets.mlp(seed, (6, 21, 16, 4)) for seed, name in enumerate("abc")}
    with pytest.raises(PlanError, match="another architecture"):
        merge(wider, align={"permutations": str(path)})
    with pytest.raises(SourceError, match="holds no permutations"):
        merge(models, align={"permutations": str(path.with_name("report.json"))})
