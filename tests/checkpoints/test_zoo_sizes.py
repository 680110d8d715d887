"""Tensors of another size taken from one parent with `use:`: config.json follows, or something is said."""

import pytest

from tests.checkpoints.recipes import recipe_of
from tests.checkpoints.wrong import wrong
from tests.zoo import files
from tests.zoo.advice import outcomes
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
    ("vit", {"num_labels": 7}, ["classifier*"]),
    ("bert-classifier", {"num_labels": 5}, ["classifier*"]),
]


@wrong("config.json keeps the sizes of the donor")
@pytest.mark.parametrize(
    ("name", "changes", "globs"), [pytest.param(*case, id=f"{case[0]}-{next(iter(case[1]))}") for case in CASES]
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
