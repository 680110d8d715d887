"""Parents that give nothing, and files that come from the wrong one or from nowhere."""

import pytest
import torch
import transformers as hf

import mergetool
from mergetool.errors import MergetoolError
from tests.checkpoints.recipes import recipe_of
from tests.zoo import files, text
from tests.zoo.advice import assert_said, outcomes
from tests.zoo.build import change_config, config_of, copy_of, stir


def llamas(zoo):
    return zoo.base("llama"), zoo.tuned("llama", 1), zoo.tuned("llama", 2)


@pytest.mark.parametrize("missing", ["base", "skip"])
def test_another_architecture_is_called_by_its_name(zoo, missing, tmp_path):
    base, a, _ = llamas(zoo)
    assert_said("gpt2", recipe_of(base, a, zoo.base("gpt2"), check={"missing": missing}), tmp_path / "out")


def test_another_architecture_is_called_by_its_name_before_its_tensors_are_listed(zoo, tmp_path):
    base, a, _ = llamas(zoo)
    assert_said("gpt2", recipe_of(base, a, zoo.base("gpt2")), tmp_path / "out")


@pytest.mark.parametrize("missing", ["base", "skip"])
@pytest.mark.parametrize("kept", ["layers.1", "model.norm"])
def test_a_parent_that_has_less_than_half_of_the_tensors_is_named(zoo, missing, kept, tmp_path):
    base, a, b = llamas(zoo)
    part = files.rewritten(tmp_path / "part", b, lambda state: {k: v for k, v in state.items() if kept in k})
    count = len(files.weights(part))
    for recipe in (recipe_of(base, a, part), recipe_of(None, a, part, method="linear")):
        if recipe["merge"]["method"] == "linear" and missing == "base":
            continue
        recipe["check"] = {"missing": missing}
        result = mergetool.run(recipe, output=tmp_path / f"out-{recipe['merge']['method']}")
        said = " ".join(result.warnings)
        assert "'b'" in said
        assert f"{count} of 21" in said


@pytest.mark.parametrize("how", ["the same folder", "a copy"])
def test_a_model_that_is_the_base_is_named(zoo, how, tmp_path):
    base, a, _ = llamas(zoo)
    other = base if how == "the same folder" else copy_of(tmp_path / "copy", base)
    assert_said("'b'", recipe_of(base, a, other), tmp_path / "out")


def test_parents_that_all_take_part_make_no_noise(zoo, tmp_path):
    assert mergetool.run(recipe_of(*llamas(zoo)), output=tmp_path / "out").warnings == ()


def without_tokenizer(folder, source):
    copy_of(folder, source)
    for path in folder.glob("token*"):
        path.unlink()
    return folder


def test_a_base_without_a_tokenizer_leaves_that_to_a_model_and_says_so(zoo, tmp_path):
    base, a, b = llamas(zoo)
    result = mergetool.run(recipe_of(without_tokenizer(tmp_path / "base", base), a, b), output=tmp_path / "out")
    assert (result.path / "tokenizer.json").is_file()
    assert result.warnings == ("the base has no tokenizer: the result has that of model 'a'",)


def test_a_base_that_is_a_bare_file_leaves_config_json_to_a_model(zoo, tmp_path):
    base, a, b = llamas(zoo)
    result = mergetool.run(recipe_of(base / "model.safetensors", a, b), output=tmp_path / "out")
    hf.LlamaForCausalLM.from_pretrained(result.path)


def test_a_tokenizer_is_not_taken_from_a_model_that_has_none(zoo, tmp_path):
    base, a, b = llamas(zoo)
    bare = without_tokenizer(tmp_path / "bare", b)
    with pytest.raises(MergetoolError, match="tokenizer"):
        mergetool.run(recipe_of(base, a, bare, tokenizer={"source": "b"}), output=tmp_path / "out")


def test_a_source_that_has_a_template_only_gives_that_and_the_ids(zoo, tmp_path):
    base, a, b = llamas(zoo)
    chat = without_tokenizer(tmp_path / "chat", b)
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    change_config(chat, eos_token_id=7)
    result = mergetool.run(recipe_of(base, a, chat, tokenizer={"source": "b"}), output=tmp_path / "out")
    assert any("has chat_template.jinja and no tokenizer" in words for words in result.warnings)
    assert (result.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (result.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert config_of(result.path)["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("first", "second"),
    [(64, [*text.token_list(62), "<|im_start|>", "<|im_end|>"]), (60, text.token_list(64))],
    ids=["two words became chat tokens", "rows of padding got words"],
)
def test_tokens_that_a_model_put_into_rows_of_others_are_not_lost_silently(zoo, first, second, tmp_path):
    base, a, b = llamas(zoo)
    mine = text.save_tokenizer(copy_of(tmp_path / "base", base), text.token_list(first))
    other = text.save_tokenizer(copy_of(tmp_path / "other", b), second)
    assert_said("token", recipe_of(mine, a, other), tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "ties", "dare-linear"])
def test_a_mask_of_minus_infinity_stays_what_it_is(zoo, method, tmp_path):
    mask = torch.triu(torch.full((4, 4), -torch.inf), 1)
    sources = [
        files.with_old_buffers(tmp_path / str(index), source, model__mask=mask)
        for index, source in enumerate(llamas(zoo))
    ]
    recipe = recipe_of(None if method == "linear" else sources[0], *sources[1:], method=method)
    for result in outcomes(recipe, tmp_path / "out"):
        assert torch.equal(files.weights(result.path)["model.mask"], mask)


def test_a_small_float32_island_stays_wide(zoo, tmp_path):
    """Router corrections and the like are kept in float32 on purpose, among weights in bfloat16."""
    island = "model.layers.0.mlp.gate.e_score_correction_bias"
    sources = [
        files.rewritten(
            tmp_path / str(index),
            source,
            lambda state: (
                {key: value.bfloat16() for key, value in state.items()} | {island: torch.tensor([0.1, 0.2, 0.3, 0.4])}
            ),
        )
        for index, source in enumerate(llamas(zoo))
    ]
    result = mergetool.run(recipe_of(*sources, output={"dtype": "bfloat16"}), output=tmp_path / "out")
    written = files.weights(result.path)
    assert written.pop(island).dtype == torch.float32
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


def test_a_variance_below_zero_is_not_written_silently(tmp_path):
    """A batch norm with such a variance answers NaN."""

    def resnet(folder, seed, variance):
        config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3)
        made = hf.ResNetForImageClassification(config)
        stir(made, seed)
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(variance)
        made.save_pretrained(folder)
        return folder

    models = [resnet(tmp_path / str(index), index, variance) for index, variance in enumerate((1.0, 0.5, 0.4))]
    recipe = recipe_of(*models)
    recipe["merge"]["scale"] = 1.0
    assert_said("running_var", recipe, tmp_path / "out")
