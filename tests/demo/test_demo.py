"""The demonstration's own promises: nothing leaks, nothing stale is reused, the table's arithmetic is right."""

import email.message
import http.client
import inspect
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from scripts.demo import sources, table, tasks, train
from scripts.demo.stages import Stage

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "quickstart").glob("*.yaml"))
TINY = train.Sizes(
    hidden=32,
    num_layers=1,
    vocabulary=400,
    max_length=24,
    pretrain_steps=8,
    finetune_steps=8,
    finetune_batch=8,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[sources.SourceFile]:
    """Standard library modules, read through two wheels as the demonstration reads its own."""
    folder = tmp_path_factory.mktemp("wheels")
    wheels = {}
    for name, module in (("mail", email.message), ("web", http.client)):
        wheels[name] = folder / f"{name}.whl"
        with zipfile.ZipFile(wheels[name], "w") as archive:
            lines = inspect.getsource(module).splitlines(keepends=True)
            for start in range(0, len(lines), 100):
                archive.writestr(f"part{start}.py", "".join(lines[start : start + 100]))
            archive.writestr("data.txt", "no code")
    return list(sources.python_files(wheels))


# ---------------------------------------------------------------- tasks


def test_no_group_and_no_text_is_on_two_sides() -> None:
    items = [tasks.Item(f"text {n % 330}", "ab"[n % 2], f"file {n // 5}") for n in range(400)]
    task = tasks.make_task("t", items, per_class=100)
    group_of = {
        split: {tasks.split_of(item.group) for item in items if (item.text, item.label) in named(task, split)}
        for split in tasks.SPLITS
    }
    texts = {split: {text for text, _ in named(task, split)} for split in tasks.SPLITS}
    assert all(split in sides for split, sides in group_of.items())
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize("name", ["digits", "category"])
def test_tasks_without_wheels_are_disjoint_and_balanced_enough(name: str) -> None:
    items = list(getattr(tasks, name)())
    task = tasks.make_task(name, items, per_class=300)
    group_of = {item.text: item.group for item in items}
    groups = [{group_of[text] for text, _ in task.splits[split]} for split in tasks.SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for split in tasks.SPLITS:
        counts = Counter(label for _, label in task.splits[split])
        assert set(counts) == set(range(len(task.labels)))
        assert max(counts.values()) <= 0.25 * sum(counts.values())


def test_making_a_task_does_not_depend_on_the_order_of_its_items() -> None:
    items = list(tasks.digits())
    assert tasks.make_task("d", items, per_class=20) == tasks.make_task("d", items[::-1], per_class=20)


def test_what_is_asked_for_is_hidden_and_fits_back_into_the_source(files: list[sources.SourceFile]) -> None:
    written = {" ".join(line.split()) for file in files for line in file.text.splitlines()}
    items = list(tasks.operator(files))
    assert len(items) > 5
    for item in items:
        line = item.text.splitlines()[0]
        assert line.count(tasks.MASK) == 1
        restored = line.replace(tasks.MASK, item.label)
        assert restored in written or f"el{restored}" in written


def test_snippets_do_not_name_their_project(files: list[sources.SourceFile]) -> None:
    items = list(tasks.project(files))
    assert {item.label for item in items} == {"mail", "web"}
    assert not [item for item in items if re.search("mail|web|import ", item.text, re.IGNORECASE)]


def test_pixels_keep_what_distinguishes_the_images() -> None:
    items = list(tasks.digits())
    assert len(items) == 1797
    assert len({item.text for item in items}) > 1790
    assert all(item.text.count("[PIXELS ") == 32 for item in items)


def test_a_task_survives_the_disk(tmp_path: Path) -> None:
    task = tasks.make_task("category", tasks.category(), per_class=10)
    tasks.save(task, tmp_path)
    assert tasks.load(tmp_path / "category.json") == task


def test_every_wheel_is_pinned_by_version_and_hash() -> None:
    lines = [line for line in sources.WHEELS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 8
    assert all(re.fullmatch(r"\w+==[\w.]+ +--hash=sha256:[0-9a-f]{64}", line) for line in lines)


def named(task: tasks.Task, split: str) -> set[tuple[str, str]]:
    return {(text, task.labels[label]) for text, label in task.splits[split]}


# ---------------------------------------------------------------- reuse


def test_a_stage_is_reused_only_if_inputs_and_every_byte_are_the_same(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "made", "inputs")
    assert not stage.is_current()
    stage.build(lambda folder: (folder / "a").write_text("one"))
    assert stage.is_current()
    assert not Stage(tmp_path / "made", "other inputs").is_current()

    before = stage.output()
    (tmp_path / "made" / "a").write_text("two")
    assert not stage.is_current()
    assert stage.output() != before
    (tmp_path / "made" / "a").write_text("one")
    assert stage.is_current()

    (tmp_path / "made" / "b").write_text("")
    assert not stage.is_current()
    (tmp_path / "made" / "b").unlink()
    (tmp_path / "made" / "a").unlink()
    assert not stage.is_current()


def test_building_replaces_what_was_there_and_an_interruption_leaves_nothing_current(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "made", "inputs")
    stage.build(lambda folder: (folder / "old").write_text("old"))
    with pytest.raises(ZeroDivisionError):
        stage.build(lambda folder: (folder / "new").write_text(str(1 / 0)))
    assert not stage.is_current()
    stage.build(lambda folder: (folder / "new").write_text("new"))
    assert stage.is_current()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]


def test_a_single_file_can_be_a_stage(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "results.json", "inputs")
    stage.path.write_text("1")
    stage.seal()
    assert stage.is_current()
    stage.path.write_text("2")
    assert not stage.is_current()


# ---------------------------------------------------------------- training


def test_a_fine_tune_moves_every_weight_and_is_the_same_each_time(tmp_path: Path) -> None:
    task = tasks.make_task("category", tasks.category(), per_class=20)
    reports: list[str] = []
    train.pretrain([text for text, _ in task.splits["train"]], tmp_path / "base", TINY, reports.append)
    for name in ("one", "two"):
        train.finetune(tmp_path / "base", task, tmp_path / name, TINY, reports.append)
    base, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "two"))
    assert base.keys() == one.keys()
    assert not [name for name in base if torch.equal(base[name], one[name]) and "position" not in name]
    assert all(torch.equal(one[name], two[name]) for name in one)
    head = load_file(tmp_path / "one" / "head.safetensors")
    assert {name: tuple(value.shape) for name, value in head.items()} == {"weight": (10, 32), "bias": (10,)}


def test_padding_does_not_change_what_a_head_sees(tmp_path: Path) -> None:
    texts = ["latin small letter a", "latin capital letter o with a very long name that goes on"]
    train.pretrain(texts * 8, tmp_path, TINY, lambda report: None)
    encoder = train.load_encoder(tmp_path)
    tokenizer = train.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    examples = [(text, 0) for text in texts]
    together = train.make_batches(tokenizer, examples, batch_size=2)
    alone = train.make_batches(tokenizer, examples, batch_size=1)
    with torch.no_grad():
        expected = torch.cat([train.features(encoder, batch) for batch in alone])
        torch.testing.assert_close(train.features(encoder, together[0]), expected)


# ---------------------------------------------------------------- table and recipes


def test_the_table_shows_means_of_accuracies_and_of_their_shares() -> None:
    scores = {"experts": {"a": 0.8, "b": 0.5}, "merged": {"a": 0.4, "b": 0.5}}
    assert table.means(scores)["merged"] == pytest.approx({"accuracy": 0.45, "normalised": (0.5 + 1.0) / 2})
    header, experts, merged = table.render(scores).splitlines()
    assert header.split() == ["a", "b", "mean"]
    assert experts == "experts  80.0 (100)  50.0 (100)  65.0 (100)"
    assert re.findall(r"[\d.]+", merged) == ["40.0", "50", "50.0", "100", "45.0", "75"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_merges_all_experts_into_the_ignored_folder(path: Path) -> None:
    document = json.loads(json.dumps(mergetool.load_recipe(path).document))
    assert document["models"] == {task: f"../../demo/experts/{task}" for task in tasks.NAMES}
    assert document["output"]["path"] == f"../../demo/merged/{path.stem}"
