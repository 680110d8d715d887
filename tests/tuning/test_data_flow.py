"""Searches for paths through the layers of several models."""

import json

import numpy as np
import pytest
import torch
import transformers
import yaml

import mergetool
from mergetool import PlanError
from mergetool.engine.choice import settled
from mergetool.planning.report import describe
from mergetool.testing.toys import assert_same_bytes, read
from mergetool.tuning.in_memory import Candidates
from tests.tuning import planted
from tests.tuning.planted import write_task, write_tokenizer
from tests.tuning.test_run import journal

pytestmark = pytest.mark.slow  # searches

COUNT, WIDTH = 60, 64


def answering(gold, layers=4):
    """A model that gives the right answer to every word."""
    model = planted.llama(COUNT, width=WIDTH, layers=layers)
    planted.answer(model, planted.towards(model, COUNT), gold, np.full(COUNT, 2.0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two copies of one model that knows all answers, each with noise in place of another layer."""
    folder = tmp_path_factory.mktemp("paths")
    gold = np.random.default_rng(0).integers(0, 2, COUNT)
    write_task(folder / "tasks", "words", range(COUNT), gold)
    with torch.no_grad():
        for name, spoilt in (("a", 1), ("b", 2)):
            model = answering(gold)
            for parameter in model.model.layers[spoilt].parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(spoilt))
            model.save_pretrained(folder / name)
            write_tokenizer(folder / name, COUNT)
    return folder


def recipe(folder, *, search=None, **merge):
    return {
        "models": {name: str(folder / name) for name in "ab"},
        "merge": {
            "method": "data-flow",
            "tasks": [{"name": "words", "include": str(folder / "tasks")}],
            "search": {"population": 8, "generations": 6, "rerank": 2, **(search or {})},
            "estimator": {"kind": "full"},
            "repeats": 1,
            "order": "depth",
            **merge,
        },
    }


def test_the_path_around_spoilt_layers_is_found_and_opens_anywhere(folder, tmp_path):
    result = mergetool.run(recipe(folder), output=tmp_path / "out")
    report = json.loads((tmp_path / "out.search" / "report.json").read_text())
    compared = {row["name"]: row["report_mean"] for row in report["compared"]}
    assert max(compared.values()) < 0.8
    assert report["winner"]["report_mean"] == 1.0
    again = mergetool.run(tmp_path / "out.search" / "recipe.yaml", output=tmp_path / "again")
    assert_same_bytes(read(result.path), read(again.path))
    assert transformers.AutoModelForCausalLM.from_pretrained(result.path).config.num_hidden_layers == 4


def test_a_killed_search_with_scales_goes_on_and_what_is_idle_is_left_out(folder, tmp_path, monkeypatch):
    asked = recipe(folder, scale=[0.8, 1.25], max_layers=5, search={"population": 4, "generations": 2, "rerank": 2})
    mergetool.run(asked, output=tmp_path / "whole")
    put, puts = Candidates.put, []

    def stopped(self, values, **options):
        puts.append(values)
        if len(puts) == 5:
            raise KeyboardInterrupt
        return put(self, values, **options)

    monkeypatch.setattr(Candidates, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        mergetool.run(asked, output=tmp_path / "out")
    with (tmp_path / "out.search" / "search.jsonl").open("ab") as file:
        file.write(b'{"question":["torn')
    result = mergetool.run(asked, output=tmp_path / "out")
    assert journal(tmp_path / "out.search") == journal(tmp_path / "whole.search")
    assert_same_bytes(read(result.path), read(tmp_path / "whole"))
    plain = yaml.safe_load((tmp_path / "out.search" / "recipe.yaml").read_text())
    assert set(plain["models"]) == {"a"} | {name for each in plain["slices"] for name in each.get("layers", each)}


def test_a_plan_tells_how_much_is_asked(folder):
    asked = recipe(folder, repeats=3)
    plan = mergetool.plan(asked)
    told = describe(plan, settled(plan, "auto", workers=1, memory=None), mergetool.load_recipe(asked).method)
    assert told["search"] | {"candidates": 48, "reported": 4} == told["search"]


def test_candidates_are_not_dealt_out_over_devices(folder, tmp_path):
    with pytest.raises(PlanError, match="networks of other depths"):
        mergetool.run(recipe(folder), output=tmp_path / "out", device_map="auto")
