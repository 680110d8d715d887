"""Orders that are found by what networks say to the same inputs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import MergeError, PlanError, RecipeError
from mergetool.testing.toys import assert_near
from tests.alignment import nets

BUILD = """
from tests.arch.networks import MLP, ResNetCifar

def mlp():
    return MLP((6, 20, 16, 4))

def resnet():
    return ResNetCifar("B")

def deaf():
    net = MLP((6, 20, 16, 4))
    net.forward = lambda input: net.layers[0](input)
    return net
"""


def inputs(folder, shape, name="input"):
    save_file({name: torch.randn(shape, generator=torch.Generator().manual_seed(5))}, folder / "data.safetensors")
    (folder / "nets.py").write_text(BUILD)
    return {"by": "activations", "data": str(folder / "data.safetensors")}


def merged(folder, models, method, match, config=None, **recipe):
    document = {"models": nets.write(folder / "models", models, config), **recipe}
    document |= {"merge": {"method": method, "match": match}, "output": {"path": str(folder / "out")}}
    return load_file(mergetool.run(document, trust_code=True).path / "model.safetensors")


def is_one_of(state, models):
    return any(all((model[name] - x).abs().max() < 1e-4 for name, x in state.items()) for model in models.values())


@pytest.mark.parametrize("compare", ["correlation", "product"])
@pytest.mark.parametrize("method", ["git-rebasin", "merge-many", "c2m3"])
def test_copies_in_any_order_merge_to_one_of_them(method, compare, tmp_path):
    models = nets.copies(nets.mlp(), 3, architecture="mlp")
    match = inputs(tmp_path, (150, 6)) | {"compare": compare, "network": str(tmp_path / "nets.py:mlp")}
    assert is_one_of(merged(tmp_path, models, method, match, architecture="mlp"), models)


def test_channels_are_matched_by_pixels(tmp_path):
    models = nets.copies(nets.resnet(), 2, architecture="resnet")
    match = inputs(tmp_path, (4, 3, 16, 16)) | {"network": str(tmp_path / "nets.py:resnet")}
    result = merged(tmp_path, models, "git-rebasin", match, architecture="resnet")
    floats = {name: x for name, x in models["a"].items() if x.is_floating_point()}
    assert_near({name: result[name] for name in floats}, floats, 1e-5)


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_transformers_with_heads_and_signs_come_back(class_name, tmp_path):
    state, config, _, _ = nets.tiny_transformer(class_name)
    models = nets.copies(state, 2, config=config)
    match = inputs(tmp_path, (1,))
    ids = torch.randint(1, config["vocab_size"], (40, 7), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "data.safetensors")
    assert_near(merged(tmp_path, models, "git-rebasin", match, config), models["a"], 1e-4)


def test_texts_go_through_the_tokenizer_of_the_first_model(tmp_path):
    state, config, _, _ = nets.tiny_transformer("LlamaForCausalLM")
    models = nets.copies(state, 2, config=config)
    rows = "".join(f'{{"text": {[1 + (7 * row + place) % 19 for place in range(3 + row % 3)]}}}\n' for row in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    match = {"by": "activations", "data": str(tmp_path / "rows.jsonl")}
    assert_near(merged(tmp_path, models, "git-rebasin", match, config), models["a"], 1e-4)


def test_of_many_positions_the_same_few_are_kept_of_every_model(tmp_path, monkeypatch):
    monkeypatch.setattr("mergetool.alignment.activations.POSITIONS", 60)
    models = nets.copies(nets.mlp(), 2, architecture="mlp")
    match = inputs(tmp_path, (250, 6)) | {"network": str(tmp_path / "nets.py:mlp")}
    assert_near(merged(tmp_path, models, "git-rebasin", match, architecture="mlp"), models["a"], 1e-5)


def refused(folder, error, **changes):
    models = {name: nets.mlp(seed) for seed, name in enumerate("ab")}
    match = inputs(folder, (9, 6)) | {"network": str(folder / "nets.py:mlp")} | changes
    merge = {"method": "c2m3", "match": {key: x for key, x in match.items() if x is not None}}
    with pytest.raises(error) as caught:
        mergetool.merge_state_dicts(merge, models, architecture="mlp", trust_code=True)
    return str(caught.value)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    assert "activations need data" in refused(tmp_path, RecipeError, data=None)
    assert "no effect" in refused(tmp_path, RecipeError, by="weights")
    assert "merge.match.network" in refused(tmp_path, PlanError, network=str(tmp_path / "nets.py:lost"))
    deaf = refused(tmp_path, PlanError, network=str(tmp_path / "nets.py:deaf"))
    assert "nothing went through layers.1" in deaf
    assert "match.by: weights" in deaf
    save_file({"x": torch.zeros(3, 5)}, tmp_path / "wrong.safetensors")
    assert "cannot be run through" in refused(tmp_path, PlanError, data=str(tmp_path / "wrong.safetensors"))
    save_file({"x": torch.full((3, 6), 3e38)}, tmp_path / "huge.safetensors")
    assert "what goes into layers.1 is not finite" in refused(
        tmp_path, MergeError, data=str(tmp_path / "huge.safetensors")
    )


def test_orders_that_are_given_are_not_matched_again(tmp_path):
    match = inputs(tmp_path, (9, 6))
    merge = {"method": "c2m3", "match": match, "align": {"permutations": "a.safetensors"}}
    with pytest.raises(RecipeError, match="match would have no effect"):
        mergetool.merge_state_dicts(merge, {"a": nets.mlp(), "b": nets.mlp()}, architecture="mlp")
