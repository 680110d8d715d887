"""A run that was ended between any two steps is taken up where it was, to the same bytes (kills: see test_kill)."""

import json
import os
import shutil

import pytest

import mergetool
from mergetool.errors import OutputError
from mergetool.outputs import journal as journals
from mergetool.outputs.verify import verify_output
from tests.files import LONG, StoppedError, Watch, content, stop_after, tensors, write_model, write_models

TIES = {"method": "ties", "density": 0.5}
SUM = {"method": "task-arithmetic", "scale": 0.5}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A merge of toy models in two output files, with a config and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    (tmp_path / "base/config.json").write_text('{"model_type": "toy", "torch_dtype": "bfloat16"}')
    (tmp_path / "base/tokenizer.json").write_text("{}")
    return {
        "base": "base",
        "models": {"a": "a", "b": "b"},
        "merge": SUM,
        "output": {"path": "out", "shard_size": 1000},
    }


@pytest.fixture
def undisturbed(recipe, tmp_path):
    """What the merge gives when nothing happens."""
    mergetool.run(recipe, output=tmp_path / "undisturbed", workers=1)
    return content(tmp_path / "undisturbed")


def interrupt(recipe, count, **flags):
    """Run, and end after `count` units."""
    with pytest.raises(StoppedError):
        mergetool.run(recipe, workers=1, progress=stop_after(count), **flags)


def whole(recipe):
    """Bytes that a whole run reads."""
    return mergetool.plan(recipe).bytes_in


# -------------------------------------------------------------------- ended by an error


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_run_that_was_ended_goes_on_where_it_was(recipe, undisturbed, tmp_path, count):
    interrupt(recipe, count)
    assert not (tmp_path / "out").exists()
    left = whole(recipe) - sum(sum(step_bytes(recipe, step).values()) for step in mergetool.plan(recipe).steps[:count])
    watch = Watch()
    result = mergetool.run(recipe, progress=watch)
    assert watch.said == [f"resuming: {count} units are done already"]
    assert result.resumed
    assert result.bytes_read == left
    assert content(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out.partial").exists()


def step_bytes(recipe, step):
    sources = mergetool.plan(recipe).sources
    return {name: sources[name].specs[step.spec.name].num_bytes for name in step.reads}


def test_a_run_may_be_told_to_start_over(recipe, undisturbed, tmp_path):
    interrupt(recipe, 3)
    result = mergetool.run(recipe, resume=False)
    assert not result.resumed
    assert result.bytes_read == whole(recipe)
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("change", ["setting", "seed", "shards", "input", "time of an input"])
def test_a_run_of_something_else_starts_over(recipe, tmp_path, change):
    interrupt(recipe, 3)
    changed = json.loads(json.dumps(recipe))
    if change == "setting":
        changed["merge"]["scale"] = 0.6
    elif change == "seed":
        changed["compute"] = {"seed": 1}
    elif change == "shards":
        changed["output"]["shard_size"] = 2000
    elif change == "input":
        write_model(tmp_path / "b", tensors(7))
    else:
        os.utime(tmp_path / "b/model.safetensors", ns=(1, 1))
    result = mergetool.run(changed)
    assert not result.resumed
    assert result.bytes_read == whole(changed)
    mergetool.run(changed, output=tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_where_the_output_lies_may_change_and_that_is_another_run(recipe, undisturbed, tmp_path):
    interrupt(recipe, 3)
    assert not mergetool.run(recipe, output=tmp_path / "elsewhere").resumed
    for name in ("partial", "partial.journal"):
        (tmp_path / f"out.{name}").rename(tmp_path / f"moved.{name}")
    assert mergetool.run(recipe, output=tmp_path / "moved").resumed
    assert content(tmp_path / "moved") == undisturbed


@pytest.mark.parametrize("damage", ["gone", "cut", "longer", "a folder"])
def test_a_run_whose_unfinished_files_are_damaged_starts_over(recipe, undisturbed, tmp_path, damage):
    interrupt(recipe, 3)
    path = tmp_path / "out.partial/model-00001-of-00003.safetensors"
    if damage in ("gone", "a folder"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    if damage in ("cut", "longer"):
        os.truncate(path, path.stat().st_size + (8 if damage == "longer" else -8))
    result = mergetool.run(recipe)
    assert not result.resumed
    assert content(tmp_path / "out") == undisturbed


def test_a_journal_torn_at_any_byte_is_good_enough(recipe, undisturbed, tmp_path):
    interrupt(recipe, 4)
    (tmp_path / "out.partial").rename(tmp_path / "kept")
    lines = (tmp_path / "out.partial.journal").read_bytes()
    ends = [at for at in range(len(lines)) if lines[at : at + 1] == b"\n"]
    assert len(ends) >= 5
    near = {at + by for at in ends for by in (-1, 0, 1, 2)} | set(range(0, len(lines), 23 if LONG else 101)) | {0, 1}
    units = []
    for length in sorted(at for at in near if at <= len(lines)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
        (tmp_path / "out.partial.journal").write_bytes(lines[:length])
        watch = Watch()
        mergetool.run(recipe, workers=1, progress=watch)
        units.append(int(watch.said[0].split()[1]) if watch.said else 0)
        assert content(tmp_path / "out") == undisturbed, length
    assert units == sorted(units)
    assert (units[0], units[-1]) == (0, 4)


@pytest.mark.parametrize("garbage", [bytes(4096), b"[]\n", b'"x"\n', b"12\n", b"\xff\n", b"{\n"])
def test_garbage_in_a_journal_ends_what_is_believed(recipe, undisturbed, tmp_path, garbage):
    interrupt(recipe, 3)
    with (tmp_path / "out.partial.journal").open("ab") as file:
        file.write(garbage)
    assert mergetool.run(recipe).resumed
    assert content(tmp_path / "out") == undisturbed


def test_after_a_reboot_only_what_was_synced_counts(recipe, undisturbed, tmp_path, monkeypatch):
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(journals, "_BOOT_ID", boot)
    boot.write_text("first")
    interrupt(recipe, 2)
    path = tmp_path / "out.partial.journal"
    lines = path.read_bytes().splitlines()
    units = [place for place, line in enumerate(lines) if b'"unit"' in line]
    with path.open("ab") as file:  # what the run does every half second
        file.write(json.dumps({"synced": units[0] + 1, "seconds": 1.5, "boot": "first"}).encode() + b"\n")

    boot.write_text("second")
    interrupt(recipe, 1)  # of two units, one was synced; here a third is done
    assert b'"second"' in path.read_bytes()
    watch = Watch()
    mergetool.run(recipe, progress=watch)
    assert watch.said == ["resuming: 2 units are done already"]
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    "merge", [{**TIES, "scope": "model"}, {"method": "iso-c", "scale": "recover", "filter": "fusionbench"}]
)
def test_what_was_surveyed_before_is_not_surveyed_again(recipe, tmp_path, merge):
    recipe["merge"] = merge
    mergetool.run(recipe, output=tmp_path / "undisturbed")
    interrupt(recipe, 2)
    done = sum(sum(step_bytes(recipe, step).values()) for step in mergetool.plan(recipe).steps[:2])
    assert mergetool.run(recipe).bytes_read == whole(recipe) - done
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_tensor_called_like_anything_is_just_a_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, shapes={"model": (50,), "null": (50,), "w": (50,), "": (50,)})
    overrides = [{"match": "model", "scope": "tensor"}, {"match": "null", "scope": "tensor"}]
    recipe = {
        "base": "base",
        "models": {"a": "a", "b": "b"},
        "merge": {**TIES, "scope": "model", "overrides": overrides},
        "output": {"path": "out"},
    }
    mergetool.run(recipe, output=tmp_path / "undisturbed")
    for count in (1, 1, 1):
        interrupt(recipe, count)
    mergetool.run(recipe)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_notes_survive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, names=("a",))
    write_model(tmp_path / "b", tensors(0))
    recipe = {"models": {"a": "a", "b": "b"}, "merge": {"method": "slerp"}, "output": {"path": "out"}}
    interrupt(recipe, 3)
    result = mergetool.run(recipe)
    assert result.notes == {"almost parallel tensors: linear interpolation": 6}


def test_remarks_may_hold_any_text_and_measures_stay_numbers(tmp_path, monkeypatch):
    from mergetool.methods.linear import Linear

    merge = Linear.merge

    def remarking(self, group, p, stats):
        group.note("rank = 3 of 8")
        group.measure("energy", 0.123456789)
        group.measure("ratio", float("inf"))
        return merge(self, group, p, stats)

    monkeypatch.setattr(Linear, "merge", remarking)
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, names=("a", "b"))
    recipe = {"models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}, "output": {"path": "out"}}
    interrupt(recipe, 3)
    result = mergetool.run(recipe)
    assert (result.resumed, result.notes["rank = 3 of 8"], result.notes["ratio is not finite"]) == (True, 6, 6)
    lock = json.loads((tmp_path / "out" / "mergetool.json").read_text())
    names = tensors(0)
    assert lock["measured"] == {name: {"energy": 0.123457} for name in names}
    assert lock["notes"] == {name: ["rank = 3 of 8", "ratio is not finite"] for name in names}


def test_an_error_after_the_last_unit_costs_no_unit(recipe, undisturbed, tmp_path):
    interrupt(recipe, 6)
    (tmp_path / "out.partial/.config.json.tmp").mkdir()
    with pytest.raises(OutputError):
        mergetool.run(recipe)
    (tmp_path / "out.partial/.config.json.tmp").rmdir()
    assert mergetool.run(recipe).bytes_read == 0
    assert content(tmp_path / "out") == undisturbed
    assert verify_output(tmp_path / "out")["files_checked"] == 7


# -------------------------------------------------------------------- ended between the lock and the rename


@pytest.mark.parametrize("journal", [True, False])
def test_a_finished_folder_is_published_by_the_next_run(recipe, undisturbed, tmp_path, journal):
    interrupt(recipe, 6)
    shutil.copy(tmp_path / "out.partial.journal", tmp_path / "journal.jsonl")
    mergetool.run(recipe)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    if journal:
        shutil.copy(tmp_path / "journal.jsonl", tmp_path / "out.partial.journal")
    result = mergetool.run(recipe)
    assert (result.resumed, result.bytes_read, result.path) == (True, 0, tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed


def test_a_finished_folder_of_something_else_is_not_published(recipe, tmp_path):
    mergetool.run(recipe)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    recipe["merge"] = {**SUM, "scale": 0.6}
    mergetool.run(recipe)
    mergetool.run(recipe, output=tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json", "config.json"])
def test_a_finished_folder_that_lost_a_file_is_made_again(recipe, undisturbed, tmp_path, name):
    mergetool.run(recipe)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / name).unlink()
    mergetool.run(recipe)
    assert content(tmp_path / "out") == undisturbed
