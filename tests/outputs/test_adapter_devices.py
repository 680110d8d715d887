"""Adapters that are made on a device are those that the CPU makes."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import mergetool
from tests.devices import every_device, present
from tests.outputs.test_adapter_runs import LLAMA


def changes(path):
    """What the adapter adds to each weight."""
    halves = load_file(path / "adapter_model.safetensors")
    return {name: halves[name.replace("lora_A", "lora_B")] @ a for name, a in halves.items() if "lora_A" in name}


@every_device
@pytest.mark.parametrize("method", ["task-arithmetic", "tsv-merge"])
def test_an_adapter_is_made_on_a_device_as_on_the_cpu(method, device, tmp_path):
    torch.manual_seed(0)
    network = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    network.save_pretrained(tmp_path / "base")
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name in "ab":
        network.load_state_dict({key: x + torch.randn_like(x) * 0.02 * ("proj" in key) for key, x in state.items()})
        network.save_pretrained(tmp_path / name)
    recipe = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "ab"},
        "merge": {"method": method},
        "output": {"kind": "adapter", "rank": 4},
    }
    here = changes(mergetool.run(recipe, output=tmp_path / "here", device="cpu").path)
    with present(device):
        there = changes(mergetool.run(recipe, output=tmp_path / "there", device=device).path)
    assert there.keys() == here.keys()
    for name, change in here.items():
        assert float((there[name] - change).norm()) <= 1e-5 * float(change.norm()), name
