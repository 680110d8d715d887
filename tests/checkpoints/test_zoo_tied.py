"""Heads and embeddings that are one tensor, stored once, twice or four times, or really two."""

import pytest

from tests.checkpoints.recipes import recipe_of
from tests.files import LONG
from tests.turns import pairs
from tests.zoo import files
from tests.zoo.advice import assert_said, outcomes
from tests.zoo.build import change_config, config_of
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import linear, task_arithmetic

COPIES = {
    "qwen2-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma2": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "distilbert": ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    "albert": ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
    "t5": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    "bart": (
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
    "whisper": ("model.decoder.embed_tokens.weight", "proj_out.weight"),
}
"""The tensor that is stored, and the names under which older versions stored it again."""


def redundant(zoo, name, folder):
    """The same model with its shared tensor stored under every name."""
    return zoo.made(f"{folder.name}-copies", lambda made: files.with_copies(made, folder, *COPIES[name]))


def models_of(zoo, name):
    return zoo.base(name), zoo.tuned(name, 1), zoo.tuned(name, 2)


def assert_is_the_merge(zoo, name, folder, sources, rule=None):
    """`sources` are base (or None) and models, as transformers opens them."""
    family = FAMILIES[name]
    base, *states = [source and zoo.state(source, family.model) for source in sources]
    return assert_merged(folder, family.auto, base, states, rule or task_arithmetic(0.5), family.inputs())


@pytest.mark.parametrize(("name", "holder"), pairs(COPIES, ["base", "a model", "every model", "everyone"]))
def test_a_redundant_copy_is_merged_as_what_it_copies(zoo, name, holder, tmp_path):
    base, a, b = models_of(zoo, name)
    copied = [redundant(zoo, name, folder) for folder in (base, a, b)]
    sources = {
        "base": (copied[0], a, b),
        "a model": (base, copied[1], b),
        "every model": (base, copied[1], copied[2]),
        "everyone": copied,
    }[holder]
    for result in outcomes(recipe_of(*sources), tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, (base, a, b))


def assert_copies_equal(name, folder):
    written = files.weights(folder)
    original, *copies = COPIES[name]
    assert all(written[copy].equal(written[original]) for copy in copies if copy in written)


def everyone_with_copies(zoo, name):
    return [redundant(zoo, name, folder) for folder in models_of(zoo, name)]


@pytest.mark.parametrize(
    ("name", "method"), pairs(["qwen2-tied", "bert", "t5", "whisper"], ["ties", "dare-linear", "dare-ties", "slerp"])
)
def test_a_tensor_and_its_copies_stay_equal_whatever_the_method(zoo, name, method, tmp_path):
    base, a, b = everyone_with_copies(zoo, name)
    recipe = recipe_of(None if method == "slerp" else base, a, b, method=method)
    for result in outcomes(recipe, tmp_path / "out"):
        assert_copies_equal(name, result.path)


@pytest.mark.parametrize("method", ["tsv-merge", "iso-c", "iso-cts"])
def test_a_copy_is_no_matrix_where_its_tensor_is_none(zoo, method, tmp_path):
    recipe = recipe_of(*everyone_with_copies(zoo, "bert"), method=method)
    for result in outcomes(recipe, tmp_path / "out"):
        assert_copies_equal("bert", result.path)


@pytest.mark.parametrize(("name", "which"), pairs(["qwen2-tied", "t5", "bert", "whisper"], ["the tensor", "the copy"]))
def test_an_override_of_one_name_holds_for_all_or_is_questioned(zoo, name, which, tmp_path):
    recipe = recipe_of(*everyone_with_copies(zoo, name))
    match = COPIES[name][0 if which == "the tensor" else -1]
    recipe["merge"]["overrides"] = [{"match": match, "use": "a"}]
    for result in outcomes(recipe, tmp_path / "out", refusal=match):
        assert_copies_equal(name, result.path)
        taken = files.weights(result.path)[COPIES[name][0]].equal(files.weights(zoo.tuned(name, 1))[COPIES[name][0]])
        assert taken or match in " ".join(result.warnings)


@pytest.mark.parametrize("name", COPIES if LONG else ["qwen2-tied", "bert", "t5", "whisper"])
def test_an_average_ties_what_its_models_tie(zoo, name, tmp_path):
    _, a, b = models_of(zoo, name)
    for index, sources in enumerate([(redundant(zoo, name, a), b), (a, redundant(zoo, name, b))]):
        for result in outcomes(recipe_of(None, *sources, method="linear"), tmp_path / f"out{index}"):
            assert_is_the_merge(zoo, name, result.path, (None, a, b), linear)


@pytest.mark.parametrize(("name", "says"), pairs(["qwen2-tied", "gemma2", "gpt2", "whisper", "bert"], [True, False]))
def test_a_head_of_its_own_among_tied_models_is_merged_as_a_head(zoo, name, says, tmp_path):
    """transformers keeps a head that differs from the embeddings, whatever the config says."""
    base, tied, b = models_of(zoo, name)
    untied = zoo.made(f"{b.name}-own-head-{says}", lambda folder: _untied(folder, name, b, says=says))
    for result in outcomes(recipe_of(base, tied, untied), tmp_path / "out"):
        assert_is_the_merge(zoo, name, result.path, (base, tied, untied))
        assert config_of(result.path)["tie_word_embeddings"] is False


def _untied(folder, name, source, *, says):
    original, *_, head = COPIES[name]
    files.with_own_head(folder, source, original, head)
    if name == "bert":  # stored where the decoder is not tied
        bias = "cls.predictions.bias", "cls.predictions.decoder.bias"
        return change_config(files.with_copies(folder, folder, *bias), tie_word_embeddings=says)
    return change_config(folder, tie_word_embeddings=says)


def test_t5_keeps_the_scale_of_its_answers_where_a_head_of_its_own_is_merged(zoo, tmp_path):
    """T5 takes the word `tie_word_embeddings` as: scale what the decoder gives to the head."""
    base, tied, b = models_of(zoo, "t5")
    untied = zoo.made("t5-own-head", lambda folder: _untied(folder, "t5", b, says=True))
    for result in outcomes(recipe_of(base, tied, untied), tmp_path / "out"):
        module = assert_is_the_merge(zoo, "t5", result.path, (base, tied, untied))
        assert module.config.scale_decoder_outputs


def test_t5_models_that_scale_their_answers_otherwise_are_not_merged_silently(zoo, tmp_path):
    base, a, b = models_of(zoo, "t5")
    other = zoo.made("t5-unscaled", lambda folder: _untied(folder, "t5", b, says=False))
    assert_said("tie_word_embeddings", recipe_of(base, a, other), tmp_path / "out")


def test_a_tied_model_among_untied_ones_gives_its_embeddings_to_the_head(zoo, tmp_path):
    base, a, b = (zoo.base("qwen2"), *(zoo.tuned("qwen2", seed) for seed in (1, 2)))
    tied = zoo.made("qwen2-tied-among-untied", lambda folder: _tied(folder, a))
    for result in outcomes(recipe_of(base, tied, b), tmp_path / "out"):
        assert_is_the_merge(zoo, "qwen2", result.path, (base, tied, b))


def _tied(folder, source):
    files.rewritten(folder, source, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    return change_config(folder, tie_word_embeddings=True)
