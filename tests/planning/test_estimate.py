"""What a run will cost, and when it is refused for that."""

import os
import re
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mergetool
from mergetool.errors import OutputError, PlanError
from mergetool.planning import cost, make_plan
from mergetool.planning.cost import available_memory, check_disk, estimate
from mergetool.recipe.load import load_recipe
from mergetool.tensors.writer import SlotWriter
from tests.files import LONG, write_model, write_models, write_recipe, write_sparse

GIB = 2**30


@pytest.fixture
def wide(tmp_path):
    """A plan whose one tensor must be seen whole: 2048 x 1024, of a base and two models."""
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {"w": torch.ones(2048, 1024)})
    models = {"base": str(tmp_path / "base"), "models": {name: str(tmp_path / name) for name in "ab"}}
    return mergetool.plan(models | {"merge": {"method": "tsv-merge"}})


@pytest.fixture
def narrow(tmp_path):
    """A plan of which every slice can be merged by itself."""
    write_models(tmp_path)
    models = {"base": str(tmp_path / "base"), "models": {name: str(tmp_path / name) for name in "ab"}}
    return mergetool.plan(models | {"merge": {"method": "ties"}})


def test_too_little_memory_is_refused_with_an_amount_that_works(narrow):
    with pytest.raises(PlanError) as caught:
        estimate(narrow, workers=1, memory=1_000_000)
    assert "--memory allows 977 KiB" in caught.value.what
    wanted = int(re.fullmatch(r"raise it: --memory (\d+)GiB", caught.value.fix).group(1))
    assert estimate(narrow, workers=1, memory=wanted * GIB).peak_memory <= wanted * GIB


def test_a_tensor_that_must_be_held_whole_is_named(wide):
    with pytest.raises(PlanError, match=r"w must be held whole: [0-9.]+ MiB"):
        estimate(wide, workers=1, memory=370_000_000)


def test_less_memory_means_fewer_workers(wide):
    assert estimate(wide, workers=8, memory=16 * GIB).workers == 8
    least = estimate(wide, workers=1, memory=16 * GIB).peak_memory
    few = estimate(wide, workers=8, memory=least)
    assert few.workers == 1
    assert few.peak_memory <= least


def test_bytes_are_counted(narrow):
    costs = estimate(narrow, workers=1, memory=None)
    weights = sum(step.spec.num_bytes for step in narrow.steps)
    assert costs.bytes_in == 3 * weights
    assert costs.bytes_out == narrow.shards[0].header.file_size > weights


def test_an_output_that_cannot_fit_is_refused(narrow, tmp_path):
    check_disk(narrow, tmp_path / "not/there/yet")
    write_sparse(tmp_path / "huge.safetensors", shutil.disk_usage(tmp_path).free + 2**30)
    plan = mergetool.plan({"models": {"a": str(tmp_path / "huge.safetensors")}, "merge": {"method": "linear"}})
    with pytest.raises(OutputError, match=r"needs [0-9.]+ .B, [0-9.]+ .B are free on that disk"):
        check_disk(plan, tmp_path / "not/there/yet")


def test_the_memory_is_that_of_the_machine_or_less_in_a_container(tmp_path, monkeypatch):
    whole = available_memory()
    assert 10**7 < whole < 10**14
    monkeypatch.setattr(cost, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("123456789\n")
    assert available_memory() == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 10**7


def test_the_workers_are_the_cores_that_this_process_may_use(narrow):
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert estimate(narrow, workers=None, memory=16 * GIB).workers == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert estimate(narrow, workers=None, memory=16 * GIB).workers == min(len(cores), 32)


RUN = """
import sys, mergetool
recipe = sys.argv[1]
print(mergetool.run(recipe, workers=2).peak_memory)
"""


@pytest.mark.parametrize("rank", [8, {"energy": 0.9}] if LONG else [{"energy": 0.9}])
def test_an_adapter_takes_no_more_memory_than_planned(tmp_path, forks, rank):
    config = LlamaConfig(
        vocab_size=32, hidden_size=512, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tuned")
    output = {"path": "out", "kind": "adapter", "rank": rank}
    merge = {"base": "base", "models": {"a": "tuned"}, "merge": {"method": "passthrough"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", **merge, output=output)
    planned = estimate(make_plan(load_recipe(recipe)), workers=2, memory=None)
    assert planned.workers == 2
    (done,) = forks.python("-c", RUN, recipe).wait()
    assert planned.peak_memory / 2 < int(done.out) < planned.peak_memory, (planned, done.out, done.err)


def test_room_for_all_directions_is_not_taken_from_the_disk(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=768, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    merge = {"base": "base", "models": {"a": "base"}, "merge": {"method": "passthrough"}}
    for rank, sparse in ((8, False), ({"energy": 0.9}, True)):
        output = {"path": "out", "kind": "adapter", "rank": rank}
        (shard,) = make_plan(load_recipe(write_recipe(tmp_path / "r.yaml", **merge, output=output))).shards
        assert shard.sparse == sparse
        SlotWriter(tmp_path, [shard]).close()
        taken = (tmp_path / shard.name).stat()
        assert taken.st_size == shard.header.file_size
        assert (taken.st_blocks * 512 < shard.header.file_size / 10) == sparse
        (tmp_path / shard.name).unlink()
