import pytest

from mergetool.search.space import Gene, SearchSpace


@pytest.mark.parametrize(
    "gene", [Gene("x", -1.0, 3.0), Gene("x", 0.1, 0.9, step=0.1), Gene("x", choices=("a", "b", "c"))]
)
def test_a_value_comes_back_from_its_coordinate(gene):
    for share in (0.0, 0.2, 0.5, 0.77, 1.0):
        value = gene.value(share)
        again = gene.value(gene.coordinate(value))
        assert again == (pytest.approx(value) if isinstance(value, float) else value)


def test_values_on_a_grid_are_those_of_the_grid_and_all_equally_likely():
    gene = Gene("density", 0.1, 0.9, step=0.2)
    drawn = [gene.value((place + 0.5) / 1000) for place in range(1000)]
    assert sorted(set(drawn)) == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert {drawn.count(value) for value in drawn} == {200}


def test_nothing_outside_the_cube_leads_outside_the_bounds():
    assert [Gene("x", 0.1, 0.3).value(share) for share in (-5.0, 7.0)] == [0.1, 0.3]


def test_points_that_mean_the_same_have_one_representative():
    space = SearchSpace((Gene("x", 0.0, 1.0, step=0.5), Gene("y", choices=(True, False))))
    assert space.snap((0.1, 0.2)) == space.snap((0.3, 0.4))
    assert space.start == (0.5, True)
