"""`architecture: auto`: from config.json and the names and shapes of a file to a proved spec of that file."""

import json
import sys

import pytest
import transformers
from safetensors import safe_open

from mergetool.arch import match
from mergetool.errors import PlanError
from mergetool.networks.trace import resolve
from tests.arch.networks import TINY, randomised, transformer
from tests.arch.test_trace import places


def saved(model, folder):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "GPT2LMHeadModel"])
def test_the_derived_spec_of_a_file_is_the_one_written_by_hand(name, tmp_path):
    model, _ = transformer(name, num_hidden_layers=1) if "ViT" in name else transformer(name, n_layer=1)
    shapes, config = saved(model, tmp_path)
    spec = resolve("auto", shapes, config)
    assert set(spec.tensors) == set(shapes)
    assert places(spec) == places(match.resolve(None, shapes, config))


def test_a_family_without_a_file_is_derived(tmp_path):
    settings = transformers.DistilBertConfig(
        vocab_size=20, dim=12, n_layers=1, n_heads=3, hidden_dim=20, max_position_embeddings=16
    )
    shapes, config = saved(randomised(transformers.DistilBertForMaskedLM(settings)), tmp_path)
    with pytest.raises(PlanError, match="no known architecture"):
        resolve(None, shapes, config)
    spec = resolve("auto", shapes, config)
    assert sorted((group.size, len(group.spaces)) for group in spec.groups) == [(3, 3), (12, 1), (20, 1)]
    assert spec.tied == ()
    assert all(spec.tensors[name].matched for name in shapes)


def test_images_of_any_size_are_traced_at_a_size_of_ours(tmp_path):
    settings = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    shapes, config = saved(randomised(transformers.ResNetForImageClassification(settings)), tmp_path)
    assert sorted(group.size for group in resolve("auto", shapes, config).groups) == [8, 8, 16, 16]


def test_what_cannot_be_built_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PlanError, match=r"there is no config\.json"):
        resolve("auto", {"w": (2, 2)}, {})
    with pytest.raises(PlanError, match=r"config\.json names no network that transformers knows"):
        resolve("auto", {"w": (2, 2)}, {"architectures": ["MartianForCausalLM"]})
    config = {**TINY, "max_position_embeddings": 16, "architectures": ["BertModel"], "model_type": "bert"}
    with pytest.raises(PlanError, match=r"BertModel has no place for stranger\.weight"):
        resolve("auto", {"stranger.weight": (2, 2)}, config)
    with pytest.raises(PlanError, match="the checkpoint does not fit BertModel"):
        resolve("auto", {"embeddings.word_embeddings.weight": (2, 2)}, config)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlanError, match="transformers, which is not installed") as caught:
        resolve("auto", {}, config)
    assert caught.value.fix == "pip install 'mergetool[eval]'"
