"""`--locked`, and everything else as a CI job meets it: no terminal, JSON on stdout, exit codes, no colour."""

import json
import os
import shutil

import pytest

from tests.files import content, tensors, write_model, write_models, write_recipe


@pytest.fixture
def job(tmp_path, forks):
    """Runs a command as a CI job would; a recipe and its models lie in the current folder."""
    write_models(tmp_path)
    write_recipe(
        tmp_path / "recipe.yaml",
        models={"a": "a", "b": "b"},
        merge={"method": "linear"},
        output={"path": "out"},
    )

    def run(*arguments):
        environment = {**os.environ, "CI": "true", "TERM": "xterm-256color"}
        done = forks.run(arguments, cwd=tmp_path, env=environment)
        assert "\033" not in done.out + done.err
        assert "\r" not in done.err
        return done.code, json.loads(done.out) if done.out.startswith(("{", "[")) else done.out, done.err

    return run


def test_locked_accepts_the_same_inputs_wherever_they_lie(job, tmp_path):
    assert job("run", "recipe.yaml", "--json")[0] == 0
    first = content(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "b", "recipe.yaml"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    shutil.copy(tmp_path / "out" / "mergetool.json", tmp_path / "elsewhere")
    code, _, err = job("run", "elsewhere/recipe.yaml", "--locked", "--json")
    assert code == 0, err
    assert content(tmp_path / "elsewhere" / "out") == first
    lock = json.loads((tmp_path / "elsewhere" / "out" / "mergetool.json").read_text())
    assert all(file["sha256"] for files in lock["inputs"].values() for file in files)


def test_locked_refuses_what_differs_and_merges_nothing(job, tmp_path):
    code, answer, _ = job("run", "recipe.yaml", "--locked", "--json")
    assert (code, "no mergetool.json to agree with" in answer["what"]) == (2, True)
    assert job("run", "recipe.yaml")[0] == 0
    again = ("run", "recipe.yaml", "--locked", "--overwrite", "--json")
    assert job(*again)[0] == 0
    before = content(tmp_path / "out")
    code, answer, _ = job(*again, "--set", "merge.weight.a=0.9", "--set", "merge.weight.b=0.1")
    assert (code, "the recipe is not the one" in answer["what"]) == (2, True)
    state = tensors(1)
    state["lm_head.weight"][0, 0] += 1
    write_model(tmp_path / "a", state)  # of the same size
    code, answer, _ = job(*again)
    assert (code, answer["where"]) == (3, "input 'a'")
    assert "SHA-256 differ" in answer["what"]
    write_model(tmp_path / "b", {"x": state["lm_head.weight"]})
    assert job(*again, "--set", "check.missing=skip")[0] == 2
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("validate", "recipe.yaml", "--json"), 0),
        (("validate", "nowhere.yaml", "--json"), 2),
        (("run", "recipe.yaml", "--set", "models.a=./nowhere", "--json"), 3),
        (("run", "recipe.yaml", "--memory", "1MB", "--json"), 4),
        (("run", "recipe.yaml", "-o", "a", "--json"), 6),
        (("run", "recipe.yaml", "--push", "--json"), 8),
    ],
)
def test_every_answer_is_json_on_stdout_with_its_exit_code(job, arguments, code):
    found, answer, err = job(*arguments)
    assert (found, answer.get("exit_code", 0)) == (code, code)
    assert bool(err) == bool(code)
