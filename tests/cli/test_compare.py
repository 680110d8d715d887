"""`mergetool compare RUN RUN ...` as its users meet it."""

import json

import pytest

import mergetool
from tests.files import write_models


@pytest.fixture
def runs(tmp_path):
    write_models(tmp_path)
    for weight in (0.2, 0.8):
        merge = {"method": "linear", "weight": {"a": weight, "b": 1 - weight}}
        recipe = {"models": {name: str(tmp_path / name) for name in "ab"}, "merge": merge}
        mergetool.run(recipe, output=tmp_path / f"w{weight}")
    return tmp_path / "w0.2", tmp_path / "w0.8"


def test_results_are_shown_side_by_side(call, runs):
    code, out, err = call("compare", *runs, "-q")
    assert (code, err) == (0, "")
    titles = [line for line in out.splitlines() if line and line[0].isupper()]
    assert titles == ["Results", "What the recipes say differently", "Distances between the weights"]
    assert ["merge.weight.a", "0.2", "0.8"] in [line.split() for line in out.splitlines()]
    assert "share opposed" not in out
    assert "share opposed" in call("compare", *runs, "--base", runs[0].parent / "base")[1]


def test_it_is_told_as_json(call, runs):
    code, out, _ = call("compare", *runs, "--json")
    assert code == 0
    assert json.loads(out)["distances"][0]["a"] == "w0.2"


def test_a_page_and_its_data_are_written_where_asked(call, runs, tmp_path):
    code, _, err = call("compare", *runs, "-o", tmp_path / "deep" / "compared")
    assert (code, f"written: {tmp_path / 'deep' / 'compared' / 'compare.html'}" in err) == (0, True)
    told = json.loads((tmp_path / "deep" / "compared" / "compare.json").read_text())
    assert told["runs"] == {path.name: str(path) for path in runs}
    assert "<h1" in (tmp_path / "deep" / "compared" / "compare.html").read_text()
    (tmp_path / "file").touch()
    code, _, err = call("compare", *runs, "-o", tmp_path / "file")
    assert (code, "fix: " in err) == (6, True)


def test_one_result_is_too_few_and_a_model_is_none(call, runs):
    code, _, err = call("compare", runs[0])
    assert (code, "fewer than two results" in err) == (2, True)
    code, _, err = call("compare", runs[0], runs[0].parent / "a")
    assert (code, "fix: name the folder that a run has written" in err) == (3, True)
