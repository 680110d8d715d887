"""What an analysis leaves in a folder where a page or a folder cannot be."""

import shutil
import sys
from pathlib import Path

import pytest

import mergetool
from mergetool import OutputError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def ties(family, tmp_path):
    """The recipe of ties as it is, with the models that it names."""
    shutil.copy(RECIPES / "ties.yaml", tmp_path)
    (tmp_path / "models").mkdir()
    for name, own in {"base": "base", "math": "tales", "code": "code", "chat": "letters"}.items():
        (tmp_path / "models" / name).symlink_to(family / own)
    return tmp_path / "ties.yaml"


def test_without_jinja_the_figures_are_there_and_the_install_line_is_told(ties, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutputError, match="jinja2 is not installed") as caught:
        mergetool.analyze(ties, output=tmp_path / "report")
    assert caught.value.fix == "pip install 'mergetool[report]'"
    assert (tmp_path / "report" / "analysis.json").exists()


def test_a_folder_that_cannot_be_made_is_told(ties, tmp_path):
    (tmp_path / "report").write_text("")
    (tmp_path / "models" / "code").unlink()  # nothing was read before
    with pytest.raises(OutputError):
        mergetool.analyze(ties, output=tmp_path / "report")
