"""Runs that make an adapter: killed, spoilt or shared, they leave what an undisturbed run leaves, or nothing."""

import json
import math

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import MergeError
from mergetool.outputs.verify import verify_output
from tests.files import content, write_recipe
from tests.forks import clean_environment

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RANKS = {"cut": 4, "energy": {"energy": 0.9}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a fine-tune that leaves the first layer as it is: room for its factors goes again."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    network.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "layers.0." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    network.save_pretrained(folder / "tuned")
    return folder


def recipe_of(models, rank, path="out", **merge):
    return write_recipe(
        models / f"{path}.yaml",
        base="base",
        models={"tuned": "tuned"},
        merge={"method": "passthrough", **merge},
        output={"path": path, "kind": "adapter", "rank": rank},
    )


@pytest.fixture(scope="module")
def undisturbed(models):
    return {name: content(mergetool.run(recipe_of(models, rank, name)).path) for name, rank in RANKS.items()}


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        ("cut", "mergetool.outputs.journal:Journal.unit 9"),
        ("energy", "mergetool.outputs.journal:Journal.unit 24"),
        ("cut", "mergetool.outputs.adapter:_copy 1"),
        ("energy", "mergetool.outputs.adapter:_config 1"),  # the file has its final size and is under its name
        ("energy", "mergetool.outputs.output:describe_run 1"),
    ],
)
def test_a_kill_at_any_moment_is_made_good(network_forks, models, undisturbed, tmp_path, rank, moment):
    recipe, output = recipe_of(models, RANKS[rank], rank), tmp_path / "out"
    killed = network_forks.run(
        ["run", recipe, "-o", output], cwd=models, env=clean_environment() | {"KILL_AFTER": moment}
    )
    assert killed.code == -9, killed.err
    assert not output.exists()
    again = network_forks.run(["run", recipe, "-o", output], cwd=models, env=clean_environment())
    assert again.code == 0, again.err
    assert content(output) == undisturbed[rank]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(output.glob(".*"))
    verify_output(output)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(models, undisturbed, tmp_path, workers):
    for name, rank in RANKS.items():
        mergetool.run(recipe_of(models, rank, name), output=tmp_path / name, workers=workers)
        assert content(tmp_path / name) == undisturbed[name]


@pytest.mark.parametrize("name", RANKS)
def test_two_processes_write_the_bytes_of_one(network_forks, models, undisturbed, tmp_path, name):
    recipe = recipe_of(models, RANKS[name], name)
    done = network_forks.team(2, ["run", recipe, "-o", tmp_path / "out"], cwd=models).wait()
    assert [each.code for each in done] == [0, 0], done[0].err + done[1].err
    assert content(tmp_path / "out") == undisturbed[name]


def test_an_earlier_adapter_is_overwritten_only_when_asked(models, undisturbed, tmp_path):
    for name in ("energy", "cut"):
        mergetool.run(recipe_of(models, RANKS[name], name), output=tmp_path / "out", overwrite=name == "cut")
    assert content(tmp_path / "out") == undisturbed["cut"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_what_is_not_finite_is_told_and_leaves_nothing(models, tmp_path, name):
    state = load_file(models / "tuned" / "model.safetensors")
    state[name].view(-1)[3] = math.nan
    for each in ("base", "tuned"):
        (tmp_path / each).mkdir()
        for file in (models / each).iterdir():
            (tmp_path / each / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"not finite.*flat index 3.*tuned"):
        mergetool.run(recipe_of(tmp_path, 4))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    keep = {"overrides": [{"match": name, "use": "base"}]}
    mergetool.run(recipe_of(tmp_path, 4, **keep))
    lock = json.loads((tmp_path / "out" / "mergetool.json").read_text())
    assert name not in lock["measured"]


@pytest.mark.parametrize(
    ("base", "front"),
    [
        ("org/llama", {"library_name": "peft", "base_model": "org/llama", "base_model_relation": "adapter"}),
        ("./base", {"library_name": "peft"}),
    ],
)
def test_the_card_says_whose_adapter_it_is(models, tmp_path, base, front):
    recipe = write_recipe(
        models / "card.yaml",
        base="base",
        models={"tuned": "tuned"},
        merge={"method": "passthrough"},
        output={"kind": "adapter", "rank": 4, "base": base},
    )
    mergetool.run(recipe, output=tmp_path / "out")
    told = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert told == front | {"tags": ["merge", "mergetool", "lora"]}
