"""What a search for permutations needs in memory is part of the plan."""

import subprocess
import sys

import pytest

from mergetool.errors import PlanError
from mergetool.planning import make_plan
from mergetool.planning.cost import estimate
from mergetool.recipe import load_recipe
from tests.alignment import nets


def planned(folder, models, method="c2m3", **merge):
    paths = nets.write(folder, models)
    return make_plan(load_recipe({"models": paths, "architecture": "mlp", "merge": {"method": method, **merge}}))


def test_a_search_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    models = {name: nets.mlp(seed, (64, 1500, 1500, 10)) for seed, name in enumerate("ab")}
    plan = planned(tmp_path, models)
    costs = estimate(plan, workers=1, memory=None)
    with pytest.raises(PlanError, match="to look at whole models"):
        estimate(plan, workers=1, memory=costs.peak_memory - 1)
    assert estimate(plan, workers=1, memory=costs.peak_memory).peak_memory == costs.peak_memory


def test_a_search_has_all_cores_however_few_workers_there_are(tmp_path):
    plan = planned(tmp_path, {name: nets.mlp(seed, (64, 1500, 1500, 10)) for seed, name in enumerate("ab")})
    one, two = (estimate(plan, workers=workers, memory=None).peak_memory for workers in (1, 2))
    assert one == two


MEASURE = """
import resource, sys
import mergetool
result = mergetool.run(sys.argv[1], workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_search_stays_within_what_its_plan_says(tmp_path):
    models = {name: nets.mlp(seed, (64, 1500, 1500, 10)) for seed, name in enumerate("abc")}
    costs = estimate(planned(tmp_path / "plan", models), workers=1, memory=None)
    recipe = tmp_path / "recipe.yaml"
    paths = "".join(f"  {name}: plan/{name}\n" for name in models)
    recipe.write_text(
        f"models:\n{paths}architecture: mlp\noutput: {{path: out}}\n"
        "merge: {method: c2m3, align: {iterations: 1, starts: 1, polish: false}}\n"
    )
    done = subprocess.run([sys.executable, "-c", MEASURE, recipe], capture_output=True, text=True, check=True)
    assert int(done.stdout) < costs.peak_memory
