"""Who may write an output, and what becomes of what lay there."""

import os
import shlex
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest

import mergetool
from mergetool.errors import OutputError
from mergetool.outputs import staging
from mergetool.outputs.journal import Journal, remove_journals
from tests.files import StoppedError, Watch, content, stop_after, write_models


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path, names=("a", "b"))
    return {"models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}, "output": {"path": "out"}}


def refused(recipe, **flags):
    with pytest.raises(OutputError) as caught:
        mergetool.run(recipe, **flags)
    assert caught.value.exit_code == 6
    assert caught.value.fix
    return caught.value


def other(recipe):
    """A recipe with another result."""
    return recipe | {"merge": {"method": "linear", "weight": {"a": 1, "b": 3}}}


# -------------------------------------------------------------------- places that cannot be written


def test_a_recipe_without_an_output_needs_one(recipe):
    del recipe["output"]
    assert refused(recipe).what == "nowhere to write to"


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("/dev/null/out", "Not a directory"),
        ("/sys/kernel/merged", ""),  # read-only, or no folders allowed: even root may not
        ("x" * 300, "File name too long"),
        ("x" * 250, "File name too long"),  # the name itself would do, but not NAME.partial
        ("a/model.safetensors/out", "Not a directory"),
        ("new/sub/..", "no name for a new folder"),
        ("..", "the output is an input, or holds one"),
        ("/", "the output is an input, or holds one"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(recipe, tmp_path, place, what):
    watch = Watch()
    assert what in refused(recipe, output=place, progress=watch).what
    assert watch.count == -1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def state(path):
    """What tells whether anyone has touched it. Looking is allowed: that may change when it was last looked at."""
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.parametrize("kind", ["file", "folder", "symlink to an empty folder", "symlink to nowhere"])
def test_what_exists_is_not_touched(recipe, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "symlink to nowhere":
        out.symlink_to("nowhere")
    elif kind == "folder":
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
    else:
        (tmp_path / "empty").mkdir()
        out.symlink_to("empty")
    before = state(out)
    assert refused(recipe).what == "exists already"
    assert "was not made by mergetool" in refused(recipe, overwrite=True).what
    assert state(out) == before
    assert not list(tmp_path.glob("out.partial*"))


@pytest.mark.parametrize("place", ["a", ".", "a/model.safetensors", "link"])
def test_inputs_are_no_outputs(recipe, tmp_path, place):
    (tmp_path / "link").symlink_to("a")
    before = content(tmp_path / "a")
    assert refused(recipe, output=place, overwrite=True).what == "the output is an input, or holds one"
    assert content(tmp_path / "a") == before


def test_an_unfinished_folder_that_holds_an_input_is_no_output(recipe, tmp_path):
    (tmp_path / "a").rename(tmp_path / "a.partial")
    recipe["models"]["a"] = "a.partial"
    assert refused(recipe, output="a").what == "the output is an input, or holds one"


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
def test_other_things_called_partial_are_not_touched(recipe, tmp_path, kind):
    partial = tmp_path / "out.partial"
    if kind == "file":
        partial.write_text("mine")
    else:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").write_text("mine")
        partial.symlink_to("mine") if kind == "symlink" else (tmp_path / "mine").rename(partial)
    assert "is in the way" in refused(recipe).what
    if kind == "file":
        assert partial.read_text() == "mine"
    else:
        assert (partial / "thesis.tex").read_text() == "mine"


def test_an_empty_unfinished_folder_is_taken(recipe, tmp_path):
    (tmp_path / "out.partial").mkdir()
    assert mergetool.run(recipe).path == tmp_path / "out"


# -------------------------------------------------------------------- an empty folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_becomes_the_result(recipe, tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    assert mergetool.run(recipe, overwrite=overwrite).path == tmp_path / "out"
    mergetool.run(recipe, output="again")
    assert content(tmp_path / "out") == content(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again", "b", "out"]


def test_an_empty_folder_stays_while_the_result_is_not_complete(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    before = state(tmp_path / "out")
    with pytest.raises(StoppedError):
        mergetool.run(recipe, progress=stop_after(3))
    assert state(tmp_path / "out") == before
    assert mergetool.run(recipe).resumed


def inside(error, out):
    """The place that the advice names."""
    (place,) = shlex.split(error.fix.partition("-o ")[2])
    assert place.startswith(f"{out}/")
    return place


@pytest.mark.parametrize("kind", ["disk", "folder of the same disk"])
def test_where_something_is_mounted_a_place_inside_is_named(recipe, tmp_path, kind):
    out = tmp_path / "out put"
    out.mkdir()
    (tmp_path / "other").mkdir()
    what = ["-t", "tmpfs", "tmpfs"] if kind == "disk" else ["--bind", str(tmp_path / "other")]
    if subprocess.run(["mount", *what, str(out)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        error = refused(recipe, output=out)
        assert "mounted" in error.what
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "other", "out put"]
        assert mergetool.run(recipe, output=inside(error, out)).path.parent == out
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_the_current_folder_is_not_taken_away(recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe["models"] = {name: str(tmp_path / name) for name in "ab"}
    error = refused(recipe, output=".")
    assert "current folder" in error.what
    assert mergetool.run(recipe, output=inside(error, tmp_path / "here")).path.is_dir()


def test_a_folder_beside_which_nothing_may_be_written_names_a_place_inside(recipe, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(staging.os, "access", lambda place, mode: place != tmp_path)  # root may write anywhere
    error = refused(recipe)
    assert mergetool.run(recipe, output=inside(error, tmp_path / "out")).path.is_dir()


# -------------------------------------------------------------------- overwriting


def test_an_earlier_result_stands_until_the_new_one_is_complete(recipe, tmp_path):
    mergetool.run(recipe)
    before = content(tmp_path / "out")
    (tmp_path / "out/stray").write_text("left in the old one")
    with pytest.raises(StoppedError):
        mergetool.run(other(recipe), overwrite=True, progress=stop_after(3))
    assert (tmp_path / "out/stray").exists()
    mergetool.run(other(recipe), overwrite=True)
    assert content(tmp_path / "out").keys() == before.keys()
    assert content(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_overwriting_a_symlink_replaces_the_link(recipe, tmp_path):
    mergetool.run(recipe, output="first")
    before = content(tmp_path / "first")
    (tmp_path / "out").symlink_to("first")
    mergetool.run(other(recipe), overwrite=True)
    assert not (tmp_path / "out").is_symlink()
    assert content(tmp_path / "out") != before
    assert content(tmp_path / "first") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "first", "out"]


@pytest.mark.parametrize("left", ["whole", "half removed", "not ours"])
def test_what_a_killed_overwriting_left_is_cleared_away(recipe, tmp_path, left):
    """Killed between the two renames, or while the earlier result was being removed."""
    mergetool.run(recipe)
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    if left == "half removed":
        (tmp_path / "out.replaced/model.safetensors").unlink()
    if left == "not ours":
        (tmp_path / "out.replaced/mergetool.json").unlink()
    mergetool.run(recipe)
    assert (tmp_path / "out.replaced").exists() == (left == "not ours")


def appear(place):
    """Progress that lets something appear at the output after three units."""

    def on_advance(count):
        if count == 3:
            place.mkdir()
            (place / "thesis.tex").write_text("mine")

    return Watch(on_advance)


@pytest.mark.parametrize(("overwrite", "what"), [(False, "exists already"), (True, "was not made by mergetool")])
def test_an_output_that_appears_meanwhile_is_not_replaced(recipe, tmp_path, overwrite, what):
    assert what in refused(recipe, overwrite=overwrite, progress=appear(tmp_path / "out")).what
    assert (tmp_path / "out/thesis.tex").read_text() == "mine"
    shutil.rmtree(tmp_path / "out")
    assert mergetool.run(recipe).bytes_read == 0  # nothing was lost


# -------------------------------------------------------------------- two at once


def test_a_second_run_is_kept_out_until_the_result_has_its_name(recipe, tmp_path):
    """Also in the moment between the last byte and the rename, whatever the second run would make."""
    tried = []

    def on_advance(count):
        if count == 6:
            for document in (recipe, other(recipe)):
                tried.append(refused(document).what)

    mergetool.run(recipe, progress=Watch(on_advance))
    assert tried == ["another run is writing this output"] * 2
    mergetool.run(recipe, output="again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_a_journal_is_locked_until_it_is_removed_and_then_begun_anew(tmp_path):
    partial = tmp_path / "out.partial"
    journal = Journal(partial, "key", resume=True)
    journal.unit("merge", SimpleNamespace(index=0, name="w"), 0, [])
    with pytest.raises(OutputError, match="another run"):
        Journal(partial, "key", resume=True)
    remove_journals(partial)
    other = Journal(partial, "key", resume=True)  # a new file: the other one's is nobody's
    assert not other.resumed
    journal.close()
    other.close()


def test_a_lock_that_a_killed_run_is_about_to_let_go_is_waited_for(tmp_path):
    """Its workers notice the kill a moment later than whoever gives the command again."""
    partial = tmp_path / "out.partial"
    journal = Journal(partial, "key", resume=True)
    journal.unit("merge", SimpleNamespace(index=0, name="w"), 0, [])
    end = threading.Timer(0.3, journal.close)
    end.start()
    other = Journal(partial, "key", resume=True)
    assert other.resumed
    end.join()
    other.close()


def test_many_runs_started_at_once_make_one_result(recipe, tmp_path):
    results = []

    def run():
        try:
            done = mergetool.run(recipe, workers=1)
            results.append("done already" if done.resumed else done.path)  # one that begins when another has ended
        except OutputError as error:
            results.append(error.what)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(tmp_path / "out") == 1
    others = {"another run is writing this output", "exists already", "done already"}
    assert all(
        result in others or "cannot be written" in str(result) for result in results if result != tmp_path / "out"
    )
    mergetool.run(recipe, output="again")
    assert content(tmp_path / "out") == content(tmp_path / "again")
    assert not (tmp_path / "out.partial").exists()
