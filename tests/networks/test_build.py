"""Models as transformers builds them: their tensors under the names of the files, whatever it made of those."""

import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergetool.errors import EvaluationError, MergetoolError, SourceError
from mergetool.evaluate.language_model import LanguageModel
from mergetool.networks.library import library
from mergetool.networks.tokenizer import load_tokenizer
from tests.tuning.planted import write_tokenizer

TINY = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def saved(model, folder):
    """A model and a tokenizer in a folder; its tensors as they are stored."""
    model.save_pretrained(folder)
    write_tokenizer(folder, 20)
    return load_file(folder / "model.safetensors")


def assert_slots_are_the_model(folder, stored):
    live = LanguageModel(folder)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    slots = live.slots({name: tuple(tensor.shape) for name, tensor in stored.items()})
    for tensor in live.model.state_dict().values():
        tensor.zero_()
    for name, slot in slots.items():
        slot.view(-1).copy_(stored[name].view(-1))
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_experts_that_lie_side_by_side_in_memory_are_written_one_by_one(tmp_path):
    config = transformers.MixtralConfig(**TINY, num_local_experts=3)
    stored = saved(transformers.MixtralForCausalLM(config), tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in stored
    assert_slots_are_the_model(tmp_path, stored)


def test_a_file_whose_names_lack_the_prefix_is_written(tmp_path):
    stored = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, tie_word_embeddings=True)), tmp_path)
    stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert_slots_are_the_model(tmp_path, stored)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    stored = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    live = LanguageModel(tmp_path)
    with pytest.raises(EvaluationError, match=r"it lacks none, the model knows no stranger"):
        live.slots(shapes | {"stranger": (2, 2)})
    del shapes["model.norm.weight"]
    with pytest.raises(EvaluationError, match=r"it lacks model\.norm\.weight, the model knows no others"):
        live.slots(shapes)


def test_a_tokenizer_of_bytes_needs_no_vocabulary_and_no_other_is_made_up(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a").input_ids == [100, 1]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(SourceError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    with pytest.raises(EvaluationError, match="its tokenizer cannot be opened"):
        load_tokenizer(tmp_path, kind=EvaluationError)


@pytest.mark.parametrize("kind", [SourceError, EvaluationError])
def test_what_needs_transformers_says_what_to_install(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MergetoolError, match="evaluating needs transformers, which is not installed") as caught:
        library("evaluating", "here", kind)
    assert type(caught.value) is kind
    assert caught.value.fix == "pip install 'mergetool[eval]'"
