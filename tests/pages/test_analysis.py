"""The page of an analysis."""

import re

import pytest

from mergetool.analysis.descent_page import descent
from mergetool.analysis.drawings import conflicts
from mergetool.analysis.page import MOST_TENSORS, analysis_page
from tests.files import LONG
from tests.pages.planted import Planted
from tests.pages.test_pages import Seen

FOUR = ["math", "code", "chat", "law"]


def written(folder, facts):
    path = folder / "page.html"
    path.write_text(analysis_page(facts), "utf-8")
    return path


@pytest.fixture(scope="module")
def html():
    facts = Planted(FOUR).facts()
    layers = facts["rows"]["layers_by_model"]
    facts["rows"]["descent_by_layer"] = [row | {"alignment": 0.3, "preconditioned": 0.1} for row in layers]
    return analysis_page(facts)


def titles(html):
    return re.findall(r"<h2[^>]*><a[^>]*>(.*?)</a>", html)


def test_advice_comes_first_with_its_evidence_its_formula_and_what_to_type(html):
    assert titles(html)[0] == "Advice"
    told = Seen(html).pieces
    first = told[told.index("problem") :]
    assert first[:4] == ["problem", "math: unrelated", "Because.", "kinship: 0.03"]
    assert first[4:6] == ["others: 0.5, unknown, yes", "by model: math 1e-07, code 1e-07, chat 1e-07, law 1e-07"]
    assert first[6:10] == ["formula", "||t_i|| < 0.1 ||t_j||", "fix", "remove math"]
    assert first[10:12] == ["warning", "math: dominates"]


def test_every_chapter_says_what_one_sees(html):
    chapters = html.split("<section")[1:]
    assert len(chapters) == 13
    assert "Task vectors and losses" in titles(html)
    assert [titles(chapter) for chapter in chapters[:-1] if 'class="lead"' not in chapter] == []


@pytest.mark.parametrize(
    ("models", "layers", "empty"),
    [
        (["one"], 3, True),
        (["one"], 0, False),
        (FOUR, 1, True),
        *([([f"model-{place}" for place in range(15)], 2, False)] * LONG),
    ],
)
def test_what_is_not_known_is_left_out(models, layers, empty):
    html = analysis_page(Planted(models, layers, base=None, empty=empty).facts())
    assert "None" not in Seen(html).text
    assert ("Do the models agree?" in titles(html)) == (len(models) > 1)
    assert ("Nothing stands out" in html) == empty
    assert "measured from the mean of the models" in html


def test_of_many_tensors_those_that_change_most_are_shown():
    facts = Planted(["one", "two"], layers=60, empty=True).facts()
    facts["rows"]["tensors_by_model"] = [
        row | {"relative": place / 2000} for place, row in enumerate(facts["rows"]["tensors_by_model"])
    ]
    html = analysis_page(facts)
    assert len(facts["rows"]["tensors"]) == 542
    shown = re.findall(r"<code><bdi>((?:model|lm_head)\.[^<]*)", html)
    assert shown == [row["tensor"] for row in facts["rows"]["tensors"]][: -MOST_TENSORS - 1 : -1]
    assert "The other 42 are in analysis.json" in html


def test_layers_of_two_stacks_with_the_same_numbers_stand_side_by_side():
    facts = Planted(["one", "two"], layers=2).facts()
    for section in ("layers", "cells", "layers_by_model", "pairs_by_layer"):
        facts["rows"][section] += [
            row | {"layer": row["layer"].replace("model", "encoder")}
            for row in facts["rows"][section]
            if row["depth"] is not None
        ]
    (picture,) = conflicts(facts).parts
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture.draw(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "other"]
    assert picture.caption.endswith("Layers are numbered through: `model.layers` 0 to 1, `encoder.layers` 2 to 3.")


def test_a_task_vector_that_climbs_its_loss_is_seen_below_nothing():
    from matplotlib.figure import Figure

    facts = Planted(["one", "two"]).facts()
    facts["rows"]["descent_by_layer"] = [
        row | {"alignment": -0.3, "preconditioned": 0.1} for row in facts["rows"]["layers_by_model"]
    ]
    (picture,) = descent(facts).parts
    axes = Figure().subplots()
    picture.draw(axes)
    assert axes.get_ylim()[0] < -0.3


def test_a_model_keeps_its_name_at_the_beginning_of_a_sentence(html):
    text = Seen(html).text
    assert "math is there." in text
    assert "All is well." in text
