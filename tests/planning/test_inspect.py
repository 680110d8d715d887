"""Facts about a checkpoint from its headers, however odd its config."""

import json

import pytest
import torch

from mergetool.errors import SourceError
from mergetool.planning.inspect import facts_about
from tests.files import tensors, write_model, write_raw


def test_facts_come_from_headers_and_config(tmp_path):
    state = tensors(0, dtype=torch.bfloat16) | {"position_ids": torch.arange(4)}
    write_model(tmp_path, state, {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
    facts = facts_about(tmp_path)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(tensor.numel() for tensor in state.values()) - 4
    assert facts["bytes_by_dtype"] == {"BF16": 2 * facts["parameters"], "I64": 32}
    assert facts["tied_embeddings"] is True
    assert facts["remarks"] == []
    assert {entry["name"] for entry in facts["tensors"]} == set(state)
    json.dumps(facts)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": 3}, "unknown"),
        ({"architectures": {"a": 1}}, "unknown"),
        ({"architectures": [], "model_type": "bert"}, "bert"),
        ({"architectures": [None]}, "None"),
        ({"model_type": 3}, "3"),
        ({"architectures": None}, "unknown"),
    ],
)
def test_an_odd_config_is_no_obstacle(tmp_path, config, architecture):
    write_model(tmp_path, tensors(0), config)
    assert facts_about(tmp_path)["architecture"] == architecture


def test_what_looks_wrong_is_remarked_on(tmp_path):
    crooked = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    write_raw(tmp_path / "model-1.safetensors", crooked, bytes(5))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "model-1.safetensors"}}')
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    remarks = " ".join(facts_about(tmp_path)["remarks"])
    assert "1 tensors are not aligned, first 'b'" in remarks
    assert "1 tensors are not in the index" in remarks
    assert "quantised" in remarks


def test_a_broken_model_is_refused(tmp_path):
    with pytest.raises(SourceError):
        facts_about(tmp_path)
