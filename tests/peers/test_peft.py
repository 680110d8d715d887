"""Adapters as older versions of PEFT saved them answer as they did, and are merged as the same versions did it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mergetool.checkpoints.adapters import AdapterAlone, AdapterSource
from mergetool.tensors.folder import open_model
from tests.checkpoints.adapters.peft_oracle import read_all

FILES = sorted((Path(__file__).parent / "peft").glob("*.safetensors"))


def configs(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {case: text for case, text in file.metadata().items() if case != "format"}


WRONG = {("0.15.2", "bias of B"), ("0.15.2", "dora of all")}
"""Where a version's merge is not its model: the trained bias without its factor, embeddings without magnitudes."""
CASES = [(path.stem, case) for path in FILES for case in sorted(configs(path))]


def answers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As scripts/peers/peft_forms.py asks them."""
    vectors, image = torch.linspace(-1, 1, 20).view(5, 4), torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    return {
        "embed_tokens": weights["embed_tokens.weight"],
        "conv": functional.conv2d(image, weights["conv.weight"], weights["conv.bias"]),
        "query": functional.linear(vectors, weights["query.weight"], weights["query.bias"]),
        "value": functional.linear(vectors, weights["value.weight"]),
        "head": functional.linear(torch.linspace(-1, 1, 30).view(5, 6), weights["head.weight"], weights["head.bias"]),
    }


@pytest.mark.parametrize(("version", "case"), CASES)
def test_what_a_version_saved_answers_as_it_did(version: str, case: str, tmp_path: Path) -> None:
    path = next(path for path in FILES if path.stem == version)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, group, own = key.split("/")
        groups.setdefault(group, {}).update({own: tensor} if name == case else {})
    config = configs(path)[case]
    (tmp_path / "adapter_config.json").write_text(config)
    save_file(groups["base"], tmp_path / "model.safetensors", {"format": "pt"})
    if case == "pickled":
        torch.save(groups["adapter"], tmp_path / "adapter_model.bin")
    else:
        save_file(groups["adapter"], tmp_path / "adapter_model.safetensors")
    source = AdapterSource(open_model(tmp_path / "model.safetensors"), tmp_path)
    assert ["peft trained and did not save" in text for text in source.warnings] == [True] * (case == "own biases")
    found = {name: read_all(source, name) for name in source.specs}
    differences = {name: each - groups["answers"][name] for name, each in answers(found).items()}
    if case == "own biases" and version != "0.8.2":  # trained and lost: off by the same for every input
        differences["query"] = differences["query"] - differences["query"][0]
    assert max(each.abs().max() for each in differences.values()) < 2e-6
    wrong = {name for name, wanted in groups["merged"].items() if not torch.allclose(found[name], wanted, atol=1e-6)}
    assert bool(wrong) is ((version, case) in WRONG)
    alone = AdapterAlone(tmp_path)
    assert bool(alone.needs_base) is (json.loads(config).get("use_dora", False) or case == "rows")
    changed = {name for name in groups["merged"] if not torch.equal(groups["merged"][name], groups["base"][name])}
    held = {name for name, site in alone.sites.items() if site.kind != "magnitude"}
    assert changed - {"embed_tokens.weight"} == held - {"embed_tokens.weight"}
