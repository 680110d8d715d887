"""Models that accelerate deals over memory and the disk are scored, and searched, as whole ones are."""

import json

import pytest
import torch
from typer.testing import CliRunner

import mergetool
from mergetool import PlanError
from mergetool.cli.app import app
from mergetool.evaluate.assess import assess
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from mergetool.networks.spread import Spread
from mergetool.tensors.folder import open_model
from mergetool.testing.toys import assert_same_bytes, read
from tests.bundle.tiny import tiny_model
from tests.tuning.planted import World, write_tokenizer

WORLD = World(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


def half_of(path):
    return sum(spec.num_bytes for spec in open_model(path).specs.values()) // 2


def test_scores_of_a_model_that_is_dealt_out_are_those_of_a_whole_one(folder):
    path = folder / "models" / "left"
    tasks = [TaskOptions(name=name, include="tasks") for name in WORLD.tasks]
    whole = assess(path, tasks, folder=folder)
    dealt = assess(path, tasks, folder=folder, spread=Spread("auto", half_of(path)))
    assert dealt.facts() == whole.facts()
    model = LanguageModel(path, spread=Spread("auto", half_of(path))).model
    assert "disk" in model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in model.parameters())


def test_the_command_deals_a_model_out(folder):
    command = ["evaluate", str(folder / "models" / "left"), "--tasks", "lefts", "--include", str(folder / "tasks")]
    here = CliRunner().invoke(app, [*command, "--json"])
    there = CliRunner().invoke(app, [*command, "--json", "--device-map", "auto", "--memory", "100KiB"])
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout) == json.loads(here.stdout)


@pytest.mark.parametrize(
    ("flags", "what", "fix"),
    [
        (["--memory", "1GiB"], "no --device-map", "leave it out"),
        (["--device-map", "all"], "'all' is none of auto", "use --device-map auto"),
        (["--device-map", "auto", "--device", "cuda:0"], "beside --device-map", "leave one of both out"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, what, fix, folder):
    command = ["evaluate", str(folder / "models" / "left"), "--tasks", "lefts", "--include", str(folder / "tasks")]
    told = CliRunner().invoke(app, [*command, *flags])
    assert told.exit_code != 0
    assert isinstance(told.exception, PlanError)
    assert what in str(told.exception)
    assert told.exception.fix == fix


def searched(folder, output, **flags):
    recipe = {
        "base": str(folder / "models" / "base"),
        "models": {name: str(folder / "models" / name) for name in WORLD.names},
        "merge": {
            "method": "merge3",
            "inner": {"method": "task-arithmetic", "weight": {"search": [0.0, 2.0]}},
            "tasks": [{"name": name, "include": str(folder / "tasks")} for name in WORLD.tasks],
            "search": {"algorithm": "random", "population": 3, "generations": 2},
            "estimator": {"kind": "full"},
        },
    }
    return mergetool.run(recipe, output=output, **flags).path


def test_a_search_over_a_model_that_is_dealt_out_finds_what_it_finds_in_a_whole_one(folder, tmp_path):
    here = searched(folder, tmp_path / "here")
    there = searched(folder, tmp_path / "there", device_map={"model": "disk", "lm_head": "cpu"})
    assert_same_bytes(read(there), read(here))
    reports = [json.loads((tmp_path / f"{name}.search" / "report.json").read_text()) for name in ("here", "there")]
    assert reports[0]["winner"] == reports[1]["winner"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_into_a_model_that_is_dealt_out_takes_effect(dtype, tmp_path):
    model = tiny_model("gpt2").to(getattr(torch, dtype))  # its head is its embedding
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 30)
    shapes = {name: spec.shape for name, spec in open_model(tmp_path).specs.items()}
    live = LanguageModel(tmp_path, spread=Spread({"": "disk"}), written=True)
    inputs = torch.arange(1, 7)[None]
    with torch.no_grad():
        model.eval()(inputs)
        for name, slot in live.slots(shapes).items():
            torch.manual_seed(len(name))
            value = torch.randn(slot.shape).to(slot.dtype) / 8
            slot.copy_(value)
            model.get_parameter(name).copy_(value)
        assert torch.equal(live.model(inputs).logits, model(inputs).logits)


def test_a_map_for_what_runs_no_network_is_refused(folder, tmp_path):
    recipe = {"models": {"left": str(folder / "models" / "left")}, "merge": {"method": "passthrough"}}
    with pytest.raises(PlanError, match="passthrough runs no network"):
        mergetool.run(recipe, output=tmp_path / "out", device_map="auto")
