"""Tensors of another size taken from one parent with `use:`: config.json follows, or something is said."""

import re

import pytest
import torch
import yaml

import mergetool
from mergetool.errors import PlanError
from tests.checkpoints.recipes import recipe_of
from tests.files import write_model
from tests.turns import some
from tests.zoo import files
from tests.zoo.advice import assert_said, outcomes
from tests.zoo.build import build
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import opened

CASES = [
    ("llama", {"vocab_size": 70}, ["*embed_tokens*", "lm_head*"]),
    ("qwen2-tied", {"vocab_size": 70}, ["*embed_tokens*"]),
    ("gemma3", {"text": {"vocab_size": 70}}, ["*embed_tokens*"]),
    ("bert", {"vocab_size": 70}, ["*word_embeddings*", "*predictions.bias"]),
    ("t5", {"vocab_size": 70}, ["shared*"]),
    ("bart", {"vocab_size": 70}, ["*shared*", "final_logits_bias"]),
    ("whisper", {"vocab_size": 70}, ["*embed_tokens*"]),
    ("bert", {"max_position_embeddings": 48}, ["*position_embeddings*"]),
    ("roberta", {"max_position_embeddings": 48}, ["*position_embeddings*"]),
    ("gpt2", {"n_positions": 48}, ["*wpe*"]),
    ("bert", {"type_vocab_size": 3}, ["*token_type*"]),
    ("vit", {"image_size": 24}, ["*position_embeddings*"]),
    ("clip", {"vision": {"image_size": 24}}, ["vision_model*position_embedding*"]),
    ("whisper", {"max_target_positions": 24}, ["model.decoder.embed_positions*"]),
    ("bart", {"max_position_embeddings": 48}, ["*embed_positions*"]),
    ("mixtral", {"num_local_experts": 6}, ["*gate*", "*experts*"]),
    ("qwen3-moe", {"num_experts": 6}, ["*gate*", "*experts*"]),
    ("llama", {"intermediate_size": 30}, ["*.mlp.*"]),
    ("vit", {"num_labels": 7}, ["classifier*"]),
    ("bert-classifier", {"num_labels": 5}, ["classifier*"]),
]


@pytest.mark.parametrize(
    ("name", "changes", "globs"), [pytest.param(*case, id=f"{case[0]}-{next(iter(case[1]))}") for case in some(CASES)]
)
def test_a_tensor_of_another_size_is_what_config_json_says(zoo, name, changes, globs, tmp_path):
    base, a, other = zoo.base(name), zoo.tuned(name, 1), build(tmp_path / "other", name, 3, **changes)
    recipe = recipe_of(base, a, other)
    recipe["merge"]["overrides"] = [{"match": glob, "use": "b"} for glob in globs]
    word = next(iter(changes)).partition("_")[0]
    found = outcomes(recipe, tmp_path / "out", refusal=word)  # or a refusal that says which number it is about
    for result in found:
        assert_follows(name, result.path, zoo.base(name), other)


def assert_follows(name, out, base, other):
    """transformers opens it, and it holds the tensors of the other size."""
    _, info = opened(out, FAMILIES[name].model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written, taken = files.weights(out), files.weights(other)
    changed = [key for key, value in files.weights(base).items() if value.shape != taken[key].shape]
    assert changed
    assert all(written[key].equal(taken[key]) for key in changed)


@pytest.mark.parametrize(
    ("name", "changes", "globs", "key"),
    [
        ("bart", {"vocab_size": 70}, ["*shared*"], "vocab_size"),
        ("bart", {"max_position_embeddings": 48}, ["*decoder.embed_positions*"], "max_position_embeddings"),
        ("llama", {"intermediate_size": 30}, ["*.0.mlp.*"], "intermediate_size"),
    ],
)
def test_half_of_the_tensors_of_a_size_are_refused_and_the_advice_helps(zoo, name, changes, globs, key, tmp_path):
    """No config.json is true of such a file."""
    base, a, other = zoo.base(name), zoo.tuned(name, 1), build(tmp_path / "other", name, 3, **changes)
    recipe = recipe_of(base, a)
    recipe["models"]["b"] = str(other)
    recipe["merge"]["overrides"] = [
        *({"match": glob, "use": "b"} for glob in globs),
        *({"match": glob, "use": "base"} for glob in ("*mlp*", "*embed_positions*", "final_logits_bias")),
    ]
    with pytest.raises(PlanError) as caught:
        mergetool.run(recipe, output=tmp_path / "refused")
    assert caught.value.where == f"config.json: {key}"
    (advised,) = re.findall(r"overrides: (\[.*\])", caught.value.fix)
    recipe["merge"]["overrides"] = yaml.safe_load(advised) + recipe["merge"]["overrides"]
    assert_follows(name, mergetool.run(recipe, output=tmp_path / "out").path, base, other)


def test_a_size_of_which_config_json_says_nothing_is_named(tmp_path):
    for name, rows in (("base", 4), ("a", 4), ("b", 6)):
        state = {"w": torch.randn(3, 3), "table.weight": torch.randn(rows, 3)}
        write_model(tmp_path / name, state, {"model_type": "toy", "rows": rows if name != "b" else 9})
    recipe = recipe_of(tmp_path / "base", tmp_path / "a", tmp_path / "b")
    recipe["merge"]["overrides"] = [{"match": "table*", "use": "b"}]
    assert_said("table.weight is of another size in model 'b'", recipe, tmp_path / "out")
