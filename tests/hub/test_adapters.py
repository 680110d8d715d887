"""Adapters and their base on the Hub: what is fetched, what the result calls its base, and that PEFT finds it there."""

import json

import pytest
import transformers as hf

from tests.checkpoints.adapters.peft_oracle import LLAMA
from tests.files import LONG, write_recipe
from tests.hub.server import TOKEN, Hub
from tests.outputs.test_merged_adapters import start, train

OPEN = """
import sys
from peft import AutoPeftModelForCausalLM
print(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).active_peft_config.r)
"""


@pytest.fixture
def hub(tmp_path, doors):
    """A Hub that holds org/base and adapters for it, org/a and org/b."""
    server = Hub(tmp_path / "hub", doors)
    made = tmp_path / "made"
    made.mkdir()
    again = start(made, lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)))
    server.upload("org/base", made / "base")
    for seed, name in enumerate("ab"):
        train(made, name, again(), seed, target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
        path = made / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}))
        server.upload(f"org/{name}", made / name)
    return server


def recipe(folder, **more):
    sections = {
        "models": {name: {"adapter": f"org/{name}"} for name in "ab"},
        "merge": {"method": "task-arithmetic"},
        "output": {"path": "out", "kind": "adapter"},
        **more,
    }
    return write_recipe(folder / "recipe.yaml", **sections)


def opened_by_peft(near_hub, environment, folder):
    near_hub.know("transformers.modeling_utils")
    command = ["-c", OPEN, folder / "out"]
    (done,) = near_hub.start(command, cwd=folder, envs=[environment], path=str(folder)).wait()
    assert done.code == 0, done.err
    return int(done.out)


@pytest.mark.parametrize("base", [{}, {"base": "org/base"}])
def test_a_base_that_is_only_named_is_not_fetched_and_peft_finds_it(hub, call, near_hub, environment, tmp_path, base):
    done = call("run", recipe(tmp_path, **base))
    assert done.code == 0, done.err
    assert not list((tmp_path / "hf").glob("hub/models--org--base/snapshots/*/model.safetensors"))
    assert list((tmp_path / "hf").glob("hub/models--org--a/snapshots/*/adapter_model.safetensors"))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert settings["revision"] == (hub.refs("org/base")["main"] if base else None)
    if base or LONG:  # with a revision there is more to be wrong
        assert opened_by_peft(near_hub, environment, tmp_path) == 4


def test_a_base_whose_values_are_needed_is_fetched(hub, call, tmp_path):
    done = call("run", recipe(tmp_path, base="org/base", merge={"method": "ties"}, output={"path": "whole"}))
    assert done.code == 0, done.err
    assert list((tmp_path / "hf").glob("hub/models--org--base/snapshots/*/model.safetensors"))


def test_output_base_is_what_the_result_calls_its_base(hub, call, tmp_path):
    done = call("run", recipe(tmp_path, output={"path": "out", "base": str(tmp_path / "made" / "base")}))
    assert done.code == 0, done.err
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "made/base"


def test_an_adapter_is_pushed_and_merged_again_from_there(hub, call, tmp_path):
    output = {"path": "out", "kind": "adapter", "hub": {"repo": "me/merged", "create": True}}
    done = call("run", recipe(tmp_path, output=output), token=TOKEN)
    assert done.code == 0, done.err
    assert set(hub.files("me/merged")) == {path.name for path in (tmp_path / "out").iterdir()} | {".gitattributes"}
    twice = {"ab": {"adapter": "me/merged"}, "a": {"adapter": "org/a"}}
    done = call("run", recipe(tmp_path, models=twice, output={"path": "twice"}))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "twice" / "adapter_config.json").read_text())["r"] == 4
