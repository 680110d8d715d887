"""What a bundle's answers are worth, as a page: every number once more by numpy."""

import sys

import numpy as np
import pytest

from mergetool.analysis.marks_page import MOST_WRONG, facts_of_marks, page_of_marks, write_marks
from mergetool.bundle.marks import marks
from mergetool.errors import OutputError
from tests.pages.samples import HOSTILE

OPTIONAL = ("class too", "refused</", "Surest wrong")
NAMES = ["sport", HOSTILE[0], "maths"]


def planted(rows=400, seed=0):
    """Rows of known tasks and classes, and what a bundle may have answered."""
    rng = np.random.default_rng(seed)
    asked = [
        {"text": f"{HOSTILE[place % 7]} {place} " + "word " * (place % 60), "task": str(rng.choice(NAMES)), "label": 1}
        for place in range(rows)
    ]
    sure, found, refused = rng.random(rows), rng.choice(NAMES, rows), rng.random(rows) < 0.1
    answered = []
    for row, probability, other, left in zip(asked, sure.tolist(), found.tolist(), refused, strict=True):
        task = None if left else row["task"] if rng.random() < probability else other
        said = {"label": "unknown"} if left else {"class": int(rng.integers(2)), "label": "good", "probability": 0.75}
        answered.append({"task": task, "task_probability": round(probability, 6)} | said)
    return asked, answered


def told(asked, answered, names=NAMES):
    return facts_of_marks(marks(names, asked, answered), asked, answered)


def test_numbers_are_those_of_numpy():
    asked, answered = planted()
    facts = told(asked, answered)
    of, by = np.array([row["task"] for row in asked]), np.array([str(each["task"]) for each in answered])
    right, sure = of == by, np.array([each["task_probability"] for each in answered])
    strict = right & np.array([each.get("class") == 1 for each in answered])
    kept = by != "None"
    assert [[int(((of == a) & (by == b)).sum()) for b in NAMES] for a in NAMES] == [*map(list, facts["confusion"])]
    assert [int(((of == a) & ~kept).sum()) for a in NAMES] == list(facts["refused"])
    for row in facts["figures"]:
        own = (of == row["task"]) | (row["task"] == "all")
        assert (row["right"], row["strict"]) == pytest.approx((right[own].mean(), strict[own].mean()))
    edges = np.digitize(sure[kept], np.linspace(0, 1, 16)[1:-1], right=True)
    gaps = [abs((right[kept] - sure[kept])[edges == place].sum()) for place in range(15)]
    assert facts["ece"] == pytest.approx(sum(gaps) / kept.sum())
    assert [row["items"] for row in facts["reliability"]] == np.bincount(edges, minlength=15).tolist()
    wrong = np.flatnonzero(kept & ~strict)
    assert facts["wrong"] == len(wrong) > MOST_WRONG
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:MOST_WRONG]
    assert [row["row"] - 1 for row in facts["surest_wrong"]] == surest.tolist()
    assert facts["surest_wrong"][0]["sure"] == pytest.approx(0.75 * sure[surest[0]])
    assert max(len(row["text"]) for row in facts["surest_wrong"]) <= 200


def test_a_page_without_classes_refusals_or_wrong_answers_has_no_empty_parts():
    asked = [{"pixel_values": [1.0], "task": task} for task in "aab"]
    answered = [{"task": row["task"], "task_probability": 1.0} for row in asked]
    facts = told(asked, answered, "abc")
    assert (facts["ece"], facts["wrong"], "refused" in facts) == (0.0, 0, False)
    page = page_of_marks(facts)
    assert [word for word in OPTIONAL if word in page] == []
    nothing = [{"task": None, "task_probability": 0.4, "label": "unknown"} for _ in asked]
    assert "calibration error is" not in page_of_marks(told(asked, nothing, "abc"))


def test_without_jinja_the_install_line_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    asked, answered = planted()
    with pytest.raises(OutputError, match="jinja2 is not installed") as caught:
        write_marks(marks(NAMES, asked, answered), asked, answered, tmp_path)
    assert caught.value.fix == "pip install 'mergetool[report]'"
    assert (tmp_path / "marks.json").is_file()
