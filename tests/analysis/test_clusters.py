"""Average linkage as scipy has it."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from mergetool.analysis.clusters import clustered


@pytest.mark.parametrize("count", [2, 3, 9])
def test_what_joins_what_and_at_which_height(count):
    x = np.random.default_rng(count).random((count, count))
    apart = x + x.T - np.diag(2 * np.diag(x))
    order, rows = clustered(apart)
    expected = linkage(squareform(apart), "average", optimal_ordering=True)
    assert [sorted(row[:2]) for row in rows] == [sorted(row[:2]) for row in expected.tolist()]
    assert np.array(rows)[:, 2:] == pytest.approx(expected[:, 2:])
    assert sorted(order) == list(range(count))
    ours, best = (sum(apart[a, b] for a, b in pairwise(o)) for o in (order, leaves_list(expected)))
    assert best <= ours * (1 + 1e-12) <= best * 1.5


def test_relatives_stand_side_by_side():
    groups = np.array([0, 1, 0, 2, 1, 0])
    order, _ = clustered((groups[:, None] != groups[None, :]).astype(float))
    assert np.count_nonzero(np.diff(groups[order])) == 2
    assert clustered(np.zeros((1, 1))) == ([0], [])
