"""What config.json, tokenizers and small files say: parents that disagree, and what goes with a result."""

import json

import pytest
import torch
import transformers as hf

import mergetool
from tests.checkpoints.recipes import recipe_of
from tests.turns import pairs, some
from tests.zoo import files, text
from tests.zoo.advice import assert_said, outcomes
from tests.zoo.build import build, config_of, copy_of, tuned
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import logits, opened, task_arithmetic

MEANINGS = [
    ("llama", "rope_theta", {"rope_parameters": {"rope_theta": 500000.0}}),
    ("llama", "rope_theta", {"rope_parameters": None, "rope_theta": 500000.0}),
    ("llama", "rope_type", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", "rope_", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}),
    ("llama", "num_attention_heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ("llama", "hidden_act", {"hidden_act": "gelu"}),
    ("llama", "rms_norm_eps", {"rms_norm_eps": 1e-2}),
    ("llama", "model_type", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    (
        "qwen2",
        "layer_types",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
    ),
    ("mixtral", "sliding_window", {"sliding_window": 4}),
    ("qwen3-moe", "num_experts_per_tok", {"num_experts_per_tok": 1}),
    ("qwen3-moe", "norm_topk_prob", {"norm_topk_prob": True}),
    ("mixtral", "num_experts_per_tok", {"num_experts_per_tok": 1}),
    ("gemma2", "final_logit_softcapping", {"final_logit_softcapping": 5.0}),
    ("gemma2", "query_pre_attn_scalar", {"query_pre_attn_scalar": 16}),
    ("gemma3-text", "layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3", "hidden_act", {"vision_config": {"hidden_act": "relu"}}),
    ("gemma3", "rope_theta", {"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}}),
    ("gpt2", "activation_function", {"activation_function": "relu"}),
    ("gpt2", "n_head", {"n_head": 2}),
    ("bert", "layer_norm_eps", {"layer_norm_eps": 1e-2}),
    ("bert", "hidden_act", {"hidden_act": "relu"}),
    ("distilbert", "activation", {"activation": "relu"}),
    ("t5", "feed_forward_proj", {"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}),
    ("bart", "scale_embedding", {"scale_embedding": True}),
    ("vit", "layer_norm_eps", {"layer_norm_eps": 1e-2}),
    ("clip", "hidden_act", {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}),
    ("whisper", "activation_function", {"activation_function": "relu"}),
]
"""Keys that give tensors of one shape another meaning."""


def _case(value):
    """What stands for a case, or for a part of it, in the name of a test."""
    return value if isinstance(value, str) else json.dumps(value)[:60]


@pytest.mark.parametrize(("case", "method"), pairs(MEANINGS, ["task-arithmetic", "linear"]), ids=_case)
def test_parents_that_disagree_in_what_tensors_mean_are_not_merged_silently(zoo, case, method, tmp_path):
    name, word, changes = case
    base = zoo.base(name) if method != "linear" else None
    other = copy_of(tmp_path / "other", zoo.tuned(name, 2), **changes)
    assert_said(word, recipe_of(base, zoo.tuned(name, 1), other, method=method), tmp_path / "out")


@pytest.mark.parametrize(("name", "word", "changes"), some(MEANINGS, 5), ids=_case)
def test_these_changes_of_a_config_do_change_the_answers(zoo, name, word, changes, tmp_path):
    """Else the test before would ask for noise."""
    model, source = FAMILIES[name].model, zoo.tuned(name, 2)
    if "model_type" in changes:  # another program: its answers need not differ for these tokens
        return
    other = copy_of(tmp_path / "other", source, **changes)
    inputs = FAMILIES[name].inputs()
    first, second = (_answers(folder, model, inputs) for folder in (source, other))
    assert not torch.allclose(first, second, atol=1e-6)


def _answers(folder, model, inputs):
    return logits(opened(folder, model)[0], inputs)


HARMLESS = [
    ("llama", {"transformers_version": "4.40.0", "_name_or_path": "someone/else", "use_cache": False}),
    ("llama", {"attention_dropout": 0.1, "initializer_range": 0.01, "pretraining_tp": 2}),
    ("llama", {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}),
    ("llama", {"rope_parameters": None}),
    ("llama", {"head_dim": None}),
    ("llama", {"dtype": None, "torch_dtype": "float32"}),
    ("mixtral", {"router_aux_loss_coef": 0.02, "output_router_logits": True}),
    ("bert", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "gradient_checkpointing": False}),
    ("bert", {"layer_norm_eps": None, "type_vocab_size": None}),
    ("t5", {"task_specific_params": {"summarization": {"prefix": "summarize: "}}, "dropout_rate": 0.0}),
    ("whisper", {"mask_time_prob": 0.1, "apply_spec_augment": True, "max_length": 448}),
    ("gemma3", {"text_config": {"use_cache": False}}),
    ("clip", {"logit_scale_init_value": 1.0}),
]
"""Keys that training, storing or older versions write, and that change no answer."""


@pytest.mark.parametrize(
    ("name", "changes"), [pytest.param(*case, id=f"{case[0]}-{json.dumps(case[1])[:60]}") for case in HARMLESS]
)
def test_differences_that_change_no_answer_make_no_noise(zoo, name, changes, tmp_path):
    base, a = zoo.base(name), zoo.tuned(name, 1)
    other = copy_of(tmp_path / "other", zoo.tuned(name, 2), **changes)
    result = mergetool.run(recipe_of(base, a, other), output=tmp_path / "out")
    assert result.warnings == ()
    family = FAMILIES[name]
    states = [zoo.state(folder, family.model) for folder in (base, a, zoo.tuned(name, 2))]
    assert_merged(result.path, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs())


@pytest.mark.parametrize("method", ["task-arithmetic", "linear"])
def test_more_layers_than_the_config_says_are_not_written_silently(zoo, method, tmp_path):
    base, a = zoo.base("llama"), zoo.tuned("llama", 1)
    deep = build(tmp_path / "deep", "llama", 2, num_hidden_layers=3)
    recipe = recipe_of(base if method != "linear" else None, a, deep, method=method)
    for result in outcomes(recipe, tmp_path / "out", refusal="layers"):
        _, info = opened(result.path, hf.LlamaForCausalLM)
        assert not info["unexpected_keys"]


# ---------------------------------------------------------------------------------------- tokenizers


def shuffled():
    """The same tokens, as many; two of them under each other's ids."""
    tokens = text.token_list()
    tokens[10], tokens[20] = tokens[20], tokens[10]
    return tokens


@pytest.mark.parametrize("method", ["task-arithmetic", "linear"])
def test_tokenizers_of_one_size_with_other_contents_are_not_merged_silently(zoo, method, tmp_path):
    base, a = zoo.base("llama"), zoo.tuned("llama", 1)
    other = text.save_tokenizer(copy_of(tmp_path / "other", zoo.tuned("llama", 2)), shuffled())
    recipe = recipe_of(base if method != "linear" else None, a, other, method=method)
    assert_said("token", recipe, tmp_path / "out")


def test_one_tokenizer_written_in_two_ways_makes_no_noise(zoo, tmp_path):
    base, a = zoo.base("llama"), zoo.tuned("llama", 1)
    other = copy_of(tmp_path / "other", zoo.tuned("llama", 2))
    path = other / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=None, sort_keys=True))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": 2048, "padding_side": "left"})
    )
    assert mergetool.run(recipe_of(base, a, other), output=tmp_path / "out").warnings == ()


def chatty(folder, source, eos=7):
    """A chat model: another end of a turn, and a template."""
    copy_of(folder, source, eos_token_id=eos)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [eos, 2]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return text.save_tokenizer(folder, eos_token=text.token_list()[eos])


def test_a_chat_template_and_an_end_of_turn_are_not_left_behind_silently(zoo, tmp_path):
    chat = chatty(tmp_path / "chat", zoo.tuned("llama", 2))
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    assert_said("template", recipe_of(zoo.base("llama"), zoo.tuned("llama", 1), chat), tmp_path / "out")


def test_the_end_of_a_turn_follows_the_tokenizer(zoo, tmp_path):
    chat = chatty(tmp_path / "chat", zoo.tuned("llama", 2))
    recipe = recipe_of(zoo.base("llama"), zoo.tuned("llama", 1), chat, tokenizer={"source": "b"})
    out = mergetool.run(recipe, output=tmp_path / "out").path
    assert config_of(out)["eos_token_id"] == 7
    assert hf.GenerationConfig.from_pretrained(out).eos_token_id == [7, 2]
    assert hf.AutoTokenizer.from_pretrained(out).eos_token_id == 7


# ---------------------------------------------------------------------------------------- files beside the weights

CARRIED = [
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "entity_vocab.json",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "prophetnet.tokenizer",
    "qwen.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
]
"""Files that belong to the model, whose names transformers asks for."""
CODE = [
    "configuration_mine.py",
    "modeling_mine.py",
    "processing_mine.py",
    "image_processing_mine.py",
    "rotary.py",
    "custom_generate/generate.py",
]
"""Files that belong to the model, whose names config.json or the code in the folder asks for."""
LEFT = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    "pytorch_model.bin",
    "tf_model.h5",
    "model.onnx",
    "runs/events.out.tfevents.1",
    ".gitattributes",
    "adapter_config.json",
]
"""Files of a training, or of other weights."""


def merged_with(zoo, folder, more, **config):
    """The result of a base with these files (texts by name) in its folder."""
    base = copy_of(folder / "base", zoo.base("llama"), **config)
    for name, said in more.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(said)
    return mergetool.run(recipe_of(base, zoo.tuned("llama", 1)), output=folder / "out").path


def test_files_of_the_model_go_with_the_result(zoo, tmp_path):
    out = merged_with(zoo, tmp_path, dict.fromkeys(CARRIED, "# mine"))
    assert [name for name in CARRIED if not (out / name).is_file() or (out / name).read_bytes() != b"# mine"] == []


def test_code_of_the_model_goes_with_the_result(zoo, tmp_path):
    """What config.json names, what that imports, and what `AutoClass` looks for."""
    named = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    code = dict.fromkeys(CODE, "# mine")
    code["modeling_mine.py"] = "from .rotary import rotate\nfrom .configuration_mine import Mine\n"
    out = merged_with(zoo, tmp_path, code, auto_map=named)
    assert {name: (out / name).read_text() for name in code} == code


def test_files_of_a_training_stay_behind(zoo, tmp_path):
    out = merged_with(zoo, tmp_path, dict.fromkeys(LEFT, "{}"))
    assert [name for name in LEFT if (out / name).exists()] == []


def sentence_models(zoo):
    def make(folder):
        base = text.as_sentence_model(build(folder / "base", "bert-bare"), 0)
        for seed in (1, 2):
            text.as_sentence_model(tuned(folder / str(seed), base, seed, model=hf.BertModel), seed)
        return folder

    root = zoo.made("sentences", make)
    return root / "base", root / "1", root / "2"


def test_a_sentence_model_gives_sentences_the_vectors_of_the_merge(zoo, tmp_path):
    """The encoder is merged; pooling, dense layer and prompts are those of the base (or merged, too)."""
    library = pytest.importorskip("sentence_transformers")
    base, *models = sentence_models(zoo)
    out = mergetool.run(recipe_of(base, *models), output=tmp_path / "out").path
    assert (out / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
    assert (out / "sentence_bert_config.json").is_file()
    assert (out / "config_sentence_transformers.json").is_file()
    states = [zoo.state(folder, hf.BertModel) for folder in (base, *models)]
    expected = library.SentenceTransformer(str(base), device="cpu").double()
    expected[0].auto_model.load_state_dict(task_arithmetic(0.5)(states[0], states[1:]))
    dense = [files.weights(folder / "2_Dense") for folder in (base, *models, out)]
    merged = task_arithmetic(0.5)(dense[0], dense[1:3])
    assert any(
        all(torch.allclose(dense[3][key], found[key], atol=1e-5) for key in merged) for found in (dense[0], merged)
    )
    expected[2].linear.load_state_dict({key.removeprefix("linear."): value for key, value in dense[3].items()})
    sentences = ["w1 w2 w7", "w9"]
    vectors = library.SentenceTransformer(str(out), device="cpu").double().encode(sentences)
    assert abs(vectors - expected.encode(sentences)).max() < 1e-4
