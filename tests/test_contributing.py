"""CONTRIBUTING.md is followed word for word: a method as a plug-in, then the same method in a copy of the project."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = re.compile(r"^`([\w./-]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = dict(FILE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")))


@pytest.fixture
def call(forks):
    """Run Python with `path` before everything else; what it prints."""

    def run(*arguments, cwd, path, code=0):
        (done,) = forks.python(*arguments, cwd=cwd, path=path).wait()
        assert done.code == code, done.out + done.err
        return done.out + done.err

    return run


def install(folder, name, points):
    """What pip leaves of a package that lies in `folder` and brings entry points."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"{key} = {value}\n" for key, value in points.items()]
    (info / "entry_points.txt").write_text("[mergetool.methods]\n" + "".join(lines))


@pytest.fixture
def plugin(tmp_path):
    for name in ("midrange.py", "test_midrange.py", "pyproject.toml"):
        (tmp_path / name).write_text(FILES[name])
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    install(tmp_path, project["name"], project["entry-points"]["mergetool.methods"])
    return tmp_path


def test_the_example_is_a_plug_in(plugin, call):
    shown = call("-m", "mergetool", "methods", "midrange", cwd=plugin, path=plugin)
    assert "Halfway between the smallest and the largest value" in shown
    assert "lean" in shown
    tested = call("-m", "pytest", "-p", "no:cacheprovider", "-q", cwd=plugin, path=plugin)
    assert re.search(r"\b2\d passed", tested), tested


def test_a_plug_in_that_is_broken_is_named_and_stops_nothing_else(plugin, call):
    (plugin / "broken.py").write_text("import a_package_that_is_not_there\n")
    (plugin / "twice.py").write_text(FILES["midrange.py"].replace("midrange", "linear").replace("Midrange", "Linear"))
    install(plugin, "mergetool-broken", {"broken": "broken", "twice": "twice:Linear"})
    shown = call("-m", "mergetool", "methods", cwd=plugin, path=plugin)
    assert {"midrange", "linear", "ties"} <= {line.split()[0] for line in shown.splitlines() if line}
    assert "Weighted average of models" in shown
    assert "warning: the plug-in 'broken' (broken, package mergetool-broken) cannot be loaded" in shown
    assert "ModuleNotFoundError: No module named 'a_package_that_is_not_there'" in shown
    assert "two methods are called 'linear'" in shown
    assert "fix: upgrade it (pip install -U mergetool-broken) or remove it (pip uninstall mergetool-broken)" in shown
    assert "Traceback" not in shown


def test_a_plug_in_that_breaks_a_law_is_told_which_and_how(plugin, call):
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "order or repeatable")
    ends = "torch.lerp(low, high, p.lean, out=high)"
    first = FILES["midrange.py"].replace(ends, "group.models[-1]")
    (plugin / "midrange.py").write_text(first)
    shown = call(*command, cwd=plugin, path=plugin, code=1)
    assert "midrange breaks the law 'order': The order of the models does not matter" in shown
    assert re.search(r"values differ by more than 1e-05; the first, at \d+, is \S+, expected \S+", shown)
    (fix,) = re.findall(r"fix: mend Midrange; or, if it is meant, say so there: (.*)", shown)[-1:]
    excused = first.replace("    granularity: ", f"    {fix}\n    granularity: ")
    (plugin / "midrange.py").write_text(excused)
    assert "1 passed, 1 xfailed" in re.sub(r", \d+ deselected", "", call(*command, cwd=plugin, path=plugin))
    (plugin / "midrange.py").write_text(excused.replace('"order"', '"repeatable"').replace("group.models[-1]", ends))
    assert "[XPASS(strict)] the reason" in call(*command, cwd=plugin, path=plugin, code=1)


@pytest.mark.slow
def test_the_example_is_a_method_of_the_project(tmp_path, call):
    for name in ("mergetool", "recipes", "scripts", "tests", "docs", "README.md", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path)
    own = FILES["test_midrange.py"].replace("from mergetool.testing import laws\nfrom midrange import Midrange\n\n", "")
    (tmp_path / "tests/methods/test_midrange.py").write_text(own.replace("test_laws = laws(Midrange)\n\n\n", ""))
    (tmp_path / "mergetool/methods/midrange.py").write_text(FILES["midrange.py"])
    (tmp_path / "recipes/midrange.yaml").write_text(FILES["recipes/midrange.yaml"])
    call("scripts/docs", "--write", cwd=tmp_path, path=tmp_path)
    assert "[`midrange`](../recipes/midrange.yaml)" in (tmp_path / "docs/methods.md").read_text()
    assert call("tests/golden/make.py", "midrange", cwd=tmp_path, path=tmp_path) == "new: midrange\n"
    places = ("tests/methods/test_midrange.py", "tests/laws/test_every_method.py", "tests/laws/test_documentation.py")
    tested = call(
        "-m", "pytest", "-k", "midrange", *places, "tests/golden", "tests/test_house.py", cwd=tmp_path, path=tmp_path
    )
    assert re.search(r"\b[23]\d passed", tested), tested
