"""Expected times: they grow with what there is to do, and no faster machine is slower."""

from dataclasses import replace

import pytest
import torch

from mergetool.planning import make_plan
from mergetool.planning.duration import MACHINES, THIS, expected_seconds, is_guess
from mergetool.recipe import load_recipe
from mergetool.tensors.source import MemorySource


def plan_of(method, *, width=2048, count=2, **merge):
    shapes = {f"model.layers.{layer}.mlp.weight": (width, width) for layer in range(24)}
    model = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    names = [f"m{index}" for index in range(count)]
    base = {} if method == "linear" else {"base": "x"}
    document = {"models": dict.fromkeys(names, "x"), "merge": {"method": method, **merge}, **base}
    return make_plan(load_recipe(document), sources={name: MemorySource(model) for name in [*base, *names]})


def test_more_models_larger_models_and_decompositions_take_longer():
    few = expected_seconds(plan_of("linear"))
    assert few < expected_seconds(plan_of("linear", count=6)) < expected_seconds(plan_of("tsv-merge", count=6))
    assert few < expected_seconds(plan_of("linear", width=4096))


@pytest.mark.parametrize("method", ["linear", "ties", "tsv-merge"])
def test_a_machine_that_has_more_of_something_is_not_slower(method):
    plan = plan_of(method)
    before = expected_seconds(plan, THIS)
    for change in ({"cores": 8}, {"disk_read": 1e10, "disk_write": 1e10}, {"memory": 1e12}, {"hash_rate": 1e10}):
        assert expected_seconds(plan, replace(THIS, **change)) <= before
    times = [expected_seconds(plan, machine) for machine in MACHINES]
    assert times == sorted(times, reverse=True)


def test_surveys_read_again_only_what_does_not_stay_in_memory():
    plan = plan_of("ties")
    slow_disk = replace(THIS, disk_read=1e6, cores=64)
    assert expected_seconds(plan, replace(slow_disk, memory=1e6)) > 1.9 * expected_seconds(plan, slow_disk)
    assert not is_guess(plan)
