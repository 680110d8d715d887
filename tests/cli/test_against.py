"""`mergetool verify PATH --against RECIPE` as its users meet it."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.files import write_models, write_recipe


@pytest.fixture
def recipe(tmp_path):
    write_models(tmp_path)
    models = {"a": "./a", "b": "./b"}
    return write_recipe(tmp_path / "r.yaml", models=models, merge={"method": "linear"}, output={"path": "out"})


def spoil(path):
    file = path / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"][3, 2] += 1
    save_file(state, file, metadata={"format": "pt"})


def test_yes_is_an_answer_on_stdout(call, recipe, tmp_path):
    call("run", recipe)
    code, out, err = call("verify", tmp_path / "out", "--against", recipe, "-q")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/out: yes: 6 tensors are what {recipe} says (6 bit for bit)\n"


def test_no_is_an_error_of_the_checkpoint_and_its_fix_makes_the_other_answer(call, recipe, tmp_path, monkeypatch):
    call("run", recipe)
    spoil(tmp_path / "out")
    code, out, err = call("verify", tmp_path / "out", "--against", recipe)
    assert (code, out) == (3, "")
    assert "1 of 6 tensors differ, most of all lm_head.weight: 1 of 128 entries, by up to 1 (at flat index 26" in err
    monkeypatch.chdir(tmp_path)
    command = err.partition("mergetool run ")[2].split()
    assert command[1:] == ["-o", "FOLDER"]
    assert call("run", *command)[0] == 0
    assert call("verify", "FOLDER", "--against", recipe)[0] == 0


def test_cannot_tell_has_a_code_of_its_own(call, recipe, tmp_path):
    call("run", recipe)
    write_recipe(tmp_path / "r.yaml", models={"a": "./a", "b": "./gone"}, merge={"method": "linear"})
    code, out, err = call("verify", tmp_path / "out", "--against", recipe)
    assert (code, out) == (5, "")
    assert "cannot tell whether it is what" in err
    assert "fix: check the path" in err


def test_the_fix_for_another_seed_can_be_typed(call, tmp_path):
    write_models(tmp_path)
    dare = {"method": "dare-linear", "density": 0.5}
    recipe = write_recipe(tmp_path / "r.yaml", base="./base", models={"a": "./a", "b": "./b"}, merge=dare)
    call("run", recipe, "-o", tmp_path / "out", "--set", "compute.seed=5")
    code, _, err = call("verify", tmp_path / "out", "--against", recipe)
    assert (code, "fix: name the seed: --set compute.seed=5\n" in err) == (5, True)
    assert call("verify", tmp_path / "out", "--against", recipe, "--set", "compute.seed=5")[0] == 0


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_answer_as_json_is_one_document(call, recipe, tmp_path, spoilt):
    call("run", recipe)
    if spoilt:
        spoil(tmp_path / "out")
    code, out, _ = call("verify", tmp_path / "out", "--against", recipe, "--json")
    answer = json.loads(out)
    assert (code, answer["exit_code"], answer["answer"]) == ((3, 3, "no") if spoilt else (0, 0, "yes"))
    assert answer["tensors"] == ({"same": 5, "different": 1} if spoilt else {"same": 6})
    assert [each["tensor"] for each in answer["differing"]] == ["lm_head.weight"] * spoilt


@pytest.mark.parametrize(
    "option", [["--load"], ["--workers", "2"], ["--memory", "8GiB"], ["--set", "a=1"], ["--trust-code"]]
)
def test_an_option_that_would_have_no_effect_is_refused(call, recipe, tmp_path, option):
    call("run", recipe)
    beside = ["--against", recipe] if option == ["--load"] else []
    code, _, err = call("verify", tmp_path / "out", *beside, *option)
    assert (code, "would have no effect" in err) == (4, True)


def test_a_wrong_recipe_is_an_error_of_the_recipe(call, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", models={"a": "./a"}, merge={"method": "linaer"})
    assert call("verify", tmp_path / "out", "--against", recipe)[0] == 2
