"""Steps that set the singular values of a merge, against numbers of independent float64 code and by hand."""

import pytest
import torch

from mergetool.api import merge_state_dicts
from tests.methods.test_dc_merge import SETS
from tests.methods.test_star import with_spectrum

NORMS = {
    "sum": (1.4170784715, 2.8802454479, 1.9028202237, 3.1329882663),
    "tsv-merge": (1.1899554529, 2.2798023347, 1.3933145702, 2.5216386189),
}
"""Frobenius norms after svc, for the sets in their order."""


def update(deltas, step, method="task-arithmetic", **settings):
    deltas = [torch.as_tensor(delta) for delta in deltas]
    models = [{"mlp.weight": delta, "norm.bias": delta[0]} for delta in deltas]
    base = {name: torch.zeros_like(value) for name, value in models[0].items()}
    return merge_state_dicts(method, models, base, dtype="float64", then=[step], scale=1.0, **settings)


@pytest.mark.parametrize("name", SETS)
def test_svc_gives_the_numbers_of_others(name):
    of_sum = update(SETS[name], {"step": "svc"})["mlp.weight"]
    of_tsv = update(SETS[name], {"step": "svc", "least": 1.0}, "tsv-merge")["mlp.weight"]
    place = "ABCD".index(name)
    assert float(of_sum.norm()) == pytest.approx(NORMS["sum"][place], rel=1e-9)
    assert float(of_tsv.norm()) == pytest.approx(NORMS["tsv-merge"][place], rel=1e-9)


def test_svc_undoes_that_copies_are_counted_several_times():
    found = update([SETS["A"][0]] * 3, {"step": "svc"})
    torch.testing.assert_close(found["mlp.weight"], torch.as_tensor(SETS["A"][0]))
    torch.testing.assert_close(found["norm.bias"], 3 * torch.as_tensor(SETS["A"][0][0]))  # no matrix


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [5, 5, 5]), (0.5, [5, 5, 5]), (0.6, [5, 3, 3]), (1.0, [5, 3, 2])]
)
def test_boosting_lifts_what_is_below_the_share(share, expected):
    found = update([with_spectrum(5.0, 3.0, 2.0)], {"step": "subspace-boosting", "share": share})["mlp.weight"]
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values[:3], torch.tensor(expected, dtype=torch.float64))
    assert float(values[3:].abs().max()) < 1e-9  # what nobody changed
