"""An order in which relatives stand side by side, by average linkage (UPGMA): as scipy's, whose import takes as long
as the analysis of small models, and 30 MB."""

from collections.abc import Mapping

from mergetool.kernels.task_vectors import Array

Linkage = list[list[float]]


def clustered(distances: Array) -> tuple[list[int], Linkage]:
    """The order of n things, and what joins what: scipy's rows (one, other, height, how many).

    `distances` (n, n) between them. Where two clusters join, the ends that are nearest to each other meet.
    """
    members = {place: [place] for place in range(len(distances))}
    rows: Linkage = []
    while len(members) > 1:
        height, one, other = _nearest(members, distances)
        joined = _met(members.pop(one), members.pop(other), distances)
        members[len(distances) + len(rows)] = joined
        rows.append([one, other, height, len(joined)])
    return next(iter(members.values()), []), rows


def _nearest(members: Mapping[int, list[int]], distances: Array) -> tuple[float, int, int]:
    pairs = ((one, other) for one in members for other in members if one < other)
    return min((float(distances[members[i]][:, members[j]].mean()), i, j) for i, j in pairs)


def _met(one: list[int], other: list[int], distances: Array) -> list[int]:
    """One row of both, turned so that near ends touch."""
    turned = [(a, b) for a in (one, one[::-1]) for b in (other, other[::-1])]
    left, right = min(turned, key=lambda pair: float(distances[pair[0][-1], pair[1][0]]))
    return left + right
