"""The stage runner: slots that one step fills together, and passes and merges in one go."""

import torch

import mergetool
from mergetool.engine.sinks import MemorySink
from mergetool.engine.worker import Worker
from mergetool.planning import make_plan
from mergetool.recipe import load_recipe
from tests.files import write_model, write_models


def test_second_names_of_a_tensor_are_slots_of_one_step(tmp_path):
    """Read, merged and drawn for once, written under both names; in memory and in files."""
    config = {"model_type": "bert", "tie_word_embeddings": True}
    states = {}
    for seed, name in enumerate(("base", "a", "b")):
        rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        states[name] = {
            "model.embed_tokens.weight": rows,
            "lm_head.weight": rows.clone(),
            "norm.weight": rows[0].clone(),
        }
        write_model(tmp_path / name, states[name], {**config, "model_type": "llama"})
    recipe = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "ab"},
        "merge": {"method": "dare-ties"},
    }
    plan = mergetool.plan(recipe)
    assert sorted(len(step.slots) for step in plan.steps) == [1, 2]
    result = mergetool.run(recipe, output=tmp_path / "out")
    found = dict(mergetool_tensors(result.path))
    assert result.num_tensors == 3
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert result.bytes_read == sum(plan.bytes_read(step, step.spec.num_elements) for step in plan.steps)


def mergetool_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_counting_and_merging_in_one_go_writes_what_doing_one_after_the_other_writes(tmp_path):
    """A tensor of one unit is counted and merged by the same worker, which keeps what is dear for the merge."""
    write_models(tmp_path, shapes={"w": (40, 30)})
    models = {name: str(tmp_path / name) for name in "ab"}
    merge = {"method": "della", "rescale": "l1", "density": 0.5}
    plan = make_plan(load_recipe({"base": str(tmp_path / "base"), "models": models, "merge": merge}))
    (step,), counts = plan.steps, plan.steps[0].operation.counts
    apart, together = (Worker(plan, MemorySink(plan)) for _ in range(2))
    stats = counts.conclude(apart.count(step, 0, 1200, counts))
    notes = apart.perform(step, 0, 1200, stats)
    assert together.visit(step, counts) == (stats, notes, [1])
    assert torch.equal(apart._sink.tensors["w"], together._sink.tensors["w"])


def test_what_passes_read_is_told_however_they_are_done(tmp_path):
    write_models(tmp_path, shapes={"w": (40, 30)})
    recipe = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": {"method": "slerp"}}
    assert mergetool.run(recipe, output=tmp_path / "out").bytes_read == 2 * 2 * 4 * 1200
