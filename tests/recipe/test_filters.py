"""Lists of filters become one list of globs with the same meaning."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.recipe.mergekit.filters import Branch, cases, globs

texts = st.text("ab.[*", min_size=1, max_size=3)
lists = st.lists(texts, max_size=3).map(lambda found: [*found, None])


def branches(found):
    return [Branch(text, value, ()) for value, text in enumerate(found)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(lists, min_size=1, max_size=3), st.lists(st.text("ab.[*", max_size=8), max_size=10))
def test_the_first_matching_glob_has_the_first_match_of_every_list(settings_, names):
    cells = {index: branches(found) for index, found in enumerate(settings_)}
    *filtered, rest = cases(cells)
    overrides = [(glob, case) for case in filtered for glob in globs(case.texts)]
    for name in names:
        taken = next((case for glob, case in overrides if fnmatchcase(name, glob)), rest)
        for cell, lines in cells.items():
            first = next(line for line in lines if line.text is None or line.text in name)
            assert taken.branches[cell].value == first.value


def test_equal_lists_do_not_multiply():
    lines = branches(["self_attn", "mlp", None])
    assert [case.texts for case in cases(dict.fromkeys(range(20), lines))] == [{"self_attn"}, {"mlp"}, set()]


def test_a_filter_that_an_earlier_one_covers_makes_no_case():
    assert len(cases({0: branches(["mlp", "mlp.down", None])})) == 2


def test_two_texts_may_share_letters_in_a_name():
    assert sorted(globs(frozenset({"attn.q", "q_proj"}))) == ["*attn.q*q_proj*", "*attn.q_proj*", "*q_proj*attn.q*"]


def test_a_text_inside_another_asks_for_nothing_more():
    assert list(globs(frozenset({"proj", "q_proj"}))) == ["*q_proj*"]


def test_too_many_ways_are_refused():
    with pytest.raises(ValueError, match="more than 256 ways"):
        cases({cell: branches([f"{cell}{i}" for i in range(4)] + [None]) for cell in range(4)})
