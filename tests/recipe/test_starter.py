"""`mergetool init`: what it writes is a recipe as it stands, and with any of its comments made true."""

import re
import shutil
import sys

import pytest
import yaml

from mergetool.methods import registry
from mergetool.methods.base import TensorMethod
from mergetool.recipe import load_recipe
from mergetool.recipe.starter import starter
from tests.cli.conftest import call  # noqa: F401  (a fixture)
from tests.files import LONG, write_models
from tests.statistics.networks import write_classifier, write_rows

RUN = {"ties", *{kind.statistic: name for name, kind in registry().items() if kind.statistic}.values()}
"""Methods whose recipe is run here: one for each kind of statistic; tests/laws runs a recipe of each method."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Models where a new recipe looks for them."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path / "models", names=("base", "first", "second", "third"))
    return tmp_path


def settings(text):
    """The lines that are comments, but hold a setting."""
    return re.findall(r"^ *# ( *\w+:.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", registry())
def test_every_method_has_a_recipe_to_begin_with_that_is_valid_and_names_every_field(call, here, name):  # noqa: F811
    assert call("init", name, "-o", "recipe.yaml") == (0, "recipe.yaml\n", "")
    assert call("validate", "recipe.yaml")[0] == 0
    assert load_recipe(here / "recipe.yaml").adapters_alone == bool(registry()[name].needs_adapters)
    text = (here / "recipe.yaml").read_text()
    for key in registry()[name].model_fields:
        assert re.search(rf"^  (# )?{key}:", text, re.MULTILINE), key
    if registry()[name].statistic:
        for seed, model in enumerate(("base", "first", "second")):
            write_classifier(here / "models" / model, seed)
        for file in ("rows", "new", "first", "second"):
            write_rows(here / f"{file}.jsonl")
        (here / "recipe.yaml").write_text(re.sub(r"^  # steps: \d+", "  steps: 2", text, flags=re.MULTILINE))
    if issubclass(registry()[name], TensorMethod) and (name in RUN or LONG):
        code, out, err = call("run", "recipe.yaml")
        assert (code, out.strip()) == (0, str(here / name)), err


@pytest.mark.parametrize("name", registry())
def test_the_comments_are_settings_that_change_nothing(tmp_path, name):
    text = starter(name)
    assert max(map(len, text.splitlines())) <= 120
    written = re.sub(r"^( *)# ( *\w+:.*)$", r"\1\2", text.partition("models:")[2], flags=re.MULTILINE)
    (tmp_path / "all.yaml").write_text(f"{text.partition('models:')[0]}models:{written}")
    (tmp_path / "none.yaml").write_text(text)
    told, plain = (load_recipe(tmp_path / file) for file in ("all.yaml", "none.yaml"))
    assert len(yaml.safe_load((tmp_path / "all.yaml").read_text())["merge"]) >= len(registry()[name].model_fields)
    assert told.method == plain.method


def test_nothing_is_overwritten_and_the_advice_helps(call, here):  # noqa: F811
    (here / "recipe.yaml").write_text("mine")
    code, _, err = call("init", "ties", "-o", "recipe.yaml")
    assert (code, (here / "recipe.yaml").read_text()) == (6, "mine")
    assert "fix: remove it, or choose another name: -o OTHER.yaml" in err
    assert call("init", "ties", "-o", "OTHER.yaml")[0] == 0
    code, _, err = call("init", "TIES")
    assert (code, "did you mean 'ties'?" in err) == (2, True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell")
@pytest.mark.parametrize(
    ("words", "found"), [("mergetool init dare", "dare-linear dare-ties"), ("mergetool in", "init inspect")]
)
def test_a_shell_completes_commands_and_methods(here, monkeypatch, capsys, words, found):
    from mergetool.cli import main

    monkeypatch.setenv("_MERGETOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setattr("sys.argv", ["mergetool"])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None, raising=False)  # else we are `python -m pytest`
    with pytest.raises(SystemExit):
        main()
    assert sorted(capsys.readouterr().out.split()) == found.split()
