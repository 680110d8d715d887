"""The pages of real analyses, evaluations, comparisons and marks, in one browser."""

import json

import numpy as np

import mergetool
from mergetool.analysis.marks_page import write_marks
from mergetool.bundle.marks import marks
from tests.analysis.models import ancestor, changed
from tests.analysis.models import state as weights_of
from tests.analysis.test_compare import planted as with_scores
from tests.analysis.test_compare import runs
from tests.analysis.test_evaluation import folder, run
from tests.analysis.test_marks_page import NAMES, OPTIONAL
from tests.analysis.test_marks_page import planted as answered_rows
from tests.pages.browsing import opened, standing, stands

__all__ = ["folder", "run", "runs"]


def test_a_real_analysis_stands_and_names_the_stranger_first(browser, recipe, family, tmp_path):
    """One of its models left layers as they are: these have no directions."""
    ancestor(tmp_path / "stranger", seed=7)
    state = {name: tensor.float() for name, tensor in weights_of(family / "code").items() if ".layers.0." not in name}
    changed(family / "base", tmp_path / "frozen", state.get)
    asked = recipe(stranger=tmp_path / "stranger", frozen=tmp_path / "frozen")
    found = mergetool.analyze(asked, output=tmp_path / "report")
    assert json.loads((tmp_path / "report" / "analysis.json").read_text()) == json.loads(found.to_json())
    path = tmp_path / "report" / "analysis.html"
    assert path.stat().st_size < 2_000_000
    with standing(browser, path) as page:
        first = page.locator("article.finding").first
        assert "stranger" in first.locator("h3").inner_text()
        assert first.locator(".tag").inner_text() == "problem"
        assert page.locator("figure.picture svg").count() == 14
        models = page.locator("section", has=page.get_by_role("heading", name="The models", exact=True)).locator(
            "tbody tr"
        )
        assert [row.split("\t")[0].strip() for row in models.all_inner_texts()] == list(found.facts["models"])
        text = page.inner_text("body").lower()
    assert [each["title"] for each in found.advice if each["title"].lower() not in text] == []


def test_the_command_tells_curves_and_pairs_and_writes_pages(folder, run, browser, tmp_path):
    base, left = (folder / "models" / name for name in ("base", "left"))
    code, out, _ = run(base, "--tasks", "lefts", "--line-to", left, "--points", 3, "-o", tmp_path / "line")
    assert (code, [line.split()[0] for line in out.splitlines() if line][:4]) == (0, ["x", "0", "0.5", "1"])
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"base: {base}\nmodels: {{left: {left}, right: {folder / 'models' / 'right'}}}\nmerge: {{method: ties}}\n"
    )
    code, out, _ = run(recipe, "--tasks", "lefts,rights", "--pairs", "--json", "-o", tmp_path / "pairs")
    assert (code, json.loads(out)["models"]) == (0, ["left", "right"])
    code, out, _ = run(recipe, "--tasks", "lefts", "--along", "merge.density=0.2:1", "--points", 2, "--json")
    assert (code, json.loads(out)["along"]) == (0, "merge.density")
    assert run(left, "--tasks", "lefts,rights", "--parent", base, "-o", tmp_path / "scores")[0] == 0
    for name in ("line", "pairs", "scores"):
        stands(browser, tmp_path / name / "evaluation.html")
        assert json.loads((tmp_path / name / "evaluation.json").read_text())
    with opened(browser, tmp_path / "scores" / "evaluation.html") as page:
        assert page.locator("h2").all_inner_texts() == ["Scores", "Kept of the best parent", "Reliability"]


def test_results_side_by_side_stand_and_every_part_is_shown(browser, runs):
    with_scores(runs)
    names = [runs / name for name in ("weak", "strong", "middle")]
    mergetool.compare(*names, base=runs / "base", output=runs / "compared")
    path = runs / "compared" / "compare.html"
    with standing(browser, path) as shown:
        titles = shown.locator("h2").all_inner_texts()
        assert titles == [
            "Scores",
            "Kept of the best parent",
            "Differences on the same items",
            "What the recipes say differently",
            "Distances between the weights",
            "Time and size",
        ]
        assert shown.locator("svg").count() >= 2
        assert "merge.method" in shown.inner_text("body")
    assert path.stat().st_size < 300_000


def test_marks_stand_and_are_the_numbers(browser, tmp_path):
    asked, answered = answered_rows()
    path = write_marks(marks(NAMES, asked, answered), asked, answered, tmp_path)
    facts = json.loads((tmp_path / "marks.json").read_text("utf-8"))
    assert [word for word in OPTIONAL if word not in path.read_text("utf-8")] == []
    with standing(browser, path) as shown:
        assert shown.locator("h2").all_inner_texts() == [
            "Accuracy",
            "Who took whose rows",
            "Reliability of the task",
            "Surest wrong answers",
        ]
        assert shown.locator("svg").count() == 3
        rows = shown.locator("figure.table").nth(1).locator("tbody tr").all()
        cells = [[int(cell) for cell in row.locator("td").all_inner_texts()[1:]] for row in rows]
        counts = np.c_[np.array(facts["confusion"]), facts["refused"]]
        assert cells == np.c_[counts.sum(1), counts].tolist()
        assert f"calibration error is {facts['ece']:.3f}" in shown.inner_text("body")
