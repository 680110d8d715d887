"""One model under several names: wrappers, base prefixes, old and new layouts, legacy names, old buffers, shards."""

import pytest
import torch

import mergetool
from mergetool.errors import MergetoolError
from tests.checkpoints.recipes import recipe_of
from tests.files import LONG
from tests.turns import pairs
from tests.zoo import files
from tests.zoo.advice import outcomes
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import linear, opened, task_arithmetic

PREFIX = {"llama": "model.", "gpt2": "transformer.", "bert": "bert.", "vit": "vit.", "distilbert": "distilbert."}
"""What the names of a model inside a head model begin with."""
LAYOUTS = ["gemma3", "llava", "qwen2-vl", "vit"]
FUSED = ["mixtral", "qwen3-moe"]
MASK = torch.tril(torch.ones(32, 32, dtype=torch.bool)).reshape(1, 1, 32, 32)


def assert_is_the_merge(zoo, name, folder, base, *models, rule=None, beside="$^"):
    family = FAMILIES[name]
    first, *states = [source and zoo.state(source, family.model) for source in (base, *models)]
    assert_merged(folder, family.auto, first, states, rule or task_arithmetic(0.5), family.inputs(), beside=beside)


def models_of(zoo, name):
    return zoo.base(name), zoo.tuned(name, 1), zoo.tuned(name, 2)


def other(zoo, source, word, make, *args, **more):
    """`source` written another way, once a session."""
    return zoo.made(f"{source.name}-{word}", lambda folder: make(folder, source, *args, **more))


def as_in_memory(zoo, name, source):
    """Saved under the names that the module has in memory: what transformers calls the new layout."""

    def make(folder):
        FAMILIES[name].model.from_pretrained(source).save_pretrained(folder, save_original_format=False)

    return zoo.made(f"{source.name}-as-in-memory", make)


def same_model(zoo, name, written, source):
    """Whether transformers opens both as one model."""
    model = FAMILIES[name].model
    first, second = zoo.state(written, model), zoo.state(source, model)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "wrapper"), pairs(["llama", "bert", "vit", "t5"], ["_orig_mod.", "module.", "module._orig_mod."])
)
def test_what_a_wrapper_put_in_front_is_no_part_of_a_name(zoo, name, wrapper, tmp_path):
    base, a, b = models_of(zoo, name)
    wrapped = other(zoo, a, wrapper, files.prefixed, wrapper)
    for result in outcomes(recipe_of(base, wrapped, b), tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, base, a, b)
        assert files.weights(result.path).keys() == files.weights(base).keys()


@pytest.mark.parametrize("name", ["llama", "bert"] if LONG else ["bert"])
def test_a_wrapped_base_gives_a_result_that_opens(zoo, name, tmp_path):
    base, a, b = models_of(zoo, name)
    wrapped = other(zoo, base, "_orig_mod", files.prefixed, "_orig_mod.")
    for result in outcomes(recipe_of(wrapped, a, b), tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, base, a, b)


@pytest.mark.parametrize("name", ["llama", "bert"] if LONG else ["llama"])
def test_wrapped_models_are_averaged_with_others(zoo, name, tmp_path):
    _, a, b = models_of(zoo, name)
    wrapped = other(zoo, b, "_orig_mod", files.prefixed, "_orig_mod.")
    for result in outcomes(recipe_of(None, a, wrapped, method="linear"), tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, None, a, b, rule=linear)


@pytest.mark.parametrize(("name", "holder"), pairs(PREFIX, ["base", "model"]))
def test_names_with_and_without_the_base_prefix_meet(zoo, name, holder, tmp_path):
    base, a, b = models_of(zoo, name)
    short = other(zoo, base if holder == "base" else a, "short", files.without_prefix, PREFIX[name])
    assert same_model(zoo, name, short, base if holder == "base" else a)
    recipe = recipe_of(short, a, b) if holder == "base" else recipe_of(base, short, b)
    for result in outcomes(recipe, tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, base, a, b)
        assert files.weights(result.path).keys() == files.weights(short if holder == "base" else base).keys()


@pytest.mark.parametrize(("name", "holder"), pairs([*LAYOUTS, *FUSED], ["base", "model"]))
def test_old_and_new_layouts_meet(zoo, name, holder, tmp_path):
    base, a, b = models_of(zoo, name)
    new = as_in_memory(zoo, name, base if holder == "base" else a)
    assert files.weights(new).keys() != files.weights(base).keys()
    assert same_model(zoo, name, new, base if holder == "base" else a)
    recipe = recipe_of(new, a, b) if holder == "base" else recipe_of(base, new, b)
    for result in outcomes(recipe, tmp_path / "out", refusal="experts" if name in FUSED else ""):
        assert_is_the_merge(zoo, name, result.path, base, a, b)
        assert files.weights(result.path).keys() == files.weights(new if holder == "base" else base).keys()


@pytest.mark.parametrize("name", [*LAYOUTS, *FUSED] if LONG else ["llava", "qwen3-moe"])
def test_a_new_layout_is_merged_with_itself(zoo, name, tmp_path):
    sources = models_of(zoo, name)
    recipe = recipe_of(*(as_in_memory(zoo, name, source) for source in sources))
    assert_is_the_merge(zoo, name, mergetool.run(recipe, output=tmp_path / "out").path, *sources)


@pytest.mark.parametrize("holder", ["base", "model"])
def test_gamma_and_beta_are_weight_and_bias(zoo, holder, tmp_path):
    base, a, b = models_of(zoo, "bert")
    old = other(zoo, base if holder == "base" else a, "gamma", files.gamma_and_beta)
    assert same_model(zoo, "bert", old, base if holder == "base" else a)
    recipe = recipe_of(old, a, b) if holder == "base" else recipe_of(base, old, b)
    for result in outcomes(recipe, tmp_path / "out"):
        assert_is_the_merge(zoo, "bert", result.path, base, a, b)


TWICE = {
    "wrapper": ("llama", "model.norm.weight", "_orig_mod.model.norm.weight"),
    "base prefix": ("bert", "bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    "legacy": ("bert", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
    "layout": ("gemma3", "language_model.model.norm.weight", "model.language_model.norm.weight"),
}


@pytest.mark.parametrize("case", TWICE)
def test_one_tensor_under_two_names_with_other_values_is_refused(zoo, case, tmp_path):
    """Which of them is meant, nobody can know; files like this come out of careless merges."""
    name, known, twin = TWICE[case]
    base, a, b = models_of(zoo, name)
    odd = files.rewritten(tmp_path / "odd", a, lambda state: state | {twin: state[known] + 1})
    with pytest.raises(MergetoolError) as caught:
        mergetool.run(recipe_of(base, odd, b), output=tmp_path / "out")
    assert known in str(caught.value)
    assert twin in str(caught.value)


OLD_BUFFERS = {
    "gpt2": {"transformer__h__N__attn__bias": MASK, "transformer__h__N__attn__masked_bias": torch.tensor(-1e4)},
    "bert": {"bert__embeddings__position_ids": torch.arange(32).reshape(1, 32)},
    "llama": {"model__layers__N__self_attn__rotary_emb__inv_freq": torch.tensor([1.0, 0.01])},
    "clip": {
        "text_model__embeddings__position_ids": torch.arange(32).reshape(1, 32),
        "vision_model__embeddings__position_ids": torch.arange(5).reshape(1, 5),
    },
}
"""Buffers that earlier versions of transformers stored, and that it passes over today."""


@pytest.mark.parametrize(("name", "holder"), pairs(OLD_BUFFERS, ["base", "model", "everyone"]))
def test_buffers_of_earlier_versions_do_no_harm(zoo, name, holder, tmp_path):
    base, a, b = models_of(zoo, name)
    old = [other(zoo, source, "buffers", files.with_old_buffers, **OLD_BUFFERS[name]) for source in (base, a, b)]
    recipe = {
        "base": recipe_of(old[0], a, b),
        "model": recipe_of(base, old[1], b),
        "everyone": recipe_of(*old),
    }[holder]
    for result in outcomes(recipe, tmp_path / "out"):  # transformers says that it passes masked_bias over
        assert_is_the_merge(zoo, name, result.path, base, a, b, beside="masked_bias")


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_in_shards_is_one_model(zoo, name, tmp_path):
    base, a, b = models_of(zoo, name)
    made = zoo.tuned(name, 1, save={"max_shard_size": "5KB"})
    assert len(list(made.glob("*.safetensors"))) > 2
    out = mergetool.run(recipe_of(base, made, b, output={"shard_size": "9kB"}), output=tmp_path / "out").path
    assert len(list(out.glob("*.safetensors"))) > 2
    assert_is_the_merge(zoo, name, out, base, a, b)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3"] if LONG else ["gemma3"])
def test_models_stored_in_other_dtypes_are_merged_as_their_values(zoo, name, tmp_path):
    base, a, b = models_of(zoo, name)
    half = other(zoo, a, "bfloat16", files.in_dtype, torch.bfloat16)
    out = mergetool.run(recipe_of(base, half, b), output=tmp_path / "out").path
    assert_is_the_merge(zoo, name, out, base, half, b)
    stored, _ = opened(out, FAMILIES[name].model)
    assert stored.config.dtype == torch.float64  # as it was opened; the file says float32
    assert {value.dtype for value in files.weights(out).values()} == {torch.float32}
