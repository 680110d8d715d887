"""`mergetool diff A B` as its users meet it."""

import json

import pytest

from tests.files import tensors, write_model, write_models


@pytest.fixture
def models(tmp_path):
    write_models(tmp_path)
    return tmp_path


def test_the_most_changed_tensors_come_first_and_no_more_than_asked_for(call, models):
    code, out, err = call("diff", models / "a", models / "b", "--top", "2", "-q")
    assert (code, err) == (0, "")
    head, _, title, heads, *rows = out.splitlines()
    assert head.startswith("6 tensors: 6 changed; relative difference ")
    assert title == "Tensors, most changed first (2 of 6: --top 6 shows all)"
    assert heads.split() == ["tensor", "relative", "cosine", "share", "changed", "max"]
    assert float(rows[0].split()[1]) >= float(rows[1].split()[1])
    assert rows[2:4] == ["", "By layer"]
    more = title.partition(": ")[2].partition(" shows")[0].split()
    assert "most changed first\n" in call("diff", models / "a", models / "b", *more)[1]


def test_with_a_base_changes_are_compared(call, models):
    _, out, _ = call("diff", models / "a", models / "b", "--base", models / "base")
    assert "cosine of changes" in out
    answer = json.loads(call("diff", models / "a", models / "b", "--base", models / "base", "--json")[1])
    assert {"change_a", "change_b", "cosine_of_changes", "share_opposed"} <= answer["tensors"][0].keys()
    assert (answer["base"], answer["identical"]) == (str(models / "base"), False)


@pytest.mark.parametrize(("other", "code"), [("a", 0), ("b", 1)])
def test_the_exit_code_tells_as_git_does_where_it_is_asked_to(call, models, other, code):
    assert call("diff", models / "a", models / other)[0] == 0
    assert call("diff", models / "a", models / other, "--exit-code")[0] == code
    assert call("diff", models / "a", models / other, "--exit-code", "--json")[0] == code


def test_identical_is_one_line(call, models):
    assert call("diff", models / "a", models / "a")[1] == "identical: 6 tensors, and what lies beside them\n"


def test_settings_tensors_of_one_side_and_shapes_are_shown(call, models):
    state = tensors(0)
    write_model(models / "c", state, {"vocab_size": 16, "layers": list(range(50))})
    other = {name: value for name, value in state.items() if "norm" not in name} | {
        "lm_head.weight": state["lm_head.weight"][:4]
    }
    write_model(models / "d", other, {"vocab_size": 4})
    _, out, _ = call("diff", models / "c", models / "d", "--top", "1")
    assert "Only in the first\nmodel.layers.0.norm.weight\n... and 1 more\n" in out
    assert "Of two shapes" in out
    assert "config.json  vocab_size  16" in out
    assert "[0, 1, 2, 3" in out
    assert "39, 40" not in out  # cut off


def test_what_is_missing_has_its_exit_code_and_fix(call, models):
    code, out, err = call("diff", models / "a", models / "gone")
    assert (code, out, "no such file or folder" in err, "fix: " in err) == (3, "", True, True)
