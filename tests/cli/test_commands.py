"""The command line as its users meet it: exit codes, what goes to stdout and what to stderr, and how fast it starts."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
import typer
from safetensors.torch import load_file

from mergetool import __version__
from mergetool.cli.app import app
from mergetool.cli.commands import named
from mergetool.errors import RecipeError
from tests.files import tensors, write_model, write_models, write_raw, write_recipe

FLAGS = {
    "bundle add": {"bundle", "experts", "--adapter", "--output", "-o", "--workers", "--json"},
    "bundle dense": {"bundle", "expert", "--output", "-o", "--json"},
    "bundle list": {"bundle", "--json"},
    "bundle remove": {"bundle", "experts", "--output", "-o", "--workers", "--json"},
    "run": {
        "recipe",
        "-o",
        "--output",
        "--device",
        "--workers",
        "--memory",
        "--overwrite",
        "--no-resume",
        "--cache",
        "--trust-code",
        "--push",
        "--no-push",
        "--locked",
        "--device-map",
        "--set",
        "--json",
    },
    "validate": {"recipe", "--online", "--set", "--json"},
    "plan": {"recipe", "--set", "--workers", "--memory", "--full", "--count", "--machines", "--json"},
    "inspect": {"reference", "--json"},
    "dequantise": {"path", "-o", "--output"},
    "verify": {"path", "--load", "--against", "--set", "--workers", "--memory", "--trust-code", "--json"},
    "analyze": {"recipe", "-o", "--output", "--workers", "--set", "--data", "--checkpoints", "--cache", "--json"},
    "diff": {"a", "b", "--base", "--top", "--exit-code", "--workers", "--json"},
    "compare": {"runs", "--base", "-o", "--output", "--workers", "--json"},
    "methods": {"name", "--find", "--json"},
    "init": {"method", "-o", "--output"},
    "schema": set(),
    "import": {"recipe", "-o", "--output"},
    "push": {"path", "repo", "--private", "--create", "--pull-request", "--json"},
    "calibrate": {"bundle", "--input", "--device", "--json"},
    "route": {"bundle", "--input", "--task", "--batch-size", "--device", "--json", "--labels", "-o", "--output"},
    "evaluate": {
        "path",
        "--tasks",
        "--include",
        "--metric",
        "--parent",
        "--line-to",
        "--along",
        "--pairs",
        "--points",
        "--device-map",
        "--memory",
        "-o",
        "--output",
        "--device",
        "--batch-size",
        "--cache",
        "--trust-code",
        "--json",
    },
}
"""Where and how a run runs. What changes a result belongs in the recipe: think twice before adding a flag."""


@pytest.fixture
def recipe(tmp_path):
    write_models(tmp_path)
    models = {"a": "./a", "b": "./b"}
    return write_recipe(tmp_path / "r.yaml", models=models, merge={"method": "linear"}, output={"path": "out"})


def every(command, before=""):
    """Commands by what is typed, those of a group behind its name."""
    found = {}
    for name, each in command.commands.items():
        found |= every(each, f"{before}{name} ") if hasattr(each, "commands") else {f"{before}{name}": each}
    return found


def test_the_commands_and_flags_are_frozen():
    command = typer.main.get_command(app)
    assert spelled(command) == {"--version", "--install-completion", "--show-completion", *EVERYWHERE}
    assert {name: spelled(each) for name, each in every(command).items()} == {
        name: flags | EVERYWHERE for name, flags in FLAGS.items()
    }


def test_every_command_answers_to_h_and_shows_an_example_that_can_be_typed(call):
    command = typer.main.get_command(app)
    assert "Usage" in call("-h")[1]
    for name, each in every(command).items():
        example = each.epilog.removeprefix("Example: ")
        assert example in " ".join(call(*name.split(), "-h")[1].split())
        words = shlex.split(example.partition(" > ")[0])
        assert words[: 1 + name.count(" ") + 1] == ["mergetool", *name.split()]
        arguments = words[2 + name.count(" ") :]
        each.make_context(name, arguments)  # which raises where an option or a value is wrong


def test_quiet_says_nothing_but_the_result_and_errors(call, recipe, tmp_path):
    for arguments in (("run", recipe, "-q"), ("-q", "run", recipe, "-o", tmp_path / "other")):
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        assert out.strip().startswith(str(tmp_path))
    code, out, err = call("run", recipe, "-q", "-o", tmp_path / "a")
    assert (code, out, err.startswith("error: ")) == (6, "", True)
    assert call("run", recipe, "--overwrite")[2]  # the next command is not quiet


def test_of_many_warnings_the_first_are_said_and_all_of_them_with_v(call, recipe, tmp_path):
    overrides = [{"match": f"nothing.{number}", "use": "a"} for number in range(14)]
    merge = {"method": "linear", "overrides": overrides}
    write_recipe(tmp_path / "many.yaml", models={"a": "./a", "b": "./b"}, merge=merge)
    _, _, err = call("run", tmp_path / "many.yaml", "-o", tmp_path / "one")
    assert err.count("warning: override") == 10
    assert "4 more warnings: -v says them all" in err
    _, _, err = call("run", tmp_path / "many.yaml", "-o", tmp_path / "two", "-v")
    assert err.count("warning: override") == 14
    assert "step: model.layers.1.mlp.weight 8x8 F32: linear of a, b (weight=1)\n" in err
    assert "step: " not in call("run", recipe)[2]


EVERYWHERE = {"-q", "--quiet", "-v", "--verbose"}


def spelled(command):
    """Every argument and every spelling of an option that a command takes."""
    return {
        text
        for p in command.params
        for text in ((*p.opts, *p.secondary_opts) if p.param_type_name == "option" else (p.name,))
    } - {"--help"}


def test_run_prints_the_path_and_nothing_else_on_stdout(call, recipe, tmp_path):
    code, out, err = call("run", recipe)
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert "6 tensors" in err
    merged, a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b"))
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)


def test_run_tells_its_result_as_json(call, recipe, tmp_path):
    code, out, _ = call("run", recipe, "-o", tmp_path / "there", "--json")
    answer = json.loads(out)
    assert (code, answer["path"], answer["tensors"]) == (0, str(tmp_path / "there"), 6)


def test_set_changes_one_value_and_is_recorded(call, recipe, tmp_path):
    assert call("run", recipe, "--set", "merge.weight.a=1", "--set", "merge.weight.b=0")[0] == 0
    lock = json.loads((tmp_path / "out" / "mergetool.json").read_text())
    assert lock["settings"] == ["merge.weight.a=1", "merge.weight.b=0"]
    assert lock["recipe"]["merge"]["weight"] == {"a": 1, "b": 0}
    a = load_file(tmp_path / "a" / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), a, rtol=0, atol=0)


def test_plan_and_inspect_tell_what_is_there(call, recipe, tmp_path):
    plan = json.loads(call("plan", recipe, "--json")[1])
    assert [step["name"] for step in plan["steps"]][:1] == ["lm_head.weight"]
    assert plan["bytes_in"] == 2 * sum(value.nbytes for value in tensors(0).values())
    facts = json.loads(call("inspect", tmp_path / "a", "--json")[1])
    assert (facts["num_tensors"], facts["remarks"]) == (6, ["no config.json"])
    assert "model.layers.{0..1}.mlp.weight" in call("plan", recipe)[1]
    assert "model.layers.1.mlp.weight" in call("plan", recipe, "--full")[1]
    assert "model.layers.1.mlp.weight" in call("inspect", tmp_path / "a")[1]


def test_verify_finds_a_flipped_bit(call, recipe, tmp_path):
    call("run", recipe)
    assert call("verify", tmp_path / "out")[0] == 0
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    code, _, err = call("verify", tmp_path / "out")
    assert code == 3
    assert "SHA-256" in err
    assert str(weights) in err


def test_verify_finds_values_that_are_not_finite(call, tmp_path):
    state = tensors(0)
    state["lm_head.weight"][3, 2] = float("nan")
    write_model(tmp_path / "m", state)
    code, _, err = call("verify", tmp_path / "m")
    assert (code, "lm_head.weight" in err) == (3, True)


def wrong_recipe(folder):
    return write_recipe(folder / "wrong.yaml", models={"a": "./a"}, merge={"method": "linaer"})


def missing_model(folder):
    return write_recipe(folder / "wrong.yaml", models={"a": "./nowhere"}, merge={"method": "linear"})


def hostile_model(folder):
    write_raw(folder / "bad.safetensors", {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}, b"123456789")
    return write_recipe(folder / "wrong.yaml", models={"a": "./bad.safetensors"}, merge={"method": "linear"})


def shapes_differ(folder):
    write_model(folder / "c", {name: value[:4] for name, value in tensors(0).items()})
    return write_recipe(folder / "wrong.yaml", models={"a": "./a", "c": "./c"}, merge={"method": "linear"})


def holds_nan(folder):
    write_model(folder / "c", {name: value * float("nan") for name, value in tensors(0).items()})
    return write_recipe(folder / "wrong.yaml", models={"a": "./a", "c": "./c"}, merge={"method": "linear"})


def nowhere_to_write(folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("mine")
    models = {"a": "./a", "b": "./b"}
    return write_recipe(
        folder / "wrong.yaml", models=models, merge={"method": "linear"}, output={"path": str(folder / "taken")}
    )


MISTAKES = {
    wrong_recipe: (2, "did you mean 'linear'"),
    missing_model: (3, "no such file or folder"),
    hostile_model: (3, "needs 8 bytes"),
    shapes_differ: (4, "shape"),
    holds_nan: (5, "not finite in model 'c'"),
    nowhere_to_write: (6, "exists already"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_every_class_of_error_has_its_exit_code_a_fix_and_no_output(mistake, call, tmp_path):
    write_models(tmp_path)
    recipe = mistake(tmp_path)
    code, out, err = call("run", recipe, *([] if mistake is nowhere_to_write else ["-o", tmp_path / "out"]))
    expected, text = MISTAKES[mistake]
    assert (code, out) == (expected, "")
    assert text in err
    assert "fix:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_errors_are_told_as_json_too(call, tmp_path):
    code, out, err = call("validate", wrong_recipe(tmp_path), "--json")
    answer = json.loads(out)
    assert (code, answer["exit_code"], answer["error"]) == (2, 2, "RecipeError")
    assert answer["what"] in err


def test_a_mergekit_recipe_runs_as_it_is_and_converts(call, tmp_path, monkeypatch):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    theirs = write_recipe(
        tmp_path / "kit.yml",
        merge_method="task_arithmetic",
        base_model="./base",
        models=[{"model": "./a", "parameters": {"weight": 0.5}}, {"model": "./b", "parameters": {"weight": 0.25}}],
    )
    assert call("run", theirs, "-o", "one")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    assert call("import", theirs, "-o", "elsewhere/ours.yaml")[0] == 0
    assert call("run", "elsewhere/ours.yaml", "-o", "two")[0] == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second


def test_what_a_mergekit_recipe_says_in_vain_is_told_by_every_command(call, tmp_path, monkeypatch):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    models = [{"model": "./a"}, {"model": "./b"}]
    write_recipe("kit.yml", merge_method="linear", models=models, parameters={"weight": 1}, normalise=True)
    told = "warning: kit.yml:7:1 normalise: mergekit knows no such key here, so it has no effect"
    for arguments in (["validate", "kit.yml"], ["validate", "kit.yml", "--online"], ["plan", "kit.yml"]):
        assert call(*arguments)[2].count(told) == 1
    assert told in call("import", "kit.yml")[2]
    assert told in call("run", "kit.yml", "-o", "out")[2]
    assert told.partition(": ")[2] in " ".join(
        json.loads((tmp_path / "out" / "mergetool.json").read_text())["warnings"]
    )


WITHOUT_TORCH = """
import json, sys

sys.modules["torch"] = None  # importing it fails
from mergetool.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mergetool", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


def test_help_documentation_and_validation_need_no_torch_and_read_no_model(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", models={"a": "./nowhere"}, merge={"method": "linear"})
    commands = [["--help"], ["run", "--help"], ["--version"], ["methods"], ["schema"], ["validate", str(recipe)]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(told in done.stdout for told in ("Usage", __version__, "task-arithmetic", "$defs", "valid"))


def test_colours_and_bars_are_imported_when_there_is_something_to_show():
    code = "import sys, mergetool.cli.app; sys.exit(any(name.partition('.')[0] == 'rich' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_is_not_a_name_and_a_value_is_told_with_what_to_write():
    assert named("--data", ["a=x", "b=y=z"], "NAME=PATH", "--data a=x") == {"a": "x", "b": "y=z"}
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(RecipeError, match=f"'{wrong}' is not NAME=PATH") as caught:
            named("--data", ["a=x", wrong], "NAME=PATH", "--data a=x")
        assert (caught.value.where, caught.value.fix) == ("--data", "write e.g. --data a=x")


def test_methods_are_found_by_other_names(call):
    code, out, _ = call("methods", "--find", "chat-vector")
    assert code == 0
    assert "task-arithmetic" in out
    assert json.loads(call("methods", "--find", "swa", "--json")[1])[0]["recipe"] == "recipes/swa.yaml"
    assert call("methods", "--find", "alchemy")[0] == 2
