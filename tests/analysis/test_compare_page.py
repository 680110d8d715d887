"""Results side by side as a page."""

import re
import sys

import pytest

import mergetool
from mergetool import OutputError
from mergetool.analysis.compare_page import page
from tests.analysis.test_compare import runs

__all__ = ["runs"]


def test_names_with_markup_are_shown_as_they_are(runs):
    name = "<script>alert(1)</script>"
    recipe = {"models": {"a": str(runs / "a")}, "merge": {"method": "linear"}}
    folder = mergetool.run(recipe, output=runs / name.replace("/", "-")).path
    text = page(mergetool.compare(runs / "weak", folder))
    assert folder.name not in text
    assert "&lt;script&gt;alert(1)" in text


def test_without_scores_the_page_says_what_there_is(runs):
    text = page(mergetool.compare(runs / "weak", runs / "strong"))
    assert not re.search(r"<h2[^>]*>\s*Scores", text)
    assert "merge.weight.a" in text


def test_without_jinja_the_install_line_is_told(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutputError, match="jinja2 is not installed") as caught:
        mergetool.compare(runs / "weak", runs / "strong", output=runs / "compared")
    assert caught.value.fix == "pip install 'mergetool[report]'"
