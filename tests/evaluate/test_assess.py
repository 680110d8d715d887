"""Scores of checkpoints, from Python and from the command line."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from typer.testing import CliRunner

import mergetool
from mergetool import EvaluationError, PlanError, SourceError
from mergetool.cli.app import app
from mergetool.evaluate.assess import assess
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import TaskItems
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.scores import Evaluation, TaskScores, summary_of_retention
from mergetool.outputs.scored import RESULTS_NAME, tell_scores
from mergetool.outputs.scores import kept_scores
from mergetool.outputs.verify import verify_output
from mergetool.search.interval import of_difference, of_mean
from tests.tuning.planted import World

WORLD = World()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


def test_scores_retention_and_intervals_are_those_that_were_planted(folder, tmp_path):
    tasks = [TaskOptions(name=name, include="tasks") for name in WORLD.tasks]
    parents = [folder / "models" / name for name in ("left", "right")]
    found = assess(folder / "models" / "base", tasks, parents=parents, folder=folder, cache=tmp_path)
    again = assess(folder / "models" / "base", tasks, parents=parents, folder=folder, cache=tmp_path)
    assert found.facts() == again.facts()
    for facts, parent, half in zip(found.facts()["tasks"], parents, (WORLD.half, ~WORLD.half), strict=True):
        best = (WORLD.margins[parent.name] > 0)[half]
        assert facts["score"] == 0.0
        assert facts["low"] == 0.0 < facts["high"] < 0.1
        assert facts["best_parent"] == str(parent)
        assert facts["parents"][str(parent)] == pytest.approx(best.mean())
        assert facts["retention"] == 0.0
        assert facts["difference_low"] < -best.mean() < facts["difference_high"]


def test_the_command_prints_a_table_or_json(folder):
    command = ["evaluate", str(folder / "models" / "left"), "--tasks", "lefts,rights"]
    command += ["--include", str(folder / "tasks"), "--parent", str(folder / "models" / "right")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["task", "lefts", "rights"]
    tasks = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["tasks"]
    assert [facts["score"] for facts in tasks] == pytest.approx([(WORLD.margins["left"] > 0)[WORLD.half].mean(), 0.0])


def test_scores_of_a_result_are_kept_beside_it(folder, tmp_path):
    models = {name: str(folder / "models" / name) for name in WORLD.names}
    mergetool.run({"models": models, "merge": {"method": "linear"}}, output=tmp_path / "merged")
    command = ["evaluate", str(tmp_path / "merged"), "--include", str(folder / "tasks"), "--tasks"]
    for task in WORLD.tasks:
        shown = CliRunner().invoke(app, [*command, task, "--parent", models["left"]])
        assert shown.exit_code == 0, shown.output
        assert "kept for mergetool compare: " in shown.stderr
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.count("## Scores") == card.count("## Recipe") == 1
    assert [line.split(" | ")[0] for line in card.splitlines() if " | acc | " in line] == ["| lefts", "| rights"]
    assert " of left |" in card
    verify_output(tmp_path / "merged")
    kept = kept_scores(tmp_path / "merged")
    assert list(kept.tasks) == list(WORLD.tasks)
    assert list(kept.parents[models["left"]]) == list(WORLD.tasks)
    assert kept.facts()["tasks"][0]["best_parent"] == models["left"]


def test_a_card_that_was_written_by_hand_is_left_alone(folder, tmp_path):
    path = mergetool.run(
        {"models": {"left": str(folder / "models" / "left")}, "merge": {"method": "linear"}}, output=tmp_path / "merged"
    ).path
    (path / "README.md").write_bytes(b"mine \xff")
    command = ["evaluate", str(path), "--include", str(folder / "tasks"), "--tasks", "lefts"]
    assert "README.md is not what the run has written" in CliRunner().invoke(app, command).stderr
    assert (path / "README.md").read_bytes() == b"mine \xff"


def test_a_result_whose_scores_were_half_told_is_mended_by_telling_them_again(folder, tmp_path):
    recipe = {"models": {"left": str(folder / "models" / "left")}, "merge": {"method": "linear"}}
    path = mergetool.run(recipe, output=tmp_path / "merged").path
    plain = (path / "README.md").read_text()
    for score in (1.0, 0.0):
        lock = (path / "mergetool.json").read_text()
        found = Evaluation("merged", {"maths": TaskScores("maths", "acc", "x", np.array([score, 1.0]))})
        assert tell_scores(path, found)
        (path / "mergetool.json").write_text(lock)  # as if the process had ended before it
        with pytest.raises(SourceError, match=r"the lock says"):
            verify_output(path)
        assert tell_scores(path, found)
        verify_output(path)
        assert (path / "README.md").read_text().count("| maths | acc | 2 |") == 1
    assert (path / "README.md").read_text().replace(_scores(path), "") == plain


def _scores(path):
    """The part of a card that tells scores."""
    card = (path / "README.md").read_text()
    return card[card.index("## Scores") : card.index("## Recipe")]


def test_scores_that_cannot_be_kept_are_told_all_the_same(folder, tmp_path):
    recipe = {"models": {"left": str(folder / "models" / "left")}, "merge": {"method": "linear"}}
    path = mergetool.run(recipe, output=tmp_path / "merged").path
    (tmp_path / "merged.evaluation.json").mkdir()
    command = ["evaluate", str(path), "--include", str(folder / "tasks"), "--tasks", "lefts"]
    shown = CliRunner().invoke(app, command)
    assert (shown.exit_code, "warning: the scores are not kept" in shown.stderr) == (0, True)
    assert "lefts" in shown.stdout


def test_results_on_datasets_of_the_hub_are_written_as_it_reads_them(folder, tmp_path):
    recipe = {"models": {"left": str(folder / "models" / "left")}, "merge": {"method": "linear"}}
    path = mergetool.run(recipe, output=tmp_path / "merged").path
    values = np.array([1.0, 0.0, 1.0, 1.0])
    own = {
        "arc": TaskScores("arc", "acc", "x", values, {"id": "allenai/ai2_arc", "config": "ARC-Easy"}),
        "mine": TaskScores("mine", "acc", "y", values),
    }
    assert tell_scores(path, Evaluation("merged", own))
    entries = parse_eval_result_entries(yaml.safe_load((path / RESULTS_NAME).read_text()))
    assert [(e.dataset_id, e.task_id, e.value, e.notes) for e in entries] == [
        ("allenai/ai2_arc", "ARC-Easy", 0.75, "lm-eval arc, acc")
    ]
    verify_output(path)
    assert RESULTS_NAME in json.loads((path / "mergetool.json").read_text())["output"]["files"]


def test_which_dataset_of_the_hub_a_task_asks_is_known(folder):
    task = load_task(TaskOptions(name="lefts", include="tasks"), folder)
    live = LanguageModel(folder / "models" / "left")
    items = TaskItems(TaskOptions(name="lefts", include="tasks"), task, live.lm)
    assert items.dataset == {}
    task.set_config(key="dataset_path", value="allenai/ai2_arc")
    task.set_config(key="dataset_name", value="ARC-Easy")
    assert items.dataset == {}  # its items are files here
    task.set_config(key="dataset_kwargs", value=None)
    assert items.dataset == {"id": "allenai/ai2_arc", "config": "ARC-Easy"}


def test_what_is_kept_of_several_tasks_is_told_in_three_ways():
    told = summary_of_retention([0.5, 1.0, 0.8])
    assert told == {"mean": pytest.approx(2.3 / 3), "geometric": pytest.approx(0.4 ** (1 / 3)), "worst": 0.5}
    assert summary_of_retention([0.0, 1.0]) == {"mean": 0.5, "geometric": 0.0, "worst": 0.0}


@pytest.mark.parametrize("values", [[], [2.0], [-0.1], [float("nan")]])
def test_kept_scores_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="scores must be in"):
        TaskScores.of({"task": "t", "metric": "acc", "items": "x", "values": values})


def test_a_device_that_cannot_be_used_is_refused(folder):
    command = ["evaluate", str(folder / "models" / "left"), "--tasks", "lefts", "--include", str(folder / "tasks")]
    told = CliRunner().invoke(app, [*command, "--device", "nonsense"]).exception
    assert isinstance(told, PlanError)
    assert "device 'nonsense' cannot be used" in str(told)


def test_a_recipe_may_ask_for_scores_of_its_result(folder, tmp_path):
    recipe = {
        "base": str(folder / "models" / "base"),
        "models": {name: str(folder / "models" / name) for name in WORLD.names},
        "merge": {"method": "task-arithmetic", "weight": 1.9},
        "evaluate": [{"name": name, "include": str(folder / "tasks")} for name in WORLD.tasks],
    }
    result = mergetool.run(recipe, output=tmp_path / "out")
    scores = [WORLD.correct((1.9, 1.9))[half].mean() for half in (WORLD.half, ~WORLD.half)]
    kept = kept_scores(tmp_path / "out")
    assert [kept.tasks[name].score for name in WORLD.tasks] == scores
    lock = json.loads((tmp_path / "out" / "mergetool.json").read_text())
    assert [facts["score"] for facts in lock["scores"]] == scores
    assert verify_output(tmp_path / "out")["files_checked"] == len(lock["output"]["files"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert [line.split(" | ")[0] for line in card.splitlines() if " | acc | " in line] == ["| lefts", "| rights"]
    assert card.index("## What changed") < card.index("## Scores") < card.index("## Recipe")
    told = [note for note in result.notes if ": acc " in note]
    assert [note.split()[2] for note in told] == [f"{score:.4f}" for score in scores]


def test_a_task_named_twice_is_refused(folder):
    with pytest.raises(EvaluationError, match="twice"):
        assess(folder / "models" / "left", [TaskOptions(name="lefts", include="tasks")] * 2, folder=folder)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = (rng.random((2000, 2, 60)) < np.array([[0.3], [0.2]])).astype(float)
    means = [of_mean(draw) for draw in draws[:, 0]]
    apart = [of_difference(*draw) for draw in draws]
    assert np.mean([low <= 0.3 <= high for low, high in means]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([low <= 0.1 <= high for low, high in apart]) == pytest.approx(0.95, abs=0.02)
    assert of_mean(np.ones(10))[0] > 0.6
