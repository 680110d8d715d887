"""Groups of tasks from stored factors, against the authors' numbers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mergetool.bundle.build import build
from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.store import FactorStore
from tests.bundle.tiny import OPTIONS, FileExperts
from tests.kernels.mass_reference import reference_numbers
from tests.kernels.tsv_reference import reference_deltas


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    deltas = reference_deltas()
    states = {"base": {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}}
    states |= dict(zip("abc", deltas, strict=True))
    for name, state in states.items():
        save_file({key: value.float() for key, value in state.items()}, folder / f"{name}.safetensors")
    (folder / "bundle").mkdir()
    experts = FileExperts({name: folder / f"{name}.safetensors" for name in states})
    options = replace(OPTIONS, kind="tsv-compress", router=None)
    manifest = build(experts, folder / "bundle", FactorStore(folder / "store"), options)
    return TaskFactors(manifest, folder / "bundle", torch.float64, 1 << 30)


@pytest.mark.parametrize("group", ["a", "ab", "abc"])
@pytest.mark.parametrize("name", ["mlp.up", "mlp.down", "norm"])
def test_a_group_has_the_weights_that_the_authors_code_gives_it(group, name, factors):
    found = factors.dense_change(tuple("abc".index(task) for task in group), name)
    torch.testing.assert_close(
        found, reference_numbers()[f"group.{group}.{name}"], rtol=0, atol=1e-5
    )  # theirs is float32
