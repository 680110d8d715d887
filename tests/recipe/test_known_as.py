"""What papers call what is here can be found, and what is found exists."""

from pathlib import Path

import pytest

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.recipe.known_as import find, known_as, not_here

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.fast
@pytest.mark.parametrize("entry", known_as(), ids=lambda entry: entry["names"][0])
def test_every_entry_is_found_by_each_of_its_names_and_has_a_recipe(entry):
    for name in entry["names"]:
        assert entry["write"] in [found["write"] for found in find(name.upper())]
    assert (RECIPES / f"{entry['recipe']}.yaml").exists()
    assert set(entry) == {"names", "write", "recipe"}


@pytest.mark.fast
@pytest.mark.parametrize("entry", not_here(), ids=lambda entry: entry["names"][0])
def test_what_is_not_here_is_found_with_what_to_do_instead(entry):
    for name in entry["names"]:
        (found,) = [each for each in find(name) if each["name"] == ", ".join(entry["names"])]
        assert found["write"] == f"not here ({entry['why']}); instead: {entry['instead']}"
    assert set(entry) == {"names", "why", "instead"}


@pytest.mark.fast
def test_methods_are_found_by_name_and_by_what_their_documentation_says():
    assert [found["name"] for found in find("localize_and stitch")][-1] == "localize-and-stitch"
    assert "ties" in [found["name"] for found in find("Yadav")]
    assert set(registry()) >= {found["name"] for found in find("arxiv.org/abs/2306.01708")}
    with pytest.raises(RecipeError, match="nothing here is known as 'alchemy'"):
        find("alchemy")


def test_a_name_means_one_thing():
    said = [name.lower() for row in [*known_as(), *not_here()] for name in row["names"]]
    assert sorted(said) == sorted(set(said))
