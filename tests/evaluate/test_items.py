"""Our scores are lm-eval's own, item by item."""

import random
import re

import numpy as np
import pytest
import torch

from mergetool import EvaluationError
from mergetool.evaluate.harness import _unknown, load_task, quiet
from mergetool.evaluate.items import TaskItems
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from tests.files import LONG
from tests.tuning.planted import World, write_task

SHOTS = "training_split: test\nfewshot_split: test\nnum_fewshot: 2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    world = World()
    world.write(folder)
    write_task(folder / "tasks", "free", range(40), world.gold, kind="generate_until")
    for sampler in ("default", "first_n"):
        text = (folder / "tasks" / "lefts.yaml").read_text().replace("num_fewshot: 0\n", SHOTS)
        text = text.replace("task: lefts", f"task: shots_{sampler}") + f"fewshot_config: {{sampler: {sampler}}}\n"
        (folder / "tasks" / f"shots_{sampler}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def live(folder):
    return LanguageModel(folder / "models" / "left", batch_size=8)


def items(folder, live, name, include="tasks", **options):
    chosen = TaskOptions(name=name, include=include, **options)
    return TaskItems(chosen, load_task(chosen, folder), live.lm)


def of_harness(folder, live, name, metric, samples=None):
    """Per-item values of lm-eval's own evaluation."""
    from lm_eval.evaluator import evaluate

    options = TaskOptions(name=name, include="tasks")
    tasks = {"tasks": {name: load_task(options, folder)}}
    with quiet():
        found = evaluate(
            live.lm, tasks, samples=samples and {name: samples}, bootstrap_iters=0, fewshot_as_multiturn=False
        )
    return {record["doc_id"]: record[metric] for record in found["samples"][name]}


@pytest.mark.parametrize(("name", "metric"), [("lefts", "acc"), ("rights", "acc_norm"), ("free", "exact_match")])
def test_scores_are_those_of_lm_eval_item_by_item(folder, live, name, metric):
    ours = items(folder, live, name, metric=metric)
    some = [1, 4, 5, 17, 30]
    theirs = of_harness(folder, live, name, metric, some)
    assert {item: score.value for item, score in ours.score(live.lm, some).items()} == theirs
    assert len(set(of_harness(folder, live, name, metric).values())) == 2


def test_scores_are_those_that_were_planted(folder, live):
    world = World()
    ours = items(folder, live, "lefts")
    found = ours.score(live.lm, range(ours.num_items))
    assert [score.value for score in found.values()] == list((world.margins["left"] > 0)[world.half])
    margins = world.margins["left"][world.half]
    assert [score.soft for score in found.values()] == pytest.approx(1 / (1 + np.exp(-margins)), abs=1e-4)


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_an_item_has_the_same_prompt_whatever_else_is_asked(folder, live, sampler):
    ours = items(folder, live, f"shots_{sampler}")
    everything = ours.score(live.lm, range(ours.num_items))
    some = [3, 20, 41]
    assert ours.score(live.lm, some) == {item: everything[item] for item in some}
    assert {i: score.value for i, score in everything.items()} == of_harness(folder, live, f"shots_{sampler}", "acc")
    if sampler == "first_n":  # with the default sampler, lm-eval asks something else when it is asked for less
        assert {i: everything[i].value for i in some} == of_harness(folder, live, f"shots_{sampler}", "acc", some)


@pytest.mark.parametrize("ids", [[], [3, 1], [2, 2], [0, 60], [-1]])
def test_ids_that_lm_eval_would_mix_up_are_refused(folder, live, ids):
    with pytest.raises(ValueError, match="sorted, unique"):
        items(folder, live, "lefts").score(live.lm, ids)


def test_random_generators_are_left_alone(folder, live):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    items(folder, live, "free").score(live.lm, [0, 1])
    assert states() == before


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"name": "left"}, "no task 'left'"),
        ({"name": "lefts", "metric": "ac"}, "no metric 'ac'"),
        ({"name": "lefts", "filter": "strict"}, "no filter 'strict'"),
        ({"name": "lefts", "include": "nowhere"}, "no such file"),
    ],
)
def test_what_does_not_exist_is_named(folder, live, options, what):
    with pytest.raises(EvaluationError, match=what):
        items(folder, live, **options)


def test_a_model_that_answers_with_nan_is_an_error_that_names_the_item(folder):
    broken = LanguageModel(folder / "models" / "right", batch_size=8)
    broken.model.lm_head.weight.data[2] = float("nan")
    with pytest.raises(EvaluationError, match="NaN"):
        items(folder, broken, "lefts").score(broken.lm, [5])


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / "models" / "left" / name)
    with pytest.raises(EvaluationError, match="holds no tokenizer"):
        LanguageModel(tmp_path, batch_size=1)


def test_code_that_a_task_names_is_run_only_if_trusted(folder, tmp_path):
    ran = tmp_path / "ran"
    text = (folder / "tasks" / "lefts.yaml").read_text().replace("lefts.jsonl", str(folder / "tasks" / "lefts.jsonl"))
    (tmp_path / "task.yaml").write_text(text + "process_docs: !function code.same\n")
    (tmp_path / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef same(docs):\n    return docs\n"
    )
    options = TaskOptions(name="lefts", include=str(tmp_path))
    with pytest.raises(EvaluationError, match="names Python code"):
        load_task(options, tmp_path)
    assert not ran.exists()
    load_task(options, tmp_path, trust_code=True)
    assert ran.exists()


def test_a_task_of_ones_own_is_told_to_name_its_folder(tmp_path):
    write_task(tmp_path / "tasks", "sums_of_mine", range(4), World(count=4).gold)
    fixes = [
        _unknown(TaskOptions(name=name), ["arc_easy"], tmp_path).fix for name in ("sums_of_mine", "lies_elsewhere")
    ]
    found = re.search(r"include: (\S+) \(on the command line --include \1\)", fixes[0])
    assert load_task(TaskOptions(name="sums_of_mine", include=found[1]), tmp_path) is not None
    assert "include: FOLDER (on the command line --include FOLDER)" in fixes[1]


@pytest.mark.skipif(not LONG, reason="scripts/test --long: lm-eval looks through all its tasks")
def test_a_task_that_lm_eval_does_not_have_is_told(tmp_path):
    with pytest.raises(EvaluationError, match="there is no task 'sums_of_mine'") as caught:
        load_task(TaskOptions(name="sums_of_mine"), tmp_path)
    assert "include: FOLDER (on the command line --include FOLDER)" in caught.value.fix
