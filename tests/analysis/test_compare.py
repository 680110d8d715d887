"""Finished results side by side: what their recipes say, what they score, how far they are apart."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from safetensors.torch import load_file

import mergetool
from mergetool import RecipeError, SourceError
from mergetool.analysis.compare_page import page
from mergetool.evaluate.scores import Evaluation, TaskScores
from mergetool.outputs.scores import keep_scores, kept_scores, scores_path
from mergetool.search.interval import of_difference, of_mean
from tests.files import write_models


@pytest.fixture
def runs(tmp_path):
    """Three merges of the same models: two differ by a number, the third by its method."""
    write_models(tmp_path)
    for name, merge in {
        "weak": {"method": "task-arithmetic", "weight": 0.2},
        "strong": {"method": "task-arithmetic", "weight": {"a": 0.9, "b": 0.8}, "scale": 1.0},
        "middle": {"method": "linear"},
    }.items():
        base = {} if name == "middle" else {"base": str(tmp_path / "base")}
        recipe = {**base, "models": {each: str(tmp_path / each) for each in "ab"}, "merge": merge}
        mergetool.run(recipe, output=tmp_path / name)
    return tmp_path


def test_only_what_recipes_say_differently_is_told_with_defaults_filled_in(runs):
    found = mergetool.compare(runs / "weak", runs / "strong")
    assert found.settings == (
        {"key": "merge.weight.a", "weak": 0.2, "strong": 0.9},
        {"key": "merge.weight.b", "weak": 0.2, "strong": 0.8},
    )  # `scale: 1.0` is the default
    keys = [row["key"] for row in mergetool.compare(runs / "weak", runs / "middle").settings]
    assert keys == ["base", "merge.method", "merge.weight", "inputs.base"]


def test_other_contents_under_the_same_path_are_told(runs):
    write_models(runs, names=("nothing", "other", "a"))
    recipe = {"models": {each: str(runs / each) for each in "ab"}, "merge": {"method": "linear"}}
    mergetool.run(recipe, output=runs / "later")
    (row,) = mergetool.compare(runs / "middle", runs / "later").settings
    assert row["key"] == "inputs.a"
    assert row["middle"] != row["later"]


def test_distances_are_those_of_the_weights(runs):
    names = ("weak", "strong", "middle")
    found = mergetool.compare(*(runs / name for name in names), base=runs / "base")
    flat = {
        name: np.concatenate([t.double().numpy().ravel() for _, t in sorted(load_file(path).items())])
        for name in (*names, "base")
        for path in [runs / name / "model.safetensors"]
    }
    for row, (a, b) in zip(found.distances, combinations(names, 2), strict=True):
        one, other, base = flat[a], flat[b], flat["base"]
        assert (row["a"], row["b"], row["identical"]) == (a, b, False)
        assert row["relative"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one))
        assert row["cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        assert row["change_a"] == pytest.approx(np.linalg.norm(one - base) / np.linalg.norm(base))
        first, second = one - base, other - base
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert row["cosine_of_changes"] == pytest.approx(cosine)


def test_time_and_size_are_those_of_the_locks(runs):
    lock = json.loads((runs / "weak" / "mergetool.json").read_text())
    cost = mergetool.compare(runs / "weak", runs / "middle").costs[0]
    files = {path.name: path.stat().st_size for path in (runs / "weak").iterdir()}
    assert cost["size"] == sum(files.values()) - files["mergetool.json"]
    assert (cost["run"], cost["method"], cost["seconds"]) == ("weak", "task-arithmetic", lock["run"]["seconds"])


def scores(task, values, items="one"):
    return TaskScores(task, "acc", items, np.array(values, dtype=float))


def test_points_of_a_sweep_are_results_and_steps_after_merging_are_told(runs):
    recipe = {"base": str(runs / "base"), "models": {each: str(runs / each) for each in "ab"}}
    merge = {"method": "task-arithmetic"}
    mergetool.run({**recipe, "merge": merge, "sweep": {"scale": [0.5, 1.0]}}, output=runs / "sweep")
    mergetool.run({**recipe, "merge": merge, "then": [{"step": "match-norm"}]}, output=runs / "then")
    found = mergetool.compare(runs / "sweep", runs / "then")
    assert [(row["run"], row["method"]) for row in found.costs] == [
        ("scale-0.5", "task-arithmetic"),
        ("scale-1", "task-arithmetic"),
        ("then", "task-arithmetic, then match-norm"),
    ]
    told = {row["key"]: [row[name] for name in found.runs] for row in found.settings}
    assert told == {"merge.scale": [0.5, 1.0, 1.0], "then": [None, None, [{"step": "match-norm"}]]}
    text = page(found)
    assert "[{&#34;step&#34;: &#34;match-norm&#34;}]" in text


def planted(runs):
    """Scores as `mergetool evaluate` keeps them: of both on the same items of a task, and of a parent."""
    rng = np.random.default_rng(0)
    weak, strong, parent = (rng.random(40) < share for share in (0.4, 0.6, 0.8))
    own = {"maths": scores("maths", weak), "code": scores("code", [1, 0, 0, 0])}
    theirs = {"maths": scores("maths", weak[::-1])}
    keep_scores(runs / "weak", Evaluation("weak", own, {"models/a": {"maths": scores("maths", parent)}}))
    keep_scores(runs / "strong", Evaluation("strong", {"maths": scores("maths", strong)}))
    keep_scores(runs / "middle", Evaluation("middle", {"maths": scores("maths", weak, items="others")}))
    return weak.astype(float), strong.astype(float), parent.astype(float), theirs


def test_scores_have_intervals_and_what_is_kept_of_the_best_parent(runs):
    weak, strong, parent, _ = planted(runs)
    found = mergetool.compare(*(runs / name for name in ("weak", "strong", "middle")))
    maths = {row["run"]: row for row in found.scores if row["task"] == "maths"}
    assert list(maths) == ["weak", "strong", "middle", "models/a"]
    for name, values in (("weak", weak), ("strong", strong)):
        row = maths[name]
        assert (row["score"], row["best_parent"]) == (values.mean(), "models/a")
        assert (row["low"], row["high"]) == of_mean(values)
        assert row["retention"] == pytest.approx(values.mean() / parent.mean())
    assert maths["middle"]["retention"] is None  # it has answered other items
    (first, second) = found.retention
    assert (first["run"], first["tasks"], first["worst_on"]) == ("weak", 1, "maths")
    assert second["mean"] == second["geometric"] == second["worst"] == pytest.approx(strong.mean() / parent.mean())


def test_pairs_are_compared_item_by_item_where_the_items_are_the_same(runs):
    weak, strong, _, _ = planted(runs)
    found = mergetool.compare(*(runs / name for name in ("weak", "strong", "middle")))
    (row,) = found.pairs
    assert (row["task"], row["a"], row["b"]) == ("maths", "weak", "strong")
    assert row["difference"] == pytest.approx(weak.mean() - strong.mean())
    assert (row["low"], row["high"]) == of_difference(weak, strong)


def test_scores_that_are_found_later_are_added(runs):
    planted(runs)
    keep_scores(runs / "weak", Evaluation("weak", {"law": scores("law", [1, 1, 0])}))
    known = kept_scores(runs / "weak")
    assert list(known.tasks) == ["maths", "code", "law"]
    assert list(known.parents) == ["models/a"]


def test_scores_of_other_weights_are_passed_over_and_told(runs):
    planted(runs)
    scores_path(runs / "weak").replace(scores_path(runs / "strong"))
    found = mergetool.compare(runs / "weak", runs / "strong")
    assert found.scores == ()
    assert found.remarks == (
        f"the scores beside strong are of other weights: mergetool evaluate {runs / 'strong'} --tasks ...",
    )


@pytest.mark.parametrize("text", ["", "[]", '{"weights": 1}', '{"tasks": [{"values": [7]}]}'])
def test_a_damaged_file_of_scores_counts_as_none(runs, text):
    scores_path(runs / "weak").write_text(text)
    assert kept_scores(runs / "weak") is None


def test_everything_is_json_and_a_row_for_each_result(runs):
    planted(runs)
    found = mergetool.compare(runs / "weak", runs / "strong")
    told = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert told["runs"] == {name: str(runs / name) for name in ("weak", "strong")}
    assert told["scores"][0]["task"] == "maths"
    assert [set(row) >= {"run", "method", "seconds", "maths acc"} for row in found.rows] == [True, True]
    assert found.rows[0]["code acc"] == 0.25


def test_bundles_have_recipes_and_sizes_but_no_weights_to_compare(runs):
    recipe = {"base": str(runs / "base"), "models": {each: str(runs / each) for each in "ab"}}
    mergetool.run({**recipe, "merge": {"method": "tsv-compress", "rank": 2}}, output=runs / "bundle")
    found = mergetool.compare(runs / "weak", runs / "bundle", runs / "strong")
    assert [(row["a"], row["b"]) for row in found.distances] == [("weak", "strong")]
    assert found.remarks == (
        "weak (checkpoint) and bundle (bundle) have no weights to compare",
        "bundle (bundle) and strong (checkpoint) have no weights to compare",
    )
    assert [row["kind"] for row in found.costs] == ["checkpoint", "bundle", "checkpoint"]
    assert {"key": "merge.rank", "weak": None, "bundle": 2, "strong": None} in found.settings


def test_results_of_one_name_are_called_by_their_paths(runs):
    (runs / "elsewhere").mkdir()
    mergetool.run({"models": {"a": str(runs / "a")}, "merge": {"method": "linear"}}, output=runs / "elsewhere" / "weak")
    found = mergetool.compare(runs / "weak", runs / "elsewhere" / "weak")
    assert found.runs == (str(runs / "weak"), str(runs / "elsewhere" / "weak"))


def test_what_cannot_be_compared_is_refused(runs):
    with pytest.raises(RecipeError, match="fewer than two"):
        mergetool.compare(runs / "weak")
    with pytest.raises(RecipeError, match="named twice"):
        mergetool.compare(runs / "weak", runs / "weak")
    with pytest.raises(SourceError, match="no result of mergetool"):
        mergetool.compare(runs / "weak", runs / "a")


def test_a_parent_without_any_score_keeps_nothing_to_share(runs):
    own, parent = scores("maths", [1, 0]), scores("maths", [0, 0])
    keep_scores(runs / "weak", Evaluation("weak", {"maths": own}, {"p": {"maths": parent}}))
    row = mergetool.compare(runs / "weak", runs / "strong").scores[0]
    assert (row["best_parent"], row["retention"]) == ("p", None)
    assert not math.isnan(row["score"])
