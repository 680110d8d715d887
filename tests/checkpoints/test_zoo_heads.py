"""Models with and without a head, with another head, and text models beside multimodal ones."""

import pytest
import torch
import transformers as hf

from tests.checkpoints.recipes import recipe_of
from tests.files import LONG
from tests.zoo.advice import outcomes
from tests.zoo.build import config_of
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES, VOCAB, ids
from tests.zoo.oracle import logits, opened, task_arithmetic

HEADED = {
    "bert": (hf.BertModel, hf.BertForSequenceClassification),
    "bert tokens": (hf.BertModel, hf.BertForTokenClassification),
    "bert questions": (hf.BertModel, hf.BertForQuestionAnswering),
    "roberta": (hf.RobertaModel, hf.RobertaForSequenceClassification),
    "distilbert": (hf.DistilBertModel, hf.DistilBertForSequenceClassification),
    "albert": (hf.AlbertModel, hf.AlbertForSequenceClassification),
    "gpt2": (hf.GPT2Model, hf.GPT2ForSequenceClassification),
    "llama": (hf.LlamaModel, hf.LlamaForSequenceClassification),
    "qwen3": (hf.Qwen3Model, hf.Qwen3ForSequenceClassification),
    "vit": (hf.ViTModel, hf.ViTForImageClassification),
}
"""The model without a head, and with one."""


def headless(zoo, name, body, source=None):
    """The inner model alone: what `AutoModel` saves."""
    source = source or zoo.base(name)
    return zoo.made(f"{source.name}-{body.__name__}", lambda folder: _saved(folder, body, source))


def _saved(folder, body, source):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a BERT gets a pooler that its base may not have
        body.from_pretrained(source).save_pretrained(folder)


def classifier(zoo, name, head, seed, base):
    labels = {} if head is hf.BertForQuestionAnswering else {"num_labels": 3}
    return zoo.tuned(name, seed, model=head, base=base, **labels)


@pytest.mark.parametrize("case", HEADED if LONG else ["bert", "bert questions", "distilbert", "llama", "vit"])
def test_a_base_without_a_head_and_fine_tunes_with_one_meet(zoo, case, tmp_path):
    """The first fine-tune's head goes with the result, and config.json says how many labels it has."""
    body, head = HEADED[case]
    name = case.partition(" ")[0]
    base = headless(zoo, name, body)
    a = classifier(zoo, name, head, 1, base)
    b = zoo.tuned(name, 2, model=body, base=base)
    for result in outcomes(recipe_of(base, a, b), tmp_path / "out"):
        states = [zoo.state(folder, head) for folder in (base, a, b)]
        inputs = FAMILIES[name].inputs()
        module = merged_with_head(result.path, head, states, inputs)
        assert module.num_labels == opened(a, head)[0].num_labels


def merged_with_head(folder, head, states, inputs):
    """The result opens as a model with this head. Its logits: `start_logits` where it answers questions."""
    if head is hf.BertForQuestionAnswering:
        module, info = opened(folder, head)
        assert not info["missing_keys"]
        assert all("pooler" in key for key in info["unexpected_keys"])
        expected = task_arithmetic(0.5)(states[0], states[1:])
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)
        return module
    return assert_merged(folder, head, states[0], states[1:], task_arithmetic(0.5), inputs, beside="pooler")


@pytest.mark.parametrize(
    "case", ["bert", "roberta", "distilbert", "llama", "gpt2", "t5"] if LONG else ["roberta", "gpt2", "t5"]
)
def test_a_base_with_a_head_and_fine_tunes_without_one_meet(zoo, case, tmp_path):
    family = FAMILIES[case]
    body = {**{name: bodies[0] for name, bodies in HEADED.items()}, "t5": hf.T5Model}[case]
    base = zoo.base(case)
    tuned = [headless(zoo, case, body, zoo.tuned(case, seed)) for seed in (1, 2)]
    for result in outcomes(recipe_of(base, *tuned), tmp_path / "out"):
        states = [zoo.state(folder, family.model) for folder in (base, *tuned)]
        beside = "pooler"  # transformers starts one at random where it saves a BERT without its head
        assert_merged(
            result.path, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs(), beside=beside
        )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", hf.BertForSequenceClassification),
        ("roberta", hf.RobertaForSequenceClassification),
        ("distilbert", hf.DistilBertForSequenceClassification),
        ("llama", hf.LlamaForSequenceClassification),
        ("gpt2", hf.GPT2ForSequenceClassification),
    ][:: 1 if LONG else 3],
)
def test_a_language_model_and_its_classifiers_meet(zoo, name, head, tmp_path):
    """The base has a head for tokens, the fine-tunes one for labels: what they share is merged."""
    base, inputs = zoo.base(name), FAMILIES[name].inputs()
    a, b = (classifier(zoo, name, head, seed, base) for seed in (1, 2))
    for result in outcomes(recipe_of(base, a, b), tmp_path / "out"):
        states = [zoo.state(folder, head) for folder in (base, a, b)]
        expected = task_arithmetic(0.5)(states[0], states[1:])
        module, info = opened(result.path, head)
        assert not info["missing_keys"]
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)
        assert module.num_labels == 3
        assert logits(module, inputs).shape[-1] == 3


def test_heads_of_other_labels_are_not_averaged_silently(zoo, tmp_path):
    """Two classifiers of three classes each; the names of the classes differ."""
    base = headless(zoo, "bert", hf.BertModel)
    labels = [{0: "no", 1: "yes", 2: "maybe"}, {0: "red", 1: "green", 2: "blue"}]
    models = [
        zoo.tuned(
            "bert",
            seed,
            model=hf.BertForSequenceClassification,
            base=base,
            id2label=names,
            label2id={word: key for key, word in names.items()},
        )
        for seed, names in enumerate(labels, 1)
    ]
    said = []
    for result in outcomes(recipe_of(None, *models, method="linear"), tmp_path / "out", refusal="label"):
        said.append(" ".join(result.warnings))
    assert all("label" in text for text in said)


TEXT_OF = {
    "gemma3": hf.Gemma3ForCausalLM,
    "llava": hf.LlamaForCausalLM,
    "qwen2-vl": hf.Qwen2ForCausalLM,
}
"""The class of the text part alone."""


def text_part(zoo, name, source):
    """The text model of a multimodal one, as a checkpoint of its own."""

    def make(folder):
        whole = FAMILIES[name].model.from_pretrained(source)
        config = _text_config(whole.config.get_text_config(), name)
        made = TEXT_OF[name](config)
        body = {f"model.{key}": value for key, value in whole.model.language_model.state_dict().items()}
        head = {} if config.tie_word_embeddings else {"lm_head.weight": whole.lm_head.weight.detach()}
        made.load_state_dict(body | head, strict=bool(head))
        made.tie_weights()
        made.save_pretrained(folder)

    return zoo.made(f"{source.name}-text", make)


def _text_config(config, name):
    if name != "qwen2-vl":
        return config
    kept = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "rope_parameters")}
    return hf.Qwen2Config(**kept)


def text_state(zoo, name, folder):
    """A text model's tensors under the names that the multimodal module gives them."""
    found = zoo.state(folder, TEXT_OF[name])
    return {
        f"model.language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key: value
        for key, value in found.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "llava",
        "qwen2-vl",
    ],
)
def test_the_text_part_of_a_multimodal_base_takes_part(zoo, name, tmp_path):
    """A multimodal base, a multimodal fine-tune and one of the text model alone: the eyes move by the first only."""
    family, base, a = FAMILIES[name], zoo.base(name), zoo.tuned(name, 1)
    b = text_part(zoo, name, zoo.tuned(name, 2))
    states = [zoo.state(base, family.model), zoo.state(a, family.model), text_state(zoo, name, b)]
    for result in outcomes(recipe_of(base, a, b), tmp_path / "out"):
        assert_merged(result.path, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs())


@pytest.mark.parametrize("name", TEXT_OF)
def test_a_text_base_and_a_multimodal_fine_tune_meet(zoo, name, tmp_path):
    """The result is the text model, or all of the multimodal one (then config.json says so)."""
    family, text = FAMILIES[name], TEXT_OF[name]
    base, b = (text_part(zoo, name, source) for source in (zoo.base(name), zoo.tuned(name, 2)))
    a = zoo.tuned(name, 1)
    states = [text_state(zoo, name, base), zoo.state(a, family.model), text_state(zoo, name, b)]
    merged = task_arithmetic(0.5)(states[0], states[1:])
    for result in outcomes(recipe_of(base, a, b), tmp_path / "out"):
        whole = config_of(result.path)["architectures"] == [family.model.__name__]
        module, info = opened(result.path, family.model if whole else text)
        assert not info["missing_keys"]
        assert whole or not info["unexpected_keys"]
        for key, value in module.state_dict().items():
            inner = key if whole or not key.startswith("model.") else f"model.language_model.{key[6:]}"
            torch.testing.assert_close(value, merged[inner], rtol=0, atol=1e-4)


def test_a_larger_vocabulary_chosen_by_use_is_what_config_json_says(zoo, tmp_path):
    base, a = zoo.base("llama"), zoo.tuned("llama", 1)
    larger = zoo.made("llama-larger", lambda folder: _larger(folder, zoo.tuned("llama", 2), VOCAB + 3))
    use = [{"match": name, "use": "b"} for name in ("*embed_tokens*", "lm_head*")]
    recipe = recipe_of(base, a, larger)
    recipe["merge"]["overrides"] = use
    for result in outcomes(recipe, tmp_path / "out"):
        module, info = opened(result.path, hf.LlamaForCausalLM)
        assert not info["missing_keys"]
        assert config_of(result.path)["vocab_size"] == VOCAB + 3
        assert logits(module, {"input_ids": ids(1, 4, high=VOCAB + 3)}).shape[-1] == VOCAB + 3


def _larger(folder, source, count):
    made = hf.LlamaForCausalLM.from_pretrained(source)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.resize_token_embeddings(count, mean_resizing=False)
    made.save_pretrained(folder)


def test_the_advice_about_a_larger_vocabulary_leads_to_a_right_merge(zoo, tmp_path):
    """Whatever is advised, the result opens, and the rest is merged."""
    base, a = zoo.base("llama"), zoo.tuned("llama", 1)
    larger = zoo.made("llama-larger", lambda folder: _larger(folder, zoo.tuned("llama", 2), VOCAB + 3))
    states = [zoo.state(folder, hf.LlamaForCausalLM) for folder in (base, a, larger)]
    for result in outcomes(recipe_of(base, a, larger), tmp_path / "out"):
        module, info = opened(result.path, hf.LlamaForCausalLM)
        assert not info["missing_keys"]
        rows = module.lm_head.weight.shape[0]
        assert rows == config_of(result.path)["vocab_size"] == module.model.embed_tokens.weight.shape[0]
        name = "model.layers.1.mlp.up_proj.weight"
        expected = task_arithmetic(0.5)({name: states[0][name]}, [{name: found[name]} for found in states[1:]])
        torch.testing.assert_close(module.state_dict()[name], expected[name], rtol=0, atol=1e-4)
